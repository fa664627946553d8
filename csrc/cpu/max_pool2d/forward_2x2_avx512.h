// The forward of max_pool2d for NCHW floats and non-overlapping 2x2 windows that lie inside the image.
//
// A row of windows takes a few AVX-512 instructions, where the general kernel (max_pool2d.cpp) is dominated by index
// bookkeeping. The maximum is found in two rounds, within each row of taps and then between the rows, and its tap is
// kept in mask registers, one for each bit of its number.
//
// The result is that of comparing the taps in order, for ties and NaNs too.
#pragma once

#ifdef CPU_CAPABILITY_AVX512

#include "lanes.h"

namespace pyops::cpu {

// A mask of the first `count` lanes; any count is allowed.
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp(count, int64_t{0}, int64_t{16})) - 1);
}

class Windows2x2 {
 public:
  explicit Windows2x2(const MaxPool2dShape& s) : s_(s) {}

  // Supports 2x2 windows with stride 2, without padding and dilation, that all lie inside the image.
  static bool takes(const MaxPool2dShape& s) { return s.is_tiled() && s.kernel_h == 2 && s.kernel_w == 2; }

  // Computes the rows [begin, end) of the output's N * C * OH.
  void rows(int64_t begin, int64_t end, const float* input, float* output, uint8_t* argmax) const {
    const float* row = input + begin / s_.OH * s_.H * s_.W + begin % s_.OH * 2 * s_.W;
    const int64_t to_next_plane = (s_.H - 2 * s_.OH) * s_.W;
    output += begin * s_.OW, argmax += begin * s_.OW;
    for (int64_t i = begin, y = begin % s_.OH; i < end; ++i, output += s_.OW, argmax += s_.OW, row += 2 * s_.W) {
      prefetch_ahead(row, 2 * s_.W * sizeof(float));
      s_.OW <= 8 ? up_to_8(row, output, argmax) : many(row, output, argmax);
      if (++y == s_.OH) y = 0, row += to_next_plane;
    }
  }

 private:
  // Which of `values` win over `best`, whose taps come before theirs.
  static __mmask16 wins(__m512 values, __m512 best) {
    return _mm512_cmp_ps_mask(values, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  }

  static void store(__mmask16 exist, __m512 max, __mmask16 right, __mmask16 lower, float* output, uint8_t* argmax) {
    _mm512_mask_storeu_ps(output, exist, max);
    const __m128i tap = _mm_or_si128(_mm_maskz_set1_epi8(right, 1), _mm_maskz_set1_epi8(lower, 2));
    _mm_mask_storeu_epi8(argmax, exist, tap);
  }

  // Both rows of taps fit in one vector, the upper row in the lower half.
  void up_to_8(const float* row, float* output, uint8_t* argmax) const {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __mmask16 columns = first_lanes(2 * s_.OW);
    const __m512 upper = _mm512_maskz_loadu_ps(columns, row), lower = _mm512_maskz_loadu_ps(columns, row + s_.W);
    const __m512 left = _mm512_permutex2var_ps(upper, even, lower), right = _mm512_permutex2var_ps(upper, odd, lower);
    const __mmask16 right_wins = wins(right, left);
    const __m512 of_rows = _mm512_mask_mov_ps(left, right_wins, right);
    const __m512 of_lower = _mm512_shuffle_f32x4(of_rows, of_rows, 0b1110);  // the upper half, moved to the lower
    const __mmask16 lower_wins = wins(of_lower, of_rows);
    const __mmask16 is_right = (right_wins >> 8 & lower_wins) | (right_wins & ~lower_wins);
    store(first_lanes(s_.OW), _mm512_mask_mov_ps(of_rows, lower_wins, of_lower), is_right, lower_wins, output, argmax);
  }

  // The larger of each pair of adjacent elements, and whether it is the right one.
  struct Pairs {
    __mmask16 right_wins;
    __m512 max;

    Pairs(const float* p, __mmask16 first, __mmask16 second) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      const __m512 a = _mm512_maskz_loadu_ps(first, p), b = _mm512_maskz_loadu_ps(second, p + 16);
      const __m512 left = _mm512_permutex2var_ps(a, even, b), right = _mm512_permutex2var_ps(a, odd, b);
      right_wins = wins(right, left);
      max = _mm512_mask_mov_ps(left, right_wins, right);
    }
  };

  void many(const float* row, float* output, uint8_t* argmax) const {
    for (int64_t x = 0; x < s_.OW; x += 16) {
      const __mmask16 first = first_lanes(2 * (s_.OW - x)), second = first_lanes(2 * (s_.OW - x) - 16);
      const Pairs upper(row + 2 * x, first, second), lower(row + s_.W + 2 * x, first, second);
      const __mmask16 lower_wins = wins(lower.max, upper.max);
      const __mmask16 is_right = (lower.right_wins & lower_wins) | (upper.right_wins & ~lower_wins);
      store(first_lanes(s_.OW - x), _mm512_mask_mov_ps(upper.max, lower_wins, lower.max), is_right, lower_wins,
            output + x, argmax + x);
    }
  }

  const MaxPool2dShape s_;
};

}  // namespace pyops::cpu

#endif
