// linear with bias and relu, if requested, and its gradients:
//
//   output[M, N]      = input[M, K] weight[N, K]^T + bias
//   grad_input[M, K]  = grad_output weight
//   grad_weight[N, K] = grad_output^T input
//   grad_bias[N]      = column sums of grad_output
//
// All matrices are row-major. One kernel (gemm/gemm.h) computes the three products, whose operands differ in which
// dimension is contiguous.
//
// Each sum is taken in float (in double for double), in an order that depends only on the shape. Registers and shared
// memory are those of gemm/gemm.h and common/sums.h.
#include "common/sums.h"
#include "gemm/gemm.h"

namespace pyops::cuda {

[[maybe_unused]] static const bool listed =
    choices::gemm.list(gemm_algorithms<SplitMma, Matrix<float, true>, Matrix<float, true>, StoreRows<float>>);

cudaError_t linear(const LinearArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    return dispatch_mma<T>(x.tf32, [&](auto mma) {
      const Matrix<T, true> input(x.input, x.K), weight(x.weight, x.K);
      const StoreRows<T> store{static_cast<T*>(x.output), static_cast<const T*>(x.bias), x.N, x.relu};
      return gemm<decltype(mma)>(x.M, x.N, x.K, input, weight, store, workspace, stream);
    });
  });
}

cudaError_t linear_backward(const LinearBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto* grad = static_cast<const T*>(x.grad_output);
    PYOPS_RETURN_ON_ERROR(dispatch_mma<T>(x.tf32, [&](auto mma) {
      using Mma = decltype(mma);
      if (x.grad_input != nullptr) {
        const Matrix<T, true> rows(grad, x.N);
        const Matrix<T, false> columns(x.weight, x.K);
        const StoreRows<T> store{static_cast<T*>(x.grad_input), nullptr, x.K, false};
        PYOPS_RETURN_ON_ERROR(gemm<Mma>(x.M, x.K, x.N, rows, columns, store, workspace, stream));
      }
      if (x.grad_weight == nullptr) return cudaSuccess;
      const Matrix<T, false> rows(grad, x.N), columns(x.input, x.K);
      const StoreRows<T> store{static_cast<T*>(x.grad_weight), nullptr, x.K, false};
      return gemm<Mma>(x.N, x.K, x.M, rows, columns, store, workspace, stream);
    }));
    if (x.grad_bias == nullptr) return cudaSuccess;
    return sum_columns(grad, x.M, x.N, static_cast<T*>(x.grad_bias), workspace, stream);
  });
}

}  // namespace pyops::cuda
