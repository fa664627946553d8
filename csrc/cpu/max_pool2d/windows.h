// max_pool2d of N C H W with too few columns for a vector of them: windows one by one, or vectors of windows that
// gather their taps.
#pragma once

#include <numeric>

#include "../runtime/parallel.h"
#include "../runtime/scratch.h"
#include "taps.h"

namespace pyops::cpu {

// Takes one window at a time.
template <class T, class A>
void pool_windows(const MaxPool2dShape& s, const T* input, T* output, A* argmax) {
  using C = Compute<T>;
  parallel_for(s.N * s.C * s.OH, items_per_fork(s.OW * s.taps()), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const plane = input + row / s.OH * s.H * s.W;
      const int64_t h0 = row % s.OH * s.stride_h - s.padding_h;
      const Range taps_h = taps_inside(h0, s.kernel_h, s.dilation_h, s.H);
      for (int64_t x = 0, w0 = -s.padding_w; x < s.OW; ++x, w0 += s.stride_w) {
        const Range taps_w = taps_inside(w0, s.kernel_w, s.dilation_w, s.W);
        C max = lowest<C>;
        int64_t tap = taps_h.begin * s.kernel_w + taps_w.begin;
        for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
          for (int64_t j = taps_w.begin; j < taps_w.end; ++j) {
            const C v = plane[(h0 + i * s.dilation_h) * s.W + w0 + j * s.dilation_w];
            if (v > max || v != v) {
              max = v;
              tap = i * s.kernel_w + j;
            }
          }
        }
        output[row * s.OW + x] = static_cast<T>(max);
        argmax[row * s.OW + x] = static_cast<A>(tap);
      }
    }
  });
}

// Whether all taps are in bounds and offsets within a plane fit into the indices of gather_windows.
inline bool can_gather_windows(const MaxPool2dShape& s) {
  return s.padding_h == 0 && s.padding_w == 0 && (s.OH - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h < s.H &&
         (s.OW - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w < s.W && s.H * s.W < (1 << 20);
}

// Takes vectors of windows, which continue across rows and planes, where all taps are in bounds.
template <class T>
void gather_windows(const MaxPool2dShape& s, const T* input, T* output, uint8_t* argmax) {
  using Index = at::vec::int_same_size_t<T>;
  constexpr int64_t lanes = lanes_of<T>;
  const int64_t plane = s.H * s.W, windows = s.OH * s.OW, planes_at_once = lanes / std::gcd(windows, lanes);
  Index* firsts = scratch<Index>(Scratch::patterns, planes_at_once * windows);  // where windows begin
  for (int64_t i = 0; i < planes_at_once * windows; ++i)
    firsts[i] = i / windows * plane + i % windows / s.OW * s.stride_h * s.W + i % s.OW * s.stride_w;
  const int64_t groups = s.N * s.C / planes_at_once, vectors = planes_at_once * windows / lanes;
  parallel_for(groups, items_per_fork(4 * vectors * s.taps()), [=](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const T* const planes = input + group * planes_at_once * plane;
      for (int64_t v = 0; v < vectors; ++v) {
        const auto first = Vec<Index>::loadu(firsts + v * lanes);
        RunningMax<T, uint8_t> best;
        for (int64_t i = 0; i < s.kernel_h; ++i)
          for (int64_t j = 0; j < s.kernel_w; ++j)
            best.update(at::vec::gather<sizeof(T)>(planes + i * s.dilation_h * s.W + j * s.dilation_w, first),
                        i * s.kernel_w + j);
        const int64_t window = (group * vectors + v) * lanes;
        store_windows<T>(best, output + window, argmax + window, lanes);
      }
    }
  });
  MaxPool2dShape rest = s;
  rest.C = 1, rest.N = s.N * s.C - groups * planes_at_once;
  const int64_t done = groups * planes_at_once * windows;
  pool_windows(rest, input + groups * planes_at_once * plane, output + done, argmax + done);
}

}  // namespace pyops::cpu
