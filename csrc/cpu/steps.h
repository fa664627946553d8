// Between matrices in memory and the factors that are multiplied (factors.h): a step of a product takes terms<F> terms
// of each sum, which lie term_stride apart; of the last step there may be one only, `left`, and zero is the other.
#pragma once

#include "factors.h"
#include "output.h"

namespace pyops::cpu {

#if defined(CPU_CAPABILITY_AVX512)
// Pairs of up to 16 numbers of two rows.
inline __m512 load_pairs(const c10::BFloat16* first, const c10::BFloat16* second, int64_t count) {
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  const auto load = [&](const c10::BFloat16* p) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)); };
  const __m512i pairs = second ? _mm512_or_epi32(load(first), _mm512_slli_epi32(load(second), 16)) : load(first);
  return _mm512_castsi512_ps(pairs);
}
#endif

// The factors of `count` neighbouring columns.
template <class F, class In>
Factors<F> load_factors(const In* p, [[maybe_unused]] int64_t term_stride, [[maybe_unused]] int64_t left,
                        int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (is_pair<F>) return load_pairs(p, left > 1 ? p + term_stride : nullptr, count);
#endif
  return load(p, count);
}

// One factor in all lanes.
template <class F, class In>
Factors<F> broadcast_factor(const In* p, [[maybe_unused]] int64_t term_stride, [[maybe_unused]] int64_t left) {
  if constexpr (is_pair<F>) {
    const F pair{*p, left > 1 ? p[term_stride] : In(0)};
    return broadcast<F>(&pair);
  } else {
    return Factors<F>(static_cast<F>(*p));
  }
}

// target[i] = the factor of p[i * stride].
template <class F, class In>
void copy_factors(F* target, const In* p, int64_t count, int64_t stride, int64_t term_stride, int64_t left) {
  if constexpr (!is_pair<F>) {
    copy_values(target, p, count, stride);
  } else {
    constexpr int64_t lanes = Factors<F>::size();
    int64_t i = 0;
    for (; stride == 1 && i + lanes <= count; i += lanes)
      load_factors<F>(p + i, term_stride, left, lanes).store(target + i);
    for (; i < count; ++i) target[i] = {p[i * stride], left > 1 ? p[i * stride + term_stride] : In(0)};
  }
}

// target[i] = the factors of a sum's `count` terms, one after the other.
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

// Whether the factors of sums can be read where they lie: `count` terms of each, the next sum's at `stride`.
template <class F, class In>
constexpr bool are_factors(int64_t term_stride, int64_t count, int64_t stride) {
  return is_pair<F> ? term_stride == 1 && count % 2 == 0 && stride % 2 == 0 : std::is_same_v<F, In>;
}

// target[k * target_stride + i] = factor k of sum i, of whose `count` terms one follows the other; the next sum's are
// at `stride`.
template <class F, class In>
void transpose_terms(F* target, int64_t target_stride, const In* p, int64_t stride, int64_t sums, int64_t count) {
  if constexpr (!is_pair<F>) {
    transpose(target, target_stride, p, stride, sums, count);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    if (are_factors<F, In>(1, count, stride)) {  // moved as if they were floats
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
      copy_factors(target, p + k, sums, stride, 1, count - k);
  }
}

}  // namespace pyops::cpu
