// The gradients of conv2d, each if it is requested: of the input (a sum over the taps through which output pixels have
// read an element), of the weight (a sum over all output pixels for each tap) and of the bias (a sum over all pixels of
// a channel). Images are in either layout, and the weight is contiguous.
//
// The tables below list the algorithms. The direct ones are in this file: they have one thread for each element of
// grad_input, and one block for each part of each sum of grad_weight (common/sums.h).
//
// Only taps inside the image take part, so that an infinite factor over the border gives no NaN. Sums are taken in an
// order that depends only on the shape. On sm_80 and sm_90 the direct kernel for the input takes 72 to 90 registers,
// for double at most 123, so that an SM holds two blocks of 256 threads, and no shared memory; for weight and bias,
// common/sums.h says what its kernels take.
#include "common/sums.h"
#include "conv2d/direct.h"
#include "conv2d/implicit_gemm.h"

namespace pyops::cuda {
namespace {

template <class T, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    backward_input(const __grid_constant__ Conv<Index> conv, const T* grad_output, const T* weight, T* grad_input) {
  const int64_t number = thread_number();
  if (number >= conv.input.count) return;
  const Position<Index> at = conv.input.position(static_cast<Index>(number));
  grad_input[number] = narrow<T>(gradient_of_input(conv, grad_output, weight, at));
}

template <class T, class Index>
struct WeightTerms {
  Conv<Index> conv;
  const T *grad_output, *input;

  __device__ __forceinline__ Compute<T> operator()(Index item, int64_t first, Index step, int64_t end) const {
    return gradient_of_weight(conv, grad_output, input, item, static_cast<Index>(first), step, static_cast<Index>(end));
  }
};

// The terms of the bias gradient of images whose planes are contiguous; an item is an output channel.
template <class T, class Index>
struct BiasTerms {
  Divider<Index> plane;
  Index n_stride;
  const T* grad_output;

  __device__ __forceinline__ Compute<T> operator()(Index item, int64_t first, Index step, int64_t end) const {
    Compute<T> sum = 0;
    for (auto k = static_cast<Index>(first); k < static_cast<Index>(end); k += step) {
      Index n = k;
      const Index pixel = take_digit(n, plane);
      sum += widen(grad_output[n * n_stride + item * plane.value() + pixel]);
    }
    return sum;
  }
};

using Problem = Launch<Conv2dBackwardArgs>;

// ---- the input gradient ----

cudaError_t implicit_gemm_of_input(const Problem& x) {
  return dispatch_floating(
      x.args.dtype, [&](auto t) { return implicit_gemm_input_gradient<decltype(t)>(x.args, x.workspace, x.stream); });
}

// Calls f(T{}, Index{}) for the types of the elements and of the offsets.
template <class F>
cudaError_t dispatch(const Conv2dBackwardArgs& x, const F& f) {
  return dispatch_floating(x.dtype, [&](auto t) {
    return dispatch_index(largest_conv_offset(x.shape), [&](auto index) { return f(t, index); });
  });
}

cudaError_t direct_input_gradient(const Problem& problem) {
  const Conv2dBackwardArgs& x = problem.args;
  return dispatch(x, [&](auto t, auto index) {
    using T = decltype(t);
    using Index = decltype(index);
    const Conv<Index> conv(x.shape);
    return launch_for(backward_input<T, Index>, conv.input.count, problem.stream, conv,
                      static_cast<const T*>(x.grad_output), static_cast<const T*>(x.weight),
                      static_cast<T*>(x.grad_input));
  });
}

// The reasons for the order are those of the forward (conv2d.cu).
constexpr Algorithm<Problem> input_gradient_algorithms[] = {
    {"direct_small", "cuda/conv2d/direct_small.cu",
     [](const Problem& x) {
       return !needs_wide_offsets(x.args.shape) && supports_direct_small_input_gradient(x.args.shape);
     },
     always<Problem>, [](const Problem& x) { return direct_small_input_gradient(x.args, x.stream); }},
    {"implicit_gemm", "cuda/conv2d/implicit_gemm.h",
     [](const Problem& x) { return supports_implicit_gemm(x.args.shape); }, always<Problem>, implicit_gemm_of_input},
    {"depthwise", "cuda/conv2d/depthwise.cu", [](const Problem& x) { return supports_depthwise(x.args.shape); },
     always<Problem>, [](const Problem& x) { return depthwise_convolution(x.args, x.stream); }},
    {"grouped", "cuda/conv2d/grouped.cu",
     [](const Problem& x) { return supports_grouped(x.args.shape, x.args.shape.O); }, always<Problem>,
     [](const Problem& x) { return grouped_convolution(x.args, x.stream); }},
    {"direct", "cuda/conv2d/direct.h", always<Problem>, always<Problem>, direct_input_gradient},
};

// ---- the weight gradient ----

bool has_sums_in_registers(const Problem& x) {
  return !needs_wide_offsets(x.args.shape) && has_grouped_weight(x.args.shape);
}

cudaError_t implicit_gemm_of_weight(const Problem& x) {
  return dispatch_floating(
      x.args.dtype, [&](auto t) { return implicit_gemm_weight_gradient<decltype(t)>(x.args, x.workspace, x.stream); });
}

cudaError_t direct_weight_gradient(const Problem& problem) {
  const Conv2dBackwardArgs& x = problem.args;
  const Conv2dShape& s = x.shape;
  return dispatch(x, [&](auto t, auto index) {
    using T = decltype(t);
    using Index = decltype(index);
    const WeightTerms<T, Index> terms{Conv<Index>(s), static_cast<const T*>(x.grad_output),
                                      static_cast<const T*>(x.input)};
    return sum(terms, s.O * (s.C / s.groups) * s.kernel_h * s.kernel_w, s.N * s.OH * s.OW,
               static_cast<T*>(x.grad_weight), problem.workspace, problem.stream);
  });
}

constexpr Algorithm<Problem> weight_gradient_algorithms[] = {
    // Tensor cores multiply.
    {"implicit_gemm", "cuda/conv2d/implicit_gemm.h",
     [](const Problem& x) { return supports_implicit_gemm(x.args.shape); }, always<Problem>, implicit_gemm_of_weight},
    // The sums of a kernel stay in a thread's registers.
    {"grouped", "cuda/conv2d/grouped_weight_gradient.cu", has_sums_in_registers, always<Problem>,
     [](const Problem& x) { return grouped_weight_gradient(x.args, x.workspace, x.stream); }},
    // Other groups, and images that need 64-bit offsets.
    {"direct", "cuda/conv2d/direct.h", always<Problem>, always<Problem>, direct_weight_gradient},
};

[[maybe_unused]] const bool listed = choices::conv2d_input_gradient.list(input_gradient_algorithms) &&
                                     choices::conv2d_weight_gradient.list(weight_gradient_algorithms);

// ---- the bias gradient ----

template <class T, class Index>
cudaError_t backward_bias(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  const Conv2dShape& s = x.shape;
  const int64_t plane = s.OH * s.OW;
  const auto* grad_output = static_cast<const T*>(x.grad_output);
  auto* grad_bias = static_cast<T*>(x.grad_bias);
  if (s.channels_last) return sum_columns(grad_output, s.N * plane, s.O, grad_bias, workspace, stream);
  const BiasTerms<T, Index> terms{Divider<Index>(plane), static_cast<Index>(s.O * plane), grad_output};
  return sum(terms, s.O, s.N * plane, grad_bias, workspace, stream);
}

}  // namespace

cudaError_t conv2d_backward(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  const Problem problem{x, workspace, stream};
  if (x.grad_input != nullptr)
    PYOPS_RETURN_ON_ERROR(choose(choices::conv2d_input_gradient, input_gradient_algorithms, problem).run(problem));
  if (x.grad_weight != nullptr)
    PYOPS_RETURN_ON_ERROR(choose(choices::conv2d_weight_gradient, weight_gradient_algorithms, problem).run(problem));
  if (x.grad_bias == nullptr) return cudaSuccess;
  return dispatch(
      x, [&](auto t, auto index) { return backward_bias<decltype(t), decltype(index)>(x, workspace, stream); });
}

}  // namespace pyops::cuda
