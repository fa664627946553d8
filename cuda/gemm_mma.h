// The product of gemm.h for 16-bit elements on tensor cores, with float sums.
//
// A block of 256 threads computes a tile of 128 x 128, a warp 64 x 32 of it, in steps of 32 along k. A step's elements
// go from memory through registers, while the step before is multiplied, to the other one of two tiles of each operand
// in shared memory. They travel eight at a time along the dimension in which the operand is contiguous, in one access
// of 16 bytes where it says that it can be read so, and lie in shared memory as they do in memory: ldmatrix turns those
// whose k is not contiguous. Rows are padded by 16 bytes, so that neither it nor the stores meet in a bank.
//
// Registers (sm_90): see gemm.h. Shared memory: 40 KB.
#pragma once

#include "tensor_cores.h"

namespace pyops::cuda {

constexpr int mma_tile = 128, mma_depth = 32, mma_warp_rows = 64, mma_warp_columns = 32;
constexpr int pack16 = 8;  // elements in 16 bytes

// How one operand's tile lies in shared memory.
template <bool along_k>
struct TileLayout {
  static constexpr int pitch = (along_k ? mma_depth : mma_tile) + pack16;
  static constexpr int elements = (along_k ? mma_tile : mma_depth) * pitch;
  static __device__ __forceinline__ int at(int row, int k) { return along_k ? row * pitch + k : k * pitch + row; }
};
// The larger one's, for either.
constexpr int mma_tile_elements =
    TileLayout<true>::elements > TileLayout<false>::elements ? TileLayout<true>::elements : TileLayout<false>::elements;
constexpr size_t mma_shared_bytes = 4 * mma_tile_elements * 2;

// One operand's elements for a step, on their way.
template <class T, bool along_k>
struct StagedPacks {
  static constexpr int count = mma_tile * mma_depth / pack16 / block_threads;
  Pack<T> packs[count];

  static __device__ __forceinline__ int row(int i) {
    const int n = i * block_threads + threadIdx.x;
    return along_k ? n / (mma_depth / pack16) : n % (mma_tile / pack16) * pack16;
  }
  static __device__ __forceinline__ int k(int i) {
    const int n = i * block_threads + threadIdx.x;
    return along_k ? n % (mma_depth / pack16) * pack16 : n / (mma_tile / pack16);
  }

  template <class Operand, class Index>
  __device__ __forceinline__ void load(const Operand& operand, Index first_row, Index rows, Index first_k,
                                       Index end_k) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Index at_row = first_row + row(i), at_k = first_k + k(i);
      const Index room = along_k ? end_k - at_k : rows - at_row;
      const bool exists = along_k ? at_row < rows : at_k < end_k;
      if constexpr (Operand::has_packs) {
        if (operand.packs && exists && room >= pack16) {
          packs[i] = operand.pack(at_row, at_k);
          continue;
        }
      }
#pragma unroll
      for (int e = 0; e < pack16; ++e)
        packs[i].values[e] =
            exists && e < room ? operand(at_row + (along_k ? 0 : e), at_k + (along_k ? e : 0)) : narrow<T>(0.0f);
    }
  }
  __device__ __forceinline__ void store(T* shared) const {
#pragma unroll
    for (int i = 0; i < count; ++i)
      *reinterpret_cast<Pack<T>*>(shared + TileLayout<along_k>::at(row(i), k(i))) = packs[i];
  }
};

// The fragments of 16 rows and 16 k: the matrices of rows 0 and 8 with k 0, then with k 8; or, for `k_first`, of row 0
// with k 0 and 8, then row 8.
template <class T, bool along_k, bool k_first>
__device__ __forceinline__ void load_fragments(uint32_t (&result)[4], const T* shared, int row, int k) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  row += (k_first ? matrix / 2 : matrix % 2) * 8;
  k += (k_first ? matrix % 2 : matrix / 2) * 8;
  load_matrices<!along_k>(
      result, shared + (along_k ? TileLayout<true>::at(row + lane % 8, k) : TileLayout<false>::at(row, k + lane % 8)));
}

template <class T, class Index, class A, class B, class Store>
__global__ void __launch_bounds__(block_threads, 1)
    mma_kernel(const __grid_constant__ A a, const __grid_constant__ B b, const __grid_constant__ Store store,
               const __grid_constant__ GemmShape<Index> shape, float* partials) {
  constexpr int row_fragments = mma_warp_rows / 16, column_fragments = mma_warp_columns / 8;
  T* shared = shared_memory<T>();
  auto part = static_cast<Index>(blockIdx.x);
  const Index first_column = take_digit(part, shape.column_tiles) * mma_tile;
  const Index first_row = take_digit(part, shape.row_tiles) * mma_tile;
  const Index first_k = part * shape.depth_per_part;
  const Index end_k = min(shape.depth, first_k + shape.depth_per_part);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / (mma_tile / mma_warp_columns) * mma_warp_rows;
  const int warp_column = warp % (mma_tile / mma_warp_columns) * mma_warp_columns;

  float sums[row_fragments][column_fragments][4] = {};
  StagedPacks<T, A::along_k> next_a;
  StagedPacks<T, B::along_k> next_b;
  next_a.load(a, first_row, shape.rows, first_k, end_k);
  next_b.load(b, first_column, shape.columns, first_k, end_k);
  int which = 0;
  for (Index k = first_k; k < end_k; k += mma_depth, which ^= 1) {
    T* a_shared = shared + which * 2 * mma_tile_elements;
    T* b_shared = a_shared + mma_tile_elements;
    next_a.store(a_shared);
    next_b.store(b_shared);
    __syncthreads();  // and the tiles of two steps ago have been read by all
    next_a.load(a, first_row, shape.rows, k + mma_depth, end_k);
    next_b.load(b, first_column, shape.columns, k + mma_depth, end_k);
#pragma unroll
    for (int step = 0; step < mma_depth; step += 16) {
      uint32_t of_a[row_fragments][4], of_b[column_fragments / 2][4];
#pragma unroll
      for (int i = 0; i < row_fragments; ++i)
        load_fragments<T, A::along_k, false>(of_a[i], a_shared, warp_row + i * 16, step);
#pragma unroll
      for (int j = 0; j < column_fragments / 2; ++j)
        load_fragments<T, B::along_k, true>(of_b[j], b_shared, warp_column + j * 16, step);
#pragma unroll
      for (int i = 0; i < row_fragments; ++i)
#pragma unroll
        for (int j = 0; j < column_fragments; ++j)
          multiply_matrices<T>(sums[i][j], of_a[i], of_b[j / 2][j % 2 * 2], of_b[j / 2][j % 2 * 2 + 1]);
    }
  }

#pragma unroll
  for (int i = 0; i < row_fragments; ++i) {
#pragma unroll
    for (int j = 0; j < column_fragments; ++j) {
#pragma unroll
      for (int s = 0; s < 4; ++s)
        store_sum(store, partials, part, shape, first_row + warp_row + i * 16 + lane / 4 + s / 2 * 8,
                  first_column + warp_column + j * 8 + lane % 4 * 2 + s % 2, sums[i][j][s]);
    }
  }
}

}  // namespace pyops::cuda
