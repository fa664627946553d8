// The update rule of max_pool2d, (v > max) || isnan(v), for a vector of windows at a time: of equal taps the first one
// wins, and of several NaNs the last.
#pragma once

#include <array>
#include <limits>

#include "lanes.h"

namespace pyops::cpu {

// The value that a maximum starts from, which also stands for taps out of bounds.
template <class C>
constexpr C lowest =
    std::numeric_limits<C>::has_infinity ? -std::numeric_limits<C>::infinity() : std::numeric_limits<C>::lowest();

// The running maximum of a vector of windows, and the tap it came from. This general form keeps taps of any size and
// leaves vectorization to the compiler.
template <class C, class A>
class RunningMax {
 public:
  // All lanes start at tap `first`, or lane l at first[l], with the lowest maximum; the forms below take any start.
  explicit RunningMax(A first = 0) {
    max_.fill(lowest<C>);
    tap_.fill(first);
  }
  explicit RunningMax(const std::array<A, lanes_of<C>>& first) : tap_(first) { max_.fill(lowest<C>); }

  void update(const Vec<C>& values, int64_t tap) {
    std::array<C, lanes_of<C>> v;
    values.store(v.data());
    for (int64_t l = 0; l < lanes_of<C>; ++l) {
      const bool wins = v[l] > max_[l] || v[l] != v[l];
      max_[l] = wins ? v[l] : max_[l];
      tap_[l] = wins ? tap : tap_[l];
    }
  }

  Vec<C> max() const { return Vec<C>::loadu(max_.data()); }
  std::array<A, lanes_of<C>> tap() const { return tap_; }

 private:
  std::array<C, lanes_of<C>> max_;
  std::array<A, lanes_of<C>> tap_;
};

// Taps that fit in a byte are blended along with the values, as numbers of the same type: every type can hold them,
// int8 as the negative numbers of the same bits.
template <class C>
class RunningMax<C, uint8_t> {
 public:
  explicit RunningMax(uint8_t first = 0, C start = lowest<C>) : max_(start), tap_(static_cast<C>(first)) {}
  explicit RunningMax(const std::array<uint8_t, lanes_of<C>>& first) : max_(lowest<C>), tap_(widen<C>(first.data())) {}

  void update(const Vec<C>& values, int64_t tap) {
    Vec<C> wins = values > max_;
    if constexpr (std::is_floating_point_v<C>) wins = wins | values.isnan();
    max_ = Vec<C>::blendv(max_, values, wins);
    tap_ = Vec<C>::blendv(tap_, Vec<C>(static_cast<C>(tap)), wins);
  }

  Vec<C> max() const { return max_; }
  std::array<uint8_t, lanes_of<C>> tap() const { return narrow<C>(tap_); }

 private:
  Vec<C> max_;
  Vec<C> tap_;
};

// The maximum alone, for callers that do not need the tap; it is bitwise that of the other forms.
template <class C>
class RunningMax<C, void> {
 public:
  explicit RunningMax(uint8_t /*first*/, C start) : max_(start) {}

  // clamp_min and max_ps keep a maximum that is NaN, and the earlier of two zeros; a value that is NaN is blended in.
  void update(const Vec<C>& values, int64_t /*tap*/) {
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (std::is_same_v<C, float>) {
      const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
      max_ = _mm512_mask_mov_ps(_mm512_max_ps(values, max_), nan, values);
      return;
    }
#endif
    max_ = Vec<C>::blendv(at::vec::clamp_min(max_, values), values, values.isnan());
  }

  Vec<C> max() const { return max_; }

 private:
  Vec<C> max_;
};

#ifdef CPU_CAPABILITY_AVX512
// In intrinsics, because Vectorized has no mask registers: it turns every comparison into a vector of ones and back.
template <>
class RunningMax<float, uint8_t> {
 public:
  explicit RunningMax(uint8_t first = 0, float start = lowest<float>)
      : max_(_mm512_set1_ps(start)), tap_(_mm512_set1_epi32(first)) {}
  explicit RunningMax(const std::array<uint8_t, 16>& first)
      : max_(_mm512_set1_ps(lowest<float>)),
        tap_(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first.data())))) {}

  void update(const Vec<float>& values, int64_t tap) {
    const __mmask16 wins =
        _mm512_cmp_ps_mask(values, max_, _CMP_GT_OQ) | _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    max_ = _mm512_mask_mov_ps(max_, wins, values);
    tap_ = _mm512_mask_set1_epi32(tap_, wins, static_cast<int>(tap));
  }

  Vec<float> max() const { return max_; }
  std::array<uint8_t, 16> tap() const {
    std::array<uint8_t, 16> bytes;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes.data()), _mm512_cvtepi32_epi8(tap_));
    return bytes;
  }

 private:
  __m512 max_;
  __m512i tap_;
};
#elif defined(CPU_CAPABILITY_AVX2)
// In gcc's own vectors: with intrinsics, gcc compares the result of a comparison once more before it blends by it.
template <>
class RunningMax<float, uint8_t> {
 public:
  explicit RunningMax(uint8_t first = 0, float start = lowest<float>) : max_(Floats{} + start), tap_(Ints{} + first) {}
  explicit RunningMax(const std::array<uint8_t, 8>& first)
      : max_(Floats{} + lowest<float>),
        tap_((Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first.data())))) {}

  void update(const Vec<float>& values, int64_t tap) {
    const auto v = (Floats) static_cast<__m256>(values);
    const auto wins = (v > max_) | (v != v);
    max_ = wins ? v : max_;
    tap_ = wins ? Ints{} + static_cast<int>(tap) : tap_;
  }

  Vec<float> max() const { return (__m256)max_; }
  std::array<uint8_t, 8> tap() const {
    std::array<uint8_t, 8> bytes;
    const auto taps = (__m256i)tap_;
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(taps), _mm256_extracti128_si256(taps, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes.data()), _mm_packus_epi16(words, words));
    return bytes;
  }

 private:
  using Floats = float __attribute__((vector_size(32)));
  using Ints = int __attribute__((vector_size(32)));
  Floats max_;
  Ints tap_;
};
#endif

}  // namespace pyops::cpu
