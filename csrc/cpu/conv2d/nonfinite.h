// Exact borders of convolutions with infinities or NaN.
//
// The matrix products of conv2d multiply the zeros that conv2d/input_tile.h puts around an image. With a finite factor
// that adds nothing, but 0 * inf is NaN, and a convolution over the taps inside of the image has no such term. So where
// a tap leaves the image and the other operand is not finite, the product is taken with that operand's finite part (its
// infinities and NaN are replaced by the smallest normal number of their sign), and the terms of the replaced values
// are added one by one, over the taps inside only. Any such term makes its sum infinite or NaN, so neither the order
// nor the rounding of these terms matters. Nor does the smallest number that was added in their place: multiplied by an
// infinity it gives the same infinity, where a 0 would give NaN.
//
// The cost is a pass over the weight (in the weight gradient, over grad_output or its sums), and time for each value
// that is not finite.
#pragma once

#include <limits>
#include <vector>

#include "input_tile.h"

namespace pyops::cpu {

template <class In>
bool is_finite(In value) {
  const auto v = static_cast<Compute<In>>(value);
  return v - v == 0;
}

template <class In>
bool all_finite(const In* values, int64_t count) {
  using T = Compute<In>;
  constexpr int64_t lanes = Vec<T>::size();
  Vec<T> sum(0);  // its terms are 0, or NaN where a value is not finite
  for (int64_t i = 0; i < count; i += lanes) {
    const Vec<T> value = load(values + i, std::min(lanes, count - i));
    sum = sum + (value - value);
  }
  return is_finite(at::vec::vec_reduce_all([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, sum));
}

template <class In>
std::vector<In> finite_part(const In* values, int64_t count) {
  std::vector<In> finite(values, values + count);
  for (In& value : finite)
    if (!is_finite(value)) value = value < In(0) ? -std::numeric_limits<In>::min() : std::numeric_limits<In>::min();
  return finite;
}

// Calls f(y, x, value) for every output pixel of image n whose tap lies inside of the image, with the value it meets.
template <class In, class F>
void for_each_inside(const ConvInput<In>& s, int64_t n, int64_t channel, Tap tap, const F& f) {
  const In* plane = s.images + n * s.image_stride + channel * s.channel_stride;
  for (int64_t y = 0; y < s.out_height; ++y) {
    const int64_t image_y = y * s.step_h + tap.dy;
    if (image_y < 0 || image_y >= s.height) continue;
    for (int64_t x = 0; x < s.out_width; ++x) {
      const int64_t image_x = x * s.step_w + tap.dx;
      if (image_x >= 0 && image_x < s.width) f(y, x, plane[image_y * s.y_stride + image_x * s.x_stride]);
    }
  }
}

template <class In>
void add_product(In& target, In a, In b) {
  using T = Compute<In>;
  target = static_cast<In>(static_cast<T>(target) + static_cast<T>(a) * static_cast<T>(b));
}

}  // namespace pyops::cpu
