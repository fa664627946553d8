// Vectors of the type that elements are computed in: loads and stores, which convert 16-bit floats.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "../common.h"

namespace pyops::cpu {

template <class T>
using Vec = at::vec::Vectorized<T>;

// The number of elements of T that are computed in one vector.
template <class T>
constexpr int64_t lanes_of = Vec<Compute<T>>::size();

#if defined(CPU_CAPABILITY_AVX512)
// Loads the floats at p that `mask` selects, with zeros elsewhere; a 16-bit float is widened.
inline __m512 load_floats(const float* p, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}
inline __m512 widened(c10::BFloat16, __m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 widened(c10::Half, __m256i bits) {
  return _mm512_cvtph_ps(bits);
}
template <class In>
inline __m512 load_floats(const In* p, __mmask16 mask) {
  return widened(In(), _mm256_maskz_loadu_epi16(mask, p));
}
// Loads all 16. Unlike masked loads, these trigger the hardware prefetcher.
inline __m512 load_floats(const float* p) {
  return _mm512_loadu_ps(p);
}
template <class In>
inline __m512 load_floats(const In* p) {
  return widened(In(), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Narrows to 16 bits, rounding to nearest, ties to even; a NaN stays a NaN, in bfloat16 always the same one.
inline __m256i narrowed(c10::BFloat16, __m512 v) {
  const __m512i bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __m512i rounded = _mm512_srli_epi32(up, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0xFFFF)));
}
inline __m256i narrowed(c10::Half, __m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#endif

// Copies n values with a stride of `stride` to consecutive values of T.
template <class T, class In>
inline void copy_values(T* target, const In* source, int64_t n, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(source[i * stride]);
  } else if constexpr (std::is_floating_point_v<T> && std::is_same_v<T, In>) {  // short runs, for which a call is long
    constexpr int64_t lanes = Vec<T>::size();
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) Vec<T>::loadu(source + i).store(target + i);
    for (; i < n; ++i) target[i] = source[i];
  } else if constexpr (std::is_same_v<T, In>) {
    std::copy_n(source, n, target);
  } else {
    at::vec::convert(source, target, n);
  }
}

// Stores the first `count` lanes of a vector, of which there is at least one.
template <class Out>
inline void store(Out* target, Vec<Compute<Out>> value, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (is_reduced<Out>) {
    const __m256i numbers = narrowed(Out(), value);
    if (count == Vec<float>::size()) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), numbers);
    return _mm256_mask_storeu_epi16(target, static_cast<__mmask16>((1u << count) - 1), numbers);
  }
#endif
  // A whole vector is stored with a constant count, which is an instruction rather than a copy of bytes.
  constexpr int lanes = lanes_of<Out>;
  const auto store_lanes = [&](const Vec<Out>& numbers) {
    count == lanes ? numbers.store(target, lanes) : numbers.store(target, static_cast<int>(count));
  };
  if constexpr (is_reduced<Out>) {
    store_lanes(at::vec::convert_from_float<Out>(value, value));
  } else {
    store_lanes(value);
  }
}

// Stores `count` elements with a stride of `stride`.
template <class Out>
inline void store(Out* target, Vec<Compute<Out>> value, int64_t count, int64_t stride) {
  if (stride == 1) return store(target, value, count);
  Out values[Vec<Out>::size()] = {};
  store(values, value, count);
  for (int64_t i = 0; i < count; ++i) target[i * stride] = values[i];
}

// Loads a whole vector.
template <class In>
inline Vec<Compute<In>> load_whole(const In* source) {
  if constexpr (is_reduced<In>) {
    Vec<float> values;
    at::vec::load_to_float<In>(source, values);
    return values;
  } else {
    return Vec<In>::loadu(source);
  }
}

// Loads the first `count` lanes of a vector; nothing else is read.
template <class In>
inline Vec<Compute<In>> load(const In* source, int64_t count) {
  using T = Compute<In>;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (is_reduced<In>)
    return count == Vec<T>::size() ? load_floats(source)
                                   : load_floats(source, static_cast<__mmask16>((1u << count) - 1));
#endif
  if constexpr (is_reduced<In>) {
    T values[Vec<T>::size()] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(source[i]);
    return Vec<T>::loadu(values);
  } else {
    return Vec<T>::loadu(source, count);
  }
}

}  // namespace pyops::cpu
