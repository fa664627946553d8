// What the CPU kernels choose between (csrc/algorithms.h), and how often their other parts have run. The fuzzer
// (tests/fuzz.py) reads the counts through the module's algorithm_counts() and fails if something was never reached.
#pragma once

#include "../../algorithms.h"
#include "../common.h"

namespace pyops::cpu {

// An algorithm of a table that needs no more than what csrc/algorithms.h asks for.
template <class Problem>
struct Algorithm {
  const char *name, *file;
  bool (*supports)(const Problem&);
  bool (*profitable)(const Problem&);
  void (*run)(const Problem&);
};

template <class Problem>
bool always(const Problem&) {
  return true;
}

namespace choices {
inline Choice gemm("gemm");
inline Choice linear_weight_gradient("linear.weight_gradient");
inline Choice conv2d("conv2d.forward");
inline Choice conv2d_backward("conv2d.backward");  // all gradients together, or each by itself, as the next two say
inline Choice conv2d_input_gradient("conv2d.input_gradient");
inline Choice conv2d_weight_gradient("conv2d.weight_gradient");
inline Choice max_pool2d("max_pool2d.forward");
inline Choice max_pool2d_backward("max_pool2d.backward");
inline Choice conv2d_relu_max_pool2d("conv2d_relu_max_pool2d.forward");
inline Choice conv2d_relu_max_pool2d_backward("conv2d_relu_max_pool2d.backward");

inline Choice* const all[] = {
    &gemm,
    &linear_weight_gradient,
    &conv2d,
    &conv2d_backward,
    &conv2d_input_gradient,
    &conv2d_weight_gradient,
    &max_pool2d,
    &max_pool2d_backward,
    &conv2d_relu_max_pool2d,
    &conv2d_relu_max_pool2d_backward,
};

// The convolution of planes within grouped_planes, which is not forced and whose runs are not shown.
inline Choice conv2d_planes("conv2d.planes");
}  // namespace choices

// Parts of the kernels that are not chosen between, by name.
struct Part {
  const char* name;
  std::atomic<int64_t> runs{0};
};
namespace parts {
inline Part relu{"relu"}, relu_with_mask{"relu.with_mask"};
inline Part relu_backward{"relu.backward"}, relu_mask_backward{"relu.mask_backward"};
inline Part nonfinite_weight{"conv2d.nonfinite_weight"};
inline Part nonfinite_grad_output{"conv2d.weight_gradient.nonfinite_grad_output"};
inline Part partial_kernel{"conv2d.weight_gradient.partial_kernel"};
inline Part max_pool2d_gather{"max_pool2d.gather"}, max_pool2d_indices{"max_pool2d.indices"};

inline Part* const all[] = {
    &relu,
    &relu_with_mask,
    &relu_backward,
    &relu_mask_backward,
    &nonfinite_weight,
    &nonfinite_grad_output,
    &partial_kernel,
    &max_pool2d_gather,
    &max_pool2d_indices,
};
}  // namespace parts

}  // namespace pyops::cpu
