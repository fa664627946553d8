// The shape of a convolution as kernels see it, and how its results are finished.
#pragma once

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
  tiny,     // few channels, 3x3 and 5x5 kernels (conv2d_tiny.cu)
  product,  // a product of matrices whose elements are found in the images (conv2d_product.h)
  generic,  // a thread for each value (conv2d_generic.h): groups, and images too large for offsets of 32 bits
};

inline ConvWay conv_way(const Conv2dShape& s, bool tiny) {
  if (s.groups != 1 || largest_conv_offset(s) > PYOPS_LARGEST_32_BIT_OFFSET) return ConvWay::generic;
  return tiny ? ConvWay::tiny : ConvWay::product;
}
inline ConvWay conv_way(const Conv2dShape& s) {
  return conv_way(s, is_tiny(s, s.C, s.O));
}
inline ConvWay conv_backward_input_way(const Conv2dShape& s) {
  return conv_way(s, is_tiny_backward(s));
}
inline ConvWay conv_backward_weight_way(const Conv2dShape& s) {
  return conv_way(s, /*tiny=*/false);
}

// Bias and rounding of a sum, in the order of every path of conv2d.
template <class T>
__device__ __forceinline__ T finish_conv(Compute<T> sum, const T* bias, int64_t channel) {
  return narrow<T>(bias == nullptr ? sum : sum + widen(bias[channel]));
}

}  // namespace pyops::cuda
