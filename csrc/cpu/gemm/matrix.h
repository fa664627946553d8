// Matrices in memory as operands of the microkernel: read in place where that is as fast, otherwise packed, that is,
// copied, converted and, for B, laid out in panels as wide as a register tile.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "pack.h"

namespace pyops::cpu {

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

// Packs rows m.. and columns k.. of an A that is stored by columns into panels of two register tiles of rows, or of a
// tile unit's, so that the values that a tile reads are close to one another.
template <class F, class In>
OperandA<F> pack_columns(const Matrix<In>& a, int64_t m, int64_t mc, int64_t k, int64_t kc) {
  const int64_t panel = uses_tiles<F>() ? 32 : 2 * tile_rows[max_vectors - 1];
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

}  // namespace pyops::cpu
