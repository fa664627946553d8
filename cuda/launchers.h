// The launchers of the CUDA kernels, one for each entry of `Kernels`, and the template that turns them into that table.
// A C++ compiler can read this header as well as nvcc.
#pragma once

#include <cuda_runtime.h>

#include "../csrc/kernels.h"

namespace pyops::cuda {

// Memory for the intermediate results of one launcher, valid for the kernels that it launches on its stream.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual void* allocate(int64_t bytes) = 0;

  template <class T>
  T* array(int64_t count) {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
};

cudaError_t relu(const ReluArgs&, Workspace&, cudaStream_t);
cudaError_t relu_backward(const ReluBackwardArgs&, Workspace&, cudaStream_t);
cudaError_t relu_mask_backward(const ReluMaskBackwardArgs&, Workspace&, cudaStream_t);
cudaError_t linear(const LinearArgs&, Workspace&, cudaStream_t);
cudaError_t linear_backward(const LinearBackwardArgs&, Workspace&, cudaStream_t);
cudaError_t conv2d(const Conv2dArgs&, Workspace&, cudaStream_t);
cudaError_t conv2d_backward(const Conv2dBackwardArgs&, Workspace&, cudaStream_t);
cudaError_t max_pool2d(const MaxPool2dArgs&, Workspace&, cudaStream_t);
cudaError_t max_pool2d_backward(const MaxPool2dBackwardArgs&, Workspace&, cudaStream_t);
cudaError_t max_pool2d_gather(const MaxPool2dGatherArgs&, Workspace&, cudaStream_t);
cudaError_t max_pool2d_indices(const MaxPool2dIndicesArgs&, Workspace&, cudaStream_t);
cudaError_t conv2d_relu_max_pool2d(const Conv2dReluMaxPool2dArgs&, Workspace&, cudaStream_t);

// max_pool2d followed by relu. A window whose maximum is neither above 0 nor NaN gives 0 and the argmax dead_window. A
// null argmax is not written.
cudaError_t max_pool2d_rectified(const MaxPool2dArgs&, cudaStream_t);

// Run<launcher>::run calls the launcher with a workspace and a stream, and handles its errors.
template <template <auto> class Run>
constexpr Kernels kernel_table() {
  return {
      Run<&relu>::run,
      Run<&relu_backward>::run,
      Run<&relu_mask_backward>::run,
      Run<&linear>::run,
      Run<&linear_backward>::run,
      Run<&conv2d>::run,
      Run<&conv2d_backward>::run,
      Run<&max_pool2d>::run,
      Run<&max_pool2d_backward>::run,
      Run<&max_pool2d_gather>::run,
      Run<&max_pool2d_indices>::run,
      Run<&conv2d_relu_max_pool2d>::run,
      nullptr,  // conv2d_relu_max_pool2d_backward: the two backward ops are called in turn
      false,    // reads_channels_last_weight: the implicit GEMM reorders a contiguous weight
  };
}

}  // namespace pyops::cuda
