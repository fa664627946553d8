// Working memory of the CPU kernels. Each thread has one buffer per use, which only grows, so that nothing is allocated
// after the first calls. Sizes are bounded by the block sizes of gemm.h and conv2d/input_tile.h, by four megabytes for
// the panels that gemm.h keeps and two for CHWN blocks, by the size of a weight, and (image_sums, planes) by the size
// of an image.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace pyops::cpu {

enum class Scratch {
  a,
  a_offsets,
  a_steps,
  b,
  b_offsets,
  b_steps,
  sums,
  sums_rows,
  sums_vectors,
  row_bias,
  column_bias,
  target_rows,
  target_vectors,
  target_lanes,
  grad_rows,
  weight,
  taps,
  phases,
  phases_of_pairs,
  spans,
  classes,
  chunk_begins,
  phase_filters,
  partial_sums,
  image_sums,
  between,
  planes,
  result_planes,
  phases_of_planes,
  gradient_taps,
  source_block,
  output_block,
  grad_block,
  block_sums,
  class_pixels,
  met_taps,
  taps_of_terms,
  sum_rows,
  row_offsets,
  run_steps,
  filter_steps,
  filter_rows,
  source_steps,
  source_pixels,
  output_pixels,
  output_channels,
  bias,
  patterns,
  pooled_block,
  argmax_block,
  tap_runs,
  tap_begins,
  permutations,
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
