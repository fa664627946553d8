// Exact borders of convolutions with infinities or NaN.
//
// The products of conv2d.cpp multiply the zeros that patches.h puts outside of an image. With a finite factor that adds
// nothing, but 0 * inf is NaN, where a convolution over the taps inside of the image has no such term. So where a patch
// leaves the image and the other operand is not finite, the product is taken with that operand's finite part (its
// infinities and NaN set to 0), and the remaining terms are added here one by one, over the taps inside only. Any such
// term makes its sum infinite or NaN, so neither their order nor their rounding matters.
//
// This costs a look at the smaller operand, and time for each value that is not finite.
#pragma once

#include <vector>

#include "patches.h"

namespace pyops::cpu {

template <class In>
bool is_finite(In value) {
  const auto v = static_cast<Compute<In>>(value);
  return v - v == 0;
}

template <class In>
bool all_finite(const In* values, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= is_finite(values[i]);
  return finite;
}

template <class In>
std::vector<In> finite_part(const In* values, int64_t count) {
  std::vector<In> finite(values, values + count);
  for (In& value : finite)
    if (!is_finite(value)) value = In(0);
  return finite;
}

// Whether some tap of some output pixel lies outside of the image.
template <class In>
bool leaves_image(const Patches<In>& p) {
  const auto leaves = [](int64_t offset, int64_t step, int64_t count, int64_t size) {
    return offset < 0 || (count - 1) * step + offset >= size;
  };
  return std::any_of(p.taps, p.taps + p.tap_count, [&](Tap tap) {
    return leaves(tap.dy, p.step_h, p.out_height, p.height) || leaves(tap.dx, p.step_w, p.out_width, p.width);
  });
}

// f(y, x, value) for every output pixel of image n where the tap lies inside, with the image's value there.
template <class In, class F>
void for_each_inside(const Patches<In>& p, int64_t n, int64_t channel, Tap tap, const F& f) {
  const In* plane = p.image + n * p.image_stride + channel * p.channel_stride;
  for (int64_t y = 0; y < p.out_height; ++y) {
    const int64_t image_y = y * p.step_h + tap.dy;
    if (image_y < 0 || image_y >= p.height) continue;
    for (int64_t x = 0; x < p.out_width; ++x) {
      const int64_t image_x = x * p.step_w + tap.dx;
      if (image_x >= 0 && image_x < p.width) f(y, x, plane[image_y * p.y_stride + image_x * p.x_stride]);
    }
  }
}

template <class In>
void add_product(In& target, In a, In b) {
  using T = Compute<In>;
  target = static_cast<In>(static_cast<T>(target) + static_cast<T>(a) * static_cast<T>(b));
}

}  // namespace pyops::cpu
