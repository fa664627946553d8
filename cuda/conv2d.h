// The shape of a convolution as kernels see it, and how its results are finished.
#pragma once

#include "conv2d_groups.h"
#include "conv2d_tiny.h"
#include "images.h"

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

  // The row and column of the input that a tap of an output pixel meets, maybe outside.
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

// A bound of every offset; windows may begin and end outside of their image.
inline int64_t largest_conv_offset(const Conv2dShape& s) {
  const int64_t reach = s.kernel_h * s.dilation_h + s.kernel_w * s.dilation_w + s.padding_top + s.padding_left + s.H +
                        s.W + s.stride_h * s.OH + s.stride_w * s.OW;
  const int64_t weights = (s.O + s.C) * (s.C / s.groups) * s.kernel_h * s.kernel_w;
  return s.N * (s.C * s.H * s.W + s.O * s.OH * s.OW) + weights + reach;
}

// The ways to compute a convolution and its gradients.
enum class ConvWay {
  tiny,       // few channels, 3x3 and 5x5 kernels (conv2d_tiny.cu)
  product,    // a product of matrices whose elements are found in the images (conv2d_product.h)
  depthwise,  // a window for each channel (conv2d_depthwise.cu)
  grouped,    // narrow groups (conv2d_grouped.cu); of the weight's gradient all groups (conv2d_grouped_weight.cu)
  generic,    // a thread for each value (conv2d_generic.h): other groups, and images too large for offsets of 32 bits
};

inline bool needs_wide_offsets(const Conv2dShape& s) {
  return largest_conv_offset(s) > PYOPS_LARGEST_32_BIT_OFFSET;
}
inline ConvWay conv_way(const Conv2dShape& s) {
  if (needs_wide_offsets(s)) return ConvWay::generic;
  if (s.groups == 1) return is_tiny(s, s.C, s.O) ? ConvWay::tiny : ConvWay::product;
  if (is_depthwise(s)) return ConvWay::depthwise;
  return is_narrow(s, s.C) ? ConvWay::grouped : ConvWay::generic;
}
inline ConvWay conv_backward_input_way(const Conv2dShape& s) {
  if (needs_wide_offsets(s)) return ConvWay::generic;
  if (s.groups == 1) return is_tiny_backward(s) ? ConvWay::tiny : ConvWay::product;
  if (is_depthwise(s)) return ConvWay::depthwise;
  return is_narrow(s, s.O) ? ConvWay::grouped : ConvWay::generic;
}
inline ConvWay conv_backward_weight_way(const Conv2dShape& s) {
  if (needs_wide_offsets(s)) return ConvWay::generic;
  if (s.groups == 1) return ConvWay::product;
  return has_grouped_weight(s) ? ConvWay::grouped : ConvWay::generic;
}

// Bias and rounding of a sum, in the order of every path of conv2d.
template <class T>
__device__ __forceinline__ T finish_conv(Compute<T> sum, const T* bias, int64_t channel) {
  return narrow<T>(bias == nullptr ? sum : sum + widen(bias[channel]));
}

}  // namespace pyops::cuda
