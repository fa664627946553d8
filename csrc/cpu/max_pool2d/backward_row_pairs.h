// The backward of max_pool2d for N C H W and non-overlapping 2x2 windows: a vector of windows is four vectors of
// elements.
#pragma once

#include "backward_windows.h"

namespace pyops::cpu {

template <class T>
class TileBackward {
 public:
  TileBackward(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

  static int64_t row_pairs(const MaxPool2dShape& s) { return s.N * s.C * ceil_div(s.H, 2); }

  // Computes the pairs of rows [begin, end) of row_pairs(); the last pair of a plane may be one row, or have no
  // windows.
  C10_ALWAYS_INLINE void rows(int64_t begin, int64_t end, T* grad_input) const {
    const int64_t pairs = ceil_div(s_.H, 2);
    const auto first_element = [&](int64_t pair) { return (pair / pairs * s_.H + pair % pairs * 2) * s_.W; };
    T* const chunk_end = grad_input + first_element(end);
    grad_input += first_element(begin);
    int64_t y = begin % pairs, first = (begin / pairs * s_.OH + std::min(y, s_.OH)) * s_.OW;
    for (int64_t pair = begin; pair < end; ++pair) {
      const bool two = 2 * y + 1 < s_.H;
      const int64_t columns = y < s_.OH ? s_.OW : 0;
      // In descending order, so that surplus lanes fall on the start of a row that is yet to be written.
      for (int64_t w = (s_.W - 1) / strip * strip; w >= 0; w -= strip) {
        tile(first + w / 2, columns - w / 2, grad_input + w, two ? grad_input + s_.W + w : nullptr, chunk_end);
      }
      grad_input += two ? 2 * s_.W : s_.W;
      first += columns;
      if (++y == pairs) y = 0;
    }
  }

 private:
  static constexpr int64_t strip = 2 * lanes_of<T>;

  // Computes the windows from `first` on, of which `columns` are left in their row. The surplus lanes are masked once,
  // and all four taps are compared before anything is stored, because as far as gcc knows a store may change an argmax.
  void tile(int64_t first, int64_t columns, T* upper, T* lower, T* chunk_end) const {
    using V = Vec<Compute<T>>;
    const LaneRange lanes{0, std::min(lanes_of<T>, columns)};
    std::array<uint8_t, lanes_of<T>> part;
    const uint8_t* argmax = windows_.argmax + first;
    V grad(0);
    if (columns > 0 && windows_.grad.holds(first, lanes_of<T>)) {
      grad = load_whole(windows_.grad.data + first);
      if (lanes.end < lanes_of<T>) grad = lanes.select(grad, Compute<T>(0));
    } else {
      part.fill(0);
      for (int64_t l = 0; l < lanes.end; ++l) part[l] = argmax[l];
      grad = windows_.grad.load_part(first, 1, lanes, Compute<T>(0));
      argmax = part.data();
    }
    grad = V(0) + grad;  // -0.0 becomes 0.0, as if added to 0
    std::array<V, 4> won;
#pragma GCC unroll 4
    for (int64_t tap = 0; tap < 4; ++tap) won[tap] = won_by<Compute<T>>(tap, grad, argmax);
    const auto store_row = [&](T* row, const V& even, const V& odd) {
      const auto [low, high] = at::vec::interleave2(even, odd);
      store_within(row, low, chunk_end - row);
      store_within(row + lanes_of<T>, high, chunk_end - row - lanes_of<T>);
    };
    store_row(upper, won[0], won[1]);
    if (lower) store_row(lower, won[2], won[3]);
  }

  const MaxPool2dShape s_;
  const Windows<T> windows_;
};

}  // namespace pyops::cpu
