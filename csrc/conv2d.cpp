// conv2d on tensors: checks, output geometry, memory format and allocation.
#include <ATen/Context.h>
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

// The arguments besides the tensors. Padding is one value, one for each dimension, or top, left, bottom, right.
struct Window {
  Pair stride, dilation;
  int64_t top, left, bottom, right;
  int64_t groups;
};

// torch.backends.cudnn.allow_tf32, or what fp32_precision says in its place; stock sets it by default.
bool allows_tf32(const Tensor& tensor) {
  return tensor.is_cuda() && tensor.scalar_type() == at::kFloat &&
         at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
}

void check_list(const char* op, const char* name, IntArrayRef values, bool four_allowed = false) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2 || (four_allowed && values.size() == 4), op, ": expected ", name,
              " to be a single integer value or a list of 2 values to match the convolution dimensions, but got ", name,
              "=", values);
  check_magnitude(op, name, values);
}

Window make_window(const char* op, const Conv2dOptions& options) {
  const auto& [stride, padding, dilation, groups] = options;
  check_list(op, "stride", stride);
  check_list(op, "padding", padding, /*four_allowed=*/true);
  check_list(op, "dilation", dilation);
  const auto all_at_least = [](int64_t least, IntArrayRef values) {
    return std::all_of(values.begin(), values.end(), [&](int64_t value) { return value >= least; });
  };
  TORCH_CHECK(groups > 0, op, ": non-positive groups is not supported, got groups=", groups);
  TORCH_CHECK(all_at_least(0, padding), op, ": negative padding is not supported, got padding=", padding);
  TORCH_CHECK(all_at_least(1, stride), op, ": non-positive stride is not supported, got stride=", stride);
  TORCH_CHECK(
      all_at_least(1, dilation), op,
      ": non-positive dilation is not supported, dilation should be greater than zero, got dilation=", dilation);
  const int64_t top = padding.front(), left = padding[padding.size() > 1 ? 1 : 0];
  const bool four = padding.size() == 4;
  return {{stride.front(), stride.back()},
          {dilation.front(), dilation.back()},
          top,
          left,
          four ? padding[2] : top,
          four ? padding[3] : left,
          groups};
}

// The shape of the convolution, after every check that needs the sizes. An unbatched input counts as a batch of one.
Conv2dShape make_shape(const char* op, IntArrayRef input, IntArrayRef weight, const Window& window) {
  TORCH_CHECK(weight.size() == 4, op,
              ": expected weight to be 4-dimensional, (out_channels, in_channels / groups, kH, ",
              "kW), but got weight of size ", weight, " and input of size ", input, " (Expected ", weight.size(),
              "-dimensional input for ", weight.size(), "-dimensional weight)");
  TORCH_CHECK(input.size() == 3 || input.size() == 4, op,
              ": Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", input);
  const IntArrayRef image = input.slice(input.size() - 3);
  const int64_t groups = window.groups;
  TORCH_CHECK(weight[0] >= groups, op, ": Given groups=", groups, ", expected weight to be at least ", groups,
              " at dimension 0, but got weight of size ", weight, " instead");
  TORCH_CHECK(weight[0] % groups == 0, op, ": Given groups=", groups, ", expected weight to be divisible by ", groups,
              " at dimension 0, but got weight of size ", weight, " instead");
  TORCH_CHECK(image[0] == weight[1] * groups, op, ": Given groups=", groups, ", weight of size ", weight,
              ", expected input", input, " to have ", weight[1] * groups, " channels, but got ", image[0],
              " channels instead");
  check_magnitude(op, "weight size", weight);
  check_magnitude(op, "input size", image);
  TORCH_CHECK(weight[2] > 0 && weight[3] > 0, op, ": kernel size should be greater than zero, but got weight of size ",
              weight);
  const Pair padded{image[1] + window.top + window.bottom, image[2] + window.left + window.right};
  const Pair kernel{window.dilation.h * (weight[2] - 1) + 1, window.dilation.w * (weight[3] - 1) + 1};
  TORCH_CHECK(padded.h >= kernel.h && padded.w >= kernel.w, op, ": Calculated padded input size per channel: (",
              padded.h, " x ", padded.w, "). Kernel size: (", kernel.h, " x ", kernel.w,
              "). Kernel size can't be greater than actual input size");
  TORCH_CHECK(image[1] > 0 && image[2] > 0, op,
              ": Only zero batch or zero channel inputs are supported, but got input shape: ", input);

  Conv2dShape shape{};
  shape.N = input.size() == 4 ? input[0] : 1;
  shape.C = image[0], shape.H = image[1], shape.W = image[2];
  shape.O = shape.C == 0 ? 0 : weight[0];  // as in stock: no channels in, no channels out
  shape.OH = (padded.h - kernel.h) / window.stride.h + 1, shape.OW = (padded.w - kernel.w) / window.stride.w + 1;
  shape.groups = groups;
  shape.kernel_h = weight[2], shape.kernel_w = weight[3];
  shape.stride_h = window.stride.h, shape.stride_w = window.stride.w;
  shape.padding_top = window.top, shape.padding_left = window.left;
  shape.dilation_h = window.dilation.h, shape.dilation_w = window.dilation.w;
  return shape;
}

}  // namespace

CheckedConv2d checked_conv2d(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                             const Conv2dOptions& options) {
  const Window window = make_window(op, options);
  check_same_kind(op, "input", input, "weight", weight);
  if (bias.has_value()) check_same_kind(op, "input", input, "bias", *bias);
  const DType dtype = floating_dtype(op, input);
  Conv2dShape shape = make_shape(op, input.sizes(), weight.sizes(), window);
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)), op, ": Given weight of size ",
              weight.sizes(), ", expected bias to be 1-dimensional with ", weight.size(0),
              " elements, but got bias of size ", bias.has_value() ? bias->sizes() : IntArrayRef{}, " instead");

  const Tensor images = to_batch(input);
  shape.weight_channels_last = is_channels_last(weight) && kernels(input)->reads_channels_last_weight;
  shape.channels_last = shape.N > 0 && (is_channels_last(images) || is_channels_last(weight));  // as stock
  CheckedConv2d checked{{dtype, shape, nullptr, nullptr, nullptr, nullptr, false, allows_tf32(input)},
                        images.contiguous(memory_format(shape.channels_last)),
                        weight.contiguous(memory_format(shape.weight_channels_last)),
                        bias.has_value() ? bias->contiguous() : Tensor(),
                        input.dim() == 4};
  checked.args.input = data_or_null(checked.input);
  checked.args.weight = data_or_null(checked.weight);
  checked.args.bias = data_or_null(checked.bias);
  return checked;
}

Tensor conv2d(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              const Conv2dOptions& options, bool relu) {
  CheckedConv2d checked = checked_conv2d(op, input, weight, bias, options);
  const Conv2dShape& shape = checked.args.shape;
  const Tensor output =
      allocate({shape.N, shape.O, shape.OH, shape.OW}, input.options(), memory_format(shape.channels_last));
  if (to_compute(output)) {
    checked.args.output = output.mutable_data_ptr();
    checked.args.relu = relu;
    kernels(input)->conv2d(checked.args);
  }
  return from_batch(output, checked.batched);
}

Conv2dGradients checked_conv2d_backward(const char* op, const Tensor& grad, const Tensor& images,
                                        const OptionalTensor& input, const OptionalTensor& weight,
                                        IntArrayRef input_size, IntArrayRef weight_size, const Conv2dOptions& options,
                                        std::array<bool, 3> output_mask) {
  const auto [want_input, want_weight, want_bias] = output_mask;
  const Window window = make_window(op, options);
  check_saved(op, input, weight, output_mask);
  if (input.has_value()) {
    check_same_kind(op, "input", *input, "grad_output", grad);
    check_shape(op, "input", *input, input_size);
  }
  if (weight.has_value()) {
    check_same_kind(op, "weight", *weight, "grad_output", grad);
    check_shape(op, "weight", *weight, weight_size);
  }
  Conv2dGradients checked{};
  checked.args.dtype = floating_dtype(op, grad);
  checked.args.tf32 = allows_tf32(grad);
  Conv2dShape& shape = checked.args.shape = make_shape(op, input_size, weight_size, window);
  checked.batched = input_size.size() == 4;
  const bool weight_channels_last = weight.has_value() && is_channels_last(*weight);
  checked.grad_weight_format = memory_format(weight_channels_last);
  shape.weight_channels_last = weight_channels_last && kernels(grad)->reads_channels_last_weight;
  shape.channels_last =
      shape.N > 0 && (is_channels_last(to_batch(input.has_value() ? *input : images)) || weight_channels_last);
  checked.weight_size = weight_size;
  checked.output_mask = output_mask;
  if (want_weight) checked.input = *input;
  if (want_input) checked.weight = *weight;
  return checked;
}

void Conv2dGradients::allocate(const at::TensorOptions& like) {
  const Conv2dShape& shape = args.shape;
  const at::MemoryFormat format = memory_format(shape.channels_last);
  const auto [want_input, want_weight, want_bias] = output_mask;
  // With nothing to sum over (an empty batch, no channels) the gradients are zeros.
  const bool empty = shape.N * shape.O == 0;
  const auto gradient = [&](IntArrayRef size, at::MemoryFormat gradient_format) {
    Tensor result = pyops::allocate(size, like, gradient_format);
    return empty ? result.zero_() : result;
  };
  if (want_input) grad_input = gradient({shape.N, shape.C, shape.H, shape.W}, format);
  if (want_weight) grad_weight = gradient(weight_size, memory_format(shape.weight_channels_last));
  if (want_bias) grad_bias = gradient({weight_size[0]}, at::MemoryFormat::Contiguous);
  if (empty) return;
  if (want_weight) input = to_batch(input).contiguous(format);
  if (want_input) weight = weight.contiguous(memory_format(shape.weight_channels_last));
  args.input = data_or_null(input), args.weight = data_or_null(weight);
  args.grad_input = mutable_data_or_null(grad_input), args.grad_weight = mutable_data_or_null(grad_weight);
  args.grad_bias = mutable_data_or_null(grad_bias);
}

Gradients Conv2dGradients::results() const {
  return {grad_input.defined() ? from_batch(grad_input, batched) : grad_input,
          grad_weight.defined() ? grad_weight.contiguous(grad_weight_format) : grad_weight, grad_bias};
}

Gradients conv2d_backward(const char* op, const Tensor& grad_output, const OptionalTensor& input,
                          const OptionalTensor& weight, IntArrayRef input_size, IntArrayRef weight_size,
                          const Conv2dOptions& options, std::array<bool, 3> output_mask) {
  Conv2dGradients gradients = checked_conv2d_backward(op, grad_output, grad_output, input, weight, input_size,
                                                      weight_size, options, output_mask);
  const Conv2dShape& shape = gradients.args.shape;
  const at::DimVector output_size{shape.N, shape.O, shape.OH, shape.OW};
  check_shape(op, "grad_output", grad_output, IntArrayRef(output_size).slice(gradients.batched ? 0 : 1));
  gradients.allocate(grad_output.options());
  if (to_compute(grad_output)) {
    const Tensor g = to_batch(grad_output).contiguous(memory_format(shape.channels_last));
    gradients.args.grad_output = g.const_data_ptr();
    kernels(grad_output)->conv2d_backward(gradients.args);
  }
  return gradients.results();
}

TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1,"
      " int groups=1) -> Tensor");
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor? input, Tensor? weight, SymInt[] input_size, SymInt[] weight_size,"
      " int[2] stride, int[2] padding, int[2] dilation, int groups, bool[3] output_mask)"
      " -> (Tensor, Tensor, Tensor)");
}

PYOPS_LIBRARY_IMPL(m) {
  m.impl("conv2d", [](const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
    return conv2d("conv2d", input, weight, bias, {stride, padding, dilation, groups}, /*relu=*/false);
  });
  m.impl("conv2d_backward", [](const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
                               IntArrayRef input_size, IntArrayRef weight_size, IntArrayRef stride, IntArrayRef padding,
                               IntArrayRef dilation, int64_t groups, std::array<bool, 3> output_mask) {
    return conv2d_backward("conv2d_backward", grad_output, input, weight, input_size, weight_size,
                           {stride, padding, dilation, groups}, output_mask);
  });
}

}  // namespace pyops
