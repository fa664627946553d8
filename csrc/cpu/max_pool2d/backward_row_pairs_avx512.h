// The backward of max_pool2d for NCHW floats and the two poolings that most networks use: 2x2 with stride 2, and 3x3
// with stride 2 and padding 1.
//
// A pair of input rows, 2y and 2y + 1, is made at once from window row y and, if windows overlap, y + 1. It is written
// in AVX-512 intrinsics because mask registers do all of the work: a comparison of argmaxes gives a mask, which then
// selects gradients. Vectorized would turn every comparison into a vector and back, and has no masks for the ends of
// short rows.
//
// The gradients of an element are added in window order. An argmax that names no tap equals none, so its gradient goes
// nowhere. Sums begin with 0, so a gradient of -0.0 becomes 0.
#pragma once

#ifdef CPU_CAPABILITY_AVX512

#include "../runtime/parallel.h"
#include "forward_2x2_avx512.h"

namespace pyops::cpu {

// The gradients and argmaxes of up to 16 windows, one to a lane.
struct WindowVector {
  __m512 grad;
  __m128i argmax;
  __mmask16 exist;

  WindowVector(const float* grads, const uint8_t* argmaxes, int64_t first, int64_t count)
      : grad(_mm512_maskz_loadu_ps(first_lanes(count), grads + first)),
        argmax(_mm_maskz_loadu_epi8(first_lanes(count), argmaxes + first)),
        exist(first_lanes(count)) {}

  // sum + the gradients of the windows whose argmax is `tap`.
  __m512 add(__m512 sum, int tap) const {
    const __mmask16 won = _mm_mask_cmpeq_epi8_mask(exist, argmax, _mm_set1_epi8(static_cast<char>(tap)));
    return _mm512_mask_add_ps(sum, won, sum, grad);
  }
};

// Non-overlapping 2x2 windows: lanes 2x and 2x + 1 of both rows belong to window x.
class RowPair2x2 {
 public:
  explicit RowPair2x2(const MaxPool2dShape& s)
      : s_(s),
        last_x_((s.W - 1) / 16 * 8),
        last_windows_(static_cast<__mmask8>(first_lanes(std::min(s.OW - last_x_, int64_t{8})))),
        last_columns_(first_lanes(s.W - 2 * last_x_)) {}

  void make(const float* grads, const uint8_t* argmaxes, int64_t y, float* upper, float* lower) const {
    const bool any = y < s_.OH;
    for (int64_t x = 0; x < last_x_; x += 8)
      strip(grads + x, argmaxes + x, upper + 2 * x, lower ? lower + 2 * x : nullptr, any ? 0xFF : 0, 0xFFFF);
    strip(grads + last_x_, argmaxes + last_x_, upper + 2 * last_x_, lower ? lower + 2 * last_x_ : nullptr,
          any ? last_windows_ : 0, last_columns_);
  }

 private:
  static void strip(const float* grads, const uint8_t* argmaxes, float* upper, float* lower, __mmask8 windows,
                    __mmask16 columns) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m128i upper_taps = _mm_set1_epi16(0x0100), lower_taps = _mm_set1_epi16(0x0302);
    const __m256 grad = _mm256_maskz_loadu_ps(windows, grads);
    const __m128i argmax = _mm_maskz_loadu_epi8(windows, argmaxes);
    const __m512 both = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(grad));
    const __m128i taps = _mm_unpacklo_epi8(argmax, argmax);
    const auto won_by = [&](__m128i tap) {  // a sum that begins with zero, as elsewhere: -0.0 becomes 0.0
      return _mm512_maskz_add_ps(_mm_cmpeq_epi8_mask(taps, tap), both, _mm512_setzero_ps());
    };
    _mm512_mask_storeu_ps(upper, columns, won_by(upper_taps));
    if (lower) _mm512_mask_storeu_ps(lower, columns, won_by(lower_taps));
  }

  const MaxPool2dShape& s_;
  const int64_t last_x_;
  const __mmask8 last_windows_;
  const __mmask16 last_columns_;
};

// 3x3 windows with stride 2 and padding 1: element (2y, 2x) is tap 4 of window (y, x) alone; an element with an odd
// coordinate is the last tap of one window and the first of the next along that axis.
class RowPair3x3 {
 public:
  explicit RowPair3x3(const MaxPool2dShape& s) : s_(s) {}

  void make(const float* grads, const uint8_t* argmaxes, int64_t y, float* upper, float* lower) const {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const auto store = [&](float* row, int64_t x, __m512 even, __m512 odd) {
      _mm512_mask_storeu_ps(row, first_lanes(s_.W - 2 * x), _mm512_permutex2var_ps(even, low, odd));
      _mm512_mask_storeu_ps(row + 16, first_lanes(s_.W - 2 * x - 16), _mm512_permutex2var_ps(even, high, odd));
    };
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t x = 0; 2 * x < s_.W; x += 16) {
      const int64_t here = y < s_.OH ? s_.OW - x : 0, below = y + 1 < s_.OH ? s_.OW - x : 0;
      const WindowVector a(grads, argmaxes, x, here), b(grads, argmaxes, x + 1, here - 1);
      store(upper + 2 * x, x, a.add(zero, 4), b.add(a.add(zero, 5), 3));
      if (lower) {
        const WindowVector c(grads, argmaxes, x + s_.OW, below), d(grads, argmaxes, x + s_.OW + 1, below - 1);
        store(lower + 2 * x, x, c.add(a.add(zero, 7), 1), d.add(c.add(b.add(a.add(zero, 8), 6), 2), 0));
      }
    }
  }

 private:
  const MaxPool2dShape& s_;
};

template <class RowPair>
void backward_by_row_pairs(const MaxPool2dShape& s, const float* grad_output, const uint8_t* argmax,
                           float* grad_input) {
  const int64_t pairs = ceil_div(s.H, 2);
  const bool large = s.N * s.C * s.H * s.W * int64_t{sizeof(float)} > 4 << 20;  // larger than the caches
  parallel_for(s.N * s.C * pairs, items_per_fork(2 * ceil_div(s.W, 16)), [&](int64_t begin, int64_t end) {
    const RowPair row_pair(s);
    int64_t plane = begin / pairs, y = begin % pairs;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t windows = (plane * s.OH + y) * s.OW;
      float* upper = grad_input + (plane * s.H + 2 * y) * s.W;
      if (large) {
        prefetch_ahead(upper, 2 * s.W * sizeof(float));
        prefetch_ahead(grad_output + windows, s.OW * sizeof(float));
      }
      row_pair.make(grad_output + windows, argmax + windows, y, upper, 2 * y + 1 < s.H ? upper + s.W : nullptr);
      if (++y == pairs) y = 0, ++plane;
    }
  });
}

}  // namespace pyops::cpu

#endif
