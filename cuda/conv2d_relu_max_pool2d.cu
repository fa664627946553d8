// output = relu(max_pool2d(conv2d(input, weight, bias))) and, if requested, the argmax of each window, by one of three
// algorithms:
//   - Few channels with 2x2 windows take one kernel (conv2d/direct_small.cu), without the convolution's result in
//   memory.
//   - If the convolution is the direct one, one thread for each window sums its pixels one after another.
//   - Otherwise the convolution's result goes to the workspace, and one kernel pools and rectifies it.
//
// The maximum is taken before the rectification, with which it commutes. If it is neither above 0 nor NaN, no gradient
// passes, and the argmax is dead_window. Each pixel is summed and rounded as in conv2d, so that values and argmax have
// the bits of the three ops called in turn. On sm_80 and sm_90 the kernel in this file, which is that of the second
// algorithm, takes 88 to 168 registers, for double at most 206, so that an SM holds at least one block of 256 threads.
// It takes no shared memory.
#include "conv2d/direct.h"
#include "max_pool2d/running_max.h"

namespace pyops::cuda {
namespace {

template <class Index>
struct PoolWindow {
  Images<Index> output;
  Index kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  explicit PoolWindow(const MaxPool2dShape& s)
      : output(s.N, s.C, s.OH, s.OW, s.channels_last),
        kernel_h(static_cast<Index>(s.kernel_h)),
        kernel_w(static_cast<Index>(s.kernel_w)),
        stride_h(static_cast<Index>(s.stride_h)),
        stride_w(static_cast<Index>(s.stride_w)),
        padding_h(static_cast<Index>(s.padding_h)),
        padding_w(static_cast<Index>(s.padding_w)),
        dilation_h(static_cast<Index>(s.dilation_h)),
        dilation_w(static_cast<Index>(s.dilation_w)) {}
};

template <class T, class A, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    forward(const __grid_constant__ Conv<Index> conv, PoolWindow<Index> pool, const T* input, const T* weight,
            const T* bias, T* output, A* argmax, A dead) {
  const int64_t number = thread_number();
  if (number >= pool.output.count) return;
  const Position<Index> at = pool.output.position(static_cast<Index>(number));
  const Index y0 = at.h * pool.stride_h - pool.padding_h, x0 = at.w * pool.stride_w - pool.padding_w;
  const Taps<Index> rows(y0, pool.kernel_h, pool.dilation_h, conv.output.height());
  const Taps<Index> columns(x0, pool.kernel_w, pool.dilation_w, conv.output.width());
  RunningMax<T, Index> winner;
  winner.tap = rows.begin * pool.kernel_w + columns.begin;
  for (Index i = rows.begin; i < rows.end; ++i) {
    for (Index j = columns.begin; j < columns.end; ++j) {
      const Position<Index> pixel{at.n, at.c, y0 + i * pool.dilation_h, x0 + j * pool.dilation_w};
      const T value = finish_conv(convolve(conv, input, weight, pixel), bias, at.c);
      winner.update(widen(value), i * pool.kernel_w + j);
    }
  }
  output[number] = winner.value(/*rectify=*/true);
  if (argmax != nullptr) argmax[number] = winner.argmax(/*rectify=*/true, dead);
}

using Problem = Launch<Conv2dReluMaxPool2dArgs>;

// Whether conv2d would use this algorithm, of which the fused op has the bits.
bool is_conv2d_by(std::string_view name, const Problem& x) {
  return name == algorithm_of({x.args.conv, x.workspace, x.stream});
}

bool is_direct_small(const Problem& x) {
  return supports_direct_small_pooled(x.args) && is_conv2d_by(direct_small_name, x);
}

bool is_direct(const Problem& x) {
  return is_conv2d_by(direct_name, x);
}

cudaError_t run_direct(const Problem& problem) {
  const Conv2dReluMaxPool2dArgs& x = problem.args;
  return dispatch_floating(x.conv.dtype, [&](auto t) {
    using T = decltype(t);
    return dispatch_index(largest_conv_offset(x.conv.shape), [&](auto index) {
      using Index = decltype(index);
      const PoolWindow<Index> pool(x.pool);
      const auto run = [&](auto* argmax) {
        using A = std::remove_pointer_t<decltype(argmax)>;
        return launch_for(forward<T, A, Index>, pool.output.count, problem.stream, Conv<Index>(x.conv.shape), pool,
                          static_cast<const T*>(x.conv.input), static_cast<const T*>(x.conv.weight),
                          static_cast<const T*>(x.conv.bias), static_cast<T*>(x.output), argmax,
                          static_cast<A>(dead_window(x.pool.taps())));
      };
      return max_pool2d_argmax_is_u8(x.pool.taps()) ? run(static_cast<uint8_t*>(x.argmax))
                                                    : run(static_cast<int64_t*>(x.argmax));
    });
  });
}

cudaError_t run_two_kernels(const Problem& problem) {
  const Conv2dReluMaxPool2dArgs& x = problem.args;
  return dispatch_floating(x.conv.dtype, [&](auto t) {
    using T = decltype(t);
    Conv2dArgs conv = x.conv;
    T* between = problem.workspace.array<T>(conv.shape.N * conv.shape.O * conv.shape.OH * conv.shape.OW);
    conv.output = between;
    conv.relu = false;
    PYOPS_RETURN_ON_ERROR(conv2d(conv, problem.workspace, problem.stream));
    return max_pool2d_rectified({conv.dtype, x.pool, between, x.output, x.argmax}, problem.stream);
  });
}

constexpr Algorithm<Problem> algorithms[] = {
    // The convolution is never stored.
    {"direct_small", "cuda/conv2d/direct_small.cu", is_direct_small, always<Problem>,
     [](const Problem& x) { return direct_small_pooled(x.args, x.stream); }},
    {"direct", "cuda/conv2d_relu_max_pool2d.cu", is_direct, always<Problem>, run_direct},
    // Other convolutions are faster when they are stored.
    {"two_kernels", "cuda/conv2d_relu_max_pool2d.cu", always<Problem>, always<Problem>, run_two_kernels},
};

[[maybe_unused]] const bool listed = choices::conv2d_relu_max_pool2d.list(algorithms);

}  // namespace

cudaError_t conv2d_relu_max_pool2d(const Conv2dReluMaxPool2dArgs& x, Workspace& workspace, cudaStream_t stream) {
  const Problem problem{x, workspace, stream};
  return choose(choices::conv2d_relu_max_pool2d, algorithms, problem).run(problem);
}

}  // namespace pyops::cuda
