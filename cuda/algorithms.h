// What the launchers choose between (csrc/algorithms.h).
#pragma once

#include "../csrc/algorithms.h"
#include "launchers.h"

namespace pyops::cuda {

// What a launcher is given.
template <class Args>
struct Launch {
  const Args& args;
  Workspace& workspace;
  cudaStream_t stream;
};

template <class Problem>
struct Algorithm {
  const char *name, *file;
  bool (*supports)(const Problem&);
  bool (*profitable)(const Problem&);
  cudaError_t (*run)(const Problem&);
};

template <class Problem>
bool always(const Problem&) {
  return true;
}

namespace choices {
inline Choice gemm("gemm");
inline Choice conv2d("conv2d.forward");
inline Choice conv2d_input_gradient("conv2d.input_gradient");
inline Choice conv2d_weight_gradient("conv2d.weight_gradient");
inline Choice conv2d_relu_max_pool2d("conv2d_relu_max_pool2d.forward");
inline Choice max_pool2d_backward("max_pool2d.backward");

inline Choice* const all[] = {
    &gemm, &conv2d, &conv2d_input_gradient, &conv2d_weight_gradient, &conv2d_relu_max_pool2d, &max_pool2d_backward};
}  // namespace choices

}  // namespace pyops::cuda
