// Finds the element that the argmax of a max_pool2d window names, for the ops that go through windows one by one.
#pragma once

#include <algorithm>
#include <array>

#include "../common.h"

namespace pyops::cpu {

// Finds the elements that argmaxes name in an image, where element (h, w) of channel c has the number (h W + w) pitch +
// c channel_step.
template <class A>
class Elements {
 public:
  Elements(const MaxPool2dShape& shape, const A* argmax, int64_t pitch, int64_t channel_step)
      : s_(shape), argmax_(argmax), pitch_(pitch), channel_step_(channel_step) {
    for (int64_t tap = 0; has_table && tap < s_.taps(); ++tap) table_[tap] = divide(tap);
    const int64_t last_w = s_.W - 1 - (s_.kernel_w - 1) * s_.dilation_w + s_.padding_w;
    inside_begin_ = std::min(s_.OW, ceil_div(s_.padding_w, s_.stride_w));
    inside_end_ = last_w < 0 ? inside_begin_ : std::max(inside_begin_, std::min(s_.OW, last_w / s_.stride_w + 1));
  }

  // f(window, element) for the windows of row y of image n, in order; the element is -1 if the argmax names none in
  // bounds.
  template <class F>
  void for_row(int64_t n, int64_t y, const F& f) const {
    s_.C == 1 ? for_row<true>(n, y, f) : for_row<false>(n, y, f);
  }

 private:
  struct Tap {
    int64_t h, w, offset;
  };

  template <bool one_channel, class F>
  void for_row(int64_t n, int64_t y, const F& f) const {
    const int64_t h0 = y * s_.stride_h - s_.padding_h;
    const bool inside = h0 >= 0 && h0 + (s_.kernel_h - 1) * s_.dilation_h < s_.H;
    const int64_t begin = inside ? inside_begin_ : s_.OW, end = inside ? inside_end_ : s_.OW;
    if (begin > 0) for_columns<false, one_channel>(n, y, 0, begin, f);
    if (end > begin) for_columns<true, one_channel>(n, y, begin, end, f);
    if (s_.OW > end) for_columns<false, one_channel>(n, y, end, s_.OW, f);
  }

  // Not inlined, because the loop needs all the registers there are.
  template <bool inside, bool one_channel, class F>
  C10_NOINLINE void for_columns(int64_t n, int64_t y, int64_t x, int64_t end, const F f) const {
    const uint64_t H = s_.H, W = s_.W, taps = s_.taps();
    const int64_t C = one_channel ? 1 : s_.C, pitch = pitch_, channel_step = channel_step_, stride_w = s_.stride_w;
    const int64_t h0 = y * s_.stride_h - s_.padding_h;
    int64_t w0 = x * stride_w - s_.padding_w, first = (h0 * s_.W + w0) * pitch;
    int64_t window = ((n * s_.OH + y) * s_.OW + x) * C;
    for (; x < end; ++x, w0 += stride_w, first += stride_w * pitch) {
      for (int64_t c = 0; c < C; ++c, ++window) {
        const A argmax = argmax_[window];
        int64_t element = -1;
        if (static_cast<uint64_t>(argmax) < taps) {
          const Tap tap = find(argmax);
          if (inside || (static_cast<uint64_t>(h0 + tap.h) < H && static_cast<uint64_t>(w0 + tap.w) < W)) {
            element = first + tap.offset + c * channel_step;
          }
        }
        f(window, element);
      }
    }
  }

  Tap find(A argmax) const {
    if constexpr (has_table) {
      return table_[argmax];
    } else {
      return divide(argmax);
    }
  }

  Tap divide(int64_t tap) const {
    const int64_t h = tap / s_.kernel_w * s_.dilation_h, w = tap % s_.kernel_w * s_.dilation_w;
    return {h, w, (h * s_.W + w) * pitch_};
  }

  static constexpr bool has_table = std::is_same_v<A, uint8_t>;  // a table saves the division
  const MaxPool2dShape s_;
  const A* const argmax_;
  const int64_t pitch_, channel_step_;
  int64_t inside_begin_, inside_end_;  // the columns of windows whose taps are all in bounds
  std::array<Tap, has_table ? 255 : 1> table_;
};

}  // namespace pyops::cpu
