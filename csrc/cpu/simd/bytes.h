// Conversions between the bytes of an argmax and the lanes of a vector, which Vectorized does not offer.
#pragma once

#include <array>

#include "vec.h"

namespace pyops::cpu {

// The loops serve types and machines where speed does not matter: gcc compiles them element by element, at many times
// the cost.
template <class C>
Vec<C> widen(const uint8_t* bytes) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<C, double>) {
    return _mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<C, float>) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
  } else if constexpr (std::is_same_v<C, double>) {
    return _mm256_cvtepi32_pd(_mm_cvtepu8_epi32(_mm_loadu_si32(bytes)));
  }
#endif
  std::array<C, lanes_of<C>> lanes;
  for (int64_t l = 0; l < lanes_of<C>; ++l) lanes[l] = static_cast<C>(bytes[l]);
  return Vec<C>::loadu(lanes.data());
}

template <class C>
std::array<uint8_t, lanes_of<C>> narrow(const Vec<C>& lanes) {
  std::array<uint8_t, lanes_of<C>> bytes;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<C, double>) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes.data()), _mm256_cvtepi32_epi8(_mm512_cvttpd_epi32(lanes)));
    return bytes;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<C, float>) {
    const __m256i numbers = _mm256_cvttps_epi32(lanes);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes.data()), _mm_packus_epi16(words, words));
    return bytes;
  } else if constexpr (std::is_same_v<C, double>) {
    const __m128i numbers = _mm256_cvttpd_epi32(lanes), words = _mm_packs_epi32(numbers, numbers);
    _mm_storeu_si32(bytes.data(), _mm_packus_epi16(words, words));
    return bytes;
  }
#endif
  std::array<C, lanes_of<C>> numbers;
  lanes.store(numbers.data());
  for (int64_t l = 0; l < lanes_of<C>; ++l) bytes[l] = static_cast<uint8_t>(numbers[l]);
  return bytes;
}

}  // namespace pyops::cpu
