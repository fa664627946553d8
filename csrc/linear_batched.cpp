// linear_batched on tensors: linear of several samples, each with a weight of its own, by the kernels of linear. vmap
// turns linear into this op if input and weight are both batched (pyops/autograd/linear.py). One call of it replaces
// one call for each sample, whose overhead would exceed the work of a small sample.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "allocate.h"
#include "checks.h"
#include "device.h"
#include "ops.h"

namespace pyops {
namespace {

using at::Tensor;

constexpr int64_t products_of_a_task = 1 << 15;  // fewer are not worth a thread of their own

// Calls compute(i) for each of the samples, of `products` = M N K each. CPU threads share the samples if there are
// enough for all of them, and otherwise share each sample. Either way the result of a sample is that of linear.
template <class Compute>
void for_each_sample(const Tensor& like, int64_t samples, int64_t products, const Compute& compute) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) compute(i);
  };
  if (!like.is_cpu() || samples < at::get_num_threads()) return some(0, samples);
  at::parallel_for(0, samples, std::max<int64_t>(1, products_of_a_task / std::max<int64_t>(1, products)), some);
}

// The part that belongs to sample i of a contiguous tensor [samples, ...]; null if the tensor is absent or empty.
const void* part(const Tensor& tensor, int64_t i) {
  if (!tensor.defined() || tensor.numel() == 0) return nullptr;
  return static_cast<const char*>(tensor.const_data_ptr()) + i * tensor.stride(0) * tensor.element_size();
}
void* mutable_part(const Tensor& tensor, int64_t i) {
  if (!tensor.defined() || tensor.numel() == 0) return nullptr;
  return static_cast<char*>(tensor.mutable_data_ptr()) + i * tensor.stride(0) * tensor.element_size();
}

int64_t rows(const Tensor& tensor) {  // of one sample
  return c10::multiply_integers(tensor.sizes().slice(1, tensor.dim() - 2));
}

void check_samples(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                   const Tensor& weight) {
  TORCH_CHECK(tensor.dim() >= 2 && weight.dim() == 3 && tensor.size(0) == weight.size(0), op, ": expected ", name,
              " [samples, *, features] and ", other_name, " [samples, out_features, in_features], but got ",
              tensor.sizes(), " and ", weight.sizes());
  check_same_kind(op, name, tensor, other_name, weight);
}

Tensor linear_batched(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const char* op = "linear_batched";
  check_samples(op, "input", input, "weight", weight);
  const int64_t samples = input.size(0), N = weight.size(1), K = weight.size(2), M = rows(input);
  TORCH_CHECK(input.size(-1) == K, op, ": shapes cannot be multiplied (", input.sizes(), " and ", weight.sizes(), ")");
  if (bias.has_value()) {
    check_same_kind(op, "bias", *bias, "weight", weight);
    check_shape(op, "bias", *bias, {samples, N});
  }
  const DType dtype = floating_dtype(op, input);

  at::DimVector sizes(input.sizes());
  sizes.back() = N;
  Tensor output = allocate(sizes, input.options());
  if (!to_compute(output)) return output;
  const Tensor x = input.contiguous(), w = weight.contiguous(), b = bias.has_value() ? bias->contiguous() : Tensor();
  const DeviceKernels device = kernels(input);
  const bool tf32 = linear_allows_tf32(input);
  for_each_sample(input, samples, M * N * K, [&](int64_t i) {
    device->linear({dtype, M, N, K, part(x, i), part(w, i), part(b, i), mutable_part(output, i), /*relu=*/false, tf32});
  });
  return output;
}

Gradients linear_batched_backward(const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
                                  std::array<bool, 3> output_mask) {
  const char* op = "linear_batched_backward";
  const auto [want_input, want_weight, want_bias] = output_mask;
  TORCH_CHECK(grad_output.dim() >= 2, op, ": expected grad_output of at least 2 dimensions, but got ",
              grad_output.sizes());
  check_saved(op, input, weight, output_mask);
  const int64_t samples = grad_output.size(0), M = rows(grad_output), N = grad_output.size(-1);
  if (want_input) {
    check_samples(op, "grad_output", grad_output, "weight", *weight);
    TORCH_CHECK(weight->size(1) == N, op, ": expected weight of shape [", samples, ", ", N,
                ", in_features] for grad_output of shape ", grad_output.sizes(), ", but got ", weight->sizes());
  }
  if (want_weight) check_saved_input(op, grad_output, *input);
  const DType dtype = floating_dtype(op, grad_output);
  const int64_t K = want_input ? weight->size(2) : want_weight ? input->size(-1) : 0;
  TORCH_CHECK(!want_weight || input->size(-1) == K, op, ": expected input of ", K, " features as weight has, but got ",
              want_weight ? input->sizes() : at::IntArrayRef{});

  Tensor grad_input, grad_weight, grad_bias, x, w;
  if (want_input) {
    at::DimVector sizes(grad_output.sizes());
    sizes.back() = K;
    grad_input = allocate(sizes, grad_output.options());
    w = weight->contiguous();
  }
  if (want_weight) {
    grad_weight = allocate({samples, N, K}, grad_output.options());
    x = input->contiguous();
  }
  if (want_bias) grad_bias = allocate({samples, N}, grad_output.options());
  if (grad_output.is_meta()) return {grad_input, grad_weight, grad_bias};
  const Tensor g = grad_output.contiguous();
  const DeviceKernels device = kernels(grad_output);
  const bool tf32 = linear_allows_tf32(grad_output);
  for_each_sample(grad_output, samples, M * N * K, [&](int64_t i) {
    device->linear_backward({dtype, M, N, K, part(g, i), part(x, i), part(w, i), mutable_part(grad_input, i),
                             mutable_part(grad_weight, i), mutable_part(grad_bias, i), tf32});
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def("linear_batched(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear_batched_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask)"
      " -> (Tensor, Tensor, Tensor)");
}

PYOPS_LIBRARY_IMPL(m) {
  m.impl("linear_batched", linear_batched);
  m.impl("linear_batched_backward", linear_batched_backward);
}

}  // namespace pyops
