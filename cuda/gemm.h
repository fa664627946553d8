// product(row, column) = sum over k of a(row, k) b(column, k), for operands that are found by functors.
//
// A block of 256 threads computes a tile of the product, in steps of 16 along k: the elements of both operands for a
// step go to shared memory once and are read from there by all threads, each of which keeps a square of the tile in
// registers: of 2, 4 or 8, for tiles of 32, 64 and 128. The elements of the next step are on their way from memory
// meanwhile. Each sum is one chain of fused multiply-adds in the order of k.
//
// Where the tiles are too few for a GPU, or k is long, k is split into parts whose products go to the workspace and are
// added in their order, in double. Tile and parts depend on the shape only.
// Registers (sm_90) of linear: at most 128 for float, 142 for double, 183 on tensor cores, 226 with the largest tiles
// and offsets of 64 bits. Shared memory: 17 KB at most, 40 on tensor cores (gemm_mma.h).
#pragma once

#include <algorithm>

#include "common.h"

namespace pyops::cuda {

constexpr int gemm_depth = 16;  // of a step along k

// An operand gives its elements (row, k), in its own type. `along_k` tells in which dimension neighbours lie side by
// side; if it has packs and `packs` is true, pack() gives 16 bytes of them whose first one's number is a multiple.

// Element (row, k) of a matrix of any two strides.
template <class T, class Index, bool contiguous_k>
struct Matrix {
  static constexpr bool along_k = contiguous_k, has_packs = true;
  const T* data;
  Index stride;  // of the dimension that is not contiguous
  bool packs;

  Matrix(const void* pointer, int64_t stride)
      : data(static_cast<const T*>(pointer)),
        stride(static_cast<Index>(stride)),
        packs(aligned_to_packs(data) && stride % Pack<T>::size == 0) {}
  __device__ __forceinline__ const T* address(Index row, Index k) const {
    return data + (contiguous_k ? row * stride + k : k * stride + row);
  }
  __device__ __forceinline__ T operator()(Index row, Index k) const { return *address(row, k); }
  __device__ __forceinline__ Pack<T> pack(Index row, Index k) const {
    return *reinterpret_cast<const Pack<T>*>(address(row, k));
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

// Partial sums go to partials[part][row][column]; without partials there is one part, which goes to `store`.
template <class Store, class C, class Index>
__device__ __forceinline__ void store_sum(const Store& store, C* partials, Index part, const GemmShape<Index>& shape,
                                          Index row, Index column, C sum) {
  if (row >= shape.rows || column >= shape.columns) return;
  if (partials == nullptr) {
    store(row, column, sum);
  } else {
    partials[(static_cast<int64_t>(part) * shape.rows + row) * shape.columns + column] = sum;
  }
}

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
      values[i] = at_row < rows && at_k < end_k ? C(widen(operand(at_row, at_k))) : C(0);
    }
  }
  template <int pitch>
  __device__ __forceinline__ void store(C* shared) const {
#pragma unroll
    for (int i = 0; i < count; ++i) shared[k(i) * pitch + row(i)] = values[i];
  }
};

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
  // A thread's rows, and columns, are runs of at most four, side by side with other threads' runs.
  constexpr int run = square < 4 ? square : 4;
  const auto mine = [](int thread, int i) { return i / run * (side * run) + thread * run + i % run; };
  const int thread_row = threadIdx.x / side, thread_column = threadIdx.x % side;

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
        a_values[i] = a_shared[step * pitch + mine(thread_row, i)];
        b_values[i] = b_shared[step * pitch + mine(thread_column, i)];
      }
#pragma unroll
      for (int i = 0; i < square; ++i)
#pragma unroll
        for (int j = 0; j < square; ++j) sums[i][j] = multiply_add(a_values[i], b_values[j], sums[i][j]);
    }
  }

#pragma unroll
  for (int i = 0; i < square; ++i)
#pragma unroll
    for (int j = 0; j < square; ++j)
      store_sum(store, partials, part, shape, first_row + mine(thread_row, i), first_column + mine(thread_column, j),
                sums[i][j]);
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

}  // namespace pyops::cuda

#include "gemm_mma.h"

namespace pyops::cuda {

// How the product is cut: into tiles, and along k into parts.
struct GemmParts {
  int64_t row_tiles, column_tiles, parts, per_part;

  GemmParts(int64_t rows, int64_t columns, int64_t depth, int64_t tile, int64_t step)
      : row_tiles(ceil_div(rows, tile)), column_tiles(ceil_div(columns, tile)) {
    constexpr int64_t enough_blocks = 128, longest_chain = 4096;
    const int64_t tiles = row_tiles * column_tiles;
    const int64_t wanted = std::min(ceil_div(enough_blocks, tiles), ceil_div(depth, 8 * step));
    const int64_t most_parts = std::max({wanted, ceil_div(depth, longest_chain), int64_t{1}});
    per_part = std::max(ceil_div(ceil_div(depth, most_parts), step), int64_t{1}) * step;
    parts = std::max(ceil_div(depth, per_part), int64_t{1});
  }
};

// `kernel` computes tiles; Store is called with each sum once.
template <class C, class Index, class Kernel, class A, class B, class Store>
cudaError_t launch_gemm(Kernel kernel, const GemmParts& cut, size_t shared_bytes, int64_t rows, int64_t columns,
                        int64_t depth, const A& a, const B& b, const Store& store, Workspace& workspace,
                        cudaStream_t stream) {
  C* partials = cut.parts == 1 ? nullptr : workspace.array<C>(cut.parts * rows * columns);
  const GemmShape<Index> shape{static_cast<Index>(rows),      static_cast<Index>(columns),
                               static_cast<Index>(depth),     static_cast<Index>(cut.per_part),
                               Divider<Index>(cut.row_tiles), Divider<Index>(cut.column_tiles)};
  PYOPS_RETURN_ON_ERROR(launch(kernel, cut.row_tiles * cut.column_tiles * cut.parts, block_threads, shared_bytes,
                               stream, a, b, store, shape, partials));
  if (partials == nullptr) return cudaSuccess;
  return launch_for(finish_gemm<C, Index, Store>, rows * columns, stream, static_cast<const C*>(partials), cut.parts,
                    Divider<Index>(columns), rows * columns, store);
}

// The product of operands of T, by tensor cores if T has 16 bits and the product is not too small for their tiles.
template <class T, class Index, class A, class B, class Store>
cudaError_t gemm(int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b, const Store& store,
                 Workspace& workspace, cudaStream_t stream) {
  using C = Compute<T>;
  if constexpr (is_reduced<T>) {
    if (rows >= 32 && columns >= 32 && depth >= 16) {
      const GemmParts cut(rows, columns, depth, mma_tile, mma_depth);
      return launch_gemm<C, Index>(mma_kernel<T, Index, A, B, Store>, cut, mma_shared_bytes, rows, columns, depth, a, b,
                                   store, workspace, stream);
    }
  }
  const auto run = [&](auto tile) {
    constexpr int size = decltype(tile)::value;
    const GemmParts cut(rows, columns, depth, size, gemm_depth);
    return launch_gemm<C, Index>(gemm_kernel<size, C, Index, A, B, Store>, cut, 2 * gemm_depth * (size + 4) * sizeof(C),
                                 rows, columns, depth, a, b, store, workspace, stream);
  };
  // The largest tiles of which there are enough for a GPU; the larger, the fewer reads of shared memory for a sum.
  const auto tiles = [&](int64_t size) { return ceil_div(rows, size) * ceil_div(columns, size); };
  if constexpr (std::is_same_v<T, float>)
    if (tiles(128) >= 128) return run(std::integral_constant<int, 128>());
  return tiles(64) >= 64 ? run(std::integral_constant<int, 64>()) : run(std::integral_constant<int, 32>());
}

}  // namespace pyops::cuda
