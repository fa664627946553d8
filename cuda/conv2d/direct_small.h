// Direct convolutions with few channels and 3x3 or 5x5 kernels, like those of LeNet (conv2d/direct_small.cu).
#pragma once

#include "../common.h"

namespace pyops::cuda {

// Whether these kernels take a convolution of this shape from `in` to `out` channels.
inline bool supports_direct_small(const Conv2dShape& s, int64_t in, int64_t out) {
  const bool kernel = s.kernel_h == s.kernel_w && (s.kernel_h == 3 || s.kernel_h == 5);
  const bool unit = s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
  return s.groups == 1 && kernel && unit && in <= 16 && out <= 32;
}

cudaError_t direct_small_forward(const Conv2dArgs&, cudaStream_t);

// The input gradient is a convolution of grad_output by the kernel rotated by 180 degrees.
inline bool supports_direct_small_input_gradient(const Conv2dShape& s) {
  return supports_direct_small(s, s.O, s.C) && s.padding_top < s.kernel_h && s.padding_left < s.kernel_w;
}
cudaError_t direct_small_input_gradient(const Conv2dBackwardArgs&, cudaStream_t);

// The fused op is taken if its pooling windows are 2x2 and do not overlap.
inline bool supports_direct_small_pooled(const Conv2dReluMaxPool2dArgs& x) {
  const MaxPool2dShape& p = x.pool;
  return supports_direct_small(x.conv.shape, x.conv.shape.C, x.conv.shape.O) && p.kernel_h == 2 && p.kernel_w == 2 &&
         p.stride_h == 2 && p.stride_w == 2 && p.padding_h == 0 && p.padding_w == 0 && p.dilation_h == 1 &&
         p.dilation_w == 1;
}
cudaError_t direct_small_pooled(const Conv2dReluMaxPool2dArgs&, cudaStream_t);

}  // namespace pyops::cuda
