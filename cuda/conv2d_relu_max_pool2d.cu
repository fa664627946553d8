// output = relu(max_pool2d(conv2d(input, weight, bias))) and, if requested, the argmax of each window, by one of three
// algorithms:
//   - Few channels with 2x2 windows take one kernel (conv2d_tiny.cu), without the convolution's result in memory.
//   - If the convolution is generic, one thread for each window sums its pixels one after another.
//   - Otherwise the convolution's result goes to the workspace, and one kernel pools and rectifies it.
//
// The maximum is taken before the rectification, with which it commutes. If it is neither above 0 nor NaN, no gradient
// passes, and the argmax is dead_window. Each pixel is summed and rounded as in conv2d, so that values and argmax have
// the bits of the three ops called in turn. On sm_80 and sm_90 the kernel in this file, which is that of the second
// algorithm, takes 88 to 168 registers, for double at most 206, so that an SM holds at least one block of 256 threads.
// It takes no shared memory.
#include "conv2d_generic.h"
#include "max_pool2d.h"

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
  Winner<T, Index> winner;
  winner.tap = rows.begin * pool.kernel_w + columns.begin;
  for (Index i = rows.begin; i < rows.end; ++i) {
    for (Index j = columns.begin; j < columns.end; ++j) {
      const Position<Index> pixel{at.n, at.c, y0 + i * pool.dilation_h, x0 + j * pool.dilation_w};
      const T value = finish_conv(convolve(conv, input, weight, pixel), bias, at.c);
      winner.meet(widen(value), i * pool.kernel_w + j);
    }
  }
  output[number] = winner.value(/*rectify=*/true);
  if (argmax != nullptr) argmax[number] = winner.argmax(/*rectify=*/true, dead);
}

}  // namespace

cudaError_t conv2d_relu_max_pool2d(const Conv2dReluMaxPool2dArgs& x, Workspace& workspace, cudaStream_t stream) {
  const ConvWay way = conv_way(x.conv.shape);
  if (way == ConvWay::tiny && is_tiny_pooled(x)) return tiny_pooled(x, stream);
  return dispatch_floating(x.conv.dtype, [&](auto t) {
    using T = decltype(t);
    if (way != ConvWay::generic) {
      Conv2dArgs conv = x.conv;
      T* between = workspace.array<T>(conv.shape.N * conv.shape.O * conv.shape.OH * conv.shape.OW);
      conv.output = between;
      conv.relu = false;
      PYOPS_RETURN_ON_ERROR(conv2d(conv, workspace, stream));
      return max_pool2d_rectified({conv.dtype, x.pool, between, x.output, x.argmax}, stream);
    }
    return dispatch_index(largest_conv_offset(x.conv.shape), [&](auto index) {
      using Index = decltype(index);
      const PoolWindow<Index> pool(x.pool);
      const auto run = [&](auto* argmax) {
        using A = std::remove_pointer_t<decltype(argmax)>;
        return launch_for(forward<T, A, Index>, pool.output.count, stream, Conv<Index>(x.conv.shape), pool,
                          static_cast<const T*>(x.conv.input), static_cast<const T*>(x.conv.weight),
                          static_cast<const T*>(x.conv.bias), static_cast<T*>(x.output), argmax,
                          static_cast<A>(dead_window(x.pool.taps())));
      };
      return max_pool2d_argmax_is_u8(x.pool.taps()) ? run(static_cast<uint8_t*>(x.argmax))
                                                    : run(static_cast<int64_t*>(x.argmax));
    });
  });
}

}  // namespace pyops::cuda
