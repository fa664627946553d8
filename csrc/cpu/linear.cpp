// linear: output[M, N] = input[M, K] weight[N, K]^T + bias[N], and its gradients, as products of gemm.h.
//
//   grad_input  [M, K] = grad_output   [M, N] weight[N, K]      nothing is transposed
//   grad_weight [N, K] = grad_output^T [N, M] input [M, K]      the left operand is read by broadcast: no transpose
//   grad_bias   [N]    = sum of the rows of grad_output
//
// Only the forward has to transpose an operand, the weight, which it does in registers while it lays out the panels.
// All matrices are row-major. Guarantees: those of gemm.h; a row of output is the same whatever the other rows hold.
#include "sums.h"

namespace pyops::cpu {

void linear(const LinearArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    gemm<T>(1, x.M, x.N, x.K, [&](int64_t) {
      return GemmOperands<T, DenseMatrix<T>, DenseMatrix<T>>{
          {static_cast<const T*>(x.input), x.K, 1},
          {static_cast<const T*>(x.weight), 1, x.K},
          {static_cast<T*>(x.output), Axis::plain(x.N), Axis::plain(1), nullptr, static_cast<const T*>(x.bias)},
          0,
          x.K};
    });
  });
}

void linear_backward(const LinearBackwardArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* grad_output = static_cast<const T*>(x.grad_output);
    if (x.grad_input) {
      gemm<T>(1, x.M, x.K, x.N, [&](int64_t) {
        return GemmOperands<T, DenseMatrix<T>, DenseMatrix<T>>{
            {grad_output, x.N, 1},
            {static_cast<const T*>(x.weight), x.K, 1},
            {static_cast<T*>(x.grad_input), Axis::plain(x.K), Axis::plain(1)},
            0,
            x.N};
      });
    }
    if (x.grad_weight) {
      T* grad_weight = static_cast<T*>(x.grad_weight);
      gemm_split_k<Compute<T>>(
          1, x.N, x.K, x.M,
          [&](int64_t, const Output<Compute<T>>& out, int64_t k_begin, int64_t k_end) {
            return GemmOperands<Compute<T>, DenseMatrix<T>, DenseMatrix<T>>{
                {grad_output, 1, x.N}, {static_cast<const T*>(x.input), x.K, 1}, out, k_begin, k_end};
          },
          [&](int64_t, int64_t n, int64_t k, Compute<T> sum) { grad_weight[n * x.K + k] = static_cast<T>(sum); });
    }
    if (x.grad_bias) sum_rows(static_cast<T*>(x.grad_bias), grad_output, x.M, x.N);
  });
}

}  // namespace pyops::cpu
