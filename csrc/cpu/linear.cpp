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
#include "gemm/sum_parts.h"

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

// ---- the weight gradient ----

template <class T>
struct WeightGradientOfLinear {
  const LinearBackwardArgs& args;

  Matrix<T> a() const { return {static_cast<const T*>(args.grad_output), 1, args.N}; }
  Matrix<T> b() const { return {static_cast<const T*>(args.input), args.K, 1}; }
  Output<T> out() const { return {static_cast<T*>(args.grad_weight), Axis::plain(args.K), Axis::plain(1)}; }
  // The number of parts of the batch that make enough tasks, which depends on the shape only.
  int64_t parts() const {
    const int64_t blocks = ceil_div(args.N, smallest_mc) * ceil_div(args.K, smallest_nc), chunks = ceil_div(args.M, KC);
    return std::min(ceil_div(enough_tasks, blocks), chunks);
  }
};

template <class T>
void outer_product(const WeightGradientOfLinear<T>& problem) {
  using V = Vec<Compute<T>>;
  const LinearBackwardArgs& x = problem.args;
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

template <class T>
void split_k(const WeightGradientOfLinear<T>& problem) {
  using C = Compute<T>;
  const LinearBackwardArgs& x = problem.args;
  const int64_t parts = problem.parts(), part = ceil_div(ceil_div(x.M, KC), parts) * KC;
  C* sums = scratch<C>(Scratch::partial_sums, parts * x.N * x.K);
  dispatch_operand<T>([&](auto operand) {
    gemm(parts, x.N, x.K, part, [&](int64_t i) {
      const Output<C> partial{sums + i * x.N * x.K, Axis::plain(x.K), Axis::plain(1)};
      const int64_t begin = std::min(i * part, x.M), end = std::min((i + 1) * part, x.M);
      return GemmArgs<T, C, decltype(operand)>{problem.a(), problem.b(), partial, begin, end};
    });
  });
  sum_parts(problem.out(), sums, parts, x.N * x.K, x.N, x.K);
}

template <class T>
void single_product(const WeightGradientOfLinear<T>& problem) {
  const LinearBackwardArgs& x = problem.args;
  dispatch_operand<T>([&](auto operand) {
    gemm(1, x.N, x.K, x.M,
         [&](int64_t) { return GemmArgs<T, T, decltype(operand)>{problem.a(), problem.b(), problem.out(), 0, x.M}; });
  });
}

template <class T>
constexpr Algorithm<WeightGradientOfLinear<T>> weight_gradient_algorithms[] = {
    // The product of one sample costs no more than to write it.
    {"outer_product", "csrc/cpu/linear.cpp", [](const WeightGradientOfLinear<T>& x) { return x.args.M == 1; },
     always<WeightGradientOfLinear<T>>, outer_product<T>},
    // A small weight has too few blocks for the threads. Then the batch is split too, and the sums of the parts are
    // added in order.
    {"split_k", "csrc/cpu/linear.cpp", [](const WeightGradientOfLinear<T>& x) { return x.parts() > 1; },
     always<WeightGradientOfLinear<T>>, split_k<T>},
    {"single_product", "csrc/cpu/linear.cpp", always<WeightGradientOfLinear<T>>, always<WeightGradientOfLinear<T>>,
     single_product<T>},
};

[[maybe_unused]] const bool listed = choices::linear_weight_gradient.list(weight_gradient_algorithms<float>) &&
                                     choices::gemm.list(gemm_algorithms<float, float, float>);

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
    if (x.grad_input) dispatch_operand<T>([&](auto operand) { input_gradient<T, decltype(operand)>(x); });
    if (x.grad_weight) {
      const WeightGradientOfLinear<T> problem{x};
      choose(choices::linear_weight_gradient, weight_gradient_algorithms<T>, problem).run(problem);
    }
    if (x.grad_bias) sum_rows(static_cast<T*>(x.grad_bias), static_cast<const T*>(x.grad_output), x.M, x.N);
  });
}

}  // namespace pyops::cpu
