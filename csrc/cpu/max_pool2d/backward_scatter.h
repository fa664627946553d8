// The backward of max_pool2d by scattering: a plane, or an image of any layout, starts as zeros, and the gradient of
// each window is added to the element that its argmax names.
//
// With one-byte argmaxes, the plane has margins for the taps out of bounds, whose sums are dropped, so that finding an
// element takes one addition. If no margins are needed, the plane is that of grad_input itself, for the types that are
// summed as they are stored.
//
// Windows are added in order, and 16-bit types are added in float32 and rounded once. An argmax that names no tap is
// skipped.
#pragma once

#include <algorithm>
#include <array>

#include "../runtime/parallel.h"
#include "../runtime/scratch.h"
#include "elements.h"
#include "lanes.h"

namespace pyops::cpu {

template <class T>
class PlaneScatter {
  using C = Compute<T>;

 public:
  explicit PlaneScatter(const MaxPool2dShape& s)
      : s_(s),
        height_(std::max(s.padding_h + s.H, (s.OH - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1)),
        width_(std::max(s.padding_w + s.W, (s.OW - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1)) {
    for (int64_t tap = 0; tap < s.taps(); ++tap)
      steps_[tap] = tap / s.kernel_w * s.dilation_h * width_ + tap % s.kernel_w * s.dilation_w;
  }

  void run(const T* grad_output, const uint8_t* argmax, T* grad_input) const {
    const int64_t windows = s_.OH * s_.OW, elements = s_.H * s_.W;
    parallel_for(s_.N * s_.C, items_per_fork((4 * windows + elements) / 16), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        plane(grad_output + p * windows, argmax + p * windows, grad_input + p * elements);
    });
  }

 private:
  void plane(const T* grad_output, const uint8_t* argmax, T* grad_input) const {
    if constexpr (std::is_same_v<T, C>) {
      if (height_ == s_.H && width_ == s_.W) {
        std::fill_n(grad_input, height_ * width_, C(0));
        return add(grad_output, argmax, grad_input);
      }
    }
    C* sums = scratch<C>(Scratch::image_sums, height_ * width_);
    std::fill_n(sums, height_ * width_, C(0));
    add(grad_output, argmax, sums);
    sums += s_.padding_h * width_ + s_.padding_w;
    const int64_t row = s_.W == width_ ? s_.H * s_.W : s_.W;  // rows without margins are one
    for (int64_t i = 0; i < s_.H * s_.W; i += row, sums += width_)
      for (int64_t j = 0; j < row; j += lanes_of<T>) {
        const int64_t count = std::min(lanes_of<T>, row - j);
        store(grad_input + i + j, load(sums + j, count), count);
      }
  }

  void add(const T* grad_output, const uint8_t* argmax, C* sums) const {
    const int64_t taps = s_.taps(), stride = s_.stride_w;
    for (int64_t y = 0; y < s_.OH; ++y, grad_output += s_.OW, argmax += s_.OW) {
      C* first = sums + y * s_.stride_h * width_;
      for (int64_t x = 0; x < s_.OW; ++x, first += stride)
        if (argmax[x] < taps) first[steps_[argmax[x]]] += static_cast<C>(grad_output[x]);
    }
  }

  const MaxPool2dShape s_;
  const int64_t height_, width_;
  std::array<int64_t, 255> steps_;
};

// NHWC, or any layout with large windows: zeroes an image, then adds window by window; a 16-bit image is summed in
// float32 first.
template <class T, class A>
void scatter(const MaxPool2dShape& s, const T* grad_output, const A* argmax, T* grad_input) {
  using C = Compute<T>;
  parallel_for(s.N, items_per_fork(s.OH * s.OW * s.C / 2), [&](int64_t begin, int64_t end) {
    const Elements<A> elements(s, argmax, s.C, 1);
    const int64_t image_size = s.H * s.W * s.C;
    for (int64_t n = begin; n < end; ++n) {
      T* const image = grad_input + n * image_size;
      C* sums;
      if constexpr (is_reduced<T>) {
        sums = scratch<C>(Scratch::image_sums, image_size);
      } else {
        sums = image;
      }
      std::fill_n(sums, image_size, C(0));
      for (int64_t y = 0; y < s.OH; ++y) {
        elements.for_row(n, y, [sums, grad_output](int64_t window, int64_t element) {
          if (element >= 0) sums[element] += static_cast<C>(grad_output[window]);
        });
      }
      if constexpr (is_reduced<T>) std::copy_n(sums, image_size, image);
    }
  });
}

}  // namespace pyops::cpu
