// The shape of a convolution as the kernels see it, and the epilogue of a sum.
#pragma once

#include <string_view>

#include "../algorithms.h"
#include "../common/images.h"
#include "direct_small.h"
#include "groups.h"

namespace pyops::cuda {

template <class Index>
struct Conv {
  Images<Index> input, output;
  Divider<Index> in_per_group, out_per_group, kernel_h, kernel_w, stride_h, stride_w;
  Index padding_h, padding_w, dilation_h, dilation_w;

  explicit Conv(const Conv2dShape& s)
      : input(s.N, s.C, s.H, s.W, s.channels_last),
        output(s.N, s.O, s.OH, s.OW, s.channels_last),
        in_per_group(s.C / s.groups),
        out_per_group(s.O / s.groups),
        kernel_h(s.kernel_h),
        kernel_w(s.kernel_w),
        stride_h(s.stride_h),
        stride_w(s.stride_w),
        padding_h(static_cast<Index>(s.padding_top)),
        padding_w(static_cast<Index>(s.padding_left)),
        dilation_h(static_cast<Index>(s.dilation_h)),
        dilation_w(static_cast<Index>(s.dilation_w)) {}

  // The row and column of the input that a tap of an output pixel reads; they may lie outside the image.
  __device__ __forceinline__ Index input_h(Index y, Index i) const {
    return y * stride_h.value() - padding_h + i * dilation_h;
  }
  __device__ __forceinline__ Index input_w(Index x, Index j) const {
    return x * stride_w.value() - padding_w + j * dilation_w;
  }

  __device__ __forceinline__ Index weight_offset(Index o, Index c, Index i, Index j) const {
    return ((o * in_per_group.value() + c) * kernel_h.value() + i) * kernel_w.value() + j;
  }
};

// An upper bound of all offsets. Receptive fields may begin and end outside their image.
inline int64_t largest_conv_offset(const Conv2dShape& s) {
  const int64_t reach = s.kernel_h * s.dilation_h + s.kernel_w * s.dilation_w + s.padding_top + s.padding_left + s.H +
                        s.W + s.stride_h * s.OH + s.stride_w * s.OW;
  const int64_t weights = (s.O + s.C) * (s.C / s.groups) * s.kernel_h * s.kernel_w;
  return s.N * (s.C * s.H * s.W + s.O * s.OH * s.OW) + weights + reach;
}

// Whether offsets need 64 bits, which only the direct algorithm (conv2d/direct.h) has.
inline bool needs_wide_offsets(const Conv2dShape& s) {
  return largest_conv_offset(s) > PYOPS_LARGEST_32_BIT_OFFSET;
}

// Which shapes the algorithms support. `channels` is the number of channels, of all groups, that are summed over.
inline bool supports_implicit_gemm(const Conv2dShape& s) {
  return !needs_wide_offsets(s) && s.groups == 1;
}
inline bool supports_depthwise(const Conv2dShape& s) {
  return !needs_wide_offsets(s) && is_depthwise(s);
}
inline bool supports_grouped(const Conv2dShape& s, int64_t channels) {
  return !needs_wide_offsets(s) && is_narrow(s, channels);
}

// Adds the bias to a sum and rounds it, in the order that every algorithm of conv2d uses.
template <class T>
__device__ __forceinline__ T finish_conv(Compute<T> sum, const T* bias, int64_t channel) {
  return narrow<T>(bias == nullptr ? sum : sum + widen(bias[channel]));
}

// The algorithms of conv2d whose work conv2d_relu_max_pool2d can do in one kernel with its own.
inline constexpr std::string_view direct_small_name = "direct_small", direct_name = "direct";

// The name of the algorithm that conv2d chooses.
std::string_view algorithm_of(const Launch<Conv2dArgs>&);

}  // namespace pyops::cuda
