// conv2d_relu on tensors: conv2d whose output is rectified as it is stored. The output is saved for the backward,
// because its sign is the mask of the gradient.
#include <torch/library.h>

#include "device.h"
#include "ops.h"

namespace pyops {
namespace {

using at::IntArrayRef;
using at::Tensor;

Tensor conv2d_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  return conv2d("conv2d_relu", input, weight, bias, {stride, padding, dilation, groups}, /*relu=*/true);
}

Gradients conv2d_relu_backward(const Tensor& grad_output, const Tensor& output, const OptionalTensor& input,
                               const OptionalTensor& weight, IntArrayRef input_size, IntArrayRef weight_size,
                               IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                               std::array<bool, 3> output_mask) {
  constexpr const char* op = "conv2d_relu_backward";
  return conv2d_backward(op, relu_backward(op, grad_output, output), input, weight, input_size, weight_size,
                         {stride, padding, dilation, groups}, output_mask);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def(
      "conv2d_relu(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0,"
      " int[2] dilation=1, int groups=1) -> Tensor");
  m.def(
      "conv2d_relu_backward(Tensor grad_output, Tensor output, Tensor? input, Tensor? weight, SymInt[] input_size,"
      " SymInt[] weight_size, int[2] stride, int[2] padding, int[2] dilation, int groups, bool[3] output_mask)"
      " -> (Tensor, Tensor, Tensor)");
}

PYOPS_LIBRARY_IMPL(m) {
  m.impl("conv2d_relu", conv2d_relu);
  m.impl("conv2d_relu_backward", conv2d_relu_backward);
}

}  // namespace pyops
