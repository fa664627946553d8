// C[M, N] = A[M, K] B[K, N] + bias: the one matrix product behind linear and conv2d, forward and backward.
//
// An operand is a *source*: an object that can fill a row-major block of itself, converted to the compute type (float,
// or double for double), wherever the values come from: a matrix, its transpose (DenseMatrix), the patches of images
// (patches.h). A matrix that already has the compute type is read in place where that is as fast. The output is a
// pointer and, for rows and columns, a map from index to offset, so that an image can be written in its own layout.
//
// The loops are those of BLIS around one register tile: C is cut into blocks of at most MC x NC, which are the tasks
// of the threads; in a block, K is cut into chunks of KC; a chunk of B is laid out in panels as wide as a register
// tile, and every register tile of MR x NR stays in registers over the chunk. A tile of 6 x 64 floats (AVX-512) does
// 24 fused multiply-adds on 10 loads.
//
// Every element of C is (((s0 + s1) + s2) ...) + bias, where s_i is the sum of chunk i in order of k. This depends on K
// alone: not on the thread count, nor on M, N or the element's place, so that a sample's result is the same in any
// batch. Sums of at most KC terms, then a sum of sums: the error grows like KC + K / KC, not like K.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>
#include <utility>

#include "common.h"
#include "scratch.h"

namespace pyops::cpu {

// ---- blocking ----

constexpr int64_t KC = 256;  // a panel of B, KC x 64 floats = 64 KB, streams from the L2 cache
constexpr int64_t MC = 192;  // a block of A, MC x KC floats = 192 KB, and
constexpr int64_t NC = 384;  // a block of B, KC x NC floats = 384 KB, share an L2 cache of 1 MB or more

// Rows of the register tile by its width in vectors: the accumulators, one row of B and one value of A fill the
// registers. The widths are 1 to max_vectors.
#if defined(CPU_CAPABILITY_AVX512)
constexpr std::array<int, 4> tile_rows = {16, 12, 8, 6};  // 32 registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr std::array<int, 2> tile_rows = {12, 6};  // 16 registers
#else
constexpr std::array<int, 1> tile_rows = {4};  // a Vectorized takes two SSE registers of 16
#endif
constexpr int max_vectors = static_cast<int>(tile_rows.size());

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below this many operations (about 20 us of one core) a fork of the threads costs more than it gives.
constexpr int64_t parallel_flops = 1 << 20;

// f(i) for every task, by the threads if there is enough work.
template <class F>
void for_each_task(int64_t tasks, double flops, const F& f) {
  at::parallel_for(0, tasks, flops < parallel_flops ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// ---- operands ----

// n values at distance `stride`, converted to T and made contiguous.
template <class T, class In>
inline void copy_values(T* target, const In* source, int64_t n, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(source[i * stride]);
  } else if constexpr (std::is_same_v<T, In>) {
    std::copy_n(source, n, target);
  } else {
    at::vec::convert(source, target, n);
  }
}

// element(r, c) = data[r * row_stride + c * column_stride]
template <class In>
struct DenseMatrix {
  using T = Compute<In>;
  static constexpr bool in_place = std::is_same_v<T, In>;
  const In* data;
  int64_t row_stride, column_stride;

  // target[r * ld + c] = element(row + r, column + c)
  void fill(T* target, int64_t ld, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const In* source = data + row * row_stride + column * column_stride;
    if (row_stride == 1 && column_stride != 1) {
      constexpr int64_t block = 16;
      for (int64_t c = 0; c < columns; c += block) {
        for (int64_t r = 0; r < rows; r += block) {
          const int64_t height = std::min(block, rows - r), width = std::min(block, columns - c);
          const In* corner = source + r + c * column_stride;
          if constexpr (std::is_same_v<In, float>) {
            at::vec::transpose_mxn(corner, column_stride, target + r * ld + c, ld, static_cast<int>(width),
                                   static_cast<int>(height));
          } else {
            for (int64_t j = 0; j < width; ++j)
              for (int64_t i = 0; i < height; ++i)
                target[(r + i) * ld + c + j] = static_cast<T>(corner[i + j * column_stride]);
          }
        }
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) copy_values(target + r * ld, source + r * row_stride, columns, column_stride);
    }
  }
};

// ---- output ----

// From the index of a row or column of C to an offset in memory: a pixel of a batch of images, (n, y, x), is at
// n * image_stride + y * y_stride + x * x_stride. A plain dimension is one endless row of pixels.
struct Axis {
  int64_t width, pixels;  // of an image; pixels = width * height
  int64_t image_stride, y_stride, x_stride;

  static constexpr int64_t endless = int64_t{1} << 62;
  static Axis plain(int64_t stride) { return {endless, endless, 0, 0, stride}; }

  int64_t offset(int64_t i) const {
    if (pixels == endless) return i * x_stride;
    const int64_t n = i / pixels, p = i % pixels;
    return n * image_stride + p / width * y_stride + p % width * x_stride;
  }
  // How many indices from i on lie next to each other in memory.
  int64_t run(int64_t i) const {
    if (x_stride != 1) return 1;
    if (pixels == endless) return endless;
    return y_stride == width ? pixels - i % pixels : width - i % width;
  }
};

template <class Out>
struct Output {
  Out* data;
  Axis rows, columns;
  const Out* row_bias = nullptr;
  const Out* column_bias = nullptr;
};

template <class Out>
inline void store(Out* target, Vec<Compute<Out>> value, int64_t count) {
  if constexpr (is_reduced<Out>) {
    at::vec::convert_from_float<Out>(value, value).store(target, static_cast<int>(count));
  } else {
    value.store(target, static_cast<int>(count));
  }
}

template <class In>
inline Vec<Compute<In>> load(const In* source, int64_t count) {
  using T = Compute<In>;
  if constexpr (is_reduced<In>) {
    T values[Vec<T>::size()] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(source[i]);
    return Vec<T>::loadu(values);
  } else {
    return Vec<T>::loadu(source, count);
  }
}

// sums: row-major, of `rows` x `columns` elements of C from (row, column) on.
template <class Out>
void write(const Output<Out>& out, const Compute<Out>* sums, int64_t sums_row_stride, int64_t row, int64_t rows,
           int64_t column, int64_t columns) {
  using T = Compute<Out>;
  constexpr int64_t lanes = Vec<T>::size();
  for (int64_t c = 0; c < columns; c += lanes) {
    const int64_t count = std::min(lanes, columns - c), column_offset = out.columns.offset(column + c);
    const bool contiguous = out.columns.run(column + c) >= count;
    const Vec<T> column_bias = out.column_bias ? load(out.column_bias + column + c, count) : Vec<T>(0);
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> value = Vec<T>::loadu(sums + r * sums_row_stride + c);
      if (out.column_bias) value = value + column_bias;
      if (out.row_bias) value = value + Vec<T>(static_cast<T>(out.row_bias[row + r]));
      Out* target = out.data + out.rows.offset(row + r);
      if (contiguous) {
        store(target + column_offset, value, count);
      } else {
        T values[lanes];
        value.store(values);
        for (int64_t i = 0; i < count; ++i) target[out.columns.offset(column + c + i)] = static_cast<Out>(values[i]);
      }
    }
  }
}

// ---- register tile ----

template <class T>
struct TileArgs {
  int64_t kc;
  const T* a;
  int64_t a_row_stride, a_column_stride;
  const T* b;
  int64_t b_row_stride;
  T* sums;  // row-major
  int64_t sums_row_stride;
  bool accumulate;  // sums += rather than sums =
};

// sums[rows, vectors * lanes] (+)= a[rows, kc] b[kc, vectors * lanes]
template <class T, int rows, int vectors>
void tile(const TileArgs<T>& x) {
  using V = Vec<T>;
  constexpr int64_t lanes = V::size();
  V sum[rows][vectors];
#pragma GCC unroll 32
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 32
    for (int j = 0; j < vectors; ++j) sum[i][j] = V(0);
  const T *a = x.a, *b = x.b;
  for (int64_t k = 0; k < x.kc; ++k, a += x.a_column_stride, b += x.b_row_stride) {
    V b_row[vectors];
#pragma GCC unroll 32
    for (int j = 0; j < vectors; ++j) b_row[j] = V::loadu(b + j * lanes);
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i) {
      const V a_value(a[i * x.a_row_stride]);
#pragma GCC unroll 32
      for (int j = 0; j < vectors; ++j) sum[i][j] = at::vec::fmadd(a_value, b_row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < rows; ++i) {
    T* sums = x.sums + i * x.sums_row_stride;
#pragma GCC unroll 32
    for (int j = 0; j < vectors; ++j)
      (x.accumulate ? V::loadu(sums + j * lanes) + sum[i][j] : sum[i][j]).store(sums + j * lanes);
  }
}

// The tiles of one width, tallest first; the rows of a block that the tallest leaves go to the lower ones.
template <class T>
struct Tile {
  int rows;
  void (*run)(const TileArgs<T>&);
};
template <class T, int vectors>
constexpr std::array<Tile<T>, 5> tiles_of_width() {
  constexpr int tallest = tile_rows[vectors - 1], second = std::min(8, tallest);
  return {{{tallest, tile<T, tallest, vectors>},
           {second, tile<T, second, vectors>},
           {4, tile<T, 4, vectors>},
           {2, tile<T, 2, vectors>},
           {1, tile<T, 1, vectors>}}};
}
template <class T>
inline constexpr auto tiles = []<int... I>(std::integer_sequence<int, I...>) {
  return std::array<std::array<Tile<T>, 5>, max_vectors>{tiles_of_width<T, I + 1>()...};
}(std::make_integer_sequence<int, max_vectors>{});

// ---- blocks ----

template <class Out, class A, class B>
struct GemmOperands {
  A a;
  B b;
  Output<Out> out;
  int64_t k_begin, k_end;  // the part of K to sum over
};

// Reading a matrix in place saves the copy, but once it is larger than this it costs more in cache and TLB misses.
constexpr int64_t in_place_bytes = 1 << 20;

template <class Source>
constexpr bool can_be_in_place = requires { requires Source::in_place; };

// Where the part of an operand that a block works on lies, in place or filled into `packed`.
template <class T>
struct Operand {
  const T* data;
  int64_t row_stride, column_stride;
};

// Rows m0.. of A, columns k.. of it; the whole of A has `elements`.
template <class T, class A>
Operand<T> block_of_a(const A& a, int64_t elements, int64_t m0, int64_t mc, int64_t k, int64_t kc) {
  if constexpr (can_be_in_place<A>) {
    if (a.column_stride == 1 || elements * int64_t{sizeof(T)} <= in_place_bytes)
      return {a.data + m0 * a.row_stride + k * a.column_stride, a.row_stride, a.column_stride};
  }
  T* packed = scratch<T>(Scratch::packed_a, MC * KC);
  a.fill(packed, kc, m0, mc, k, kc);
  return {packed, kc, 1};
}

// Rows k.. of B, columns n.. of it, `width` of them with zeros past the first `columns`.
template <class T, class B>
Operand<T> panel_of_b(const B& b, bool in_place, int64_t k, int64_t kc, int64_t n, int64_t columns, int64_t width) {
  if constexpr (can_be_in_place<B>) {
    if (in_place && b.column_stride == 1 && columns == width)
      return {b.data + k * b.row_stride + n, b.row_stride, 1};
  }
  T* packed = scratch<T>(Scratch::packed_b, KC * Vec<T>::size() * max_vectors);
  b.fill(packed, width, k, kc, n, columns);
  if (columns < width)
    for (int64_t r = 0; r < kc; ++r) std::fill(packed + r * width + columns, packed + (r + 1) * width, T(0));
  return {packed, width, 1};
}

// The block of C from (m0, n0) on, of mc x nc.
template <class Out, class A, class B>
void gemm_block(const GemmOperands<Out, A, B>& x, int64_t M, int64_t N, int64_t m0, int64_t mc, int64_t n0,
                int64_t nc) {
  using T = Compute<Out>;
  constexpr int64_t lanes = Vec<T>::size(), NR = lanes * max_vectors;
  const int64_t K = x.k_end - x.k_begin;
  const bool b_in_place = K * N * int64_t{sizeof(T)} <= in_place_bytes || M <= tile_rows.back();
  const int64_t sums_row_stride = ceil_div(nc, lanes) * lanes;
  T* const sums = scratch<T>(Scratch::block_sums, mc * sums_row_stride);

  int64_t k = x.k_begin;
  do {
    const int64_t kc = std::min(KC, x.k_end - k);
    const bool last = k + kc == x.k_end;
    const Operand<T> a = block_of_a<T>(x.a, M * K, m0, mc, k, kc);
    for (int64_t n = 0; n < nc; n += NR) {
      const int64_t columns = std::min(NR, nc - n), vectors = ceil_div(columns, lanes);
      const Operand<T> b = panel_of_b<T>(x.b, b_in_place, k, kc, n0 + n, columns, vectors * lanes);
      for (int64_t m = 0; m < mc;) {
        const Tile<T>* tile = tiles<T>[vectors - 1].data();
        while (tile->rows > mc - m) ++tile;
        T* tile_sums = sums + m * sums_row_stride + n;
        tile->run({kc, a.data + m * a.row_stride, a.row_stride, a.column_stride, b.data, b.row_stride, tile_sums,
                   sums_row_stride, k > x.k_begin});
        if (last) write(x.out, tile_sums, sums_row_stride, m0 + m, tile->rows, n0 + n, columns);
        m += tile->rows;
      }
    }
    k += kc;
  } while (k < x.k_end);
}

// operands(g) for each of `groups` independent products of the same M and N, all blocks of all of them in parallel.
template <class Out, class MakeOperands>
void gemm(int64_t groups, int64_t M, int64_t N, int64_t K, const MakeOperands& operands) {
  // Blocks small enough for several threads to share the work evenly, if there is more than one register tile.
  constexpr int64_t enough_tasks = 16, NR = Vec<Compute<Out>>::size() * max_vectors;
  int64_t mc = std::min(M, MC), nc = std::min(N, NC);
  const auto tasks = [&] { return groups * ceil_div(M, mc) * ceil_div(N, nc); };
  while (tasks() < enough_tasks && nc > NR) nc = ceil_div(nc / 2, NR) * NR;
  while (tasks() < enough_tasks && mc > 4 * tile_rows.back()) mc = ceil_div(mc / 2, tile_rows.back()) * tile_rows.back();
  const int64_t row_blocks = ceil_div(M, mc), column_blocks = ceil_div(N, nc);
  for_each_task(tasks(), 2.0 * groups * M * N * K, [&](int64_t task) {
    const int64_t m0 = task % row_blocks * mc, n0 = task / row_blocks % column_blocks * nc;
    const auto x = operands(task / row_blocks / column_blocks);
    gemm_block(x, M, N, m0, std::min(mc, M - m0), n0, std::min(nc, N - n0));
  });
}

// C for few elements and a long K, as a weight gradient has: K is cut into parts, a number that depends on the shape
// only; each is a product of its own into a [parts][groups][M][N] workspace, and write(g, m, n, sum) gets the sum of the
// parts in order. operands(g, out, k_begin, k_end) makes the GemmOperands.
template <class T, class MakeOperands, class Write>
void gemm_split_k(int64_t groups, int64_t M, int64_t N, int64_t K, const MakeOperands& operands, const Write& write) {
  constexpr int64_t enough_tasks = 16;
  const int64_t blocks = groups * ceil_div(M, MC) * ceil_div(N, NC);
  const int64_t parts = std::clamp(enough_tasks / blocks, int64_t{1}, std::max(ceil_div(K, KC), int64_t{1}));
  const int64_t part = ceil_div(ceil_div(K, parts), KC) * KC;
  T* partial = scratch<T>(Scratch::partial_sums, parts * groups * M * N);
  gemm<T>(parts * groups, M, N, ceil_div(K, parts), [&](int64_t i) {
    const int64_t k = std::min(i / groups * part, K);
    return operands(i % groups, Output<T>{partial + i * M * N, Axis::plain(N), Axis::plain(1)}, k,
                    std::min(k + part, K));
  });
  for_each_task(groups * M, static_cast<double>(parts) * groups * M * N, [&](int64_t row) {
    for (int64_t n = 0; n < N; ++n) {
      T sum = partial[row * N + n];
      for (int64_t p = 1; p < parts; ++p) sum += partial[(p * groups * M + row) * N + n];
      write(row / M, row % M, n, sum);
    }
  });
}

}  // namespace pyops::cpu
