// Long sums in two passes: partials[part][item] is the sum over one part of an item's terms, and a second kernel adds
// the parts in order, in double, and rounds once.
//
// Each of the n threads of a part adds up every n-th term, and the block adds up its threads (in a tree; for columns,
// warp by warp), so that no chain of float additions is longer than about a thousand. The number of parts depends only
// on the shape, and so does the order of the additions.
//
// On sm_80 and sm_90 the kernels for columns take 40 registers, 56 for double; the others take those of their terms, at
// most 80. Shared memory is 4 bytes for each thread, 8 for double. An SM therefore holds at least three blocks of 256
// threads.
#pragma once

#include <algorithm>

#include "../common.h"

namespace pyops::cuda {

// The number of parts of a sum of `length` terms for each of `items` results: enough blocks to fill a large GPU, but no
// part so short that starting its block costs more than its terms, nor so long that its chains lose digits.
inline int64_t sum_parts(int64_t items, int64_t length) {
  constexpr int64_t blocks = 2048, smallest = 4 * block_threads, largest = 1024 * block_threads;
  const int64_t wanted = std::min(ceil_div(blocks, items), ceil_div(length, smallest));
  return std::max({wanted, ceil_div(length, largest), int64_t{1}});
}

// Returns the sum of `value` over the block's threads in thread 0; every thread must call it.
template <class C>
__device__ C sum_of_block(C value) {
  C* values = shared_memory<C>();
  values[threadIdx.x] = value;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  return values[0];
}

// term(item, first, step, end) is the sum of the terms first, first + step, ... of an item, below end.
template <class C, class Term>
__global__ void __launch_bounds__(block_threads, 1)
    partial_sums(const __grid_constant__ Term term, Divider<int32_t> items, int64_t length, int64_t per_part,
                 C* partials) {
  auto part = static_cast<int32_t>(blockIdx.x);
  const int32_t item = take_digit(part, items);
  const int64_t end = min(length, (part + 1) * per_part);
  const C sum = sum_of_block(term(item, part * per_part + threadIdx.x, blockDim.x, end));
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Sums the columns of a matrix [rows, columns], 32 of them in a block, so that a warp reads contiguous elements.
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    partial_column_sums(const T* matrix, Divider<int32_t> groups, int64_t rows, int64_t columns, int64_t per_part,
                        Compute<T>* partials) {
  using C = Compute<T>;
  constexpr int warps = block_threads / 32;
  auto part = static_cast<int32_t>(blockIdx.x);
  const int64_t column = int64_t{take_digit(part, groups)} * 32 + threadIdx.x % 32;
  const int64_t end = min(rows, (part + 1) * per_part);
  C sum = 0;
  if (column < columns)
    for (int64_t row = part * per_part + threadIdx.x / 32; row < end; row += warps)
      sum += widen(matrix[row * columns + column]);
  C* sums = shared_memory<C>();
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || column >= columns) return;
  for (int warp = 1; warp < warps; ++warp) sum += sums[warp * 32 + threadIdx.x];
  partials[part * columns + column] = sum;
}

template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    finish_sums(const Compute<T>* partials, int64_t items, int64_t parts, T* output) {
  const int64_t item = thread_number();
  if (item >= items) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partials[part * items + item];
  output[item] = narrow<T>(sum);
}

// output[item] = the sum of the terms below length.
template <class T, class Term>
cudaError_t sum(const Term& term, int64_t items, int64_t length, T* output, Workspace& workspace, cudaStream_t stream) {
  using C = Compute<T>;
  const int64_t parts = sum_parts(items, length), per_part = ceil_div(length, parts);
  C* partials = workspace.array<C>(parts * items);
  unsigned threads = 32;  // doubled while each thread has more than four terms
  while (threads < block_threads && threads * 4 < per_part) threads *= 2;
  PYOPS_RETURN_ON_ERROR(launch(partial_sums<C, Term>, parts * items, threads, threads * sizeof(C), stream, term,
                               Divider<int32_t>(items), length, per_part, partials));
  return launch_for(finish_sums<T>, items, stream, partials, items, parts, output);
}

// output[column] = the sum over the rows of a matrix [rows, columns].
template <class T>
cudaError_t sum_columns(const T* matrix, int64_t rows, int64_t columns, T* output, Workspace& workspace,
                        cudaStream_t stream) {
  using C = Compute<T>;
  const int64_t groups = ceil_div(columns, 32), parts = sum_parts(groups, rows * 32);
  C* partials = workspace.array<C>(parts * columns);
  PYOPS_RETURN_ON_ERROR(launch(partial_column_sums<T>, parts * groups, block_threads, block_threads * sizeof(C), stream,
                               matrix, Divider<int32_t>(groups), rows, columns, ceil_div(rows, parts), partials));
  return launch_for(finish_sums<T>, columns, stream, partials, columns, parts, output);
}

}  // namespace pyops::cuda
