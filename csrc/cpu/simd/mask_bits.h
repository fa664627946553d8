// Converts between lanes and bits for the mask of relu: bit i tells whether lane i of a rectified vector passes its
// gradient. A lane passes if its output is not <= 0, so a NaN passes too. 16-bit floats are compared as integers, as in
// relu.cpp.
#pragma once

#include <limits>

#include "vec.h"

namespace pyops::cpu {

// The type in which relu computes a T: T itself, or the bits of a 16-bit float.
template <class T>
using Lane = std::conditional_t<is_reduced<T>, int16_t, T>;

// The bits of -inf in a 16-bit float. As signed integers, negative floats run from -0.0 = INT16_MIN through -inf to the
// negative NaNs, which end at -1.
template <class T>
constexpr int16_t minus_infinity_bits =
    std::is_same_v<T, c10::Half> ? int16_t(0xFC00 - 0x10000) : int16_t(0xFF80 - 0x10000);

#if defined(CPU_CAPABILITY_AVX512)

template <class T>
uint64_t passing_bits(const Vec<Lane<T>>& output) {
  if constexpr (is_reduced<T>) {
    return _mm512_cmpgt_epi16_mask(output, _mm512_set1_epi16(minus_infinity_bits<T>)) &
           _mm512_test_epi16_mask(output, output);
  } else if constexpr (std::is_same_v<T, float>) {
    return _mm512_cmp_ps_mask(output, _mm512_setzero_ps(), _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask(output, _mm512_setzero_pd(), _CMP_NLE_UQ);
  }
}

// The lanes of `values` whose bits are set, and zeros elsewhere.
template <class T>
Vec<Lane<T>> select_bits(const Vec<Lane<T>>& values, uint64_t bits) {
  if constexpr (is_reduced<T>) {
    return _mm512_maskz_mov_epi16(static_cast<__mmask32>(bits), values);
  } else if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), values);
  } else {
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), values);
  }
}

#elif defined(CPU_CAPABILITY_AVX2)

template <class T>
uint64_t passing_bits(const Vec<Lane<T>>& output) {
  if constexpr (is_reduced<T>) {
    const __m256i passes = _mm256_andnot_si256(_mm256_cmpeq_epi16(output, _mm256_setzero_si256()),
                                               _mm256_cmpgt_epi16(output, _mm256_set1_epi16(minus_infinity_bits<T>)));
    return _mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(passes), _mm256_extracti128_si256(passes, 1)));
  } else if constexpr (std::is_same_v<T, float>) {
    return _mm256_movemask_ps(_mm256_cmp_ps(output, _mm256_setzero_ps(), _CMP_NLE_UQ));
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd(output, _mm256_setzero_pd(), _CMP_NLE_UQ));
  }
}

template <class T>
Vec<Lane<T>> select_bits(const Vec<Lane<T>>& values, uint64_t bits) {
  if constexpr (is_reduced<T>) {
    const __m256i lane = _mm256_setr_epi16(1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 9,
                                           1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, int16_t(-0x8000));
    const __m256i all = _mm256_set1_epi16(static_cast<int16_t>(bits));
    return _mm256_and_si256(values, _mm256_cmpeq_epi16(_mm256_and_si256(all, lane), lane));
  } else if constexpr (std::is_same_v<T, float>) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), all = _mm256_set1_epi32(bits);
    return _mm256_and_ps(values, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane)));
  } else {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8), all = _mm256_set1_epi64x(bits);
    return _mm256_and_pd(values, _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(all, lane), lane)));
  }
}

#else

template <class T>
uint64_t passing_bits(const Vec<Lane<T>>& output) {
  Lane<T> values[Vec<Lane<T>>::size()];
  output.store(values);
  uint64_t bits = 0;
  for (int i = 0; i < output.size(); ++i) {
    const bool passes = is_reduced<T> ? values[i] > minus_infinity_bits<T> && values[i] != 0 : !(values[i] <= 0);
    bits |= static_cast<uint64_t>(passes) << i;
  }
  return bits;
}

template <class T>
Vec<Lane<T>> select_bits(const Vec<Lane<T>>& values, uint64_t bits) {
  Lane<T> selected[Vec<Lane<T>>::size()];
  values.store(selected);
  for (int i = 0; i < values.size(); ++i)
    if ((bits >> i & 1) == 0) selected[i] = 0;
  return Vec<Lane<T>>::loadu(selected);
}

#endif

}  // namespace pyops::cpu
