// Depthwise convolutions with dense 3x3 kernels at stride 1, the most common ones, and their weight gradients. The
// formulas are in conv2d/depthwise.cpp, whose general kernels serve all other shapes. Channels-last images of any type
// use these kernels; channels-first ones do so with AVX-512, unless they are double.
//
// A value that is loaded serves several of the sums that it is a term of, where the general kernels load it anew for
// each. Nothing is copied: where a tap leaves the image its value is a zero, from a mask or a register, or the row is
// skipped.
//
// A sum runs over the taps in the order of the filter, which for an input gradient is the reverse of that of the image,
// so that the results are bit-identical to those of the other algorithms. A weight gradient sums over the pixels of
// each image.
#pragma once

#include "problem.h"

namespace pyops::cpu {

// The nine taps: the coordinates of the top left one, and as order[3 * i + j] the index of the tap in row i, column j.
// An input gradient has its taps in reverse order.
struct Taps3x3 {
  int64_t top, left;
  int64_t order[9];

  template <class T>
  static bool fit(const ConvInput<T>& s) {
    if (s.tap_count != 9 || s.step_h != 1 || s.step_w != 1) return false;
    const ReceptiveField e(s);
    return e.span_h == 3 && e.span_w == 3 && e.left >= -2;
  }
  template <class T>
  explicit Taps3x3(const ConvInput<T>& s) {
    const ReceptiveField e(s);
    top = e.top, left = e.left;
    for (int64_t t = 0; t < 9; ++t) order[(s.taps[t].dy - top) * 3 + s.taps[t].dx - left] = t;
  }
  bool reversed() const { return order[0] == 8; }
};

// Whether there are kernels for images of this layout.
template <class T>
constexpr bool has_3x3_kernels(bool channels_last) {
#ifdef CPU_CAPABILITY_AVX512
  return channels_last || std::is_same_v<Compute<T>, float>;
#else
  return channels_last;
#endif
}

// ---- channels-last: vectors along the channels, one pixel at a time; columns of input values slide with it ----

// The input values of three adjacent rows in one column, or the sums of a column of taps.
template <class C>
struct Column3 {
  Vec<C> top{0}, middle{0}, bottom{0};
};

// Calls f(x, left column, middle column, right column) for every pixel x of output row y, with the input values of
// channels [c, c + n), which are zeros outside of the image.
template <class T, class F>
C10_ALWAYS_INLINE void for_each_pixel_3x3(const ConvInput<T>& s, const Taps3x3& taps, const T* image, int64_t y,
                                          int64_t c, int64_t n, const F& f) {
  using Column = Column3<Compute<T>>;
  alignas(64) static const T zeros[Vec<Compute<T>>::size()] = {};
  const T* rows[3];
  int64_t steps[3];
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t image_y = y + taps.top + i;
    const bool inside = image_y >= 0 && image_y < s.height;
    rows[i] = inside ? image + image_y * s.y_stride + c : zeros;
    steps[i] = inside ? s.x_stride : 0;
  }
  const T *top = rows[0], *middle = rows[1], *bottom = rows[2];
  const auto column_at = [=](int64_t x) {
    return Column{load(top + x * steps[0], n), load(middle + x * steps[1], n), load(bottom + x * steps[2], n)};
  };
  const auto is_inside = [&](int64_t x) { return x >= 0 && x < s.width; };
  Column a = is_inside(taps.left) ? column_at(taps.left) : Column();
  Column b = is_inside(taps.left + 1) ? column_at(taps.left + 1) : Column();
  const int64_t end = std::clamp(s.width - taps.left - 2, int64_t{0}, s.out_width);
  for (int64_t x = 0; x < end; ++x) {
    const Column right = column_at(x + taps.left + 2);
    f(x, a, b, right);
    a = b, b = right;
  }
  for (int64_t x = end; x < s.out_width; ++x) {
    f(x, a, b, Column());
    a = b, b = Column();
  }
}

// `reversed` is that of the taps, which is known at compile time so that their order costs nothing.
template <bool reversed, class T>
void depthwise_channels_3x3(const ConvProblem<T>& x, const Taps3x3& taps, const T* weight) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int64_t lanes = V::size();
  const ConvInput<T>& s = x.input;
  const int64_t channels = x.groups, lines = s.count * s.out_height;
  const Axis pixels = x.out_pixels();
  C* by_tap = scratch<C>(Scratch::weight, 9 * channels);
  for (int64_t t = 0; t < 9; ++t)
    for (int64_t c = 0; c < channels; ++c) by_tap[t * channels + c] = static_cast<C>(weight[c * 9 + taps.order[t]]);
  for_each_task(lines, 18.0 * lines * s.out_width * channels, [&](int64_t line) {
    const int64_t n = line / s.out_height, y = line % s.out_height;
    T* output = x.first_pixel() + n * pixels.image_stride + y * pixels.y_stride;
    const auto row_of_channels = [&](int64_t c, int64_t count) {
      V w[9];
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) w[t] = load(by_tap + t * channels + c, count);
      const V bias = x.bias ? load(x.bias + c, count) : V(0);
      for_each_pixel_3x3(s, taps, s.images + n * s.image_stride, y, c, count,
                         [&](int64_t column, const auto& a, const auto& b, const auto& right) {
                           const V values[9] = {a.top,        b.top,    right.top, a.middle,    b.middle,
                                                right.middle, a.bottom, b.bottom,  right.bottom};
                           V sum(0);
#pragma GCC unroll 9
                           for (int t = 0; t < 9; ++t) {
                             const int tap = reversed ? 8 - t : t;
                             sum = at::vec::fmadd(values[tap], w[tap], sum);
                           }
                           if (x.bias) sum = sum + bias;
                           if (x.relu) sum = at::vec::clamp_min(sum, V(0));
                           store(output + column * pixels.x_stride + c, sum, count);
                         });
    };
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) row_of_channels(c, lanes);
    if (c < channels) row_of_channels(c, channels - c);
  });
}

// sums[t * channels + c] = the sum of tap t over one image, for the channels [c, c + count).
template <class T>
void weight_sums_of_channels_3x3(const ConvInput<T>& s, const Taps3x3& taps, const T* image, const T* grad,
                                 int64_t channels, int64_t c, int64_t count, Compute<T>* sums) {
  using Column = Column3<Compute<T>>;
  Column left, middle, right;  // the sums, one for each tap
  const auto add = [](Column& sum, const Column& values, const Vec<Compute<T>>& g) {
    sum.top = at::vec::fmadd(values.top, g, sum.top);
    sum.middle = at::vec::fmadd(values.middle, g, sum.middle);
    sum.bottom = at::vec::fmadd(values.bottom, g, sum.bottom);
  };
  for (int64_t y = 0; y < s.out_height; ++y) {
    const T* grad_row = grad + y * s.out_width * channels + c;
    for_each_pixel_3x3(s, taps, image, y, c, count, [&](int64_t x, const Column& a, const Column& b, const Column& d) {
      const Vec<Compute<T>> g = load(grad_row + x * channels, count);
      add(left, a, g), add(middle, b, g), add(right, d, g);
    });
  }
  const Column* columns[] = {&left, &middle, &right};
  for (int j = 0; j < 3; ++j) {
    columns[j]->top.store(sums + taps.order[j] * channels + c, static_cast<int>(count));
    columns[j]->middle.store(sums + taps.order[3 + j] * channels + c, static_cast<int>(count));
    columns[j]->bottom.store(sums + taps.order[6 + j] * channels + c, static_cast<int>(count));
  }
}

#ifdef CPU_CAPABILITY_AVX512

// ---- channels-first: vectors along the width, masked at the borders ----

// Columns [x, x + 16) of the output, and for each of the three taps of a row the mask of those that meet the image.
struct Columns3x3 {
  int64_t x, count;
  __mmask16 met[3];

  template <class T>
  Columns3x3(const ConvInput<T>& s, const Taps3x3& taps, int64_t x)
      : x(x), count(std::min(s.out_width - x, int64_t{16})) {
    for (int64_t j = 0; j < 3; ++j) {
      const int64_t first = x + taps.left + j;
      const int64_t begin = std::clamp(-first, int64_t{0}, count), end = std::clamp(s.width - first, begin, count);
      met[j] = static_cast<__mmask16>((1u << end) - (1u << begin));
    }
  }
  __mmask16 exist() const { return static_cast<__mmask16>((1u << count) - 1); }
};

template <bool reversed, class T, int rows>
void rows_of_plane_3x3(const ConvInput<T>& s, const Taps3x3& taps, const Columns3x3& columns, const T* plane,
                       const __m512 (&w)[9], int64_t y, Vec<float> (&sum)[rows]) {
#pragma GCC unroll 4
  for (int j = 0; j < rows; ++j) sum[j] = Vec<float>(0);
#pragma GCC unroll 6
  for (int i = 0; i < rows + 2; ++i) {
    const int r = reversed ? rows + 1 - i : i;
    const int64_t image_y = y + taps.top + r;
    if (image_y < 0 || image_y >= s.height) continue;
    const T* row = plane + image_y * s.y_stride + columns.x + taps.left;
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      const int dx = reversed ? 2 - k : k;
      const __m512 value = load_floats(row + dx, columns.met[dx]);
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j)
        if (r - j >= 0 && r - j < 3) sum[j] = _mm512_fmadd_ps(value, w[(r - j) * 3 + dx], sum[j]);
    }
  }
}

template <bool reversed, class T>
void depthwise_planes_3x3(const ConvProblem<T>& x, const Taps3x3& taps, const T* weight) {
  using V = Vec<float>;
  const ConvInput<T>& s = x.input;
  const Axis pixels = x.out_pixels();
  const int64_t planes = s.count * x.groups;
  for_each_task(planes, 18.0 * planes * s.pixels(), [&](int64_t task) {
    const int64_t n = task / x.groups, g = task % x.groups;
    const T* plane = s.images + n * s.image_stride + g * s.channel_stride;
    T* output = x.first_pixel() + n * pixels.image_stride + g * x.out_channel_stride;
    __m512 w[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) w[t] = _mm512_set1_ps(static_cast<float>(weight[g * 9 + taps.order[t]]));
    const V bias(x.bias ? static_cast<float>(x.bias[g]) : 0.0f);
    for (int64_t column = 0; column < s.out_width; column += 16) {
      const Columns3x3 columns(s, taps, column);
      const auto rows_from = [&](int64_t y, auto rows) {
        V sum[decltype(rows)::value];
        rows_of_plane_3x3<reversed, T>(s, taps, columns, plane, w, y, sum);
#pragma GCC unroll 4
        for (int j = 0; j < decltype(rows)::value; ++j) {
          if (x.bias) sum[j] = sum[j] + bias;
          if (x.relu) sum[j] = at::vec::clamp_min(sum[j], V(0));
          store(output + (y + j) * pixels.y_stride + column, sum[j], columns.count);
        }
      };
      int64_t y = 0;
      for (; y + 4 <= s.out_height; y += 4) {
        for (int64_t j = 0; j < 4; ++j) prefetch_ahead(plane + (y + j) * s.y_stride + column, 16 * sizeof(T));
        rows_from(y, std::integral_constant<int, 4>{});
      }
      for (; y < s.out_height; ++y) rows_from(y, std::integral_constant<int, 1>{});
    }
  });
}

// sums[t * sums_stride] = the sum of tap t over one plane.
template <class T>
void weight_sums_of_plane_3x3(const ConvInput<T>& s, const Taps3x3& taps, const T* plane, const T* grad, float* sums,
                              int64_t sums_stride) {
  using V = Vec<float>;
  V sum[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) sum[t] = V(0);
  for (int64_t column = 0; column < s.out_width; column += 16) {
    const Columns3x3 columns(s, taps, column);
    for (int64_t y = 0; y < s.out_height; ++y) {
      const __m512 g = load_floats(grad + y * s.out_width + column, columns.exist());
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const int64_t image_y = y + taps.top + i;
        if (image_y < 0 || image_y >= s.height) continue;
        const T* row = plane + image_y * s.y_stride + column + taps.left;
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j)
          sum[3 * i + j] = _mm512_fmadd_ps(load_floats(row + j, columns.met[j]), g, sum[3 * i + j]);
      }
    }
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t)
    sums[taps.order[t] * sums_stride] = at::vec::vec_reduce_all([](const V& a, const V& b) { return a + b; }, sum[t]);
}

#endif

}  // namespace pyops::cpu
