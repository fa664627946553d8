// Direct convolutions with few channels and 3x3 or 5x5 kernels, in either layout: the output (plain, rectified, or
// rectified and pooled by non-overlapping 2x2 windows), and the input gradient, which is a convolution of grad_output
// by the kernel rotated by 180 degrees.
//
// A thread computes 2x2 output pixels of up to 8 channels. For each input channel it holds the (kernel + 1)^2 inputs
// that these pixels need in registers. The weights are in shared memory, where all threads of a warp read the same
// ones, 8 at a time, for 32 multiply-adds. An implicit GEMM would fill only a fifth of its tiles here. Pooled results
// leave the thread as one value and one byte for each window, which is a quarter of the writes, and nothing is read
// again.
//
// Sums run over c, i, j in one chain, as in convolve(). Taps outside the image are read as 0; a sum that is NaN, as
// infinity times 0 is, is taken again over the taps inside alone. On sm_80 and sm_90 the kernels take 88 to 128
// registers, so that an SM holds four blocks; for double at most 196, two blocks. They take 32 bytes of shared memory
// for each input channel and tap, 64 for double: LeNet's 6 channels of 5x5 take 4.8 KB.
#include <algorithm>

#include "../max_pool2d/running_max.h"
#include "direct.h"
#include "direct_small.h"

namespace pyops::cuda {
namespace {

constexpr int small_threads = 128, weight_pitch = 8;
// The fewest blocks for which an SM must have registers: four of 128 threads leave 128 registers to a thread.
template <class T>
constexpr int small_blocks = std::is_same_v<T, double> ? 2 : 4;

enum class Result { plain, pooled, gradient };

// The convolution that is computed. For the gradient, its input and output are grad_output and grad_input, while `conv`
// remains the convolution of the forward.
struct SmallProblem {
  Conv<int32_t> conv;
  Images<int32_t> input, output;
  Images<int32_t> blocks;                               // of 2x2 output pixels
  Divider<int32_t> chunks;                              // of output channels
  int32_t padding_h, padding_w, out_stride, in_stride;  // strides of the weight
  bool relu;
};

template <class T>
struct SmallOperands {
  const T *input, *weight, *bias;
  T* output;
  uint8_t* argmax;  // null: not requested
  uint8_t dead;     // the argmax of a window that passes no gradient
};

template <class T, int kernel, int outputs, Result result>
__device__ __forceinline__ void load_weights(const SmallProblem& problem, const T* weight, int32_t first_output,
                                             Compute<T>* shared) {
  constexpr int taps = kernel * kernel;
  const int32_t count = problem.input.C.value() * taps * outputs;
  for (int32_t k = threadIdx.x; k < count; k += small_threads) {
    const int32_t o = k % outputs, c = k / outputs / taps, tap = k / outputs % taps;
    const int32_t at = result == Result::gradient ? taps - 1 - tap : tap;
    shared[k / outputs * weight_pitch + o] =
        first_output + o < problem.output.C.value()
            ? widen(weight[(first_output + o) * problem.out_stride + c * problem.in_stride + at])
            : Compute<T>(0);
  }
}

// Stores the 2x2 outputs of one channel, or their maximum.
template <class T, Result result>
__device__ __forceinline__ void finish(const SmallProblem& problem, const SmallOperands<T>& x,
                                       const Pixel<int32_t>& block, int32_t channel, const Compute<T> (&sums)[4]) {
  using C = Compute<T>;
  RunningMax<T, int> winner;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const Position<int32_t> at{block.n, channel, block.h * 2 + q / 2, block.w * 2 + q % 2};
    if (at.h >= problem.output.height() || at.w >= problem.output.width()) continue;
    C sum = sums[q];
    if (sum != sum)
      sum = result == Result::gradient ? gradient_of_input(problem.conv, x.input, x.weight, at)
                                       : convolve(problem.conv, x.input, x.weight, at);
    const T value = finish_conv(sum, x.bias, channel);
    if constexpr (result == Result::pooled) {
      winner.update(widen(value), q);
    } else {
      x.output[problem.output.offset(at.n, at.c, at.h, at.w)] =
          problem.relu ? narrow<T>(rectified(widen(value))) : value;
    }
  }
  if constexpr (result == Result::pooled) {
    const int32_t offset = problem.blocks.offset(block.n, channel, block.h, block.w);
    x.output[offset] = winner.value(/*rectify=*/true);
    if (x.argmax != nullptr) x.argmax[offset] = winner.argmax(/*rectify=*/true, x.dead);
  }
}

template <class T, int kernel, int outputs, Result result>
__global__ void __launch_bounds__(small_threads, small_blocks<T>)
    direct_small_kernel(const __grid_constant__ SmallProblem problem, const __grid_constant__ SmallOperands<T> x) {
  using C = Compute<T>;
  constexpr int side = kernel + 1;
  C* weights = shared_memory<C>();
  auto tile = static_cast<int32_t>(blockIdx.x);
  const int32_t first_output = take_digit(tile, problem.chunks) * outputs;
  load_weights<T, kernel, outputs, result>(problem, x.weight, first_output, weights);
  __syncthreads();
  const int64_t number = static_cast<int64_t>(tile) * small_threads + threadIdx.x;
  if (number >= static_cast<int64_t>(problem.blocks.count)) return;
  const auto block = problem.blocks.pixel(static_cast<int32_t>(number));
  const int32_t h0 = block.h * 2 - problem.padding_h, w0 = block.w * 2 - problem.padding_w;

  C sums[outputs][4] = {};
  for (int32_t c = 0; c < problem.input.C.value(); ++c) {
    C patch[side][side];
#pragma unroll
    for (int i = 0; i < side; ++i) {
#pragma unroll
      for (int j = 0; j < side; ++j) {
        const int32_t h = h0 + i, w = w0 + j;
        const bool inside = h >= 0 && w >= 0 && h < problem.input.height() && w < problem.input.width();
        patch[i][j] = inside ? widen(x.input[problem.input.offset(block.n, c, h, w)]) : C(0);
      }
    }
#pragma unroll
    for (int tap = 0; tap < kernel * kernel; ++tap) {
      const C* of_tap = weights + (c * kernel * kernel + tap) * weight_pitch;
#pragma unroll
      for (int o = 0; o < outputs; ++o)
#pragma unroll
        for (int q = 0; q < 4; ++q)
          sums[o][q] = multiply_add(patch[tap / kernel + q / 2][tap % kernel + q % 2], of_tap[o], sums[o][q]);
    }
  }
#pragma unroll
  for (int o = 0; o < outputs; ++o)
    if (first_output + o < problem.output.C.value()) finish<T, result>(problem, x, block, first_output + o, sums[o]);
}

template <class T, Result result>
cudaError_t launch_small(SmallProblem problem, int64_t kernel, const SmallOperands<T>& x, cudaStream_t stream) {
  const auto run = [&](auto kernel_constant, auto outputs_constant) {
    constexpr int k = decltype(kernel_constant)::value, outputs = decltype(outputs_constant)::value;
    const int64_t chunks = ceil_div(problem.output.C.value(), outputs);
    problem.chunks = Divider<int32_t>(chunks);
    const size_t shared_bytes = problem.input.C.value() * k * k * weight_pitch * sizeof(Compute<T>);
    return launch(direct_small_kernel<T, k, outputs, result>, ceil_div(problem.blocks.count, small_threads) * chunks,
                  small_threads, shared_bytes, stream, problem, x);
  };
  using Three = std::integral_constant<int, 3>;
  using Five = std::integral_constant<int, 5>;
  using Six = std::integral_constant<int, 6>;
  using Eight = std::integral_constant<int, 8>;
  if (problem.output.C.value() <= 6) return kernel == 3 ? run(Three(), Six()) : run(Five(), Six());
  return kernel == 3 ? run(Three(), Eight()) : run(Five(), Eight());
}

SmallProblem small_problem(const Conv2dShape& s, int64_t blocks_h, int64_t blocks_w) {
  const Conv<int32_t> conv(s);
  const auto taps = static_cast<int32_t>(s.kernel_h * s.kernel_w);
  // A number stands for a block of pixels in all channels.
  Images<int32_t> blocks(s.N, s.O, blocks_h, blocks_w, s.channels_last);
  blocks.count = s.N * blocks_h * blocks_w;
  return {conv,
          conv.input,
          conv.output,
          blocks,
          Divider<int32_t>(1),
          static_cast<int32_t>(s.padding_top),
          static_cast<int32_t>(s.padding_left),
          static_cast<int32_t>(s.C) * taps,
          taps,
          false};
}

}  // namespace

cudaError_t direct_small_forward(const Conv2dArgs& x, cudaStream_t stream) {
  const Conv2dShape& s = x.shape;
  SmallProblem problem = small_problem(s, ceil_div(s.OH, 2), ceil_div(s.OW, 2));
  problem.relu = x.relu;
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    const SmallOperands<T> operands{static_cast<const T*>(x.input),
                                    static_cast<const T*>(x.weight),
                                    static_cast<const T*>(x.bias),
                                    static_cast<T*>(x.output),
                                    nullptr,
                                    0};
    return launch_small<T, Result::plain>(problem, s.kernel_h, operands, stream);
  });
}

cudaError_t direct_small_input_gradient(const Conv2dBackwardArgs& x, cudaStream_t stream) {
  const Conv2dShape& s = x.shape;
  SmallProblem problem = small_problem(s, ceil_div(s.H, 2), ceil_div(s.W, 2));
  std::swap(problem.input, problem.output);
  std::swap(problem.in_stride, problem.out_stride);
  problem.padding_h = static_cast<int32_t>(s.kernel_h - 1 - s.padding_top);
  problem.padding_w = static_cast<int32_t>(s.kernel_w - 1 - s.padding_left);
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    const SmallOperands<T> operands{static_cast<const T*>(x.grad_output),
                                    static_cast<const T*>(x.weight),
                                    nullptr,
                                    static_cast<T*>(x.grad_input),
                                    nullptr,
                                    0};
    return launch_small<T, Result::gradient>(problem, s.kernel_h, operands, stream);
  });
}

cudaError_t direct_small_pooled(const Conv2dReluMaxPool2dArgs& x, cudaStream_t stream) {
  const Conv2dShape& s = x.conv.shape;
  const SmallProblem problem = small_problem(s, x.pool.OH, x.pool.OW);
  return dispatch_floating(x.conv.dtype, [&](auto t) {
    using T = decltype(t);
    const SmallOperands<T> operands{
        static_cast<const T*>(x.conv.input), static_cast<const T*>(x.conv.weight),
        static_cast<const T*>(x.conv.bias),  static_cast<T*>(x.output),
        static_cast<uint8_t*>(x.argmax),     static_cast<uint8_t>(dead_window(x.pool.taps()))};
    return launch_small<T, Result::pooled>(problem, s.kernel_h, operands, stream);
  });
}

}  // namespace pyops::cuda
