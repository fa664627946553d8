// max_pool2d of N C H W: a vector holds one tap of the windows of adjacent columns. With stride 2, one pair of loads,
// de-interleaved, is two taps.
#pragma once

#include "../runtime/parallel.h"
#include "taps.h"

namespace pyops::cpu {

// fixed_stride is stride_w if that is 1 or 2, otherwise 0. A fixed_kernel other than 0 stands for a square kernel of
// that size without dilation, so that the loops over its taps disappear.
template <int64_t fixed_stride, int64_t fixed_kernel, class T, class A>
class ColumnPool {
 public:
  ColumnPool(const MaxPool2dShape& shape, const T* input)
      : s_(shape), in_{input, shape.N * shape.C * shape.H * shape.W}, row_step_(shape.dilation_h * shape.W) {}

  // Computes the rows [begin, end) of the output's N * C * OH.
  void rows(int64_t begin, int64_t end, T* output, A* argmax) const {
    int64_t y = begin % s_.OH, plane = begin / s_.OH * s_.H * s_.W;
    int64_t room = (end - begin) * s_.OW;
    output += begin * s_.OW;
    argmax += begin * s_.OW;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h0 = y * s_.stride_h - s_.padding_h;
      const Range taps_h = taps_inside(h0, s_.kernel_h, s_.dilation_h, s_.H);
      const int64_t row_first = plane + h0 * s_.W;  // of tap row 0, maybe out of bounds
      for (int64_t x = 0; x < s_.OW; x += lanes_of<T>) {
        const int64_t w0 = x * stride() - s_.padding_w;
        const int64_t live = std::min(lanes_of<T>, s_.OW - x);
        const auto best = reads_inside(row_first, w0, live, taps_h) ? inside(row_first + w0, taps_h)
                                                                    : edge(row_first, w0, live, taps_h);
        store_windows(best, output + x, argmax + x, room - x);
      }
      output += s_.OW;
      argmax += s_.OW;
      room -= s_.OW;
      if (++y == s_.OH) {
        y = 0;
        plane += s_.H * s_.W;
      }
    }
  }

 private:
  using Windows = RunningMax<Compute<T>, A>;

  // Whether all taps of these windows are in bounds along the width and may be read in whole vectors.
  bool reads_inside(int64_t row_first, int64_t w0, int64_t live, Range taps_h) const {
    const int64_t reach = (s_.kernel_w - 1) * s_.dilation_w;
    return w0 >= 0 && w0 + (live - 1) * stride() + reach < s_.W &&
           in_.holds(row_first + w0 + taps_h.begin * row_step_,
                     (taps_h.end - 1 - taps_h.begin) * row_step_ + reach + span());
  }

  Windows inside(int64_t first, Range taps_h) const {
    Windows best(static_cast<A>(taps_h.begin * s_.kernel_w));
    const T* row = in_.data + first;
    if (fixed_kernel && taps_h.begin == 0 && taps_h.end == fixed_kernel) {
      for (int64_t i = 0; i < fixed_kernel; ++i) update_row(best, row + i * s_.W, 1, fixed_kernel, i * fixed_kernel);
    } else {
      for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
        update_row(best, row + i * row_step_, s_.dilation_w, s_.kernel_w, i * s_.kernel_w);
      }
    }
    return best;
  }

  // Updates the maximum with one row of taps.
  void update_row(Windows& best, const T* p, int64_t dilation, int64_t kernel, int64_t tap) const {
    int64_t j = 0;
    if constexpr (fixed_stride == 2) {
      for (; dilation == 1 && j + 1 < kernel; j += 2) {
        const auto [even, odd] = at::vec::deinterleave2(load_whole(p + j), load_whole(p + j + lanes_of<T>));
        best.update(even, tap + j);
        best.update(odd, tap + j + 1);
      }
    }
    for (; j < kernel; ++j) best.update(load_strided<fixed_stride>(p + j * dilation, stride()), tap + j);
  }

  // Windows that start at their first tap in bounds; `tap` is the first tap of the row.
  Windows start(int64_t w0, int64_t live, int64_t tap) const {
    if (w0 >= 0) return Windows(static_cast<A>(tap));
    std::array<A, lanes_of<T>> first;
    first.fill(static_cast<A>(tap));
    for (int64_t l = 0; l < live && w0 + l * stride() < 0; ++l) {
      for (int64_t w = w0 + l * stride(); w < 0; w += s_.dilation_w) ++first[l];
    }
    return Windows(first);
  }

  // Windows with taps out of bounds, or where a vector would reach beyond the tensor.
  Windows edge(int64_t row_first, int64_t w0, int64_t live, Range taps_h) const {
    Windows best = start(w0, live, taps_h.begin * s_.kernel_w);
    for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
      for (int64_t j = 0; j < s_.kernel_w; ++j) {
        const int64_t w = w0 + j * s_.dilation_w, first = row_first + i * row_step_ + w;
        const LaneRange lanes{w < 0 ? std::min(lanes_of<T>, ceil_div(-w, stride())) : 0,
                              w < s_.W ? std::min(live, ceil_div(s_.W - w, stride())) : 0};
        if (lanes.begin >= lanes.end) continue;
        best.update(in_.holds(first, span())
                        ? lanes.select(load_strided<fixed_stride>(in_.data + first, stride()), lowest<Compute<T>>)
                        : in_.load_part(first, stride(), lanes, lowest<Compute<T>>),
                    i * s_.kernel_w + j);
      }
    }
    return best;
  }

  int64_t stride() const { return fixed_stride ? fixed_stride : s_.stride_w; }

  // The number of elements that a vector of windows covers, from the first one it reads.
  int64_t span() const { return fixed_stride ? fixed_stride * lanes_of<T> : stride() * (lanes_of<T> - 1) + 1; }

  const MaxPool2dShape s_;
  const Flat<T> in_;
  const int64_t row_step_;
};

template <int64_t fixed_stride, int64_t fixed_kernel, class T, class A>
void pool_columns(const MaxPool2dShape& s, const T* input, T* output, A* argmax) {
  parallel_for(s.N * s.C * s.OH, items_per_fork(ceil_div(s.OW, lanes_of<T>) * s.taps()),
               [&](int64_t begin, int64_t end) {
                 // Every chunk has its own copy, because a byte stored through argmax may alias any object that is
                 // shared.
                 ColumnPool<fixed_stride, fixed_kernel, T, A>(s, input).rows(begin, end, output, argmax);
               });
}

}  // namespace pyops::cpu
