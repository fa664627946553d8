// relu on tensors: checks, allocation and layout. A tensor of any dense layout is processed as a flat array, in memory
// order.
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "allocate.h"
#include "checks.h"
#include "device.h"
#include "ops.h"

namespace pyops {
namespace {

using at::Tensor;

// `tensor` with the strides of `layout` (dense, of the same shape): the tensor itself if it already has them.
Tensor with_layout_of(const Tensor& tensor, const Tensor& layout) {
  return tensor.strides() == layout.strides() ? tensor : allocate_like(layout).copy_(tensor);
}

Tensor relu(const Tensor& input) {
  const DType dtype = real_dtype("relu", input);
  Tensor output = allocate_like(input);
  if (!to_compute(output)) return output;
  const Tensor dense = with_layout_of(input, output);
  kernels(input)->relu({dtype, dense.numel(), dense.const_data_ptr(), output.mutable_data_ptr()});
  return output;
}

// Whether the strides reach exactly as much memory as there are elements, each place once; any strides do if there are
// no elements.
bool is_dense(at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (c10::multiply_integers(sizes) == 0) return true;
  int64_t stride = 1;
  for (auto left = std::count_if(sizes.begin(), sizes.end(), [](int64_t size) { return size > 1; }); left > 0; --left) {
    size_t d = 0;
    while (d < sizes.size() && !(sizes[d] > 1 && strides[d] == stride)) ++d;
    if (d == sizes.size()) return false;
    stride *= sizes[d];
  }
  return true;
}

int64_t mask_words(int64_t numel) {
  return (numel + 63) / 64;
}

std::tuple<Tensor, Tensor> relu_with_mask(const Tensor& input) {
  const DType dtype = floating_dtype("relu_with_mask", input);
  Tensor output = allocate_like(input);
  Tensor mask = allocate({mask_words(output.numel())}, input.options().dtype(at::kLong));
  if (!to_compute(output)) return {output, mask};
  const Tensor dense = with_layout_of(input, output);
  kernels(input)->relu({dtype, dense.numel(), dense.const_data_ptr(), output.mutable_data_ptr(),
                        static_cast<uint64_t*>(mask.mutable_data_ptr())});
  return {output, mask};
}

Tensor relu_mask_backward(const Tensor& grad_output, const Tensor& mask, at::IntArrayRef stride) {
  constexpr const char* op = "relu_mask_backward";
  const DType dtype = floating_dtype(op, grad_output);
  check_same_device(op, "grad_output", grad_output, "mask", mask);
  TORCH_CHECK(mask.scalar_type() == at::kLong, op, ": expected mask of dtype Long, but got ", mask.scalar_type());
  check_shape(op, "mask", mask, {mask_words(grad_output.numel())});
  TORCH_CHECK(static_cast<int64_t>(stride.size()) == grad_output.dim(), op,
              ": expected a stride for each dimension of ", "grad_output of shape ", grad_output.sizes(),
              ", but got stride=", stride);
  TORCH_CHECK(is_dense(grad_output.sizes(), stride), op, ": stride must be that of a dense tensor of shape ",
              grad_output.sizes(), ", but got stride=", stride);
  Tensor grad_input = allocate_strided(grad_output.sizes(), stride, grad_output.options());
  if (!to_compute(grad_input)) return grad_input;
  const Tensor dense_grad = with_layout_of(grad_output, grad_input), words = mask.contiguous();
  kernels(grad_output)
      ->relu_mask_backward({dtype, grad_input.numel(), dense_grad.const_data_ptr(),
                            static_cast<const uint64_t*>(words.const_data_ptr()), grad_input.mutable_data_ptr()});
  return grad_input;
}

void relu_(const Tensor& input) {
  const DType dtype = real_dtype("relu_", input);
  at::assert_no_internal_overlap(input);
  if (!to_compute(input)) return;
  if (input.is_non_overlapping_and_dense()) {
    kernels(input)->relu({dtype, input.numel(), input.const_data_ptr(), input.mutable_data_ptr()});
  } else {
    input.copy_(relu(input));
  }
}

}  // namespace

Tensor relu_backward(const char* op, const Tensor& grad_output, const Tensor& output) {
  const DType dtype = real_dtype(op, output);
  check_same_kind(op, "grad_output", grad_output, "output", output);
  check_shape(op, "grad_output", grad_output, output.sizes());
  Tensor grad_input = allocate_like(output);
  if (!to_compute(grad_input)) return grad_input;
  const Tensor dense_grad = with_layout_of(grad_output, grad_input);
  const Tensor dense_output = with_layout_of(output, grad_input);
  kernels(output)->relu_backward({dtype, grad_input.numel(), dense_grad.const_data_ptr(), dense_output.const_data_ptr(),
                                  grad_input.mutable_data_ptr()});
  return grad_input;
}

TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def("relu(Tensor input) -> Tensor");
  m.def("relu_(Tensor(a!) input) -> ()");  // torch.compile accepts no custom op that returns its argument
  // What training saves of a relu: whether each element passes its gradient, one bit per element, in the memory order
  // of the output, whose strides are passed to the backward.
  m.def("relu_with_mask(Tensor input) -> (Tensor output, Tensor mask)");
  m.def("relu_mask_backward(Tensor grad_output, Tensor mask, SymInt[] stride) -> Tensor");
  m.def("relu_backward(Tensor grad_output, Tensor output) -> Tensor");
}

PYOPS_LIBRARY_IMPL(m) {
  m.impl("relu", relu);
  m.impl("relu_", relu_);
  m.impl("relu_with_mask", relu_with_mask);
  m.impl("relu_mask_backward", relu_mask_backward);
  m.impl("relu_backward", [](const Tensor& grad_output, const Tensor& output) {
    return relu_backward("relu_backward", grad_output, output);
  });
}

}  // namespace pyops
