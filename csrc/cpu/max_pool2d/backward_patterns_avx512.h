// The backward of max_pool2d for floats and windows that do not overlap, over rows shorter than a vector: NCHW images
// of few columns, or NHWC images of few channels.
//
// A vector of elements continues across rows, pixels and images, and the windows that its elements belong to repeat
// from one group of images, or of rows, to the next. So each vector of a group has a pattern, which is found once: the
// first of the 16 consecutive windows that its lanes choose from, the window that each lane takes, and the tap of that
// window that the lane is. A vector then costs two permutations, a comparison and a store, and each pattern stays in
// registers while it is applied to a block of groups.
//
// An argmax that names no tap equals none, so its gradient goes nowhere. Sums begin with 0, so a gradient of -0.0
// becomes 0.
#pragma once

#ifdef CPU_CAPABILITY_AVX512

#include <numeric>

#include "../runtime/parallel.h"
#include "../runtime/scratch.h"
#include "forward_2x2_avx512.h"

namespace pyops::cpu {

class PatternBackward {
 public:
  // Whether rows are shorter than a vector and windows do not overlap.
  static bool takes(const MaxPool2dShape& s) {
    const int64_t row = s.channels_last ? s.C : s.W;
    return row < 16 && s.kernel_h <= s.stride_h && s.kernel_w <= s.stride_w && s.dilation_h == 1 && s.dilation_w == 1;
  }

  // Finds the patterns of a shape, in the scratch of this thread.
  explicit PatternBackward(const MaxPool2dShape& shape) : s_(as_channels_last(shape)) {
    const bool by_rows = s_.padding_h == 0 && s_.H == s_.OH * s_.stride_h;  // every row of windows repeats
    const int64_t rows = by_rows ? s_.stride_h : s_.H, windows = (by_rows ? 1 : s_.OH) * s_.OW * s_.C;
    const int64_t elements = rows * s_.W * s_.C, repeats = 16 / std::gcd(elements, int64_t{16});
    elements_ = repeats * elements, windows_ = repeats * windows;
    if (elements_ > most_elements) return;
    patterns_ = scratch<Pattern>(Scratch::patterns, elements_);
    for (int64_t r = 0; r < repeats; ++r)
      for (int64_t h = 0; h < rows; ++h) add_row(r * elements + h * s_.W * s_.C, r * windows, h + s_.padding_h);
  }

  // Whether a group is short enough for its patterns to be kept.
  bool exist() const { return count_ > 0; }

  // Whether at least 12 of 16 lanes are used on average; below that the patterns are not worth it.
  bool use_most_lanes() const { return elements_ >= 12 * count_; }

  void run(const float* grad_output, const uint8_t* argmax, float* grad_input) const {
    const int64_t elements = s_.N * s_.H * s_.W * s_.C, windows = s_.N * s_.OH * s_.OW * s_.C;
    const int64_t groups = ceil_div(elements, elements_), at_once = block_elements / elements_;
    // The groups with enough windows and elements after them to read whole vectors without counting what is left.
    const int64_t whole = std::clamp((windows - 16) / windows_, int64_t{0}, elements / elements_);
    parallel_for(groups, items_per_fork(2 * count_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += at_once) {
        const int64_t last = std::min(i + at_once, end), last_whole = std::clamp(whole, i, last);
        for (const Pattern* p = patterns_; p < patterns_ + count_; ++p)
          whole_groups(*p, last_whole - i, grad_output + i * windows_, argmax + i * windows_,
                       grad_input + i * elements_, elements > prefetched);
        for (int64_t j = last_whole; j < last; ++j) {
          const int64_t from = j * windows_, to = j * elements_;
          last_group(grad_output + from, argmax + from, windows - from, grad_input + to, elements - to);
        }
      }
    });
  }

 private:
  static constexpr int64_t most_elements = 2048;        // in a group
  static constexpr int64_t block_elements = 4096;       // in a block, which stays in an L1 cache
  static constexpr int64_t prefetched = (4 << 20) / 4;  // a tensor of more elements is larger than the caches

  struct alignas(64) Pattern {
    int32_t lanes[16], taps[16];  // taps: -1 in lanes that no window reaches
    int64_t from, to, count;      // its first window and element in the group, and how many elements

    // One vector of elements from 16 windows: each lane takes the gradient of its window if that window's argmax is its
    // tap.
    C10_ALWAYS_INLINE static __m512 choose(__m512i lanes, __m512i taps, __m512 grad, __m128i argmax) {
      const __m512i argmax_of_lanes = _mm512_permutexvar_epi32(lanes, _mm512_cvtepu8_epi32(argmax));
      const __mmask16 won = _mm512_cmpeq_epi32_mask(argmax_of_lanes, taps);
      return _mm512_maskz_add_ps(won, _mm512_permutexvar_ps(lanes, grad), _mm512_setzero_ps());  // -0.0 becomes 0.0
    }
  };

  void whole_groups(const Pattern& p, int64_t groups, const float* grads, const uint8_t* argmaxes, float* grad_input,
                    bool prefetch) const {
    const __m512i lanes = _mm512_load_si512(p.lanes), taps = _mm512_load_si512(p.taps);
    const __mmask16 exist = first_lanes(p.count);
    const int64_t windows = windows_, elements = elements_;
    grads += p.from, argmaxes += p.from, grad_input += p.to;
    for (int64_t i = 0; i < groups; ++i, grads += windows, argmaxes += windows, grad_input += elements) {
      if (prefetch) __builtin_prefetch(grad_input + block_elements);
      const __m512 result = Pattern::choose(lanes, taps, _mm512_loadu_ps(grads),
                                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(argmaxes)));
      _mm512_mask_storeu_ps(grad_input, exist, result);
    }
  }

  // One group at the end of the tensors, of which `windows` and `elements` are left.
  void last_group(const float* grads, const uint8_t* argmaxes, int64_t windows, float* grad_input,
                  int64_t elements) const {
    for (const Pattern* p = patterns_; p < patterns_ + count_ && p->to < elements; ++p) {
      const __mmask16 there = first_lanes(windows - p->from);
      const __m512 result = Pattern::choose(_mm512_load_si512(p->lanes), _mm512_load_si512(p->taps),
                                            _mm512_maskz_loadu_ps(there, grads + p->from),
                                            _mm_maskz_loadu_epi8(there, argmaxes + p->from));
      _mm512_mask_storeu_ps(grad_input + p->to, first_lanes(std::min(p->count, elements - p->to)), result);
    }
  }

  // Adds a row of elements that begins at `to`, h rows below the top of the padding; its windows are counted from
  // `from`.
  void add_row(int64_t to, int64_t from, int64_t h) {
    const int64_t y = h / s_.stride_h, i = h % s_.stride_h;
    for (int64_t w = 0; w < s_.W; ++w) {
      const int64_t x = (w + s_.padding_w) / s_.stride_w, j = (w + s_.padding_w) % s_.stride_w;
      const bool reached = y < s_.OH && x < s_.OW && i < s_.kernel_h && j < s_.kernel_w;
      const int64_t first = from + (y * s_.OW + x) * s_.C;
      for (int64_t c = 0; c < s_.C; ++c, ++to)
        reached ? add(to, first + c, static_cast<int32_t>(i * s_.kernel_w + j)) : add(to, last_from(), -1);
    }
  }

  int64_t last_from() const { return count_ > 0 ? patterns_[count_ - 1].from : 0; }

  // Adds an element that takes the gradient of `window` if the argmax of that window is `tap`.
  void add(int64_t to, int64_t window, int32_t tap) {
    Pattern* p = patterns_ + count_ - 1;
    if (count_ == 0 || p->count == 16 || window >= p->from + 16 || !include(*p, window)) {
      p = patterns_ + count_++;
      *p = {{}, {}, window, to, 0};
      std::fill_n(p->taps, 16, -1);
    }
    p->lanes[p->count] = static_cast<int32_t>(window - p->from);
    p->taps[p->count++] = tap;
  }

  // Moves the beginning of a pattern back to `window` if that comes before it; false if a lane would then be out of
  // reach.
  static bool include(Pattern& p, int64_t window) {
    const auto earlier = static_cast<int32_t>(p.from - window);
    if (earlier <= 0) return true;
    if (earlier + *std::max_element(p.lanes, p.lanes + p.count) >= 16) return false;
    for (int64_t l = 0; l < p.count; ++l) p.lanes[l] += earlier;
    p.from = window;
    return true;
  }

  const MaxPool2dShape s_;
  Pattern* patterns_ = nullptr;
  int64_t count_ = 0, elements_ = 0, windows_ = 0;
};

}  // namespace pyops::cpu

#endif
