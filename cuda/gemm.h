// product(row, column) = sum over k of a(row, k) b(column, k), for operands that are found by functors.
//
// A block of 256 threads computes a tile of the product, in steps of 16 along k: the elements of both operands for a
// step go to shared memory once and are read from there by all threads, each of which keeps a square of the tile in
// registers. The elements of the next step are on their way from memory meanwhile. Each sum is one chain of fused
// multiply-adds in the order of k.
//
// Where the tiles are too few for a GPU, or k is long, k is split into parts whose products go to the workspace and are
// added in their order, in double. Tile and parts depend on the shape only.
// Registers (sm_90): of linear at most 80 for float and 128 for double. Shared memory: 8.5 KB for float, 17 for double.
#pragma once

#include <algorithm>

#include "common.h"

namespace pyops::cuda {

constexpr int gemm_depth = 16;  // of a step along k

// Element (row, k) of a matrix of any two strides. `along_k` tells how neighbouring threads read.
template <class T, class Index, bool contiguous_k>
struct Matrix {
  static constexpr bool along_k = contiguous_k;
  const T* data;
  Index stride;  // of the dimension that is not contiguous
  __device__ __forceinline__ Compute<T> operator()(Index row, Index k) const {
    return widen(data[contiguous_k ? row * stride + k : k * stride + row]);
  }
};

// What becomes of a finished sum: bias, rounding, rectification.
template <class T, class Index>
struct StoreRows {
  T* output;      // [rows, columns]
  const T* bias;  // [columns], or null
  Index columns;
  bool relu;
  __device__ __forceinline__ void operator()(Index row, Index column, Compute<T> sum) const {
    if (bias != nullptr) sum += widen(bias[column]);
    const T rounded = narrow<T>(sum);
    output[row * columns + column] = relu ? narrow<T>(rectified(widen(rounded))) : rounded;
  }
};

template <class Index>
struct GemmShape {
  Index rows, columns, depth, depth_per_part;
  Divider<Index> row_tiles, column_tiles;
};

// One operand's elements for a step, on their way from memory to shared memory.
template <class C, int tile, bool along_k>
struct Staged {
  static constexpr int count = tile * gemm_depth / block_threads;
  C values[count];

  static __device__ __forceinline__ int row(int i) {
    const int n = i * block_threads + threadIdx.x;
    return along_k ? n / gemm_depth : n % tile;
  }
  static __device__ __forceinline__ int k(int i) {
    const int n = i * block_threads + threadIdx.x;
    return along_k ? n % gemm_depth : n / tile;
  }

  template <class Operand, class Index>
  __device__ __forceinline__ void load(const Operand& operand, Index first_row, Index rows, Index first_k,
                                       Index end_k) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Index at_row = first_row + row(i), at_k = first_k + k(i);
      values[i] = at_row < rows && at_k < end_k ? operand(at_row, at_k) : C(0);
    }
  }
  template <int pitch>
  __device__ __forceinline__ void store(C* shared) const {
#pragma unroll
    for (int i = 0; i < count; ++i) shared[k(i) * pitch + row(i)] = values[i];
  }
};

// Partial sums go to partials[part][row][column]; without partials there is one part, which goes to `store`.
template <int tile, class C, class Index, class A, class B, class Store>
__global__ void __launch_bounds__(block_threads, 1)
    gemm_kernel(const __grid_constant__ A a, const __grid_constant__ B b, const __grid_constant__ Store store,
                const __grid_constant__ GemmShape<Index> shape, C* partials) {
  constexpr int side = 16, square = tile / side, pitch = tile + 4;
  C* a_shared = shared_memory<C>();
  C* b_shared = a_shared + gemm_depth * pitch;
  auto part = static_cast<Index>(blockIdx.x);
  const Index first_column = take_digit(part, shape.column_tiles) * tile;
  const Index first_row = take_digit(part, shape.row_tiles) * tile;
  const Index first_k = part * shape.depth_per_part;
  const Index end_k = min(shape.depth, first_k + shape.depth_per_part);
  const int my_row = threadIdx.x / side * square, my_column = threadIdx.x % side * square;

  C sums[square][square] = {};
  Staged<C, tile, A::along_k> next_a;
  Staged<C, tile, B::along_k> next_b;
  next_a.load(a, first_row, shape.rows, first_k, end_k);
  next_b.load(b, first_column, shape.columns, first_k, end_k);
  for (Index k = first_k; k < end_k; k += gemm_depth) {
    __syncthreads();  // the step before has been read
    next_a.template store<pitch>(a_shared);
    next_b.template store<pitch>(b_shared);
    __syncthreads();
    next_a.load(a, first_row, shape.rows, k + gemm_depth, end_k);
    next_b.load(b, first_column, shape.columns, k + gemm_depth, end_k);
#pragma unroll
    for (int step = 0; step < gemm_depth; ++step) {
      C a_values[square], b_values[square];
#pragma unroll
      for (int i = 0; i < square; ++i) {
        a_values[i] = a_shared[step * pitch + my_row + i];
        b_values[i] = b_shared[step * pitch + my_column + i];
      }
#pragma unroll
      for (int i = 0; i < square; ++i)
#pragma unroll
        for (int j = 0; j < square; ++j) sums[i][j] = multiply_add(a_values[i], b_values[j], sums[i][j]);
    }
  }

#pragma unroll
  for (int i = 0; i < square; ++i) {
#pragma unroll
    for (int j = 0; j < square; ++j) {
      const Index row = first_row + my_row + i, column = first_column + my_column + j;
      if (row >= shape.rows || column >= shape.columns) continue;
      if (partials == nullptr) {
        store(row, column, sums[i][j]);
      } else {
        partials[(static_cast<int64_t>(part) * shape.rows + row) * shape.columns + column] = sums[i][j];
      }
    }
  }
}

template <class C, class Index, class Store>
__global__ void __launch_bounds__(block_threads, 1)
    finish_gemm(const C* partials, int64_t parts, Divider<Index> columns, int64_t count,
                const __grid_constant__ Store store) {
  const int64_t number = thread_number();
  if (number >= count) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partials[part * count + number];
  auto row = static_cast<Index>(number);
  const Index column = take_digit(row, columns);
  store(row, column, static_cast<C>(sum));
}

// Store is called with each sum once.
template <class C, class Index, class A, class B, class Store>
cudaError_t gemm(int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b, const Store& store,
                 Workspace& workspace, cudaStream_t stream) {
  constexpr int64_t enough_blocks = 128, longest_chain = 4096, shortest_part = 8 * gemm_depth;
  const auto run = [&](auto tile) {
    constexpr int size = decltype(tile)::value;
    const int64_t row_tiles = ceil_div(rows, size), column_tiles = ceil_div(columns, size);
    const int64_t wanted = std::min(ceil_div(enough_blocks, row_tiles * column_tiles), ceil_div(depth, shortest_part));
    const int64_t most_parts = std::max({wanted, ceil_div(depth, longest_chain), int64_t{1}});
    const int64_t per_part = ceil_div(ceil_div(depth, most_parts), gemm_depth) * gemm_depth;
    const int64_t parts = std::max(ceil_div(depth, std::max<int64_t>(per_part, 1)), int64_t{1});
    C* partials = parts == 1 ? nullptr : workspace.array<C>(parts * rows * columns);
    const GemmShape<Index> shape{static_cast<Index>(rows),  static_cast<Index>(columns),
                                 static_cast<Index>(depth), static_cast<Index>(per_part),
                                 Divider<Index>(row_tiles), Divider<Index>(column_tiles)};
    constexpr size_t shared_bytes = 2 * gemm_depth * (size + 4) * sizeof(C);
    PYOPS_RETURN_ON_ERROR(launch(gemm_kernel<size, C, Index, A, B, Store>, row_tiles * column_tiles * parts,
                                 block_threads, shared_bytes, stream, a, b, store, shape, partials));
    if (parts == 1) return cudaSuccess;
    return launch_for(finish_gemm<C, Index, Store>, rows * columns, stream, static_cast<const C*>(partials), parts,
                      Divider<Index>(columns), rows * columns, store);
  };
  const bool few_large_tiles = ceil_div(rows, 64) * ceil_div(columns, 64) < enough_blocks / 2;
  return few_large_tiles ? run(std::integral_constant<int, 32>()) : run(std::integral_constant<int, 64>());
}

}  // namespace pyops::cuda
