// What the algorithms of max_pool2d's forward share: the taps in bounds, and the store of a vector of windows.
#pragma once

#include <algorithm>

#include "running_max.h"

namespace pyops::cpu {

// The taps of a window that lie inside the input, along one axis of `size` elements on which tap 0 is at `origin`.
inline Range taps_inside(int64_t origin, int64_t kernel, int64_t dilation, int64_t size) {
  const Range taps = range_inside(origin, dilation, kernel, size);
  return taps.size() > 0 ? taps : Range{0, 0};
}

// Loads every stride-th element from p on. With fixed_stride = 2, all of the 2 * lanes_of elements are read.
template <int64_t fixed_stride, class T>
Vec<Compute<T>> load_strided(const T* p, int64_t stride) {
  if constexpr (fixed_stride == 1) {
    return load_whole(p);
  } else if constexpr (fixed_stride == 2) {
    return at::vec::deinterleave2(load_whole(p), load_whole(p + lanes_of<T>)).first;
  } else {
    std::array<Compute<T>, lanes_of<T>> values;
    for (int64_t l = 0; l < lanes_of<T>; ++l) values[l] = p[l * stride];
    return Vec<Compute<T>>::loadu(values.data());
  }
}

// Writes a vector of windows; `room` is the number of elements that this chunk has yet to write.
template <class T, class A>
void store_windows(const RunningMax<Compute<T>, A>& best, T* output, A* argmax, int64_t room) {
  store_within(output, best.max(), room);
  const auto tap = best.tap();
  if (room >= lanes_of<T>) {
    std::copy_n(tap.begin(), lanes_of<T>, argmax);
  } else {
    std::copy_n(tap.begin(), room, argmax);
  }
}

}  // namespace pyops::cpu
