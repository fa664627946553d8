// Vectors of elements and their edges, for both directions of max_pool2d.
//
// Rows of an image are contiguous, and every kernel writes its rows in memory order. So a vector may be read whole if
// it stays inside the tensor, and written whole if it stays inside the part that the same chunk of work has yet to
// write: the surplus lanes hold elements of other rows, are computed in vain and overwritten later. Masks and partial
// vectors, which cost as much as a whole 2x2 window, are left for the ends of tensors and chunks.
#pragma once

#include <algorithm>
#include <array>

#include "../simd/bytes.h"

namespace pyops::cpu {

// Stores as many lanes of `values` at p as there is room for, which may be none or more than a vector.
template <class T>
void store_within(T* p, const Vec<Compute<T>>& values, int64_t room) {
  if (room >= lanes_of<T>) return store(p, values, lanes_of<T>);
  if (room > 0) store(p, values, room);
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
    std::array<Compute<T>, lanes_of<T>> values;
    values.fill(fill);
    for (int64_t lane = lanes.begin; lane < lanes.end; ++lane) values[lane] = data[first + lane * stride];
    return Vec<Compute<T>>::loadu(values.data());
  }
};

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
