// max_pool2d on tensors: checks, output geometry, memory format and allocation. The forward saves only the argmax: the
// number of the winning tap in its window, in one byte if the window has at most 255 taps.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "allocate.h"
#include "checks.h"
#include "device.h"
#include "ops.h"

namespace pyops {
namespace {

using at::IntArrayRef;
using at::Tensor;

struct Window {
  Pair kernel, stride, padding, dilation;
  bool ceil_mode;
};

Pair to_pair(const char* op, const char* name, const char* rule, IntArrayRef values) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, op, ": ", name, " must ", rule, ", but got ", name, "=",
              values);
  check_magnitude(op, name, values);
  return {values.front(), values.back()};
}

Window make_window(const char* op, const PoolOptions& options) {
  const auto& [kernel_size, stride, padding, dilation, ceil_mode] = options;
  const Pair k = to_pair(op, "kernel_size", "either be a single int, or a tuple of two ints", kernel_size);
  const Pair s =
      stride.empty() ? k : to_pair(op, "stride", "either be omitted, a single int, or a tuple of two ints", stride);
  const Pair p = to_pair(op, "padding", "either be a single int, or a tuple of two ints", padding);
  const Pair d = to_pair(op, "dilation", "be either a single int, or a tuple of two ints", dilation);
  TORCH_CHECK(s.h != 0 && s.w != 0, op, ": stride should not be zero, but got kernel_size=", kernel_size,
              " and stride=", stride);
  TORCH_CHECK(k.h > 0 && k.w > 0, op, ": kernel size should be greater than zero, but got kH: ", k.h, " kW: ", k.w);
  TORCH_CHECK(s.h > 0 && s.w > 0, op, ": stride should be greater than zero, but got dH: ", s.h, " dW: ", s.w);
  TORCH_CHECK(p.h >= 0 && p.w >= 0, op, ": pad must be non-negative, but got pad: ", std::min(p.h, p.w));
  TORCH_CHECK(d.h > 0 && d.w > 0, op, ": dilation should be greater than zero, but got dilationH: ", d.h,
              " dilationW: ", d.w);
  for (const auto& [pad, kernel, dil] : {std::array{p.h, k.h, d.h}, std::array{p.w, k.w, d.w}})
    TORCH_CHECK(pad <= ((kernel - 1) * dil + 1) / 2, op,
                ": pad should be at most half of effective kernel size, but got pad=", pad, ", kernel_size=", kernel,
                " and dilation=", dil);
  TORCH_CHECK(p.h <= k.h / 2 && p.w <= k.w / 2, op,  // stock checks this too
              ": pad should be smaller than or equal to half of kernel size, but got padW = ", p.w, ", padH = ", p.h,
              ", kW = ", k.w, ", kH = ", k.h);
  return {k, s, p, d, ceil_mode};
}

// The number of windows along one dimension; with ceil_mode the last one must still start inside the input or left
// padding.
int64_t window_count(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (room < 0 && !(ceil_mode && room + stride > 0)) return 0;
  int64_t count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (count - 1) * stride >= size + padding) --count;
  return count;
}

// The shape of the pooling of an input of sizes `input`; an unbatched input counts as a batch of one.
MaxPool2dShape make_shape(const char* op, IntArrayRef input, const Window& window) {
  const bool batched = input.size() == 4;
  TORCH_CHECK(batched || input.size() == 3, op, ": non-empty 3D or 4D (batch mode) tensor expected for input, but got ",
              input);
  const IntArrayRef image = input.slice(input.size() - 3);
  TORCH_CHECK(image[0] > 0 && image[1] > 0 && image[2] > 0, op,
              ": Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got:", input);
  check_magnitude(op, "input size", image);

  const auto& [kernel, stride, padding, dilation, ceil_mode] = window;
  MaxPool2dShape shape{};
  shape.N = batched ? input[0] : 1;
  shape.C = image[0], shape.H = image[1], shape.W = image[2];
  shape.OH = window_count(shape.H, kernel.h, stride.h, padding.h, dilation.h, ceil_mode);
  shape.OW = window_count(shape.W, kernel.w, stride.w, padding.w, dilation.w, ceil_mode);
  TORCH_CHECK(shape.OH >= 1 && shape.OW >= 1, op, ": Given input size: (", shape.C, "x", shape.H, "x", shape.W,
              "). Calculated output size: (", shape.C, "x", shape.OH, "x", shape.OW, "). Output size is too small");
  shape.kernel_h = kernel.h, shape.kernel_w = kernel.w, shape.stride_h = stride.h, shape.stride_w = stride.w;
  shape.padding_h = padding.h, shape.padding_w = padding.w;
  shape.dilation_h = dilation.h, shape.dilation_w = dilation.w;
  return shape;
}

at::DimVector output_sizes(const MaxPool2dShape& shape, bool batched) {
  return batched ? at::DimVector{shape.N, shape.C, shape.OH, shape.OW} : at::DimVector{shape.C, shape.OH, shape.OW};
}

}  // namespace

MaxPool2dShape checked_pool_shape(const char* op, IntArrayRef input, const PoolOptions& options) {
  return make_shape(op, input, make_window(op, options));
}

at::ScalarType argmax_dtype(const MaxPool2dShape& shape) {
  return max_pool2d_argmax_is_u8(shape.taps()) ? at::kByte : at::kLong;
}

namespace {

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                      IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  MaxPool2dShape shape =
      checked_pool_shape("max_pool2d", input.sizes(), {kernel_size, stride, padding, dilation, ceil_mode});
  const DType dtype = real_dtype("max_pool2d", input);

  shape.channels_last = is_channels_last(input);
  const at::MemoryFormat format = memory_format(shape.channels_last);
  const at::DimVector sizes = output_sizes(shape, input.dim() == 4);
  Tensor output = allocate(sizes, input.options(), format);
  Tensor argmax = allocate(sizes, input.options().dtype(argmax_dtype(shape)), format);
  if (!to_compute(output)) return {output, argmax};
  const Tensor x = input.contiguous(format);
  kernels(input)->max_pool2d({dtype, shape, x.const_data_ptr(), output.mutable_data_ptr(), argmax.mutable_data_ptr()});
  return {output, argmax};
}

// The shape of the pooling that produced `argmax` from images of size (H, W), after checking the dtype and sizes of
// argmax.
MaxPool2dShape shape_of_argmax(const char* op, const Tensor& argmax, IntArrayRef image_size, const Window& window) {
  TORCH_CHECK(argmax.dim() == 3 || argmax.dim() == 4, op, ": expected argmax of 3 or 4 dimensions, but got ",
              argmax.sizes());
  TORCH_CHECK(image_size.size() == 2, op, ": expected input_size (H, W), but got ", image_size);
  at::DimVector input(argmax.sizes());
  std::copy(image_size.begin(), image_size.end(), input.end() - 2);
  MaxPool2dShape shape = make_shape(op, input, window);
  check_shape(op, "argmax", argmax, output_sizes(shape, argmax.dim() == 4));
  TORCH_CHECK(argmax.scalar_type() == argmax_dtype(shape), op, ": expected argmax of dtype ", argmax_dtype(shape),
              " for a window of ", shape.taps(), " taps, but got ", argmax.scalar_type());
  shape.channels_last = is_channels_last(argmax);
  return shape;
}

}  // namespace

MaxPool2dShape checked_pool_backward_shape(const char* op, const Tensor& grad_output, const Tensor& argmax,
                                           IntArrayRef input_size, const PoolOptions& options) {
  const MaxPool2dShape shape = shape_of_argmax(op, argmax, input_size, make_window(op, options));
  check_same_device(op, "grad_output", grad_output, "argmax", argmax);
  check_shape(op, "grad_output", grad_output, argmax.sizes());
  return shape;
}

Tensor max_pool2d_backward(const char* op, const Tensor& grad_output, const Tensor& argmax, IntArrayRef input_size,
                           const PoolOptions& options) {
  const MaxPool2dShape shape = checked_pool_backward_shape(op, grad_output, argmax, input_size, options);
  const DType dtype = floating_dtype(op, grad_output);

  const at::MemoryFormat format = memory_format(shape.channels_last);
  at::DimVector sizes(argmax.sizes());
  std::copy(input_size.begin(), input_size.end(), sizes.end() - 2);
  Tensor grad_input = allocate(sizes, grad_output.options(), format);
  if (!to_compute(grad_input)) return grad_input;
  const Tensor g = grad_output.contiguous(format), a = argmax.contiguous(format);
  kernels(grad_output)
      ->max_pool2d_backward({dtype, shape, g.const_data_ptr(), a.const_data_ptr(), grad_input.mutable_data_ptr()});
  return grad_input;
}

namespace {

Tensor max_pool2d_gather(const Tensor& input, const Tensor& argmax, IntArrayRef kernel_size, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  constexpr const char* op = "max_pool2d_gather";
  const Window window = make_window(op, {kernel_size, stride, padding, dilation, ceil_mode});
  TORCH_CHECK(input.dim() == argmax.dim() && input.dim() >= 3 &&
                  input.sizes().slice(0, input.dim() - 2) == argmax.sizes().slice(0, argmax.dim() - 2),
              op, ": expected argmax with the batch and channels of input ", input.sizes(), ", but got ",
              argmax.sizes());
  const MaxPool2dShape shape = shape_of_argmax(op, argmax, input.sizes().slice(input.dim() - 2), window);
  check_same_device(op, "input", input, "argmax", argmax);
  const DType dtype = floating_dtype(op, input);

  const at::MemoryFormat format = memory_format(shape.channels_last);
  Tensor output = allocate(argmax.sizes(), input.options(), format);
  if (!to_compute(output)) return output;
  const Tensor x = input.contiguous(format), a = argmax.contiguous(format);
  kernels(input)->max_pool2d_gather({dtype, shape, x.const_data_ptr(), a.const_data_ptr(), output.mutable_data_ptr()});
  return output;
}

Tensor max_pool2d_indices(const Tensor& argmax, IntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  constexpr const char* op = "max_pool2d_indices";
  const Window window = make_window(op, {kernel_size, stride, padding, dilation, ceil_mode});
  const MaxPool2dShape shape = shape_of_argmax(op, argmax, input_size, window);

  const at::MemoryFormat format = memory_format(shape.channels_last);
  Tensor indices = allocate(argmax.sizes(), argmax.options().dtype(at::kLong), format);
  if (!to_compute(indices)) return indices;
  const Tensor a = argmax.contiguous(format);
  kernels(argmax)->max_pool2d_indices({shape, a.const_data_ptr(), indices.mutable_data_ptr<int64_t>()});
  return indices;
}

}  // namespace

#define WINDOW "int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, bool ceil_mode=False"
TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def("max_pool2d(Tensor input, " WINDOW ") -> (Tensor output, Tensor argmax)");
  m.def("max_pool2d_backward(Tensor grad_output, Tensor argmax, SymInt[2] input_size, " WINDOW ") -> Tensor");
  m.def("max_pool2d_gather(Tensor input, Tensor argmax, " WINDOW ") -> Tensor");
  m.def("max_pool2d_indices(Tensor argmax, SymInt[2] input_size, " WINDOW ") -> Tensor");
}
#undef WINDOW

PYOPS_LIBRARY_IMPL(m) {
  m.impl("max_pool2d", max_pool2d);
  m.impl("max_pool2d_backward",
         [](const Tensor& grad_output, const Tensor& argmax, IntArrayRef input_size, IntArrayRef kernel_size,
            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
           return max_pool2d_backward("max_pool2d_backward", grad_output, argmax, input_size,
                                      {kernel_size, stride, padding, dilation, ceil_mode});
         });
  m.impl("max_pool2d_gather", max_pool2d_gather);
  m.impl("max_pool2d_indices", max_pool2d_indices);
}

}  // namespace pyops
