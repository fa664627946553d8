// max_pool2d of N H W C: a vector holds one tap of the windows of adjacent channels. Every load is contiguous, whatever
// the stride.
#pragma once

#include "../runtime/parallel.h"
#include "taps.h"

namespace pyops::cpu {

template <class T, class A>
class ChannelPool {
 public:
  ChannelPool(const MaxPool2dShape& shape, const T* input)
      : s_(shape), in_{input, shape.N * shape.H * shape.W * shape.C} {}

  // Computes the rows [begin, end) of the output's N * OH.
  C10_ALWAYS_INLINE void rows(int64_t begin, int64_t end, T* output, A* argmax) const {
    int64_t room = (end - begin) * s_.OW * s_.C;
    output += begin * s_.OW * s_.C;
    argmax += begin * s_.OW * s_.C;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h0 = row % s_.OH * s_.stride_h - s_.padding_h;
      const Range taps_h = taps_inside(h0, s_.kernel_h, s_.dilation_h, s_.H);
      const int64_t row_first = (row / s_.OH * s_.H + h0) * s_.W;
      for (int64_t w0 = -s_.padding_w, x = 0; x < s_.OW; ++x, w0 += s_.stride_w) {
        const Range taps_w = taps_inside(w0, s_.kernel_w, s_.dilation_w, s_.W);
        const Pixel pixel{(row_first + w0) * s_.C, taps_h, taps_w};
        int64_t c = 0;
        for (; c + vectors_at_once * lanes_of<T> <= s_.C; c += vectors_at_once * lanes_of<T>) {
          pool<vectors_at_once>(pixel, c, output + c, argmax + c, room - c);
        }
        for (; c < s_.C; c += lanes_of<T>) pool<1>(pixel, c, output + c, argmax + c, room - c);
        output += s_.C;
        argmax += s_.C;
        room -= s_.C;
      }
    }
  }

 private:
  // Vectors that are computed together, so that one's comparison does not wait for another's blend.
  static constexpr int64_t vectors_at_once = std::is_floating_point_v<Compute<T>> && std::is_same_v<A, uint8_t> ? 4 : 1;

  // A pixel of the output: the position of tap (0, 0) in channel 0, and the taps in bounds.
  struct Pixel {
    int64_t first;
    Range taps_h, taps_w;
  };

  // Computes the channels of `vectors` vectors from c on.
  template <int64_t vectors>
  void pool(const Pixel& pixel, int64_t c, T* output, A* argmax, int64_t room) const {
    const int64_t first = pixel.first + c;
    const int64_t last = first + (pixel.taps_h.end - 1) * row_step() + (pixel.taps_w.end - 1) * column_step();
    const auto best = in_.holds(last, vectors * lanes_of<T>)
                          ? best_of<vectors>(pixel, first, [&](int64_t at) { return load_whole(in_.data + at); })
                          : best_of<vectors>(pixel, first, [&](int64_t at) {
                              const LaneRange lanes{0, std::min(lanes_of<T>, s_.C - c)};
                              return in_.load_part(at, 1, lanes, lowest<Compute<T>>);
                            });
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) {
      store_windows(best[v], output + v * lanes_of<T>, argmax + v * lanes_of<T>, room - v * lanes_of<T>);
    }
  }

  // The maxima of vectors whose tap (0, 0) is at `first`.
  template <int64_t vectors, class Load>
  C10_ALWAYS_INLINE auto best_of(const Pixel& pixel, int64_t first, const Load& load_at) const {
    using Windows = RunningMax<Compute<T>, A>;
    const Windows start(static_cast<A>(pixel.taps_h.begin * s_.kernel_w + pixel.taps_w.begin));
    std::array<Windows, vectors> best;
    best.fill(start);
    for (int64_t i = pixel.taps_h.begin; i < pixel.taps_h.end; ++i) {
      for (int64_t j = pixel.taps_w.begin; j < pixel.taps_w.end; ++j) {
        const int64_t at = first + i * row_step() + j * column_step();
#pragma GCC unroll 4
        for (int64_t v = 0; v < vectors; ++v) best[v].update(load_at(at + v * lanes_of<T>), i * s_.kernel_w + j);
      }
    }
    return best;
  }

  int64_t column_step() const { return s_.dilation_w * s_.C; }
  int64_t row_step() const { return s_.dilation_h * s_.W * s_.C; }

  const MaxPool2dShape s_;
  const Flat<T> in_;
};

template <class T, class A>
void pool_channels(const MaxPool2dShape& s, const T* input, T* output, A* argmax) {
  parallel_for(s.N * s.OH, items_per_fork(s.OW * ceil_div(s.C, lanes_of<T>) * s.taps()),
               [&](int64_t begin, int64_t end) { ChannelPool<T, A>(s, input).rows(begin, end, output, argmax); });
}

}  // namespace pyops::cpu
