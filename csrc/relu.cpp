// relu on tensors: checks, allocation and layout; any dense layout is walked flat, as it lies in memory.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"
#include "device.h"
#include "fresh.h"
#include "ops.h"

namespace pyops {
namespace {

using at::Tensor;

// `tensor` with the strides of `layout` (dense, of the same shape): itself where it already has them.
Tensor with_layout_of(const Tensor& tensor, const Tensor& layout) {
  return tensor.strides() == layout.strides() ? tensor : fresh(at::empty_like(layout)).copy_(tensor);
}

Tensor relu(const Tensor& input) {
  const DType dtype = real_dtype("relu", input);
  Tensor output = fresh(at::empty_like(input));
  if (output.numel() == 0) return output;
  const Tensor dense = with_layout_of(input, output);
  kernels(input).relu({dtype, dense.numel(), dense.const_data_ptr(), output.mutable_data_ptr()});
  return output;
}

void relu_(const Tensor& input) {
  const DType dtype = real_dtype("relu_", input);
  at::assert_no_internal_overlap(input);
  if (input.numel() == 0) return;
  if (input.is_non_overlapping_and_dense()) {
    kernels(input).relu({dtype, input.numel(), input.const_data_ptr(), input.mutable_data_ptr()});
  } else {
    input.copy_(relu(input));
  }
}

}  // namespace

Tensor relu_backward(const Tensor& grad_output, const Tensor& output) {
  const DType dtype = real_dtype("relu_backward", output);
  check_same_kind("relu_backward", "grad_output", grad_output, "output", output);
  check_shape("relu_backward", "grad_output", grad_output, output.sizes());
  Tensor grad_input = fresh(at::empty_like(output));
  if (grad_input.numel() == 0) return grad_input;
  const Tensor dense_grad = with_layout_of(grad_output, grad_input);
  const Tensor dense_output = with_layout_of(output, grad_input);
  kernels(output).relu_backward({dtype, grad_input.numel(), dense_grad.const_data_ptr(), dense_output.const_data_ptr(),
                                 grad_input.mutable_data_ptr()});
  return grad_input;
}

TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def("relu(Tensor input) -> Tensor");
  m.def("relu_(Tensor(a!) input) -> ()");  // torch.compile takes no custom op that returns its argument
  m.def("relu_backward(Tensor grad_output, Tensor output) -> Tensor");
}

TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("relu", relu);
  m.impl("relu_", relu_);
  m.impl("relu_backward", relu_backward);
}

}  // namespace pyops
