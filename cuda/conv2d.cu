// The forward of conv2d, with relu if requested, for images in either layout:
//
//   output[n, o, y, x] = bias[o] + sum over c, i, j of
//     weight[o, c, i, j] input[n, c, y stride + i dilation - padding, ..]
//
// The table below lists the algorithms. The direct one, which supports every shape, has one thread for each output.
//
// Sums are taken in float (in double for double) over the taps inside the image, in an order that depends only on the
// shape, and are rounded once. On sm_80 and sm_90 the direct kernel takes 56 to 114 registers, so that an SM holds two
// blocks of 256 threads; for double at most 148, one block. It takes no shared memory.
#include "conv2d/direct.h"
#include "conv2d/implicit_gemm.h"

namespace pyops::cuda {
namespace {

template <class T, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    direct_forward(const __grid_constant__ Conv<Index> conv, const T* input, const T* weight, const T* bias, T* output,
                   bool relu) {
  const int64_t number = thread_number();
  if (number >= conv.output.count) return;
  const Position<Index> at = conv.output.position(static_cast<Index>(number));
  const T value = finish_conv(convolve(conv, input, weight, at), bias, at.c);
  output[number] = relu ? narrow<T>(rectified(widen(value))) : value;
}

using Problem = Launch<Conv2dArgs>;

cudaError_t run_implicit_gemm(const Problem& x) {
  return dispatch_floating(x.args.dtype,
                           [&](auto t) { return implicit_gemm_forward<decltype(t)>(x.args, x.workspace, x.stream); });
}

cudaError_t run_direct(const Problem& problem) {
  const Conv2dArgs& x = problem.args;
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    return dispatch_index(largest_conv_offset(x.shape), [&](auto index) {
      using Index = decltype(index);
      const Conv<Index> conv(x.shape);
      return launch_for(direct_forward<T, Index>, conv.output.count, problem.stream, conv,
                        static_cast<const T*>(x.input), static_cast<const T*>(x.weight), static_cast<const T*>(x.bias),
                        static_cast<T*>(x.output), x.relu);
    });
  });
}

constexpr Algorithm<Problem> algorithms[] = {
    // Few channels would leave most of a tensor core's tile empty.
    {direct_small_name.data(), "cuda/conv2d/direct_small.cu",
     [](const Problem& x) {
       return !needs_wide_offsets(x.args.shape) && supports_direct_small(x.args.shape, x.args.shape.C, x.args.shape.O);
     },
     always<Problem>, [](const Problem& x) { return direct_small_forward(x.args, x.stream); }},
    // Tensor cores multiply.
    {"implicit_gemm", "cuda/conv2d/implicit_gemm.h",
     [](const Problem& x) { return supports_implicit_gemm(x.args.shape); }, always<Problem>, run_implicit_gemm},
    // A group would be a matrix of one row.
    {"depthwise", "cuda/conv2d/depthwise.cu", [](const Problem& x) { return supports_depthwise(x.args.shape); },
     always<Problem>, [](const Problem& x) { return depthwise_convolution(x.args, x.stream); }},
    // Groups with few channels would be small matrices.
    {"grouped", "cuda/conv2d/grouped.cu",
     [](const Problem& x) { return supports_grouped(x.args.shape, x.args.shape.C); }, always<Problem>,
     [](const Problem& x) { return grouped_convolution(x.args, x.stream); }},
    // Other groups, and images that need 64-bit offsets.
    {direct_name.data(), "cuda/conv2d/direct.h", always<Problem>, always<Problem>, run_direct},
};

[[maybe_unused]] const bool listed = choices::conv2d.list(algorithms);

}  // namespace

cudaError_t conv2d(const Conv2dArgs& x, Workspace& workspace, cudaStream_t stream) {
  const Problem problem{x, workspace, stream};
  return choose(choices::conv2d, algorithms, problem).run(problem);
}

std::string_view algorithm_of(const Problem& x) {
  return algorithms[chosen_row(choices::conv2d, algorithms, x)].name;
}

}  // namespace pyops::cuda
