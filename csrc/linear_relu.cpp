// linear_relu on tensors: linear whose output is rectified as it is stored. The output is saved for the backward,
// because its sign is the mask of the gradient.
#include <torch/library.h>

#include "device.h"
#include "ops.h"

namespace pyops {
namespace {

using at::Tensor;

Tensor linear_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return linear("linear_relu", input, weight, bias, /*relu=*/true);
}

Gradients linear_relu_backward(const Tensor& grad_output, const Tensor& output, const OptionalTensor& input,
                               const OptionalTensor& weight, std::array<bool, 3> output_mask) {
  constexpr const char* op = "linear_relu_backward";
  return linear_backward(op, relu_backward(op, grad_output, output), input, weight, output_mask);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def("linear_relu(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear_relu_backward(Tensor grad_output, Tensor output, Tensor? input, Tensor? weight, bool[3] output_mask)"
      " -> (Tensor, Tensor, Tensor)");
}

PYOPS_LIBRARY_IMPL(m) {
  m.impl("linear_relu", linear_relu);
  m.impl("linear_relu_backward", linear_relu_backward);
}

}  // namespace pyops
