// C[M, N] = A[M, K] B[K, N] + bias for matrices in memory, rectified if the output asks for it.
//
// A product of one row streams B, every other one is tiled; gemm_algorithms lists the variants of both. The tiled ones
// follow Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), and the names of
// BLIS. C is cut into blocks of at most MC x NC, which the threads share, and K into chunks of at most KC, over which
// macrokernel() of gemm/microkernel.h runs its register tiles. A matrix of the compute type (float, or double for
// double) is read in place as long as that is as fast. Otherwise the part that a chunk needs is packed: copied,
// converted and, for B, laid out in panels as wide as a register tile. Matrices of bfloat16 are multiplied in pairs if
// the CPU can (gemm/operand.h); a step then takes two terms, and a chunk twice as many.
//
// Every element of C is (((s0 + s1) + s2) ...) + bias, where s_i is the sum of chunk i in order of k. The cut depends
// on K alone, not on the thread count, M, N or the element's position, so a sample's result is the same in any batch.
// Each s_i is a chain of at most KC steps, so the error grows like KC + K / KC, not like K.
#pragma once

#include <algorithm>

#include "../runtime/algorithms.h"
#include "../runtime/parallel.h"
#include "epilogue.h"
#include "k_chunks.h"
#include "pack.h"

namespace pyops::cpu {

// An L2 cache of 1 MB or more holds two blocks of A, MC x KC floats each (216 KB), their blocks of C (384 KB) and, with
// AVX-512, a block of B, KC x NC floats (144 KB). With AVX2 it pays to pack longer rows of B, because a page of B is
// then read in one go.
constexpr int64_t MC = 192;
constexpr int64_t NC = by_capability(1024, 1024, 256);

// element(r, c) = data[r * row_stride + c * column_stride]
template <class In>
struct Matrix {
  const In* data;
  int64_t row_stride, column_stride;

  const In* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// F is the type of the operands that are multiplied (gemm/operand.h).
template <class In, class Out, class F>
struct GemmArgs {
  Matrix<In> a, b;
  Output<Out> out;         // row-major
  int64_t k_begin, k_end;  // the part of K to sum over
};

// Reading a matrix in place saves the copy, but past this size it costs more in cache and TLB misses. Products of few
// rows are the exception: they read even a large B in place, because packing it would not pay off over so little use.
// Without AVX-512 the pieces that a tile reads from each row of B are so short that rows of B evict one another from
// the L1 cache: only what is no larger than half of it is read in place, or by a single tile of rows.
constexpr int64_t in_place_bytes = by_capability(1 << 14, 1 << 14, 1 << 20);
constexpr int64_t few_rows = by_capability(tile_rows[max_vectors - 1], tile_rows[max_vectors - 1], 64);

// Packs rows m.. and columns k.. of an A that is stored by columns into panels of two register tiles of rows, so that
// the values that a tile reads are close to one another.
template <class F, class In>
OperandA<F> pack_columns(const Matrix<In>& a, int64_t m, int64_t mc, int64_t k, int64_t kc) {
  constexpr int64_t panel = 2 * tile_rows[max_vectors - 1];
  const int64_t steps = ceil_div(kc, k_per_step<F>);
  F* copy = scratch<F>(Scratch::a, ceil_div(mc, panel) * panel * steps);
  for (int64_t i = 0; i < steps; ++i) {
    const In* column = a.at(m, k + i * k_per_step<F>);
    int64_t r = 0;
    if constexpr (std::is_same_v<F, In>)
      for (; r + panel <= mc; r += panel) std::copy_n(column + r, panel, copy + r * steps + i * panel);
    for (; r < mc; r += panel)
      copy_operand(copy + r * steps + i * panel, column + r, std::min(panel, mc - r), 1, a.column_stride,
                   kc - i * k_per_step<F>);
  }
  int64_t* offsets = scratch<int64_t>(Scratch::a_offsets, mc);
  for (int64_t r = 0; r < mc; ++r) offsets[r] = r / panel * panel * steps + r % panel;
  return {copy, offsets, multiples(Scratch::a_steps, steps, panel)};
}

// Rows m.. and columns k.. of A as an operand, in place or packed; all of A has `elements`.
template <class F, class In>
OperandA<F> operand_a(const Matrix<In>& a, int64_t elements, int64_t m, int64_t mc, int64_t k, int64_t kc) {
  const int64_t steps = ceil_div(kc, k_per_step<F>);
  if (are_operands<F, In>(a.column_stride, kc, a.row_stride) &&
      (a.column_stride == 1 || elements * int64_t{sizeof(In)} <= in_place_bytes))
    return {reinterpret_cast<const F*>(a.at(m, k)), multiples(Scratch::a_offsets, mc, a.row_stride / k_per_step<F>),
            multiples(Scratch::a_steps, steps, a.column_stride)};
  if (a.row_stride == 1) return pack_columns<F>(a, m, mc, k, kc);
  F* copy = scratch<F>(Scratch::a, mc * steps);
  for (int64_t i = 0; i < mc; ++i) copy_terms(copy + i * steps, a.at(m + i, k), kc, a.column_stride);
  return {copy, multiples(Scratch::a_offsets, mc, steps), multiples(Scratch::a_steps, steps, 1)};
}

// Packs B[k .., n ..], kc x nc, into panels of panel_width columns, with zeros past nc. Panel p begins at p * steps *
// panel_width.
template <class F, class In>
void pack_panels(F* panels, const Matrix<In>& b, int64_t k, int64_t kc, int64_t n, int64_t nc, int64_t panel_width) {
  const int64_t steps = ceil_div(kc, k_per_step<F>), panel = steps * panel_width, odd = nc % panel_width;
  if (b.row_stride == 1 && b.column_stride != 1) {
    for (int64_t c = 0; c < nc; c += panel_width)
      transpose_terms(panels + c * steps, panel_width, b.at(k, n + c), b.column_stride, std::min(panel_width, nc - c),
                      kc);
  } else {
    // All panels are filled row by row, so that B is read in long runs, unless the run of one panel is long enough. The
    // next rows may be in other pages, where the hardware prefetcher does not follow.
    constexpr bool long_runs = by_capability(false, false, !is_reduced<In>);
    constexpr int64_t steps_ahead = 8;
    const int64_t at_once = long_runs ? panel_width : nc;
    for (int64_t begin = 0; begin < nc; begin += at_once) {
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t term = i * k_per_step<F>, later = (i + steps_ahead) * k_per_step<F>;
        if (!long_runs && b.column_stride == 1 && later < kc) prefetch(b.at(k + later, n), nc * int64_t{sizeof(In)});
        for (int64_t c = begin; c < std::min(begin + at_once, nc); c += panel_width)
          copy_operand(panels + c * steps + i * panel_width, b.at(k + term, n + c), std::min(panel_width, nc - c),
                       b.column_stride, b.row_stride, kc - term);
      }
    }
  }
  F* last = panels + nc / panel_width * panel;
  for (F* row = last; odd > 0 && row < last + panel; row += panel_width) std::fill(row + odd, row + panel_width, F{});
}

// The offsets of vectors in panels of `steps` steps each.
template <class F>
const int64_t* panel_offsets(Scratch use, int64_t vectors, int64_t steps, int64_t panel_width) {
  constexpr int64_t lanes = OperandVec<F>::size();
  int64_t* offsets = scratch<int64_t>(use, vectors);
  for (int64_t j = 0; j < vectors; ++j)
    offsets[j] = j * lanes / panel_width * steps * panel_width + j * lanes % panel_width;
  return offsets;
}

// The width of the panels of B: at most a register tile, with the vectors spread evenly as in macrokernel(), so that 6
// vectors make two panels of 3.
template <class T>
int64_t panel_width(int64_t columns) {
  constexpr int64_t lanes = Vec<T>::size();
  const int64_t vectors = ceil_div(columns, lanes);
  return ceil_div(vectors, ceil_div(vectors, int64_t{max_vectors})) * lanes;
}

// Rows k.. and columns n.. of B as an operand, in place or in `panels`, which hold them already if `packed`.
template <class F, class In>
OperandB<F> operand_b(const Matrix<In>& b, bool in_place, int64_t k, int64_t kc, int64_t n, int64_t nc, F* panels,
                      bool packed) {
  constexpr int64_t lanes = OperandVec<F>::size();
  const int64_t vectors = ceil_div(nc, lanes), steps = ceil_div(kc, k_per_step<F>);
  if constexpr (std::is_same_v<In, F>) {
    if (in_place && b.column_stride == 1 && nc % lanes == 0)
      return {b.at(k, n), multiples(Scratch::b_offsets, vectors, lanes), multiples(Scratch::b_steps, kc, b.row_stride)};
  }
  const int64_t width = panel_width<Accumulator<F>>(nc);
  if (!packed) pack_panels(panels, b, k, kc, n, nc, width);
  return {panels, panel_offsets<F>(Scratch::b_offsets, vectors, steps, width),
          multiples(Scratch::b_steps, steps, width)};
}

// How many lanes exist in each vector of a block of nc columns; null if all do.
template <class T>
const int32_t* column_lanes(int64_t nc) {
  constexpr int64_t lanes = Vec<T>::size();
  if (nc % lanes == 0) return nullptr;
  const int64_t vectors = ceil_div(nc, lanes);
  int32_t* counts = scratch<int32_t>(Scratch::target_lanes, vectors);
  for (int64_t j = 0; j < vectors; ++j) counts[j] = static_cast<int32_t>(std::min(lanes, nc - j * lanes));
  return counts;
}

// sums[nc] = A[1, kc] B[kc, nc], for a B that is read only once: a few rows of it at a time, each from beginning to
// end. A register tile would go down the columns of B instead and touch another page with every row.
template <class F, class In>
void multiply_row(int64_t kc, const Matrix<In>& a, const Matrix<In>& b, int64_t k, int64_t n, int64_t nc,
                  Accumulator<F>* sums) {
  using V = OperandVec<F>;
  constexpr int64_t lanes = V::size(), steps_at_once = 8 / k_per_step<F>, terms_at_once = 8;
  for (int64_t i = 0; i < kc; i += terms_at_once) {
    const int64_t left = kc - i, steps = std::min(steps_at_once, ceil_div(left, k_per_step<F>));
    const In* row[steps_at_once];
    V value[steps_at_once];
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t term = i + s * k_per_step<F>;
      row[s] = b.at(k + term, n);
      value[s] = broadcast_operand<F>(a.at(0, k + term), a.column_stride, kc - term);
    }
    for (int64_t j = 0; j < nc; j += lanes) {
      const int64_t count = std::min(lanes, nc - j);
      V sum = i == 0 ? V(0) : V::loadu(sums + j, count);
      if (left >= terms_at_once && count == lanes) {
#pragma GCC unroll 8
        for (int64_t s = 0; s < steps_at_once; ++s)
          sum = multiply_add<F>(value[s], load_operand<F>(row[s] + j, b.row_stride, k_per_step<F>, lanes), sum);
      } else {
        for (int64_t s = 0; s < steps; ++s)
          sum = multiply_add<F>(value[s], load_operand<F>(row[s] + j, b.row_stride, left - s * k_per_step<F>, count),
                                sum);
      }
      sum.store(sums + j, count);
    }
  }
}

// Stores one vector of a single-row C. Sums of bfloat16 pairs are rounded exactly as in the tiled algorithms, so a
// sample's result is the same in any batch.
template <class F, class Out>
void finish_row(const Output<Out>& out, int64_t column, Vec<Accumulator<F>> sum, int64_t count) {
  if (out.column_bias) sum = sum + load(out.column_bias + column, count);
  if (out.relu) sum = at::vec::clamp_min(sum, Vec<Accumulator<F>>(0));
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (is_pair<F> && std::is_same_v<Out, c10::BFloat16>) return store_rounded(out.data + column, sum, count);
#endif
  store(out.data + column, sum, count);
}

// Columns n .. n + nc of a single-row C.
template <class In, class Out, class F>
void multiply_one_row(const GemmArgs<In, Out, F>& x, int64_t n, int64_t nc) {
  using T = Accumulator<F>;
  constexpr int64_t lanes = Vec<T>::size();
  T *total = scratch<T>(Scratch::sums, 2 * nc), *sums = total + nc;
  for_each_chunk<KC * k_per_step<F>>(x.k_begin, x.k_end, [&](int64_t k, int64_t kc, bool first, bool) {
    multiply_row<F>(kc, x.a, x.b, k, n, nc, first ? total : sums);
    for (int64_t j = 0; j < nc && !first; j += lanes) {
      const int64_t count = std::min(lanes, nc - j);
      (load(total + j, count) + load(sums + j, count)).store(total + j, count);
    }
  });
  for (int64_t j = 0; j < nc; j += lanes) {
    const int64_t count = std::min(lanes, nc - j);
    finish_row<F>(x.out, n + j, load(total + j, count), count);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// Columns n .. n + nc of a single-row C, where B is stored by columns: squares of B are transposed in registers and
// multiplied there, so that B is read once and never written. Each of the `chains` vectors of sums is its own chain of
// FMAs, and the chains hide each other's latency. The order of every sum is that of the other algorithms.
template <int chains, class In, class Out, class F>
void multiply_one_row_transposed(const GemmArgs<In, Out, F>& x, int64_t n, int64_t nc) {
  using V = Vec<float>;
  using Word = std::conditional_t<is_pair<F>, float, In>;  // pairs are moved as if they were floats
  constexpr int64_t lanes = V::size();
  for (int64_t end = n + nc; n < end; n += chains * lanes) {
    int64_t counts[chains];
    for (int64_t c = 0; c < chains; ++c) counts[c] = std::clamp(end - n - c * lanes, int64_t{0}, lanes);
    V total[chains];
    for_each_chunk<KC * k_per_step<F>>(x.k_begin, x.k_end, [&](int64_t chunk, int64_t kc, bool first, bool) {
      V sum[chains];
      std::fill_n(sum, chains, V(0));
      for (int64_t k = chunk; k < chunk + kc; k += square_columns * k_per_step<F>) {
        const int64_t steps = std::min(square_columns, (chunk + kc - k) / k_per_step<F>);
        const auto add = [&](V& to, __m512 column, int64_t i) {
          const auto value = broadcast_operand<F>(x.a.at(0, k + i * k_per_step<F>), x.a.column_stride, k_per_step<F>);
          to = multiply_add<F>(value, V(column), to);
        };
#pragma GCC unroll 2
        for (int64_t c = 0; c < chains; ++c) {
          if (counts[c] == 0) break;
          __m512 square[square_columns];
          load_square(square, reinterpret_cast<const Word*>(x.b.at(k, n + c * lanes)),
                      x.b.column_stride / k_per_step<F>, counts[c], steps);
          if (steps == square_columns) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < square_columns; ++i) add(sum[c], square[i], i);
          } else {
            for (int64_t i = 0; i < steps; ++i) add(sum[c], square[i], i);
          }
        }
      }
      for (int64_t c = 0; c < chains; ++c) total[c] = first ? sum[c] : total[c] + sum[c];
    });
    for (int64_t c = 0; c < chains && counts[c] > 0; ++c) finish_row<F>(x.out, n + c * lanes, total[c], counts[c]);
  }
}
#endif

// If the panels of all K for one block of columns fit in this many bytes, they are packed once and kept for all the
// rows that the thread multiplies by them.
constexpr int64_t kept_bytes = 4 << 20;

// The mc x nc block of C at (m, n), in register tiles. With `b_in_place`, B is read in place where its vectors are
// whole and contiguous.
template <class In, class Out, class F>
void multiply_tiled(const GemmArgs<In, Out, F>& x, int64_t M, int64_t m, int64_t mc, int64_t n, int64_t nc,
                    bool b_in_place) {
  using T = Accumulator<F>;
  constexpr int64_t lanes = Vec<T>::size(), most_terms = KC * k_per_step<F>;
  const int64_t K = x.k_end - x.k_begin, vectors = ceil_div(nc, lanes);
  const int64_t width = panel_width<T>(nc), columns = ceil_div(nc, width) * width, steps = ceil_div(K, k_per_step<F>);
  const int64_t rows_at_once = ceil_div(mc, ceil_div(mc, 2 * MC));  // in parts of about equal size
  const bool kept = rows_at_once < mc && columns * steps * int64_t{sizeof(F)} <= kept_bytes;
  F* panels = scratch<F>(Scratch::b, columns * (kept ? steps : KC));
  const int64_t* target_vectors = multiples(Scratch::target_vectors, vectors, lanes);
  const Output<Out>& out = x.out;
  for (int64_t begin = m; begin < m + mc; begin += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, m + mc - begin);
    const auto product = [&](const OperandC<T>& target) {
      for_each_chunk<most_terms>(x.k_begin, x.k_end, [&](int64_t k, int64_t kc, bool first, bool last) {
        const OperandA<F> a = operand_a<F>(x.a, M * K, begin, rows, k, kc);
        F* panels_here = panels + (kept ? (k - x.k_begin) / k_per_step<F> * columns : 0);
        const OperandB<F> b = operand_b<F>(x.b, b_in_place, k, kc, n, nc, panels_here, kept && begin > m);
        macrokernel<F>(rows, vectors, ceil_div(kc, k_per_step<F>), a, b, target, !first, last);
      });
    };
    if constexpr (stores_directly<F, Out>) {
      const OperandC<Out> target{out.data + begin * out.rows.x_stride + n,
                                 multiples(Scratch::target_rows, rows, out.rows.x_stride),
                                 target_vectors,
                                 column_lanes<T>(nc),
                                 nullptr,
                                 out.column_bias ? out.column_bias + n : nullptr,
                                 out.relu};
      with_epilogue<F>(target, rows, nc, product);
    } else {
      const int64_t stride = vectors * lanes;
      T* sums = scratch<T>(Scratch::sums, rows * stride);
      product({sums, multiples(Scratch::target_rows, rows, stride), target_vectors});
      write(out, sums, stride, begin, rows, n, nc);
    }
  }
}

// The mc x nc block of C at (m, n), of a C of M rows and N columns.
template <class In, class Out, class F>
struct GemmBlock {
  const GemmArgs<In, Out, F>& x;
  int64_t M, N, m, mc, n, nc;

  int64_t K() const { return x.k_end - x.k_begin; }
};

#if defined(CPU_CAPABILITY_AVX512)
// Reads B, which is stored by columns, in the order of memory. `chains` is the number of columns of squares at a time.
template <int chains, class In, class Out, class F>
struct OneRowTransposed {
  static bool supports(const GemmBlock<In, Out, F>& block) {
    const GemmArgs<In, Out, F>& x = block.x;
    if constexpr (is_squared<In>)
      return block.M == 1 && x.b.row_stride == 1 &&
             (!is_pair<F> || are_operands<F, In>(1, block.K(), x.b.column_stride));
    return false;
  }
  static bool profitable(const GemmBlock<In, Out, F>& block) {
    return chains == 1 || block.K() * block.N * int64_t{sizeof(In)} <= in_place_bytes;
  }
  static void run(const GemmBlock<In, Out, F>& block) {
    if constexpr (is_squared<In>) multiply_one_row_transposed<chains>(block.x, block.n, block.nc);
  }
};
#endif

template <class In, class Out, class F>
struct OneRow {
  static bool supports(const GemmBlock<In, Out, F>& block) {
    return block.M == 1 && block.x.b.column_stride == 1 && block.K() > 0;
  }
  static void run(const GemmBlock<In, Out, F>& block) { multiply_one_row(block.x, block.n, block.nc); }
};

template <bool in_place, class In, class Out, class F>
struct Tiles {
  static bool profitable(const GemmBlock<In, Out, F>& block) {
    return block.M <= few_rows || block.K() * block.N * int64_t{sizeof(Accumulator<F>)} <= in_place_bytes;
  }
  static void run(const GemmBlock<In, Out, F>& block) {
    multiply_tiled(block.x, block.M, block.m, block.mc, block.n, block.nc, in_place);
  }
};

template <class In, class Out, class F, class Block = GemmBlock<In, Out, F>>
constexpr Algorithm<Block> gemm_algorithms[] = {
#if defined(CPU_CAPABILITY_AVX512)
    // A B that stays in cache: two chains of FMAs hide more of their latency than one.
    {"one_row_transposed_2", "csrc/cpu/gemm/gemm.h", OneRowTransposed<2, In, Out, F>::supports,
     OneRowTransposed<2, In, Out, F>::profitable, OneRowTransposed<2, In, Out, F>::run},
    // A larger B comes from memory, where the rows of two chains are more streams than a core can follow.
    {"one_row_transposed", "csrc/cpu/gemm/gemm.h", OneRowTransposed<1, In, Out, F>::supports,
     OneRowTransposed<1, In, Out, F>::profitable, OneRowTransposed<1, In, Out, F>::run},
#endif
    // B is read once, row by row; a register tile would read it column by column.
    {"one_row", "csrc/cpu/gemm/gemm.h", OneRow<In, Out, F>::supports, always<Block>, OneRow<In, Out, F>::run},
    // With few rows of C, or with a small B, packing B costs more than it saves.
    {"tiles_in_place", "csrc/cpu/gemm/gemm.h", always<Block>, Tiles<true, In, Out, F>::profitable,
     Tiles<true, In, Out, F>::run},
    // Each panel is used by enough rows to pay for its packing.
    {"tiles_of_panels", "csrc/cpu/gemm/gemm.h", always<Block>, always<Block>, Tiles<false, In, Out, F>::run},
};

template <class In, class Out, class F>
void run_gemm_block(const GemmArgs<In, Out, F>& x, int64_t M, int64_t N, int64_t m, int64_t mc, int64_t n, int64_t nc) {
  const GemmBlock<In, Out, F> block{x, M, N, m, mc, n, nc};
  choose(choices::gemm, gemm_algorithms<In, Out, F>, block).run(block);
}

// `parts` products in parallel, all of the same M and N; args(i) describes product i. K only serves to estimate the
// amount of work.
template <class Args>
void gemm(int64_t parts, int64_t M, int64_t N, int64_t K, const Args& args) {
  constexpr int64_t smallest_mc = 24;
  const int64_t smallest_nc = M == 1 ? 1024 : 64;  // a single-row product reads B in long runs
  const double flops = 2.0 * parts * M * N * K;
  int64_t mc = std::min(M, MC), nc = std::min(N, std::max(NC, smallest_nc));
  const auto tasks = [&] { return parts * ceil_div(M, mc) * ceil_div(N, nc); };
  while (tasks() < tasks_worth(flops) && nc > smallest_nc) nc = ceil_div(nc / 2, smallest_nc) * smallest_nc;
  while (tasks() < tasks_worth(flops) && mc > smallest_mc) mc = ceil_div(mc / 2, smallest_mc) * smallest_mc;
  // The blocks are of about equal size, because the threads share the work in whole blocks.
  const int64_t row_blocks = ceil_div(M, mc), column_blocks = ceil_div(N, nc), lanes = Vec<float>::size();
  mc = ceil_div(M, row_blocks), nc = ceil_div(ceil_div(N, column_blocks), lanes) * lanes;
  for_each_range(tasks(), flops, [&](int64_t begin, int64_t end) {
    // Consecutive row blocks of one column of blocks are merged into one.
    for (int64_t task = begin; task < end;) {
      const int64_t row = task % row_blocks, m = row * mc, n = task / row_blocks % column_blocks * nc;
      const int64_t blocks = std::min(row_blocks - row, end - task);
      run_gemm_block(args(task / row_blocks / column_blocks), M, N, m, std::min(blocks * mc, M - m), n,
                     std::min(nc, N - n));
      task += blocks;
    }
  });
}

}  // namespace pyops::cpu
