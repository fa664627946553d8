// One value of a convolution, summed by one thread: the generic way, for any shape. The sums run over the taps inside
// the image only, so that an infinite factor over the border gives no NaN.
#pragma once

#include "images.h"

namespace pyops::cuda {

template <class Index>
struct Conv {
  Images<Index> input, output;
  Divider<Index> in_per_group, out_per_group, stride_h, stride_w;
  Index kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w;

  explicit Conv(const Conv2dShape& s)
      : input(s.N, s.C, s.H, s.W, s.channels_last),
        output(s.N, s.O, s.OH, s.OW, s.channels_last),
        in_per_group(s.C / s.groups),
        out_per_group(s.O / s.groups),
        stride_h(s.stride_h),
        stride_w(s.stride_w),
        kernel_h(static_cast<Index>(s.kernel_h)),
        kernel_w(static_cast<Index>(s.kernel_w)),
        padding_h(static_cast<Index>(s.padding_top)),
        padding_w(static_cast<Index>(s.padding_left)),
        dilation_h(static_cast<Index>(s.dilation_h)),
        dilation_w(static_cast<Index>(s.dilation_w)) {}

  __device__ __forceinline__ Index weight_offset(Index o, Index c, Index i, Index j) const {
    return ((o * static_cast<Index>(in_per_group.divisor) + c) * kernel_h + i) * kernel_w + j;
  }
};

// f(Index{}) for the type of offsets; windows may begin and end outside of their image.
template <class F>
cudaError_t dispatch_conv_index(const Conv2dShape& s, F&& f) {
  const int64_t reach = s.kernel_h * s.dilation_h + s.kernel_w * s.dilation_w + s.padding_top + s.padding_left + s.H +
                        s.W + s.stride_h * s.OH + s.stride_w * s.OW;
  const int64_t weights = s.O * (s.C / s.groups) * s.kernel_h * s.kernel_w;
  return dispatch_index(s.N * (s.C * s.H * s.W + s.O * s.OH * s.OW) + weights + reach, f);
}

// Terms in one chain of additions; longer sums are taken in parts, lest they lose digits.
constexpr int longest_conv_chain = 512;

// The convolution at output position `at`, without bias: chains over c, i, j in this order.
template <class T, class Index>
__device__ Compute<T> convolve(const Conv<Index>& conv, const T* input, const T* weight, const Position<Index>& at) {
  using C = Compute<T>;
  const Index h0 = at.h * static_cast<Index>(conv.stride_h.divisor) - conv.padding_h;
  const Index w0 = at.w * static_cast<Index>(conv.stride_w.divisor) - conv.padding_w;
  const Taps<Index> rows(h0, conv.kernel_h, conv.dilation_h, static_cast<Index>(conv.input.H.divisor));
  const Taps<Index> columns(w0, conv.kernel_w, conv.dilation_w, static_cast<Index>(conv.input.W.divisor));
  const auto channels = static_cast<Index>(conv.in_per_group.divisor);
  const Index first_channel = conv.out_per_group.quotient(at.c) * channels;
  C sum = 0, chain = 0;
  int length = 0;
  for (Index c = 0; c < channels; ++c) {
    for (Index i = rows.begin; i < rows.end; ++i) {
      for (Index j = columns.begin; j < columns.end; ++j) {
        const T value =
            input[conv.input.offset(at.n, first_channel + c, h0 + i * conv.dilation_h, w0 + j * conv.dilation_w)];
        chain = multiply_add(widen(value), widen(weight[conv.weight_offset(at.c, c, i, j)]), chain);
        if (++length == longest_conv_chain) {
          sum += chain;
          chain = 0;
          length = 0;
        }
      }
    }
  }
  return sum + chain;
}

// Bias and rounding of a sum, in the order of every path of conv2d.
template <class T>
__device__ __forceinline__ T finish_conv(Compute<T> sum, const T* bias, int64_t channel) {
  return narrow<T>(bias == nullptr ? sum : sum + widen(bias[channel]));
}

}  // namespace pyops::cuda
