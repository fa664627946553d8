// product(row, column) = sum over k of a(row, k) b(column, k), on tensor cores. The operands compute the addresses of
// their elements themselves (gemm/copy.h), so neither has to be a matrix in memory. The element type decides how
// fragments are multiplied (gemm/mma.h).
//
// A block computes a tile of the product, each warp a part of it in registers, in steps of 64 bytes along k. Shared
// memory has three stages, each of which holds the tiles of both operands for one step. While one stage is multiplied,
// the next has arrived or is about to, and the one after that is in flight, so that only the first step waits for
// memory. One barrier for each step is enough: it says that the stage of this step has arrived for all threads, and
// that all threads have read the stage of the previous step, which is filled next.
//
// If the tiles are too few for a GPU, or k is long, k is split into parts (split-K). Their products go to the workspace
// and are then added in order, in double.
//
// Tiles and parts depend only on the shape, and so do the order of the sums and the bits of the result. NaN and
// infinities come out as in plain sums; gemm/mma.h says how for float.
//
// On sm_80 and sm_90, linear and conv2d take these registers, none of them spilled, and this shared memory:
//
//            large (256 threads)   small (128)         flat (128)          narrow (128)
//   16-bit   168 to 183, 60 KB     121 to 221, 30 KB   110 to 216, 34 KB   112 to 197, 34 KB
//   TF32     130 to 186, 60 KB     108 to 148, 30 KB   114 to 168, 34 KB   118 to 171, 34 KB
//   float    198 to 250, 60 KB     138 to 183, 30 KB   120 to 172, 34 KB   132 to 173, 34 KB
//   double   192 to 254, 72 KB     128 to 200, 36 KB   112 to 166, 41 KB   115 to 166, 41 KB
//
// The kernel is designed for at least 8 warps on a multiprocessor, which leaves 255 registers to a thread: latency is
// hidden by the stages and the many independent products of a warp rather than by many warps. In the large tiles the
// sums take 64 registers, 128 for double; parts of 32x32, as in the small tiles, would read a third more of shared
// memory for each product.
#pragma once

#include <algorithm>

#include "../algorithms.h"
#include "copy.h"
#include "mma.h"

namespace pyops::cuda {

// The epilogue. For each sum, a Store has
//   address(row, column)      where its result is stored
//   result(row, column, sum)  what is stored there: with bias, rounded, rectified
//   pairs                     whether the results of an even column and the next one are adjacent and aligned, so that
//                             both are stored at once

// Whether contiguous lines of `length` elements can be stored in pairs.
template <class T>
bool lie_in_pairs(const T* output, int64_t length) {
  return length % 2 == 0 && aligned_to(2 * sizeof(T), output);
}

template <class Element>
struct StoreRows {
  using T = Element;
  T* output;      // [rows, columns]
  const T* bias;  // [columns], or null
  int64_t columns;
  bool relu;
  bool pairs = lie_in_pairs(output, columns);
  __device__ __forceinline__ T* address(int64_t row, int64_t column) const { return output + row * columns + column; }
  __device__ __forceinline__ T result(int64_t, int64_t column, Compute<T> sum) const {
    if (bias != nullptr) sum += widen(bias[column]);
    const T rounded = narrow<T>(sum);
    return relu ? narrow<T>(rectified(widen(rounded))) : rounded;
  }
};

// Stores the sums of `column` and, if there is one, the next column.
template <class Store, class Sum>
__device__ __forceinline__ void store_two(const Store& store, int64_t row, int64_t column, int64_t columns, Sum first,
                                          Sum second) {
  using T = typename Store::T;
  const bool both = column + 1 < columns;
  Vector<T, 2> values;
  values.values[0] = store.result(row, column, first);
  if (both) values.values[1] = store.result(row, column + 1, second);
  if (store.pairs) {
    *reinterpret_cast<Vector<T, 2>*>(store.address(row, column)) = values;
  } else {
    *store.address(row, column) = values.values[0];
    if (both) *store.address(row, column + 1) = values.values[1];
  }
}

struct GemmShape {
  int64_t rows, columns, depth, depth_per_part;
  Divider<int64_t> row_tiles, column_tiles;
};

// The rows and columns of a block's tile and of a warp's part of it.
template <int block_rows, int block_columns, int of_warp_rows, int of_warp_columns>
struct GemmTile {
  static constexpr int rows = block_rows, columns = block_columns;
  static constexpr int warp_rows = of_warp_rows, warp_columns = of_warp_columns;
  static constexpr int threads = rows / warp_rows * (columns / warp_columns) * 32;
  static constexpr int blocks = 256 / threads;  // on a multiprocessor: 8 warps with up to 255 registers
};
using LargeTile = GemmTile<128, 128, 64, 32>;
using SmallTile = GemmTile<64, 64, 32, 32>;
using FlatTile = GemmTile<16, 128, 16, 32>;
using NarrowTile = GemmTile<128, 16, 32, 16>;

constexpr int gemm_stages = 3;

template <class Tile, class A, class B>
struct GemmStage {
  using T = typename A::T;
  static constexpr int of_a = TileLayout<T, A::along_k, Tile::rows>::elements;
  static constexpr int elements = of_a + TileLayout<T, B::along_k, Tile::columns>::elements;
  static constexpr size_t all_bytes = gemm_stages * elements * sizeof(T);
};

// Loads the four registers of 16 rows by Mma::depth: for the first half of k, of rows 0 to 7 and of rows 8 to 15, then
// for the second half; or, with `k_first`, for rows 0 to 7 both halves of k, then for rows 8 to 15.
template <class Mma, class Layout, bool along_k, bool k_first>
__device__ __forceinline__ typename Mma::Operand load_operand(const typename Mma::Element* tile, int row, int k) {
  using T = typename Mma::Element;
  typename Mma::Register values[4];
  const int lane = threadIdx.x % 32;
  const auto block_row = [&](int block) { return row + (k_first ? block / 2 : block % 2) * 8; };
  const auto block_k = [&](int block) { return k + (k_first ? block % 2 : block / 2) * (Mma::depth / 2); };
  if constexpr (sizeof(T) == 2 || (sizeof(T) == 4 && along_k)) {
    uint32_t loaded[4];
    const int r = block_row(lane / 8), first = block_k(lane / 8);
    load_matrices<!along_k>(loaded,
                            tile + (along_k ? Layout::at(r + lane % 8, first) : Layout::at(r, first + lane % 8)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        values[i] = loaded[i];
      } else {
        values[i] = __uint_as_float(loaded[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = tile[Layout::at(block_row(i) + lane / 4, block_k(i) + lane % 4)];
  }
  return Mma::prepare(values);
}

// Partial sums go to partials[part][row][column]. If `partials` is null, there is one part, whose sums go to `store`.
template <class Mma, class Tile, class A, class B, class Store>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    gemm_kernel(const __grid_constant__ A a, const __grid_constant__ B b, const __grid_constant__ Store store,
                const __grid_constant__ GemmShape shape, typename Mma::Sum* partials) {
  using T = typename Mma::Element;
  using Stage = GemmStage<Tile, A, B>;
  using LayoutA = TileLayout<T, A::along_k, Tile::rows>;
  using LayoutB = TileLayout<T, B::along_k, Tile::columns>;
  constexpr int depth = LayoutA::depth, row_fragments = Tile::warp_rows / 16, column_pairs = Tile::warp_columns / 16;
  T* shared = shared_memory<T>();
  int64_t part = blockIdx.x;
  const int64_t first_column = take_digit(part, shape.column_tiles) * Tile::columns;
  const int64_t first_row = take_digit(part, shape.row_tiles) * Tile::rows;
  const int64_t first_k = part * shape.depth_per_part;
  const int64_t end_k = min(shape.depth, first_k + shape.depth_per_part);
  const int steps = static_cast<int>(ceil_div(end_k - first_k, depth));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int warps_in_row = Tile::columns / Tile::warp_columns;
  const int warp_row = warp / warps_in_row * Tile::warp_rows, warp_column = warp % warps_in_row * Tile::warp_columns;

  TileCopy<A, Tile::rows, Tile::threads> copy_a(a, first_row, shape.rows);
  TileCopy<B, Tile::columns, Tile::threads> copy_b(b, first_column, shape.columns);
  const auto stage_of = [&](int step) { return shared + step % gemm_stages * Stage::elements; };
  const auto start = [&](int step) {
    if (step < steps) {
      copy_a.start(stage_of(step), first_k + int64_t{step} * depth, end_k);
      copy_b.start(stage_of(step) + Stage::of_a, first_k + int64_t{step} * depth, end_k);
    }
    commit_copies();  // an empty group too, so that there are as many groups as steps
  };
  const auto finish = [&](int step) {
    if (step >= steps) return;
    copy_a.finish(stage_of(step));
    copy_b.finish(stage_of(step) + Stage::of_a);
  };

  typename Mma::Sum sums[row_fragments][2 * column_pairs][4] = {};
  for (int step = 0; step < gemm_stages - 1; ++step) {
    start(step);
    finish(step);
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<gemm_stages - 2>();
    __syncthreads();
    start(step + gemm_stages - 1);
    const T* tile_a = stage_of(step);
    const T* tile_b = tile_a + Stage::of_a;
#pragma unroll Mma::unroll
    for (int k = 0; k < depth; k += Mma::depth) {
      typename Mma::Operand of_b[column_pairs];
#pragma unroll
      for (int j = 0; j < column_pairs; ++j)
        of_b[j] = load_operand<Mma, LayoutB, B::along_k, true>(tile_b, warp_column + j * 16, k);
#pragma unroll
      for (int i = 0; i < row_fragments; ++i) {
        const auto of_a = load_operand<Mma, LayoutA, A::along_k, false>(tile_a, warp_row + i * 16, k);
#pragma unroll
        for (int j = 0; j < column_pairs; ++j) {
          Mma::multiply(sums[i][2 * j], of_a, of_b[j], 0);
          Mma::multiply(sums[i][2 * j + 1], of_a, of_b[j], 2);
        }
      }
    }
    finish(step + gemm_stages - 1);
  }
  wait_copies<0>();

  const auto store_sums = [&](const auto& to) {
#pragma unroll
    for (int i = 0; i < 2 * row_fragments; ++i) {
      const int64_t row = first_row + warp_row + i * 8 + lane / 4;
      if (row >= shape.rows) break;
#pragma unroll
      for (int j = 0; j < 2 * column_pairs; ++j) {
        const int64_t column = first_column + warp_column + j * 8 + lane % 4 * 2;
        if (column >= shape.columns) break;
        const auto& pair = sums[i / 2][j];
        store_two(to, row, column, shape.columns, pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
  };
  if (partials == nullptr) {
    store_sums(store);
  } else {
    using Sum = typename Mma::Sum;
    partials += part * shape.rows * shape.columns;
    store_sums(StoreRows<Sum>{partials, nullptr, shape.columns, false, shape.columns % 2 == 0});
  }
}

template <class C, class Store>
__global__ void __launch_bounds__(block_threads, 1)
    finish_gemm(const C* partials, int64_t parts, Divider<int64_t> columns, int64_t count,
                const __grid_constant__ Store store) {
  const int64_t number = thread_number();
  if (number >= count) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partials[part * count + number];
  int64_t row = number;
  const int64_t column = take_digit(row, columns);
  *store.address(row, column) = store.result(row, column, static_cast<C>(sum));
}

// Computes the product in tiles of one size.
template <class Tile, class Mma, class A, class B, class Store>
cudaError_t gemm_by_tiles(int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b, const Store& store,
                          Workspace& workspace, cudaStream_t stream) {
  using Sum = typename Mma::Sum;
  constexpr int64_t step = TileLayout<typename Mma::Element, true, Tile::rows>::depth;
  // The number of parts of k: enough to give each multiprocessor of a large GPU a block of 256 threads, but no part so
  // short that its first step and its partial sums cost more than its products, nor so long that its chains of sums
  // lose digits.
  constexpr int64_t enough_blocks = 32768 / Tile::threads, shortest = 8 * step, longest = 32768;
  const int64_t row_tiles = ceil_div(rows, Tile::rows), column_tiles = ceil_div(columns, Tile::columns);
  const int64_t wanted = std::min(ceil_div(enough_blocks, row_tiles * column_tiles), ceil_div(depth, shortest));
  const int64_t most_parts = std::max({wanted, ceil_div(depth, longest), int64_t{1}});
  const int64_t per_part = std::max(ceil_div(ceil_div(depth, most_parts), step), int64_t{1}) * step;
  const int64_t parts = std::max(ceil_div(depth, per_part), int64_t{1});

  Sum* partials = parts == 1 ? nullptr : workspace.array<Sum>(parts * rows * columns);
  const GemmShape shape{rows, columns, depth, per_part, Divider<int64_t>(row_tiles), Divider<int64_t>(column_tiles)};
  PYOPS_RETURN_ON_ERROR(launch(gemm_kernel<Mma, Tile, A, B, Store>, row_tiles * column_tiles * parts, Tile::threads,
                               GemmStage<Tile, A, B>::all_bytes, stream, a, b, store, shape, partials));
  if (partials == nullptr) return cudaSuccess;
  return launch_for(finish_gemm<Sum, Store>, rows * columns, stream, static_cast<const Sum*>(partials), parts,
                    Divider<int64_t>(columns), rows * columns, store);
}

// ---- the choice of tiles ----

template <class Mma, class A, class B, class Store>
struct GemmProblem {
  int64_t rows, columns, depth;
  const A& a;
  const B& b;
  const Store& store;
  Workspace& workspace;
  cudaStream_t stream;
};

template <class Tile, class Mma, class A, class B, class Store>
cudaError_t gemm_by_tiles(const GemmProblem<Mma, A, B, Store>& x) {
  return gemm_by_tiles<Tile, Mma>(x.rows, x.columns, x.depth, x.a, x.b, x.store, x.workspace, x.stream);
}

// There must be a large tile for each multiprocessor of a large GPU, if need be by splitting k into parts of 1024, and
// small tiles must cover at least three quarters of the area of the large ones.
template <class Problem>
bool fill_large_tiles(const Problem& x) {
  const auto tiles_of = [&](auto tile) { return ceil_div(x.rows, tile.rows) * ceil_div(x.columns, tile.columns); };
  const int64_t large = tiles_of(LargeTile()), quarters = tiles_of(SmallTile());
  return large * ceil_div(x.depth, 1024) >= 128 && 3 * large <= quarters;
}

template <class Mma, class A, class B, class Store, class Problem = GemmProblem<Mma, A, B, Store>>
constexpr Algorithm<Problem> gemm_algorithms[] = {
    // Few rows: a batch of at most 16, or few channels in N C H W. The time is that of reading the other operand, and a
    // tile of 128 of its rows keeps enough copies in flight.
    {"flat_tiles", "cuda/gemm/gemm.h", always<Problem>, [](const Problem& x) { return x.rows <= FlatTile::rows; },
     gemm_by_tiles<FlatTile, Mma, A, B, Store>},
    // Few columns: few channels in N H W C, or the last layer of a classifier.
    {"narrow_tiles", "cuda/gemm/gemm.h", always<Problem>,
     [](const Problem& x) { return x.columns <= NarrowTile::columns; }, gemm_by_tiles<NarrowTile, Mma, A, B, Store>},
    // Large products, because a larger tile takes fewer reads of memory and shared memory for each product.
    {"large_tiles", "cuda/gemm/gemm.h", always<Problem>, fill_large_tiles<Problem>,
     gemm_by_tiles<LargeTile, Mma, A, B, Store>},
    {"small_tiles", "cuda/gemm/gemm.h", always<Problem>, always<Problem>, gemm_by_tiles<SmallTile, Mma, A, B, Store>},
};

// Computes the product.
template <class Mma, class A, class B, class Store>
cudaError_t gemm(int64_t rows, int64_t columns, int64_t depth, const A& a, const B& b, const Store& store,
                 Workspace& workspace, cudaStream_t stream) {
  const GemmProblem<Mma, A, B, Store> problem{rows, columns, depth, a, b, store, workspace, stream};
  return choose(choices::gemm, gemm_algorithms<Mma, A, B, Store>, problem).run(problem);
}

}  // namespace pyops::cuda
