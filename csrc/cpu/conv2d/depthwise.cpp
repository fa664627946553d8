// Depthwise convolution, where every channel is a group of its own with one input and one output channel, and its
// weight gradient:
//
//   output[c, pixel]    = bias[c] + sum over taps of weight[c, tap] * input(c, pixel, tap)
//   grad_weight[c, tap] = sum over pixels of grad_output[c, pixel] * input(c, pixel, tap)
//
// It is chosen for every such convolution, unless the batch is in lanes or a channels-first output has gaps between its
// columns. As products of gemm/microkernel.h each group would be a matrix of a single row, whose operands take longer
// to lay out than to multiply.
//
// The vectors run along contiguous memory, and a value that is loaded is used at once. For channels-last images they
// run along the channels: four pixels at a time share the weights of a tap, and where taps leave the image, single
// pixels sum over the taps inside. For channels-first images they run along the width, four rows at a time, over an
// input tile (conv2d/input_tile.h). Kernels of 3x3 taps have code of their own (conv2d/depthwise_3x3.h).
//
// Each output is one sum over the taps in order, in a single chunk. A weight gradient sums over each image, then over
// the images in order.
#include "depthwise_3x3.h"
#include "problem.h"

namespace pyops::cpu {
namespace {

// ---- channels-last ----

template <class C>
struct MetTap {
  int64_t offset;   // of the input pixel
  const C* weight;  // this tap's, of all channels
};

// Computes channels [c, c + count) of `pixels` pixels, which lie source_step and output_step apart. `full`: count is a
// whole vector.
template <class T, int pixels, bool full>
void channels_of_pixels(const ConvProblem<T>& x, const T* source, int64_t source_step, const MetTap<Compute<T>>* taps,
                        int64_t tap_count, T* output, int64_t output_step, int64_t c, int64_t count) {
  using V = Vec<Compute<T>>;
  const int64_t n = full ? V::size() : count;
  V sum[pixels];
#pragma GCC unroll 4
  for (int j = 0; j < pixels; ++j) sum[j] = V(0);
  for (int64_t t = 0; t < tap_count; ++t) {
    const T* from = source + taps[t].offset + c;
    const V weight = load(taps[t].weight + c, n);
#pragma GCC unroll 4
    for (int j = 0; j < pixels; ++j) sum[j] = at::vec::fmadd(load(from + j * source_step, n), weight, sum[j]);
  }
  const V bias = x.bias ? load(x.bias + c, n) : V(0);
#pragma GCC unroll 4
  for (int j = 0; j < pixels; ++j) {
    if (x.bias) sum[j] = sum[j] + bias;
    if (x.relu) sum[j] = at::vec::clamp_min(sum[j], V(0));
    store(output + j * output_step + c, sum[j], n);
  }
}

template <class T, int pixels>
void all_channels(const ConvProblem<T>& x, const T* source, int64_t source_step, const MetTap<Compute<T>>* taps,
                  int64_t tap_count, T* output, int64_t output_step) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  const int64_t channels = x.groups, whole = channels / lanes * lanes;
  for (int64_t c = 0; c < whole; c += lanes)
    channels_of_pixels<T, pixels, true>(x, source, source_step, taps, tap_count, output, output_step, c, lanes);
  if (whole < channels)
    channels_of_pixels<T, pixels, false>(x, source, source_step, taps, tap_count, output, output_step, whole,
                                         channels - whole);
}

template <class T>
void depthwise_channels(const ConvProblem<T>& x, const T* weight) {
  using C = Compute<T>;
  const ConvInput<T>& s = x.input;
  const int64_t channels = x.groups, lines = s.count * s.out_height;
  const Axis pixels = x.out_pixels();
  C* by_tap = scratch<C>(Scratch::weight, s.tap_count * channels);
  transpose(by_tap, channels, weight, s.tap_count, channels, s.tap_count);
  Range inner = range_inside(0, s.step_w, s.out_width, s.width);  // the columns that all taps meet
  for (int64_t t = 0; t < s.tap_count; ++t) {
    const Range met = range_inside(s.taps[t].dx, s.step_w, s.out_width, s.width);
    inner.begin = std::max(inner.begin, met.begin), inner.end = std::min(inner.end, met.end);
  }
  for_each_task(lines, 2.0 * lines * s.out_width * channels * s.tap_count, [&](int64_t line) {
    const int64_t n = line / s.out_height, y = line % s.out_height;
    auto* taps = scratch<MetTap<C>>(Scratch::a_offsets, s.tap_count);
    const T* source = s.images + n * s.image_stride;
    T* output = x.first_pixel() + n * pixels.image_stride + y * pixels.y_stride;
    for (int64_t column = 0; column < s.out_width;) {
      const bool inside = column >= inner.begin && column + 4 <= inner.end;
      int64_t tap_count = 0;
      for (int64_t t = 0; t < s.tap_count; ++t) {
        const int64_t image_y = y * s.step_h + s.taps[t].dy, image_x = column * s.step_w + s.taps[t].dx;
        if (image_y >= 0 && image_y < s.height && (inside || (image_x >= 0 && image_x < s.width)))
          taps[tap_count++] = {image_y * s.y_stride + image_x * s.x_stride, by_tap + t * channels};
      }
      const int64_t source_step = s.step_w * s.x_stride;
      if (!inside) {
        all_channels<T, 1>(x, source, 0, taps, tap_count, output + column * pixels.x_stride, 0);
        ++column;
        continue;
      }
      const T* from = source;
      for (; column + 4 <= inner.end; column += 4, from += 4 * source_step)
        all_channels<T, 4>(x, from, source_step, taps, tap_count, output + column * pixels.x_stride, pixels.x_stride);
    }
  });
}

// ---- channels-first ----

// Computes `rows` rows of one plane, which lie source_step apart in the input tile.
template <class T, int rows>
void rows_of_plane(const ConvProblem<T>& x, int64_t g, const Compute<T>* source, int64_t source_step,
                   const int64_t* offsets, const T* weight, T* output, int64_t output_step) {
  using V = Vec<Compute<T>>;
  constexpr int64_t lanes = V::size();
  const ConvInput<T>& s = x.input;
  const V bias(x.bias ? static_cast<Compute<T>>(x.bias[g]) : Compute<T>(0));
  for (int64_t column = 0; column < s.out_width; column += lanes) {
    V sum[rows];
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) sum[j] = V(0);
    for (int64_t t = 0; t < s.tap_count; ++t) {
      const V value(static_cast<Compute<T>>(weight[t]));
      const Compute<T>* from = source + offsets[t] + column;
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) sum[j] = at::vec::fmadd(value, V::loadu(from + j * source_step), sum[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) {
      if (x.bias) sum[j] = sum[j] + bias;
      if (x.relu) sum[j] = at::vec::clamp_min(sum[j], V(0));
      store(output + j * output_step + column, sum[j], std::min(lanes, s.out_width - column));
    }
  }
}

template <class T>
void depthwise_planes(const ConvProblem<T>& x, const T* weight) {
  const ConvInput<T>& s = x.input;
  const Axis pixels = x.out_pixels();
  const ReceptiveField field(s);
  const int64_t planes = s.count * x.groups;
  for_each_task(planes, 2.0 * planes * s.pixels() * s.tap_count, [&](int64_t plane) {
    const int64_t n = plane / x.groups, g = plane % x.groups;
    const OutputTile tile{g, 0, 1, n, 1, 0, s.out_height};
    const auto w = input_tile<Compute<T>>(s, field, tile, /*channels_last=*/false, /*by_width=*/true);
    const int64_t* offsets = patch_offsets(Scratch::a_offsets, w, s, 1);
    T* output = x.first_pixel() + n * pixels.image_stride + g * x.out_channel_stride;
    const T* weights = weight + g * s.tap_count;
    int64_t y = 0;
    for (; y + 4 <= s.out_height; y += 4)
      rows_of_plane<T, 4>(x, g, w.data + y * w.y_step, w.y_step, offsets, weights, output + y * pixels.y_stride,
                          pixels.y_stride);
    for (; y < s.out_height; ++y)
      rows_of_plane<T, 1>(x, g, w.data + y * w.y_step, 0, offsets, weights, output + y * pixels.y_stride, 0);
  });
}

// ---- weight gradient ----

// The sums over one image of one tap, for the channels [c, c + count).
template <class T>
Vec<Compute<T>> tap_of_channels(const ConvInput<T>& s, const T* image, const T* grad, int64_t grad_x_stride, Tap tap,
                                int64_t c, int64_t count) {
  using V = Vec<Compute<T>>;
  const Range rows = range_inside(tap.dy, s.step_h, s.out_height, s.height);
  const Range columns = range_inside(tap.dx, s.step_w, s.out_width, s.width);
  V sums[4] = {V(0), V(0), V(0), V(0)};  // four chains, because an FMA of a single one would wait for the one before
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const T* source = image + (y * s.step_h + tap.dy) * s.y_stride + tap.dx * s.x_stride + c;
    const T* g = grad + y * s.out_width * grad_x_stride + c;
    const int64_t step = s.step_w * s.x_stride;
    int64_t column = columns.begin;
    for (; column + 4 <= columns.end; column += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        sums[j] = at::vec::fmadd(load(source + (column + j) * step, count),
                                 load(g + (column + j) * grad_x_stride, count), sums[j]);
    }
    for (; column < columns.end; ++column)
      sums[0] = at::vec::fmadd(load(source + column * step, count), load(g + column * grad_x_stride, count), sums[0]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// sums[t * sums_stride] = the sum over a plane of tap t, for `taps` taps.
template <class C, int taps>
void taps_of_plane(const C* input, int64_t y_step, const int64_t* offsets, const C* grad, int64_t height, int64_t width,
                   C* sums, int64_t sums_stride) {
  using V = Vec<C>;
  constexpr int64_t lanes = V::size();
  V sum[taps];
#pragma GCC unroll 4
  for (int t = 0; t < taps; ++t) sum[t] = V(0);
  for (int64_t y = 0; y < height; ++y, input += y_step, grad += width) {
    for (int64_t x = 0; x < width; x += lanes) {
      const int64_t count = std::min(lanes, width - x);
      const V g = V::loadu(grad + x, count);
#pragma GCC unroll 4
      for (int t = 0; t < taps; ++t) sum[t] = at::vec::fmadd(V::loadu(input + offsets[t] + x, count), g, sum[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < taps; ++t)
    sums[t * sums_stride] = at::vec::vec_reduce_all([](const V& a, const V& b) { return a + b; }, sum[t]);
}

// Computes all sums [N, taps, C] of the weight gradient, or returns false if conv2d/depthwise_3x3.h has no code for
// them.
template <class T>
bool sums_3x3(const Conv2dShape& s, const ConvInput<T>& source, const T* grad_output, Compute<T>* sums) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  if (!Taps3x3::fit(source)) return false;
  const Taps3x3 taps(source);
  const int64_t plane = s.OH * s.OW;
  const double flops = 18.0 * s.N * s.C * plane;
  if (s.channels_last) {
    const int64_t vectors = ceil_div(s.C, lanes);
    for_each_task(s.N * vectors, flops, [&](int64_t task) {
      const int64_t n = task / vectors, c = task % vectors * lanes;
      const auto add = [&](int64_t count) {
        weight_sums_of_channels_3x3(source, taps, source.images + n * source.image_stride,
                                    grad_output + n * plane * s.C, s.C, c, count, sums + n * 9 * s.C);
      };
      c + lanes <= s.C ? add(lanes) : add(s.C - c);
    });
    return true;
  }
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<C, float>) {
    for_each_task(s.N * s.C, flops, [&](int64_t task) {
      const int64_t n = task / s.C, c = task % s.C;
      weight_sums_of_plane_3x3(source, taps, source.images + n * source.image_stride + c * source.channel_stride,
                               grad_output + task * plane, sums + n * 9 * s.C + c, s.C);
    });
    return true;
  }
#endif
  return false;
}

// Runs the kernel of conv2d/depthwise_3x3.h, or returns false if there is none for this convolution.
template <bool reversed, class T>
bool convolve_3x3(const ConvProblem<T>& x, const Taps3x3& taps, const T* weight) {
  if (x.channels_last) {
    depthwise_channels_3x3<reversed>(x, taps, weight);
    return true;
  }
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<Compute<T>, float>) {
    depthwise_planes_3x3<reversed>(x, taps, weight);
    return true;
  }
#endif
  return false;
}

}  // namespace

template <class T>
void convolve_depthwise(const ConvProblem<T>& x, const T* weight) {
  if (Taps3x3::fit(x.input)) {
    const Taps3x3 taps(x.input);
    if (taps.reversed() ? convolve_3x3<true>(x, taps, weight) : convolve_3x3<false>(x, taps, weight))
      return count_run(Algorithm::conv2d_depthwise_3x3);
  }
  count_run(Algorithm::conv2d_depthwise);
  x.channels_last ? depthwise_channels(x, weight) : depthwise_planes(x, weight);
}

template <class T>
void weight_gradient_depthwise(const Conv2dShape& s, const ConvInput<T>& source, const T* grad_output, T* grad_weight) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const int64_t taps = source.tap_count, plane = s.OH * s.OW, kernel = s.kernel_h * s.kernel_w;
  const double flops = 2.0 * s.N * s.C * plane * taps;
  C* sums = scratch<C>(Scratch::partial_sums, s.N * taps * s.C);  // [N, taps, C]
  const bool is_3x3 = sums_3x3(s, source, grad_output, sums);
  count_run(is_3x3 ? Algorithm::weight_gradient_depthwise_3x3 : Algorithm::weight_gradient_depthwise);
  if (is_3x3) {
  } else if (s.channels_last) {
    for_each_task(s.N * taps, flops, [&](int64_t task) {
      const int64_t n = task / taps;
      for (int64_t c = 0; c < s.C; c += lanes) {
        const int64_t count = std::min(lanes, s.C - c);
        tap_of_channels(source, source.images + n * source.image_stride, grad_output + n * plane * s.C, s.C,
                        source.taps[task % taps], c, count)
            .store(sums + task * s.C + c, static_cast<int>(count));
      }
    });
  } else {
    const ReceptiveField field(source);
    for_each_task(s.N * s.C, flops, [&](int64_t task) {
      const int64_t n = task / s.C, c = task % s.C;
      const InputTile<C> w = input_tile<C>(source, field, OutputTile{c, 0, 1, n, 1, 0, s.OH}, false, /*by_width=*/true);
      const T* grad = grad_output + task * plane;
      const C* values;
      if constexpr (std::is_same_v<T, C>) {
        values = grad;
      } else {
        C* copy = scratch<C>(Scratch::grad_rows, plane);
        copy_values(copy, grad, plane, 1);
        values = copy;
      }
      const int64_t* offsets = patch_offsets(Scratch::a_offsets, w, source, 1);
      C* target = sums + n * taps * s.C + c;
      int64_t t = 0;
      for (; t + 4 <= taps; t += 4)
        taps_of_plane<C, 4>(w.data, w.y_step, offsets + t, values, s.OH, s.OW, target + t * s.C, s.C);
      for (; t < taps; ++t)
        taps_of_plane<C, 1>(w.data, w.y_step, offsets + t, values, s.OH, s.OW, target + t * s.C, s.C);
    });
  }
  std::fill(grad_weight, grad_weight + s.C * kernel, T(0));
  for (int64_t c = 0; c < s.C; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      C total = 0;
      for (int64_t n = 0; n < s.N; ++n) total += sums[(n * taps + t) * s.C + c];
      grad_weight[c * kernel + source.taps[t].index] = static_cast<T>(total);
    }
  }
}

#define INSTANTIATE(T)                                               \
  template void convolve_depthwise(const ConvProblem<T>&, const T*); \
  template void weight_gradient_depthwise(const Conv2dShape&, const ConvInput<T>&, const T*, T*);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
