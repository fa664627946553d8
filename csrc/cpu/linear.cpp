// linear: output[M, N] = input[M, K] weight[N, K]^T + bias[N], and its gradients, as products of gemm.h.
//
//   grad_input  [M, K] = grad_output   [M, N] weight[N, K]      nothing is transposed
//   grad_weight [N, K] = grad_output^T [N, M] input [M, K]      the left operand is read by broadcast: no transpose
//   grad_bias   [N]    = sum of the rows of grad_output
//
// All matrices are row-major. Only the forward has to transpose an operand, the weight, and it does so in registers
// while it packs the panels.
//
// The guarantees are those of gemm.h; in particular, a row of the output does not depend on what the other rows hold.
#include "gemm/bias_sums.h"

namespace pyops::cpu {
namespace {

template <class T, class F>
void forward(const LinearArgs& x) {
  const T *input = static_cast<const T*>(x.input), *weight = static_cast<const T*>(x.weight);
  const Output<T> out{
      static_cast<T*>(x.output), Axis::plain(x.N), Axis::plain(1), nullptr, static_cast<const T*>(x.bias), x.relu};
  gemm(1, x.M, x.N, x.K, [&](int64_t) { return GemmArgs<T, T, F>{{input, x.K, 1}, {weight, 1, x.K}, out, 0, x.K}; });
}

template <class T, class F>
void input_gradient(const LinearBackwardArgs& x) {
  const T *grad_output = static_cast<const T*>(x.grad_output), *weight = static_cast<const T*>(x.weight);
  const Output<T> out{static_cast<T*>(x.grad_input), Axis::plain(x.K), Axis::plain(1)};
  gemm(1, x.M, x.K, x.N,
       [&](int64_t) { return GemmArgs<T, T, F>{{grad_output, x.N, 1}, {weight, x.K, 1}, out, 0, x.N}; });
}

// The weight gradient of one sample is an outer product, whose only cost is to write it.
template <class T>
void weight_gradient_of_one(const LinearBackwardArgs& x) {
  using V = Vec<Compute<T>>;
  const T *grad_output = static_cast<const T*>(x.grad_output), *input = static_cast<const T*>(x.input);
  for_each_task(x.N, 2.0 * x.N * x.K, [&](int64_t n) {
    T* row = static_cast<T*>(x.grad_weight) + n * x.K;
    const V grad(static_cast<Compute<T>>(grad_output[n]));
    for (int64_t k = 0; k < x.K; k += V::size()) {
      const int64_t count = std::min<int64_t>(V::size(), x.K - k);
      store(row + k, at::vec::fmadd(grad, load(input + k, count), V(0)), count);
    }
  });
}

// A small weight has too few blocks for the threads. Then the batch is split too (split K), into a number of parts that
// depends on the shape only, and the sums of the parts are added in order.
template <class T, class F>
void weight_gradient(const LinearBackwardArgs& x) {
  using C = Compute<T>;
  if (x.M == 1) {
    count_run(Algorithm::linear_outer_product);
    return weight_gradient_of_one<T>(x);
  }
  const T *grad_output = static_cast<const T*>(x.grad_output), *input = static_cast<const T*>(x.input);
  const Matrix<T> a{grad_output, 1, x.N}, b{input, x.K, 1};
  const Output<T> out{static_cast<T*>(x.grad_weight), Axis::plain(x.K), Axis::plain(1)};
  const int64_t blocks = ceil_div(x.N, MC) * ceil_div(x.K, NC), chunks = ceil_div(x.M, KC);
  const int64_t parts = std::min(ceil_div(enough_tasks, blocks), chunks);
  if (parts <= 1) return gemm(1, x.N, x.K, x.M, [&](int64_t) { return GemmArgs<T, T, F>{a, b, out, 0, x.M}; });

  count_run(Algorithm::linear_split_k);
  const int64_t part = ceil_div(chunks, parts) * KC;
  C* sums = scratch<C>(Scratch::partial_sums, parts * x.N * x.K);
  gemm(parts, x.N, x.K, part, [&](int64_t i) {
    const Output<C> partial{sums + i * x.N * x.K, Axis::plain(x.K), Axis::plain(1)};
    return GemmArgs<T, C, F>{a, b, partial, std::min(i * part, x.M), std::min((i + 1) * part, x.M)};
  });
  sum_parts(out, sums, parts, x.N * x.K, x.N, x.K);
}

}  // namespace

void linear(const LinearArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    dispatch_operand<T>([&](auto operand) { forward<T, decltype(operand)>(x); });
  });
}

void linear_backward(const LinearBackwardArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    dispatch_operand<T>([&](auto operand) {
      using F = decltype(operand);
      if (x.grad_input) input_gradient<T, F>(x);
      if (x.grad_weight) weight_gradient<T, F>(x);
    });
    if (x.grad_bias) sum_rows(static_cast<T*>(x.grad_bias), static_cast<const T*>(x.grad_output), x.M, x.N);
  });
}

}  // namespace pyops::cpu
