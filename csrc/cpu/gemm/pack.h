// Packing of matrices in memory into the operands that are multiplied (gemm/operand.h). A step takes k_per_step<F>
// terms of each sum, which lie term_stride apart. `left` is the number of terms that remain: if the last pair has only
// one, its other number is zero.
#pragma once

#include "operand.h"
#include "output.h"

namespace pyops::cpu {

#if defined(CPU_CAPABILITY_AVX512)
// Pairs the lanes of two vectors of bfloat16 numbers that were widened to float.
inline Vec<float> pairs_of(__m512 first, __m512 second) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
  return _mm512_castsi512_ps(_mm512_or_epi32(low, _mm512_castps_si512(second)));
}
#endif

// Loads the operands of `count` adjacent columns.
template <class F, class In>
OperandVec<F> load_operand(const In* p, [[maybe_unused]] int64_t term_stride, [[maybe_unused]] int64_t left,
                           int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (is_pair<F>) return pairs_of(load(p, count), left > 1 ? load(p + term_stride, count) : Vec<float>(0));
#endif
  return load(p, count);
}

template <class F, class In>
F operand_at(const In* p, [[maybe_unused]] int64_t term_stride, [[maybe_unused]] int64_t left) {
  if constexpr (is_pair<F>) {
    return {*p, left > 1 ? p[term_stride] : In(0)};
  } else {
    return static_cast<F>(*p);
  }
}

// Broadcasts one operand to all lanes.
template <class F, class In>
OperandVec<F> broadcast_operand(const In* p, int64_t term_stride, int64_t left) {
  const F value = operand_at<F>(p, term_stride, left);
  return broadcast<F>(&value);
}

// target[i] = the operand that begins at p[i * stride].
template <class F, class In>
void copy_operand(F* target, const In* p, int64_t count, int64_t stride, int64_t term_stride, int64_t left) {
  if constexpr (!is_pair<F> || std::is_same_v<F, In>) {
    copy_values(target, p, count, stride);
  } else if (stride == 1) {
    constexpr int64_t lanes = OperandVec<F>::size();
    for (int64_t i = 0; i < count; i += lanes) {
      const int64_t here = std::min(lanes, count - i);
      load_operand<F>(p + i, term_stride, left, here).store(target + i, static_cast<int>(here));
    }
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = operand_at<F>(p + i * stride, term_stride, left);
  }
}

// Copies the `count` terms of one sum, with a stride of `stride`, to consecutive operands; an odd last term is paired
// with zero.
template <class F, class In>
void copy_terms(F* target, const In* p, int64_t count, int64_t stride) {
  if constexpr (!is_pair<F>) {
    copy_values(target, p, count, stride);
  } else {
    In* numbers = reinterpret_cast<In*>(target);
    copy_values(numbers, p, count, stride);
    if (count % 2 != 0) numbers[count] = In(0);
  }
}

// Whether the operands can be read in place: each sum has `count` terms, and the sums lie `stride` apart.
template <class F, class In>
constexpr bool are_operands(int64_t term_stride, int64_t count, int64_t stride) {
  return is_pair<F> ? term_stride == 1 && count % 2 == 0 && stride % 2 == 0 : std::is_same_v<F, In>;
}

// target[k * target_stride + i] = operand k of sum i. The `count` terms of a sum are contiguous, and the sums lie
// `stride` apart.
template <class F, class In>
void transpose_terms(F* target, int64_t target_stride, const In* p, int64_t stride, int64_t sums, int64_t count) {
  if constexpr (!is_pair<F>) {
    transpose(target, target_stride, p, stride, sums, count);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    if (are_operands<F, In>(1, count, stride)) {  // pairs are moved as if they were floats
      const float* floats = reinterpret_cast<const float*>(p);
      for (int64_t i = 0; i < sums; i += 16)
        for (int64_t k = 0; k < count / 2; k += square_columns)
          transpose_square(reinterpret_cast<float*>(target) + k * target_stride + i, target_stride,
                           floats + i * (stride / 2) + k, stride / 2, std::min(int64_t{16}, sums - i),
                           std::min(square_columns, count / 2 - k));
      return;
    }
#endif
    for (int64_t k = 0; k < count; k += 2, target += target_stride)
      copy_operand(target, p + k, sums, stride, 1, count - k);
  }
}

// target[k * target_stride + i] = operand k of sum i. The first numbers of operands k and k + 1 are adjacent, the
// second numbers lie term_stride further on, and the sums lie `stride` apart.
template <class F, class In>
void transpose_operand(F* target, int64_t target_stride, const In* p, int64_t stride,
                       [[maybe_unused]] int64_t term_stride, int64_t sums, int64_t count) {
  if constexpr (!is_pair<F>) {
    transpose(target, target_stride, p, stride, sums, count);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    for (int64_t k = 0; k < count; k += square_columns) {
      for (int64_t i = 0; i < sums; i += 16) {
        const int64_t rows = std::min(int64_t{16}, sums - i), columns = std::min(square_columns, count - k);
        const In* corner = p + i * stride + k;
        __m512 first[16], second[16];
        load_square(first, corner, stride, rows, columns);
        load_square(second, corner + term_stride, stride, rows, columns);
        for (int64_t j = 0; j < columns; ++j)
          pairs_of(first[j], second[j]).store(target + (k + j) * target_stride + i, static_cast<int>(rows));
      }
    }
#endif
  }
}

}  // namespace pyops::cpu
