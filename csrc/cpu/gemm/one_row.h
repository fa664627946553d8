// Products of a single row, C[1, N] = A[1, K] B[K, N]: B is read only once, in the order of memory, and never packed.
// Every sum has the order of the tiled products (gemm/gemm.h), so a sample's result is the same in any batch.
#pragma once

#include "k_chunks.h"
#include "matrix.h"

namespace pyops::cpu {

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
  for_each_chunk<k_per_step<F>>(x.k_begin, x.k_end, [&](int64_t k, int64_t kc, bool first, bool) {
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
    for_each_chunk<k_per_step<F>>(x.k_begin, x.k_end, [&](int64_t chunk, int64_t kc, bool first, bool) {
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

}  // namespace pyops::cpu
