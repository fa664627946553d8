// conv2d_relu_max_pool2d on tensors: three ops whose intermediate results never become tensors. The backward uses
// input, weight and the argmax of each window; a window that passes no gradient has an argmax that names no tap. A
// separate op returns the argmax, so that it is computed only if a gradient is needed.
#include <torch/library.h>

#include "allocate.h"
#include "device.h"
#include "ops.h"

namespace pyops {
namespace {

using at::IntArrayRef;
using at::Tensor;

at::DimVector conv_size(const Conv2dShape& s, bool batched) {
  return batched ? at::DimVector{s.N, s.O, s.OH, s.OW} : at::DimVector{s.O, s.OH, s.OW};
}

// Returns the output, and sets `argmax`, unless it is null, to that of each window. Errors name the op that the user
// calls, who does not know which of the two ops a layer uses.
Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Conv2dOptions& options,
               const PoolOptions& pool_options, Tensor* argmax) {
  constexpr const char* op = "conv2d_relu_max_pool2d";
  const CheckedConv2d conv = checked_conv2d(op, input, weight, bias, options);
  const Conv2dShape& s = conv.args.shape;
  MaxPool2dShape pool = checked_pool_shape(op, conv_size(s, conv.batched), pool_options);
  pool.channels_last = s.channels_last;
  const auto empty = [&](at::ScalarType dtype) {
    return allocate({pool.N, pool.C, pool.OH, pool.OW}, input.options().dtype(dtype), memory_format(s.channels_last));
  };
  // A single image has no memory format: the results of max_pool2d for it are contiguous.
  const auto result = [&](const Tensor& batch) { return conv.batched ? batch : from_batch(batch, false).contiguous(); };
  const Tensor output = empty(input.scalar_type());
  if (argmax) *argmax = empty(argmax_dtype(pool));
  if (to_compute(output))
    kernels(input)->conv2d_relu_max_pool2d(
        {conv.args, pool, output.mutable_data_ptr(), argmax ? argmax->mutable_data_ptr() : nullptr});
  if (argmax) *argmax = result(*argmax);
  return result(output);
}

Tensor conv2d_relu_max_pool2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, int64_t groups, IntArrayRef pool_kernel_size,
                              IntArrayRef pool_stride, IntArrayRef pool_padding, IntArrayRef pool_dilation,
                              bool ceil_mode) {
  return forward(input, weight, bias, {stride, padding, dilation, groups},
                 {pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode}, nullptr);
}

std::tuple<Tensor, Tensor> conv2d_relu_max_pool2d_with_argmax(const Tensor& input, const Tensor& weight,
                                                              const OptionalTensor& bias, IntArrayRef stride,
                                                              IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                                              IntArrayRef pool_kernel_size, IntArrayRef pool_stride,
                                                              IntArrayRef pool_padding, IntArrayRef pool_dilation,
                                                              bool ceil_mode) {
  Tensor argmax;
  Tensor output = forward(input, weight, bias, {stride, padding, dilation, groups},
                          {pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode}, &argmax);
  return {output, argmax};
}

Gradients conv2d_relu_max_pool2d_backward(const Tensor& grad_output, const Tensor& argmax, const OptionalTensor& input,
                                          const OptionalTensor& weight, IntArrayRef input_size, IntArrayRef weight_size,
                                          IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                          IntArrayRef pool_kernel_size, IntArrayRef pool_stride,
                                          IntArrayRef pool_padding, IntArrayRef pool_dilation, bool ceil_mode,
                                          std::array<bool, 3> output_mask) {
  constexpr const char* op = "conv2d_relu_max_pool2d_backward";
  const Conv2dOptions options{stride, padding, dilation, groups};
  const PoolOptions pool_options{pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode};
  Conv2dGradients gradients =
      checked_conv2d_backward(op, grad_output, argmax, input, weight, input_size, weight_size, options, output_mask);
  const Conv2dShape& s = gradients.args.shape;
  MaxPool2dShape pool = checked_pool_backward_shape(op, grad_output, argmax, {s.OH, s.OW}, pool_options);
  TORCH_CHECK(argmax.dim() == (gradients.batched ? 4 : 3) && pool.N == s.N && pool.C == s.O, op,
              ": expected argmax of the batch size and channels of the convolution's output ",
              conv_size(s, gradients.batched), ", but got ", argmax.sizes());
  gradients.allocate(grad_output.options());
  if (!to_compute(argmax)) return gradients.results();
  pool.channels_last = s.channels_last;
  const at::MemoryFormat format = memory_format(s.channels_last);
  const Tensor g = to_batch(grad_output).contiguous(format), a = to_batch(argmax).contiguous(format);
  const DeviceKernels device = kernels(grad_output);
  const Conv2dReluMaxPool2dBackwardArgs args{gradients.args, pool, g.const_data_ptr(), a.const_data_ptr()};
  if (device->conv2d_relu_max_pool2d_backward && device->conv2d_relu_max_pool2d_backward(args))
    return gradients.results();
  const Tensor grad_conv = max_pool2d_backward(op, g, a, {s.OH, s.OW}, pool_options).contiguous(format);
  gradients.args.grad_output = grad_conv.const_data_ptr();
  device->conv2d_backward(gradients.args);
  return gradients.results();
}

}  // namespace

#define CONV "int[2] stride, int[2] padding, int[2] dilation, int groups"
#define POOL "int[2] pool_kernel_size, int[2] pool_stride, int[2] pool_padding, int[2] pool_dilation, bool ceil_mode"
#define FORWARD "Tensor input, Tensor weight, Tensor? bias, " CONV ", " POOL
TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def("conv2d_relu_max_pool2d(" FORWARD ") -> Tensor");
  m.def("conv2d_relu_max_pool2d_with_argmax(" FORWARD ") -> (Tensor output, Tensor argmax)");
  m.def(
      "conv2d_relu_max_pool2d_backward(Tensor grad_output, Tensor argmax, Tensor? input, Tensor? weight,"
      " SymInt[] input_size, SymInt[] weight_size, " CONV ", " POOL
      ", bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}
#undef CONV
#undef POOL
#undef FORWARD

PYOPS_LIBRARY_IMPL(m) {
  m.impl("conv2d_relu_max_pool2d", conv2d_relu_max_pool2d);
  m.impl("conv2d_relu_max_pool2d_with_argmax", conv2d_relu_max_pool2d_with_argmax);
  m.impl("conv2d_relu_max_pool2d_backward", conv2d_relu_max_pool2d_backward);
}

}  // namespace pyops
