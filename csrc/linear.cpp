// linear on tensors: checks, allocation, and the view of any leading dimensions as one row dimension M.
#include <ATen/Context.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "allocate.h"
#include "checks.h"
#include "device.h"
#include "ops.h"

namespace pyops {
namespace {

using at::Tensor;

int64_t rows(const Tensor& tensor) {
  return c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
}

void check_matrices(const char* op, const Tensor& input, const Tensor& weight) {
  TORCH_CHECK(input.dim() >= 1 && weight.dim() >= 1, op,
              ": both arguments to linear need to be at least 1D, but they are ", input.dim(), "D and ", weight.dim(),
              "D");
  TORCH_CHECK(weight.dim() == 2, op, ": expected weight of 2 dimensions (out_features, in_features), but got ",
              weight.sizes());
  check_same_kind(op, "input", input, "weight", weight);
  TORCH_CHECK(input.size(-1) == weight.size(1), op, ": mat1 and mat2 shapes cannot be multiplied (", rows(input), "x",
              input.size(-1), " and ", weight.size(1), "x", weight.size(0), ")");
}

}  // namespace

void check_saved(const char* op, const OptionalTensor& input, const OptionalTensor& weight,
                 std::array<bool, 3> output_mask) {
  TORCH_CHECK(!output_mask[0] || weight.has_value(), op, ": the gradient of input needs weight, but got None");
  TORCH_CHECK(!output_mask[1] || input.has_value(), op, ": the gradient of weight needs input, but got None");
}

void check_saved_input(const char* op, const Tensor& grad_output, const Tensor& input) {
  check_same_kind(op, "grad_output", grad_output, "input", input);
  TORCH_CHECK(input.dim() == grad_output.dim() &&
                  input.sizes().slice(0, input.dim() - 1) == grad_output.sizes().slice(0, grad_output.dim() - 1),
              op, ": expected input with the leading dimensions of grad_output ", grad_output.sizes(), ", but got ",
              input.sizes());
}

bool linear_allows_tf32(const Tensor& tensor) {
  return tensor.is_cuda() && tensor.scalar_type() == at::kFloat && at::globalContext().allowTF32CuBLAS();
}

Tensor linear(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias, bool relu) {
  check_matrices(op, input, weight);
  const int64_t N = weight.size(0);
  if (bias.has_value()) {
    check_same_kind(op, "bias", *bias, "weight", weight);
    check_shape(op, "bias", *bias, {N});
  }
  const DType dtype = floating_dtype(op, input);

  at::DimVector sizes(input.sizes());
  sizes.back() = N;
  Tensor output = allocate(sizes, input.options());
  if (!to_compute(output)) return output;
  const Tensor x = input.contiguous(), w = weight.contiguous();
  const OptionalTensor b = bias.has_value() ? OptionalTensor(bias->contiguous()) : bias;
  kernels(input)->linear({dtype, rows(input), N, weight.size(1), x.const_data_ptr(), w.const_data_ptr(),
                          data_or_null(b), output.mutable_data_ptr(), relu, linear_allows_tf32(input)});
  return output;
}

Gradients linear_backward(const char* op, const Tensor& grad_output, const OptionalTensor& input,
                          const OptionalTensor& weight, std::array<bool, 3> output_mask) {
  const auto [want_input, want_weight, want_bias] = output_mask;
  TORCH_CHECK(grad_output.dim() >= 1, op, ": expected grad_output of at least 1 dimension, but got ",
              grad_output.sizes());
  check_saved(op, input, weight, output_mask);
  const int64_t M = rows(grad_output), N = grad_output.size(-1);
  if (want_input) {
    check_same_kind(op, "grad_output", grad_output, "weight", *weight);
    TORCH_CHECK(weight->dim() == 2 && weight->size(0) == N, op, ": expected weight of shape [", N,
                ", in_features] for grad_output of shape ", grad_output.sizes(), ", but got ", weight->sizes());
  }
  if (want_weight) check_saved_input(op, grad_output, *input);
  if (want_input && want_weight) check_matrices(op, *input, *weight);
  const DType dtype = floating_dtype(op, grad_output);
  const int64_t K = want_input ? weight->size(1) : want_weight ? input->size(-1) : 0;

  Tensor grad_input, grad_weight, grad_bias, x, w;
  if (want_input) {
    at::DimVector sizes(grad_output.sizes());
    sizes.back() = K;
    grad_input = allocate(sizes, grad_output.options());
    w = weight->contiguous();
  }
  if (want_weight) {
    grad_weight = allocate({N, K}, grad_output.options());
    x = input->contiguous();
  }
  if (want_bias) grad_bias = allocate({N}, grad_output.options());

  const auto target = [](const Tensor& t) { return t.defined() && t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
  if (grad_output.is_meta()) return {grad_input, grad_weight, grad_bias};
  const Tensor g = grad_output.contiguous();
  kernels(grad_output)
      ->linear_backward({dtype, M, N, K, g.const_data_ptr(), data_or_null(x), data_or_null(w), target(grad_input),
                         target(grad_weight), target(grad_bias), linear_allows_tf32(grad_output)});
  return {grad_input, grad_weight, grad_bias};
}

TORCH_LIBRARY_FRAGMENT(pyops, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask)"
      " -> (Tensor, Tensor, Tensor)");
}

PYOPS_LIBRARY_IMPL(m) {
  m.impl("linear", [](const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
    return linear("linear", input, weight, bias, /*relu=*/false);
  });
  m.impl("linear_backward", [](const Tensor& grad_output, const OptionalTensor& input, const OptionalTensor& weight,
                               std::array<bool, 3> output_mask) {
    return linear_backward("linear_backward", grad_output, input, weight, output_mask);
  });
}

}  // namespace pyops
