// C[M, N] = A[M, K] B[K, N] + bias for matrices in memory, rectified if the output asks for it.
//
// A product of one row streams B, unless a tile unit multiplies it, and every other one is tiled; gemm_algorithms lists
// the variants of both. The tiled ones follow Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008), and the names of BLIS. C is cut into blocks of at most MC x NC, which the threads share, and
// K into chunks of at most KC, over which macrokernel() of gemm/microkernel.h runs its register tiles. A matrix of the
// compute type (float, or double for double) is read in place as long as that is as fast. Otherwise the part that a
// chunk needs is packed: copied, converted and, for B, laid out in panels as wide as a register tile. Matrices of
// bfloat16 are multiplied in pairs if the CPU can (gemm/operand.h); a step then takes two terms, and a chunk twice as
// many.
//
// Every element of C is (((s0 + s1) + s2) ...) + bias, where s_i is the sum of chunk i in order of k; a tile unit sums
// a chunk in pieces (gemm/tile_kernel.h). The cut depends on K alone, not on the thread count, M, N or the element's
// position, so a sample's result is the same in any batch. Each s_i is a chain of at most KC steps, so the error grows
// like KC + K / KC, not like K.
#pragma once

#include <algorithm>

#include "../runtime/algorithms.h"
#include "../runtime/parallel.h"
#include "k_chunks.h"
#include "matrix.h"
#include "one_row.h"

namespace pyops::cpu {

// An L2 cache of 1 MB or more holds two blocks of A, MC x KC floats each (216 KB), their blocks of C (384 KB) and, with
// AVX-512, a block of B, KC x NC floats (144 KB). With AVX2 it pays to pack longer rows of B, because a page of B is
// then read in one go, and to keep more of the panels than the L2 cache holds.
constexpr int64_t MC = 192;
constexpr int64_t NC = by_capability(1024, 1024, 256);

// If the panels of all K for one block of columns fit in this many bytes, they are packed once and kept for all the
// rows that the thread multiplies by them.
constexpr int64_t kept_bytes = by_capability(16 << 20, 16 << 20, 4 << 20);

// The mc x nc block of C at (m, n), in register tiles. With `b_in_place`, B is read in place where its vectors are
// whole and contiguous.
template <class In, class Out, class F>
void multiply_tiled(const GemmArgs<In, Out, F>& x, int64_t M, int64_t m, int64_t mc, int64_t n, int64_t nc,
                    bool b_in_place) {
  using T = Accumulator<F>;
  constexpr int64_t lanes = Vec<T>::size();
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
      for_each_chunk<k_per_step<F>>(x.k_begin, x.k_end, [&](int64_t k, int64_t kc, bool first, bool last) {
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
  // Whether B is stored by columns that are read as operands in place.
  bool has_columns_of_operands() const { return x.b.row_stride == 1 && are_operands<F, In>(1, K(), x.b.column_stride); }
};

// The block by C^T = B^T A^T: the columns of B are the rows of the left operand, which a tile unit reads in place, and
// the few rows of A are packed. Every sum has the order that it has in multiply_tiled.
template <class In, class Out, class F>
void multiply_exchanged(const GemmBlock<In, Out, F>& block) {
  using T = Accumulator<F>;
  constexpr int64_t lanes = Vec<T>::size(), most_rows = 64;
  const auto& [x, M, N, m, mc, n, nc] = block;
  const int64_t vectors = ceil_div(mc, lanes), stride = vectors * lanes, steps = ceil_div(block.K(), k_per_step<F>);
  const Matrix<In> right{x.a.data, x.a.column_stride, x.a.row_stride};
  const int64_t width = panel_width<T>(mc), columns = ceil_div(mc, width) * width;
  // With the panels of all K, some columns of B after the other are read from beginning to end, as they lie in memory.
  const bool kept = columns * steps * int64_t{sizeof(F)} <= kept_bytes;
  F* panels = scratch<F>(Scratch::b, columns * (kept ? steps : KC));
  Out* transposed = scratch<Out>(Scratch::exchanged, nc * stride);
  const int64_t* target_vectors = multiples(Scratch::target_vectors, vectors, lanes);
  const int64_t rows_at_once = kept ? most_rows : nc;
  for (int64_t i = 0; i < nc; i += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, nc - i);
    const OperandC<Out> target{transposed + i * stride,
                               multiples(Scratch::target_rows, rows, stride),
                               target_vectors,
                               nullptr,
                               x.out.column_bias ? x.out.column_bias + n + i : nullptr,
                               nullptr,
                               x.out.relu};
    with_epilogue<F>(target, rows, stride, [&](const OperandC<T>& sums) {
      for_each_chunk<k_per_step<F>>(x.k_begin, x.k_end, [&](int64_t k, int64_t kc, bool first, bool last) {
        const OperandA<F> left{reinterpret_cast<const F*>(x.b.at(k, n + i)),
                               multiples(Scratch::a_offsets, rows, x.b.column_stride / k_per_step<F>),
                               multiples(Scratch::a_steps, ceil_div(kc, k_per_step<F>), 1)};
        F* panels_here = kept ? panels + (k - x.k_begin) / k_per_step<F> * columns : panels;
        const OperandB<F> b = operand_b<F>(right, /*in_place=*/false, k, kc, m, mc, panels_here, kept && i > 0);
        macrokernel<F>(rows, vectors, ceil_div(kc, k_per_step<F>), left, b, sums, !first, last);
      });
    });
  }
  transpose(x.out.data + m * x.out.rows.x_stride + n, x.out.rows.x_stride, transposed, stride, nc, mc);
}

#if defined(CPU_CAPABILITY_AVX512)
// Reads B, which is stored by columns, in the order of memory. `chains` is the number of columns of squares at a time.
template <int chains, class In, class Out, class F>
struct OneRowTransposed {
  static bool supports(const GemmBlock<In, Out, F>& block) {
    if constexpr (is_squared<In>)
      return block.M == 1 && block.x.b.row_stride == 1 &&
             (!is_pair<F> || (block.has_columns_of_operands() && !uses_tiles<F>()));
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
    return block.M == 1 && block.x.b.column_stride == 1 && block.K() > 0 && !uses_tiles<F>();
  }
  static void run(const GemmBlock<In, Out, F>& block) { multiply_one_row(block.x, block.n, block.nc); }
};

template <bool in_place, class In, class Out, class F>
struct Tiles {
  static bool profitable(const GemmBlock<In, Out, F>& block) {
    return block.M <= few_rows || block.K() * block.N * int64_t{sizeof(Accumulator<F>)} <= in_place_bytes;
  }
  static void run(const GemmBlock<In, Out, F>& block) {
    if constexpr (in_place && is_pair<F> && stores_directly<F, Out>)
      if (uses_tiles<F>() && block.M <= few_rows && block.has_columns_of_operands()) return multiply_exchanged(block);
    multiply_tiled(block.x, block.M, block.m, block.mc, block.n, block.nc, in_place);
  }
};

template <class In, class Out, class F, class Block = GemmBlock<In, Out, F>>
constexpr Algorithm<Block> gemm_algorithms[] = {
#if defined(CPU_CAPABILITY_AVX512)
    // A B that stays in cache: two chains of FMAs hide more of their latency than one.
    {"one_row_transposed_2", "csrc/cpu/gemm/one_row.h", OneRowTransposed<2, In, Out, F>::supports,
     OneRowTransposed<2, In, Out, F>::profitable, OneRowTransposed<2, In, Out, F>::run},
    // A larger B comes from memory, where the rows of two chains are more streams than a core can follow.
    {"one_row_transposed", "csrc/cpu/gemm/one_row.h", OneRowTransposed<1, In, Out, F>::supports,
     OneRowTransposed<1, In, Out, F>::profitable, OneRowTransposed<1, In, Out, F>::run},
#endif
    // B is read once, row by row; a register tile would read it column by column.
    {"one_row", "csrc/cpu/gemm/one_row.h", OneRow<In, Out, F>::supports, always<Block>, OneRow<In, Out, F>::run},
    // With few rows of C, or with a small B, packing B costs more than it saves. A tile unit reads in place the columns
    // of B, if the rows are few and B is stored by columns.
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

// The smallest blocks of C into which work is cut for the threads.
constexpr int64_t smallest_mc = 24, smallest_nc = 64;

// `parts` products in parallel, all of the same M and N; args(i) describes product i. K only serves to estimate the
// amount of work.
template <class Args>
void gemm(int64_t parts, int64_t M, int64_t N, int64_t K, const Args& args) {
  const int64_t narrowest = M == 1 ? 1024 : smallest_nc;  // a single-row product reads B in long runs
  const double flops = 2.0 * parts * M * N * K;
  int64_t mc = std::min(M, MC), nc = std::min(N, std::max(NC, narrowest));
  const auto tasks = [&] { return parts * ceil_div(M, mc) * ceil_div(N, nc); };
  // One thread keeps the blocks whole. For several, an A that has to be packed is cut by rows first, because every
  // block of columns packs it again.
  const int64_t wanted = thread_count() == 1 ? 1 : tasks_worth(flops);
  const auto cut = [&](int64_t& size, int64_t smallest) {
    while (tasks() < wanted && size > smallest) size = ceil_div(size / 2, smallest) * smallest;
  };
  if (args(0).a.column_stride != 1) cut(mc, smallest_mc);
  cut(nc, narrowest);
  cut(mc, smallest_mc);
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
