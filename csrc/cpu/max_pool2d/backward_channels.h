// The backward of max_pool2d for N H W C, with vectors of channels: every pixel gathers from the windows over it, or
// every non-overlapping window writes its own pixels.
#pragma once

#include "backward_windows.h"

namespace pyops::cpu {

// The windows over a position that moves along an axis, and which tap of each the position is.
class Cover {
 public:
  Cover(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t windows)
      : stride_(stride), padding_(padding), dilation_(dilation), reach_((kernel - 1) * dilation), windows_(windows) {}

  void restart() { begin_ = end_ = 0; }

  // Positions must not decrease before the next restart.
  C10_ALWAYS_INLINE void move_to(int64_t position) {
    at_ = position + padding_;
    while (end_ < windows_ && end_ * stride_ <= at_) ++end_;
    while (begin_ < end_ && begin_ * stride_ + reach_ < at_) ++begin_;
  }

  // The windows that may cover the position are [begin(), end()).
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

  // The tap of `window` at the position, or -1 if dilation skips it.
  int64_t tap(int64_t window) const {
    const int64_t distance = at_ - window * stride_;
    if (dilation_ == 1) return distance;
    return distance % dilation_ == 0 ? distance / dilation_ : -1;
  }

 private:
  int64_t stride_, padding_, dilation_, reach_, windows_;
  int64_t at_ = 0, begin_ = 0, end_ = 0;
};

// NHWC: every input pixel gathers vectors of channels.
template <class T>
class ChannelGather {
 public:
  static constexpr int64_t vectors_at_once = 4;  // vectors that share the search for windows

  ChannelGather(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

  // Computes the rows [begin, end) of the input's N * H.
  void rows(int64_t begin, int64_t end, T* grad_input) const {
    int64_t h = begin % s_.H, image = begin / s_.H * s_.OH;
    int64_t room = (end - begin) * s_.W * s_.C;
    grad_input += begin * s_.W * s_.C;
    Cover rows(s_.kernel_h, s_.stride_h, s_.padding_h, s_.dilation_h, s_.OH);
    Cover columns(s_.kernel_w, s_.stride_w, s_.padding_w, s_.dilation_w, s_.OW);
    for (int64_t row = begin; row < end; ++row) {
      rows.move_to(h);
      columns.restart();
      for (int64_t w = 0; w < s_.W; ++w) {
        columns.move_to(w);
        int64_t c = 0;
        for (; c + vectors_at_once * lanes_of<T> <= s_.C; c += vectors_at_once * lanes_of<T>) {
          pixel<vectors_at_once>(rows, columns, image, c, grad_input + c, room - c);
        }
        for (; c < s_.C; c += lanes_of<T>) pixel<1>(rows, columns, image, c, grad_input + c, room - c);
        grad_input += s_.C;
        room -= s_.C;
      }
      if (++h == s_.H) {
        h = 0;
        image += s_.OH;
        rows.restart();
      }
    }
  }

 private:
  // Computes the channels of `vectors` vectors from c on.
  template <int64_t vectors>
  void pixel(const Cover& rows, const Cover& columns, int64_t image, int64_t c, T* grad_input, int64_t room) const {
    const int64_t live = std::min(lanes_of<T>, s_.C - c);
    std::array<Vec<Compute<T>>, vectors> sums{};
    for (int64_t y = rows.begin(); y < rows.end(); ++y) {
      const int64_t i = rows.tap(y);
      if (i < 0) continue;
      for (int64_t x = columns.begin(); x < columns.end(); ++x) {
        const int64_t j = columns.tap(x);
        if (j < 0) continue;
        const int64_t first = ((image + y) * s_.OW + x) * s_.C + c, tap = i * s_.kernel_w + j;
        if (windows_.grad.holds(first, vectors * lanes_of<T>)) {
#pragma GCC unroll 4
          for (int64_t v = 0; v < vectors; ++v) sums[v] = windows_.add(sums[v], first + v * lanes_of<T>, tap);
        } else {
#pragma GCC unroll 4
          for (int64_t v = 0; v < vectors; ++v) {
            sums[v] = windows_.add_edge(sums[v], first + v * lanes_of<T>, tap, LaneRange{0, live});
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) store_within(grad_input + v * lanes_of<T>, sums[v], room - v * lanes_of<T>);
  }

  const MaxPool2dShape s_;
  const Windows<T> windows_;
};

// NHWC with non-overlapping windows and whole vectors of channels: every window writes the pixels that belong to it
// alone. Partial vectors, with their masks, are slower than scattering.
template <class T>
class ChannelTiles {
 public:
  ChannelTiles(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

  static bool take(const MaxPool2dShape& s) {
    return s.is_tiled() && s.taps() <= lanes_of<T> && s.C % lanes_of<T> == 0;
  }

  // Computes the rows of windows [begin, end) of N * OH; the last row of an image also writes the rows of pixels below
  // it that no window reaches.
  C10_ALWAYS_INLINE void rows(int64_t begin, int64_t end, T* grad_input) const {
    const int64_t line = s_.W * s_.C, reached = s_.OW * s_.kernel_w * s_.C;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / s_.OH, y = row % s_.OH;
      T* lines = grad_input + (n * s_.H + y * s_.kernel_h) * line;
      for (int64_t x = 0; x < s_.OW; ++x) window((row * s_.OW + x) * s_.C, lines + x * s_.kernel_w * s_.C, line);
      for (int64_t i = 0; i < s_.kernel_h && reached < line; ++i)
        std::fill(lines + i * line + reached, lines + (i + 1) * line, T(0));
      if (y == s_.OH - 1) std::fill(lines + s_.kernel_h * line, grad_input + (n + 1) * s_.H * line, T(0));
    }
  }

 private:
  void window(int64_t first, T* pixels, int64_t line) const {
    for (int64_t c = 0; c < s_.C; c += lanes_of<T>)
      for (int64_t i = 0; i < s_.kernel_h; ++i)
        for (int64_t j = 0; j < s_.kernel_w; ++j)
          store_within(pixels + i * line + j * s_.C + c,
                       windows_.add(Vec<Compute<T>>(0), first + c, i * s_.kernel_w + j), lanes_of<T>);
  }

  const MaxPool2dShape s_;
  const Windows<T> windows_;
};

}  // namespace pyops::cpu
