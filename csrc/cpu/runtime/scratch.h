// Working memory of the CPU kernels. Each thread has one buffer per use, which only grows, so that nothing is allocated
// after the first calls. Sizes are bounded by the block sizes of gemm.h and conv2d/input_tile.h, by kept_bytes of
// gemm.h for the panels that it keeps, by two megabytes for CHWN blocks, by the size of a weight, and (image_sums,
// planes) by the size of an image.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace pyops::cpu {

// Who uses which buffer. A function may fill a buffer while its callers use those of other groups, or other buffers of
// its own group. Only one algorithm of a convolution runs at a time in a thread, unless it is named as the caller of
// others.
enum class Scratch {
  // Operands and sums of a product: gemm/gemm.h, and every caller of macrokernel().
  a,
  a_offsets,
  a_steps,
  b,
  b_offsets,
  b_steps,
  sums,
  target_rows,
  target_vectors,
  target_lanes,
  run_steps,
  row_offsets,
  // gemm/tile_kernel.cpp
  staged_a,
  staged_b,
  // multiply_exchanged() of gemm/gemm.h
  exchanged,
  // gemm/epilogue.h
  sums_rows,
  sums_vectors,
  row_bias,
  column_bias,
  // The partial sums of a batch that is cut into parts.
  partial_sums,
  // The description of a convolution, which its algorithm reads: conv2d/problem.h and conv2d_backward.cpp.
  taps,
  gradient_taps,
  phases,
  // An algorithm of a convolution: its packed filters and its tables.
  weight,
  bias,
  classes,
  spans,
  phases_of_pairs,
  phase_filters,
  taps_of_terms,
  source_pixels,
  output_pixels,
  output_channels,
  source_steps,
  filter_steps,
  filter_rows,
  class_pixels,
  chunk_begins,
  met_taps,
  tap_runs,
  permutations,
  // A weight gradient.
  grad_rows,
  sum_rows,
  tap_begins,
  // CHWN blocks of images: conv2d/batch_lanes.cpp and conv2d_relu_max_pool2d.cpp.
  source_block,
  output_block,
  grad_block,
  pooled_block,
  argmax_block,
  block_sums,
  // The callers of other algorithms: conv2d/grouped_planes.cpp, implicit_gemm_of_planes and forward_of_chunks.
  planes,
  result_planes,
  phases_of_planes,
  between,
  // max_pool2d
  image_sums,
  patterns,
  count
};

inline void* scratch_bytes(Scratch use, size_t size) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> memory;
    size_t size = 0;
  };
  static thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& buffer = buffers[static_cast<int>(use)];
  if (size > buffer.size) {
    buffer.memory.reset();
    buffer.size = 0;
    buffer.memory.reset(std::aligned_alloc(64, (size + 63) / 64 * 64));
    if (buffer.memory == nullptr) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.memory.get();
}

// At least `count` elements of T, 64-byte aligned, with undefined content. They stay valid until the same thread asks
// again for the same use; other threads may read and write them meanwhile.
template <class T>
T* scratch(Scratch use, int64_t count) {
  return static_cast<T*>(scratch_bytes(use, count * sizeof(T)));
}

// 0, step, 2 step, ...
inline const int64_t* multiples(Scratch use, int64_t count, int64_t step) {
  int64_t* values = scratch<int64_t>(use, count);
  for (int64_t i = 0; i < count; ++i) values[i] = i * step;
  return values;
}

}  // namespace pyops::cpu
