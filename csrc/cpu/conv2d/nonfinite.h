// Exact borders of convolutions with infinities or NaN.
//
// The matrix products of conv2d multiply the zeros that conv2d/input_tile.h puts around an image. With a finite factor
// that adds nothing, but 0 * inf is NaN, and a convolution over the taps inside of the image has no such term. So where
// a tap leaves the image and the other operand is not finite, the product is taken with that operand's finite part (its
// infinities and NaN are replaced by the smallest normal number of their sign), and the terms of the replaced values
// are added one by one, over the taps inside only. Any such term makes its sum infinite or NaN, so neither the order
// nor the rounding of these terms matters. The number that takes their place does no harm either: times an infinity it
// gives the infinity that the replaced value gives, whereas a 0 would give NaN.
//
// The cost is a pass over the weight (in the weight gradient, over grad_output or its sums), and time for each value
// that is not finite.
#pragma once

#include <limits>
#include <vector>

#include "algorithms.h"

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

// ---- convolutions ----

// Adds the terms of the weights that are not finite.
template <class T>
void add_nonfinite(const ConvProblem<T>& x) {
  const ConvInput<T>& s = x.input;
  const Axis pixels = x.out_pixels();
  for_each_task(s.count, 2.0 * s.count * s.pixels() * x.groups * x.out_channels * x.depth(), [&](int64_t n) {
    for (int64_t o = 0; o < x.groups * x.out_channels; ++o) {
      const int64_t g = o / x.out_channels;
      T* image = x.first_pixel() + o * x.out_channel_stride + n * pixels.image_stride;
      for (int64_t k = 0; k < s.depth(); ++k) {
        const T weight = x.filters.at(g, o % x.out_channels)[x.filter_step(k)];
        if (is_finite(weight)) continue;
        for_each_inside(s, n, g * s.channels + s.channel(k), s.tap(k), [&](int64_t y, int64_t column, T value) {
          add_product(image[y * pixels.y_stride + column * pixels.x_stride], weight, value);
        });
      }
    }
  });
}

template <class T>
void rectify(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < T(0)) values[i] = T(0);
}

// Computes a convolution by an algorithm that multiplies the zeros around the images: run(phases) runs it.
template <class T, class Run>
void convolve_exactly(const Phases<T>& x, const Run& run) {
  const Filters<T>& filters = x.first().filters;
  if (!reaches_outside(x.first().input, ReceptiveField(x.data, x.count)) || all_finite(filters.data, filters.count))
    return run(x);

  count_run(parts::nonfinite_weight.runs);
  const std::vector<T> finite = finite_part(filters.data, filters.count);
  std::vector<ConvProblem<T>> finite_phases(x.begin(), x.end());
  for (ConvProblem<T>& phase : finite_phases) phase.filters.data = finite.data(), phase.relu = false;
  run(Phases<T>{finite_phases.data(), x.count});
  for (const ConvProblem<T>& phase : x) add_nonfinite(phase);
  if (x.first().relu) rectify(x.first().output, x.first().input.count * x.first().out_lines.image_stride);
}

// ---- weight gradients ----

// Adds the terms of the gradients that are not finite.
template <class T>
void add_nonfinite(const WeightGradient<T>& x) {
  const Conv2dShape& s = x.shape;
  const Layout grad(s.O, s.OH, s.OW, s.channels_last);
  const WeightLayout weight(s);
  const int64_t in = x.in(), taps = x.input.tap_count;
  for_each_task(s.O * in, 2.0 * s.N * s.O * s.OH * s.OW * in * taps, [&](int64_t task) {
    const int64_t o = task / in, channel = o / x.out() * in + task % in;
    T* target = x.grad_weight + o * weight.out_stride + task % in * weight.channel_stride;
    for (int64_t n = 0; n < s.N; ++n) {
      const T* image = x.grad_output + n * grad.image_stride + o * grad.channel_stride;
      for (int64_t t = 0; t < taps; ++t) {
        for_each_inside(x.input, n, channel, x.input.taps[t], [&](int64_t y, int64_t column, T value) {
          const T g = image[y * grad.y_stride + column * grad.x_stride];
          if (!is_finite(g)) add_product(target[x.input.taps[t].index * weight.tap_stride], g, value);
        });
      }
    }
  });
}

// Computes a weight gradient by an algorithm that multiplies the zeros around the images: run(problem) runs it.
//
// A gradient that is not finite makes its sums infinite or NaN too. Where there are fewer sums than gradients, the sums
// are inspected instead, because a pass over all gradients takes a noticeable share of the time of their products.
template <class T, class Run>
void weight_gradient_exactly(const WeightGradient<T>& x, const Run& run) {
  const Conv2dShape& s = x.shape;
  const int64_t count = s.N * s.O * s.OH * s.OW, size = s.O * x.in() * s.kernel_h * s.kernel_w;
  const bool exact = !reaches_outside(x.input, ReceptiveField(x.input)), look_at_sums = size < count;
  if (exact || look_at_sums || all_finite(x.grad_output, count)) {
    run(x);
    if (exact || !look_at_sums || all_finite(x.grad_weight, size) || all_finite(x.grad_output, count)) return;
  }

  count_run(parts::nonfinite_grad_output.runs);
  const std::vector<T> finite = finite_part(x.grad_output, count);
  WeightGradient<T> of_finite = x;
  of_finite.grad_output = finite.data();
  run(of_finite);
  add_nonfinite(x);
}

}  // namespace pyops::cpu
