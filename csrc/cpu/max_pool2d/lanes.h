// Vectors of elements, and their edges, for both directions of max_pool2d, and how much work is worth a fork.
//
// Rows of an image are contiguous, and every kernel writes its rows in memory order. So a vector may be read whole if
// it stays inside the tensor, and written whole if it stays inside the part that the same chunk of work has yet to
// write: the surplus lanes hold elements of other rows, are computed in vain and overwritten later. Masks and partial
// vectors, which cost as much as a whole 2x2 window, are left for the ends of tensors and chunks.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <array>

#include "../common.h"

namespace pyops::cpu {

template <class T>
constexpr int64_t kLanes = Vec<Compute<T>>::size();

// Loads p[0], p[1], ... as one vector of the type that T is computed in.
template <class T>
Vec<Compute<T>> load_lanes(const T* p) {
  if constexpr (is_reduced<T>) {
    Vec<float> values;
    at::vec::load_to_float<T>(p, values);
    return values;
  } else {
    return Vec<T>::loadu(p);
  }
}

// Stores the first `count` lanes of `values` at p. Any count is allowed, so that a caller can pass the room that is
// left.
template <class T>
void store_lanes(T* p, const Vec<Compute<T>>& values, int64_t count) {
  const int64_t lanes = std::min(count, kLanes<T>);
  if (lanes <= 0) return;
  if constexpr (is_reduced<T>) {
    const Vec<T> rounded = at::vec::convert_from_float<T>(values, values);
    lanes == kLanes<T> ? rounded.store(p, kLanes<T>) : rounded.store(p, lanes);
  } else {
    lanes == kLanes<T> ? values.store(p) : values.store(p, lanes);
  }
}

// Conversions between the bytes of an argmax and the lanes of a vector, which Vectorized does not offer. The loops
// serve types and machines where speed does not matter: gcc compiles them element by element, at many times the cost.
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
  std::array<C, kLanes<C>> lanes;
  for (int64_t l = 0; l < kLanes<C>; ++l) lanes[l] = static_cast<C>(bytes[l]);
  return Vec<C>::loadu(lanes.data());
}

template <class C>
std::array<uint8_t, kLanes<C>> narrow(const Vec<C>& lanes) {
  std::array<uint8_t, kLanes<C>> bytes;
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
  std::array<C, kLanes<C>> numbers;
  lanes.store(numbers.data());
  for (int64_t l = 0; l < kLanes<C>; ++l) bytes[l] = static_cast<uint8_t>(numbers[l]);
  return bytes;
}

// The gradients whose argmax is `tap`, and zeros elsewhere.
template <class C>
Vec<C> won_by(int64_t tap, const Vec<C>& grad, const uint8_t* argmax) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<C, float>) {
    const __m128i taps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(argmax));
    return _mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask(taps, _mm_set1_epi8(static_cast<char>(tap))), grad);
  }
#endif
  return grad & (widen<C>(argmax) == Vec<C>(static_cast<C>(tap)));
}

// The lanes [begin, end) of a vector.
struct LaneRange {
  int64_t begin, end;

#ifdef CPU_CAPABILITY_AVX512
  __mmask16 mask16() const { return static_cast<__mmask16>((1u << end) - (1u << begin)); }
#endif

  // `values` in these lanes, and `fill` in the rest.
  template <class C>
  Vec<C> select(const Vec<C>& values, C fill) const {
    const Vec<C> fills(fill);
#ifdef CPU_CAPABILITY_AVX512
    // set() jumps through a table of constant masks; here two shifts make the mask.
    if constexpr (std::is_same_v<C, float>) {
      return _mm512_mask_mov_ps(fills, mask16(), values);
    }
#endif
    return Vec<C>::set(fills, Vec<C>::set(values, fills, begin), end);
  }
};

// A tensor as a flat array that knows its end.
template <class T>
struct Flat {
  const T* data;
  int64_t numel;

  // Whether `count` elements from `first` on may be read.
  bool holds(int64_t first, int64_t count) const { return first >= 0 && first + count <= numel; }

  // data[first + lane * stride] in these lanes, and `fill` in the rest; nothing else is read.
  Vec<Compute<T>> load_part(int64_t first, int64_t stride, LaneRange lanes, Compute<T> fill) const {
    std::array<Compute<T>, kLanes<T>> values;
    values.fill(fill);
    for (int64_t lane = lanes.begin; lane < lanes.end; ++lane) values[lane] = data[first + lane * stride];
    return Vec<Compute<T>>::loadu(values.data());
  }
};

// The grain of at::parallel_for over rows: how many rows are worth a fork. `vectors` is the number of vectors that a
// row reads.
inline int64_t rows_per_fork(int64_t vectors) {
  constexpr int64_t kVectorsPerFork = 8192;  // fitted to measurements, edges and loop control included
  return std::max<int64_t>(1, kVectorsPerFork / std::max<int64_t>(1, vectors));
}

// Whether windows are square, without dilation, and have this stride along the width; stride_h may be anything. Such
// shapes have kernels of their own.
inline bool is_square(const MaxPool2dShape& s, int64_t kernel, int64_t stride) {
  return s.kernel_h == kernel && s.kernel_w == kernel && s.stride_w == stride && s.dilation_h == 1 && s.dilation_w == 1;
}

// An NCHW tensor as N * C images of one channel, for which NCHW and NHWC are the same layout.
inline MaxPool2dShape as_channels_last(MaxPool2dShape shape) {
  if (!shape.channels_last) {
    shape.N *= shape.C;
    shape.C = 1;
    shape.channels_last = true;
  }
  return shape;
}

}  // namespace pyops::cpu
