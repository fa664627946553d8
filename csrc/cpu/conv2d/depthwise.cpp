// Depthwise convolution, where every channel is a group of its own with one input and one output channel:
//
//   output[c, pixel] = bias[c] + sum over taps of weight[c, tap] * input(c, pixel, tap)
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
// Each output is one sum over the taps in order, in a single chunk.
#include "algorithms.h"
#include "depthwise_3x3.h"
#include "nonfinite.h"

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

template <bool reversed, class T>
void convolve_3x3(const ConvProblem<T>& x, const Taps3x3& taps, const T* weight) {
  if (x.channels_last) return depthwise_channels_3x3<reversed>(x, taps, weight);
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<Compute<T>, float>) depthwise_planes_3x3<reversed>(x, taps, weight);
#endif
}

template <class T>
void convolve_3x3(const ConvProblem<T>& x, const T* weight) {
  const Taps3x3 taps(x.input);
  taps.reversed() ? convolve_3x3<true>(x, taps, weight) : convolve_3x3<false>(x, taps, weight);
}

// The filters of a phase as the kernels read them: each with its taps contiguous.
template <class T>
const T* filters_of_taps(const ConvProblem<T>& x) {
  const int64_t taps = x.input.tap_count;
  T* selected = scratch<T>(Scratch::partial_sums, x.groups * taps);
  for (int64_t g = 0; g < x.groups; ++g)
    for (int64_t t = 0; t < taps; ++t) selected[g * taps + t] = x.filters.at(g, 0)[x.filter_step(t)];
  return selected;
}

}  // namespace

template <class T>
bool Depthwise3x3<T>::supports(const Phases<T>& phases) {
  return has_one_channel_groups(phases.first()) && has_3x3_kernels<T>(phases.first().channels_last) &&
         std::all_of(phases.begin(), phases.end(), [](const ConvProblem<T>& x) { return Taps3x3::fit(x.input); });
}

template <class T>
bool Depthwise3x3<T>::profitable(const Phases<T>& x) {
  return x.first().groups > 1;
}

template <class T>
bool Depthwise3x3<T>::sums_in_order(const Phases<T>&) {
  return true;
}

template <class T>
void Depthwise3x3<T>::run(const Phases<T>& phases) {
  convolve_exactly(phases, [](const Phases<T>& finite) {
    for (const ConvProblem<T>& x : finite) convolve_3x3(x, filters_of_taps(x));
  });
}

template <class T>
bool Depthwise<T>::supports(const Phases<T>& x) {
  return has_one_channel_groups(x.first());
}

template <class T>
bool Depthwise<T>::profitable(const Phases<T>& x) {
  return x.first().groups > 1;
}

template <class T>
bool Depthwise<T>::sums_in_order(const Phases<T>& x) {
  return x.first().depth() <= KC;
}

template <class T>
void Depthwise<T>::run(const Phases<T>& phases) {
  convolve_exactly(phases, [](const Phases<T>& finite) {
    for (const ConvProblem<T>& x : finite) {
      const T* weight = filters_of_taps(x);
      if (finite.count > 1 && has_3x3_kernels<T>(x.channels_last) && Taps3x3::fit(x.input)) {
        convolve_3x3(x, weight);  // one of the phases of a larger kernel
      } else {
        x.channels_last ? depthwise_channels(x, weight) : depthwise_planes(x, weight);
      }
    }
  });
}

#define INSTANTIATE(T)             \
  template struct Depthwise3x3<T>; \
  template struct Depthwise<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
