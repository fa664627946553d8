// Grouped convolutions that have kernels of their own: depthwise ones (conv2d/depthwise.cu), those with narrow groups
// (conv2d/grouped.cu), and the weight gradients of both (conv2d/grouped_weight_gradient.cu).
#pragma once

#include "../common.h"

namespace pyops::cuda {

// The arguments of a convolution or of its input gradient. In both, a pixel of the result sums what its taps meet in
// the source, which is the input or grad_output.
struct ConvolutionArgs {
  DType dtype;
  const Conv2dShape& shape;  // of the convolution
  const void *source, *weight, *bias;
  void* result;
  bool gradient, relu;

  ConvolutionArgs(const Conv2dArgs& x)
      : dtype(x.dtype),
        shape(x.shape),
        source(x.input),
        weight(x.weight),
        bias(x.bias),
        result(x.output),
        gradient(false),
        relu(x.relu) {}
  ConvolutionArgs(const Conv2dBackwardArgs& x)
      : dtype(x.dtype),
        shape(x.shape),
        source(x.grad_output),
        weight(x.weight),
        bias(nullptr),
        result(x.grad_input),
        gradient(true),
        relu(false) {}

  int64_t height() const { return gradient ? shape.H : shape.OH; }  // of the result
  int64_t width() const { return gradient ? shape.W : shape.OW; }
};

// One input and one output channel for each group, and kernels whose weights fit into shared memory.
inline bool is_depthwise(const Conv2dShape& s) {
  return s.is_depthwise() && s.kernel_h * s.kernel_w <= 49;
}
cudaError_t depthwise_convolution(const ConvolutionArgs&, cudaStream_t);

// Groups so narrow that one chain of additions for each tap loses few digits and that their weights fit into shared
// memory. `channels` is the number of channels, of all groups, that are summed over.
inline bool is_narrow(const Conv2dShape& s, int64_t channels) {
  const int64_t of_group = channels / s.groups;
  return s.groups > 1 && of_group > 0 && of_group <= 256 && of_group * s.kernel_h * s.kernel_w <= 2048;
}
cudaError_t grouped_convolution(const ConvolutionArgs&, cudaStream_t);

// Kernels whose sums, one for each tap, fit into the registers of a thread.
inline bool has_grouped_weight(const Conv2dShape& s) {
  const bool kernel = s.kernel_h == s.kernel_w && (s.kernel_h == 3 || s.kernel_h == 5 || s.kernel_h == 7);
  const bool stride = s.stride_h == s.stride_w && s.stride_h <= 2;
  return s.groups > 1 && s.C >= s.groups && kernel && stride && s.dilation_h == 1 && s.dilation_w == 1;
}
cudaError_t grouped_weight_gradient(const Conv2dBackwardArgs&, Workspace&, cudaStream_t);

}  // namespace pyops::cuda
