// The names of all algorithms, and how often each has run in this process. The fuzzer (tests/fuzz.py) reads the counts
// through the module's algorithm_counts() and fails if an algorithm was never reached.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "../common.h"

namespace pyops::cpu {

// clang-format off
#define PYOPS_ALGORITHMS(A)                                                            \
  A(relu, "relu")                                                                      \
  A(relu_with_mask, "relu.with_mask")                                                  \
  A(relu_backward, "relu.backward")                                                    \
  A(relu_mask_backward, "relu.mask_backward")                                          \
  A(gemm_one_row, "gemm.one_row")                                                  \
  A(gemm_tiles_in_place, "gemm.tiles_in_place")                                        \
  A(gemm_tiles_of_panels, "gemm.tiles_of_panels")                                      \
  A(linear_outer_product, "linear.weight_gradient.outer_product")                      \
  A(linear_split_k, "linear.weight_gradient.split_k")                                  \
  A(conv2d_grouped_planes, "conv2d.grouped_planes")                                    \
  A(conv2d_batch_lanes, "conv2d.batch_lanes")                                          \
  A(conv2d_depthwise, "conv2d.depthwise")                                              \
  A(conv2d_depthwise_3x3, "conv2d.depthwise_3x3")                                      \
  A(conv2d_implicit_gemm_width, "conv2d.implicit_gemm_width")                          \
  A(conv2d_direct_3wide, "conv2d.direct_3wide")                                        \
  A(conv2d_implicit_gemm_channels, "conv2d.implicit_gemm_channels")                    \
  A(conv2d_nonfinite_weight, "conv2d.nonfinite_weight")                                \
  A(input_gradient_linear, "conv2d.input_gradient.linear")                             \
  A(input_gradient_kn2row, "conv2d.input_gradient.kn2row")                             \
  A(weight_gradient_depthwise, "conv2d.weight_gradient.depthwise")                     \
  A(weight_gradient_depthwise_3x3, "conv2d.weight_gradient.depthwise_3x3")             \
  A(weight_gradient_grouped_planes, "conv2d.weight_gradient.grouped_planes")           \
  A(weight_gradient_outputs, "conv2d.weight_gradient.implicit_gemm_outputs")           \
  A(weight_gradient_inputs, "conv2d.weight_gradient.implicit_gemm_inputs")             \
  A(weight_gradient_width, "conv2d.weight_gradient.dot_products_width")                \
  A(weight_gradient_batch_lanes, "conv2d.weight_gradient.batch_lanes")                 \
  A(weight_gradient_partial_kernel, "conv2d.weight_gradient.partial_kernel")           \
  A(weight_gradient_nonfinite, "conv2d.weight_gradient.nonfinite_grad_output")         \
  A(max_pool2d_channels, "max_pool2d.channels")                                        \
  A(max_pool2d_columns, "max_pool2d.columns")                                          \
  A(max_pool2d_gathered_windows, "max_pool2d.gathered_windows")                        \
  A(max_pool2d_windows, "max_pool2d.windows")                                          \
  A(max_pool2d_backward_row_pairs, "max_pool2d.backward.row_pairs")                    \
  A(max_pool2d_backward_plane_scatter, "max_pool2d.backward.plane_scatter")            \
  A(max_pool2d_backward_channel_tiles, "max_pool2d.backward.channel_tiles")            \
  A(max_pool2d_backward_channel_gather, "max_pool2d.backward.channel_gather")          \
  A(max_pool2d_backward_scatter, "max_pool2d.backward.scatter")                        \
  A(max_pool2d_gather, "max_pool2d.gather")                                            \
  A(max_pool2d_indices, "max_pool2d.indices")                                          \
  A(fused_pool_2x2, "conv2d_relu_max_pool2d.in_registers_2x2")                         \
  A(fused_batch_lanes, "conv2d_relu_max_pool2d.batch_lanes")                           \
  A(fused_chunks, "conv2d_relu_max_pool2d.chunks")                                     \
  A(fused_backward_batch_lanes, "conv2d_relu_max_pool2d.backward.batch_lanes")

// Algorithms that need instructions to permute the lanes of a vector.
#define PYOPS_PERMUTING_ALGORITHMS(A)                                                  \
  A(conv2d_grouped_lanes, "conv2d.grouped_lanes")                                      \
  A(weight_gradient_grouped_lanes, "conv2d.weight_gradient.grouped_lanes")

#define PYOPS_AVX512_ALGORITHMS(A)                                                     \
  A(gemm_one_row_transposed_2, "gemm.one_row_transposed_2")                              \
  A(gemm_one_row_transposed, "gemm.one_row_transposed")                                    \
  A(max_pool2d_2x2, "max_pool2d.2x2")                                                  \
  A(max_pool2d_backward_patterns, "max_pool2d.backward.patterns")                      \
  A(max_pool2d_backward_2x2, "max_pool2d.backward.2x2")                                \
  A(max_pool2d_backward_3x3, "max_pool2d.backward.3x3")
// clang-format on

#define PYOPS_ENUMERATOR(enumerator, name) enumerator,
#define PYOPS_NAME(enumerator, name) name,

enum class Algorithm {
  PYOPS_ALGORITHMS(PYOPS_ENUMERATOR)
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
      PYOPS_PERMUTING_ALGORITHMS(PYOPS_ENUMERATOR)
#endif
#if defined(CPU_CAPABILITY_AVX512)
          PYOPS_AVX512_ALGORITHMS(PYOPS_ENUMERATOR)
#endif
              count
};

constexpr const char* algorithm_names[] = {PYOPS_ALGORITHMS(PYOPS_NAME)
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
                                               PYOPS_PERMUTING_ALGORITHMS(PYOPS_NAME)
#endif
#if defined(CPU_CAPABILITY_AVX512)
                                                   PYOPS_AVX512_ALGORITHMS(PYOPS_NAME)
#endif
};

#undef PYOPS_ENUMERATOR
#undef PYOPS_NAME

inline std::array<std::atomic<int64_t>, static_cast<size_t>(Algorithm::count)> algorithm_counts{};

// Counts one run of the algorithm. A load and a store replace one atomic addition, which would lock the bus in every
// call. Threads that count at the same time may lose a count, but a count never returns to zero.
inline void count_run(Algorithm algorithm) {
  std::atomic<int64_t>& runs = algorithm_counts[static_cast<size_t>(algorithm)];
  runs.store(runs.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

}  // namespace pyops::cpu
