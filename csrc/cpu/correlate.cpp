// The convolution at the heart of conv2d's forward and input gradient, as products of tile.h over windows of window.h.
//
// way_of chooses how to lay the vectors. Two ways are products over windows; with K = (channel, tap):
//
//   along x:             output [O, pixels] = filters [O, K]    window [K, pixels]    a filter's values are broadcast
//   along the channels:  output [pixels, O] = window [pixels, K] filters^T [K, O]     the window's values are
//
// A task of theirs is a band of output rows (or several small images) of one group and, if there are few bands, a part
// of the output channels; along the channels, the filters are transposed once into panels. LeNet's first layer on 64
// images, one core with AVX-512, along x: forward 0.13 ms and grad_input 0.39, stock torch 0.33 and 3.1. Patches
// gathered in cache (im2col) took 2 and 4 times as long.
//
// Few output channels of channels-last images under kernels of three columns: correlate_by_triples.cpp.
//
// An even number of bfloat16 channels is multiplied in pairs where the CPU does that (factors.h): K = (pair, tap).
// 8x64x56x56 -> 64, 3x3, on another core 4.8 ms, widened to float32 8.1, stock torch 4.7. Guarantees: those of gemm.h.
#include "correlate.h"

#include <cmath>

#include "conv2d_grouped_lanes.h"
#include "nonfinite.h"

namespace pyops::cpu {
namespace {

// Whether rows of pixels follow one another in memory, in the image or in the window copied from it: of a single tap.
template <class T>
bool are_rows_joined(const Correlation<T>& x) {
  return x.source.tap_count == 1 && x.x_phases == 1;
}

// How much longer products along the channels take where the output is channels-first: to transpose it takes as long as
// some terms.
template <class T>
double transposing(const Correlation<T>& x) {
  return x.channels_last ? 0 : 23 / static_cast<double>(x.depth());
}

template <class T>
bool is_depthwise(const Correlation<T>& x) {
  return x.groups > 1 && x.source.channels == 1 && x.out_channels == 1 &&
         (x.channels_last || x.out_pixels().x_stride == 1);
}

// Whether correlate_depthwise takes each sum in one chain where the other ways take it in chunks of KC terms.
template <class T>
bool has_long_chains(const Correlation<T>& x) {
  return is_depthwise(x) && x.depth() > KC;
}

// Whether the vectors should run along the images: where lanes would be idle or multiply the zeros around an image,
// more than what transposing a block of images into cache and back costs.
template <class T>
bool vectors_along_images(const Correlation<T>& x, int64_t count) {
  const Source<T>& s = x.source;
  constexpr int64_t lanes = Vec<Compute<T>>::size(), most_elements = (1 << 20) / sizeof(Compute<T>);
  const int64_t out = x.groups * x.out_channels * s.pixels();
  if (count < lanes || (s.image_stride + out) * lanes > most_elements || has_long_chains(x)) return false;
  const double inside = share_inside(s), products = inside * static_cast<double>(out * x.depth());
  const double transposes = 8.0 * static_cast<double>(s.image_stride + out);
  // Measured: a vector along x ends at every row, and a tile of one vector waits for its few chains of sums. Of more
  // vectors, 64x8x14x14 -> 64, 3x3, channels-first, takes 0.64 ms along the channels, 0.51 along the images; but pairs
  // of channels, 64x16x14x14 -> 32, 5x5, 0.38 and 0.67.
  const double along_x =
      are_rows_joined(x) ? lanes_used<Compute<T>>(s.pixels()) : 0.75 * lanes_used<Compute<T>>(s.out_width);
  const double chains = x.out_channels <= lanes ? 0.6 : has_pairs<T>() ? 1 : 1 / (1 + transposing(x));
  const double channels = lanes_used<Compute<T>>(x.out_channels) * chains;
  const double others = std::max(along_x, channels);
  return lanes_used<Compute<T>>(count) * products / (products + transposes) > inside * others;
}

// Whether a broadcast value of the source can serve three taps at once. Never in a convolution that goes along the
// images for some batch size: its sums are taken in another order.
template <class T>
bool takes_triples(const Correlation<T>& x, int64_t count) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  if constexpr (std::is_same_v<T, Compute<T>>)
    return count == 1 && x.channels_last && x.out_channels <= lanes && has_triples(x.source) &&
           !vectors_along_images(x, lanes);
  return false;
}

// Whether the vectors should run along x, with a broadcast weight, rather than along the output channels, with a
// broadcast value of the source: what a pixel and term takes in lanes, weighed by what was measured.
template <class T>
bool vectors_along_x(const Correlation<T>& x, bool triples) {
  constexpr double lanes = Vec<Compute<T>>::size();
  const auto taps = static_cast<double>(x.source.tap_count), O = static_cast<double>(x.out_channels);
  const double vectors = std::ceil(O / lanes);
  const double used = lanes_used<Compute<T>>(are_rows_joined(x) ? x.source.pixels() : x.source.out_width);
  // The tiles of a line are shorter; channels-last images are transposed, and their output.
  const double along_x = (x.channels_last ? 1.25 * (O + 9 / taps) : 1.15 * O) / used;
  // A tile of one vector takes a load for every product, by triples fewer. Where along x the output's columns would not
  // be neighbours, that costs as much as transposing it.
  const double transpose = x.x_phases > 1 ? 0 : transposing(x);
  const double of_tiles = vectors > 1 ? 1 : triples ? 1.1 : 1.5;
  const double along_channels = of_tiles * vectors * lanes * (1 + transpose);
  return along_x < along_channels;
}

// The filters of all groups of all phases as the products read them: filters[g * count + p].
template <class F, class T>
const F** arrange_filters(const Correlation<T>* phases, int64_t count, bool along_x, int64_t width) {
  const Correlation<T>& x = phases[0];
  const int64_t O = x.out_channels, panels = ceil_div(O, width);
  const F** filters = scratch<const F*>(Scratch::phase_filters, count * x.groups);
  if constexpr (std::is_same_v<T, F>) {
    if (along_x) {  // they are read where they lie
      for (int64_t i = 0; i < count * x.groups; ++i) filters[i] = phases[i % count].filters.at(i / count, 0);
      return filters;
    }
  }
  const auto group_size = [&](int64_t p) { return (along_x ? O : panels * width) * phases[p].depth(); };
  int64_t size = 0;
  for (int64_t p = 0; p < count; ++p) size += x.groups * group_size(p);
  F* target = scratch<F>(Scratch::weight, size);
  for (int64_t i = 0; i < count * x.groups; ++i) filters[i] = target, target += group_size(i % count);
  for_each_task(count * x.groups * panels, 16.0 * size, [&](int64_t task) {
    const int64_t i = task / panels, o = task % panels * width, columns = std::min(width, O - o), g = i / count;
    const Correlation<T>& phase = phases[i % count];
    const int64_t K = phase.depth();
    F* target = const_cast<F*>(filters[i]) + o * K;
    if (!along_x) return pack_filters(target, phase, g, o, columns, width, 0, K);
    for (int64_t f = o; f < o + columns; ++f)
      for (int64_t k = 0; k < K; ++k)
        *target++ = factor<F>(phase.filters.at(g, f) + phase.filter_step(k), phase.filters.second, terms<F>);
  });
  return filters;
}

// Where each filter has one tap after the other: what correlate_depthwise reads.
template <class T>
const T* filters_of_taps(const Correlation<T>& x) {
  const int64_t taps = x.source.tap_count;
  T* selected = scratch<T>(Scratch::partial_sums, x.groups * taps);
  for (int64_t g = 0; g < x.groups; ++g)
    for (int64_t t = 0; t < taps; ++t) selected[g * taps + t] = x.filters.at(g, 0)[x.filter_step(t)];
  return selected;
}

template <class T>
Correlation<T> paired(Correlation<T> x) {
  x.source = paired(x.source);
  x.filters.second = x.filters.channel_stride, x.filters.channel_stride *= 2;
  return x;
}

template <class T>
bool has_narrow_groups(const Correlation<T>& x) {
  return x.groups > 1 && lanes_used<Compute<T>>(x.out_channels) <= 0.5;
}

enum class Way { group_lanes, planes, along_images, depthwise, along_x, triples, along_channels };

// The first that applies, with what it takes in ms and what the others would; one core with AVX-512, 3x3 but for LeNet.
template <class T>
Way way_of(const Correlation<T>* phases, int64_t count) {
  const Correlation<T>& x = phases[0];
  // 8x128x28x28 in 32 groups, channels-last: 0.32, as planes 0.86.
  if (x.channels_last && should_share_lanes<Compute<T>>(x.groups, x.source.channels, x.out_channels))
    return Way::group_lanes;
  // Such groups where they may not share vectors: 1.0, along the channels 6.
  if (x.channels_last && has_narrow_groups(x) && !is_depthwise(x)) return Way::planes;
  // LeNet's second layer on 64 images: 0.14, along the channels 0.22, along x 0.27.
  if (count == 1 && vectors_along_images(x, x.source.count)) return Way::along_images;
  // 8x64x28x28 in 64 groups: 0.09, along x 0.45, along the channels 2.8.
  if (is_depthwise(x)) return Way::depthwise;
  // LeNet's first layer on one image: 0.004, along the channels 0.010; 8x64x56x56 -> 3, channels-last: 1.3, 3.0.
  const bool triples = takes_triples(x, count);
  if (vectors_along_x(x, triples)) return Way::along_x;
  // 8x16x32x32 -> 16, channels-last: 0.16, along x 0.22.
  if (triples) return Way::triples;
  // 8x512x7x7 -> 512: 7.5, along x 21; 8x64x56x56 -> 64: 9.0, 11.6.
  return Way::along_channels;
}

// The classes of each phase's pixels, which products along the channels read.
struct PhaseClasses {
  const PixelClasses* data = nullptr;
  bool in_place = false;  // no phase multiplies zeros around the images, which are read where they lie
};

template <class T>
PhaseClasses classes_of(const Correlation<T>* phases, int64_t count) {
  // Planes are a page or more apart, too far to be read by pixel: they are copied, and get zeros around them.
  bool in_place = phases[0].channels_last && (std::is_same_v<T, Compute<T>> || multiplies_pairs(phases[0]));
  PixelClasses* classes = scratch<PixelClasses>(Scratch::classes, count);
  for (int64_t p = 0; p < count; ++p) {
    classes[p] = PixelClasses(phases[p].source, /*wanted=*/in_place);
    in_place &= classes[p].exact;
  }
  return {classes, in_place};
}

template <class F, class T>
void multiply_windows(const Correlation<T>* phases, int64_t count, Way way, PhaseClasses classes) {
  constexpr int64_t lanes = Factors<F>::size();
  const Correlation<T>& x = phases[0];
  const Source<T>& s = x.source;
  const bool along_x = way == Way::along_x;
  count_run(along_x ? Algorithm::conv2d_implicit_gemm_width : Algorithm::conv2d_implicit_gemm_channels);
  const Extent extent(phases, count);
  const BandSize size(s, extent, s.channels);
  const int64_t image_bands = ceil_div(s.count, size.images), row_bands = ceil_div(s.out_height, size.rows);
  const int64_t O = x.out_channels, bands = x.groups * image_bands * row_bands, width = panel_width<Sum<F>>(O);
  double flops = 0;
  for (int64_t p = 0; p < count; ++p)
    flops += 2.0 * s.count * phases[p].source.pixels() * x.groups * O * phases[p].depth() * terms<F>;
  const int64_t o_unit = along_x ? lanes : width;
  const int64_t o_part = ceil_div(ceil_div(O, ceil_div(tasks_worth(flops), bands)), o_unit) * o_unit;
  const int64_t o_parts = ceil_div(O, o_part);

  // A single band packs its filters where it needs them, while they are in cache.
  const F** filters = along_x || bands > x.groups ? arrange_filters<F>(phases, count, along_x, width) : nullptr;
  for_each_range(bands * o_parts, flops, [&](int64_t begin, int64_t end) {
    Window<F> window{};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task % o_parts * o_part, y = task / o_parts % row_bands * size.rows;
      const int64_t g = task / o_parts / row_bands % x.groups;
      const int64_t n = task / o_parts / row_bands / x.groups * size.images;
      const Band band{
          g, 0, s.channels, n, std::min(size.images, s.count - n), y, std::min(size.rows, s.out_height - y)};
      if (task == begin || o == 0) window = window_of<F>(s, extent, band, x.channels_last, along_x, classes.in_place);
      const Task<T, F> t{phases, classes.data,           filters ? filters + g * count : nullptr, width, band, window,
                         o,      std::min(o_part, O - o)};
      for (int64_t p = 0; p < count; p += along_x ? 1 : x.x_phases) {
        if (t.rows(p) <= 0) continue;
        along_x ? multiply_along_x(t, p) : multiply_along_channels(t, p);
      }
    }
  });
}

template <class T>
void correlate_finite(const Correlation<T>* phases, int64_t count, Way way, PhaseClasses classes) {
  if (way == Way::depthwise) {
    for (int64_t p = 0; p < count; ++p) correlate_depthwise(phases[p], filters_of_taps(phases[p]));
    return;
  }
  const bool pairs = multiplies_pairs(phases[0]);
  auto* of_pairs = scratch<Correlation<T>>(Scratch::phases_of_pairs, count);
  for (int64_t p = 0; p < count && pairs; ++p) of_pairs[p] = paired(phases[p]);
  dispatch_factor<T>(
      [&](auto factor) { multiply_windows<decltype(factor)>(pairs ? of_pairs : phases, count, way, classes); }, pairs);
}

template <class T>
void add_nonfinite(const Correlation<T>& x) {
  const Source<T>& s = x.source;
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

}  // namespace

template <class T>
bool multiplies_pairs(const Correlation<T>& x) {
  return has_pairs<T>() && x.source.channels % 2 == 0 && !vectors_along_images(x, Vec<Compute<T>>::size());
}

template <class T>
bool sums_in_order(const Correlation<T>& x) {
  const Way way = way_of(&x, 1);
  return way != Way::group_lanes && way != Way::triples && !has_long_chains(x);
}

template <class T>
void correlate(const Correlation<T>* phases, int64_t count) {
  const Correlation<T>& x = phases[0];
  const Way way = way_of(phases, count);
  if constexpr (can_permute)
    if (way == Way::group_lanes) return correlate_group_lanes(phases, count);
  if (way == Way::planes) return correlate_planes(phases, count);
  if (way == Way::along_images) return correlate_images(x);
  if constexpr (std::is_same_v<T, Compute<T>>)
    if (way == Way::triples) return correlate_by_triples(x);
  const PhaseClasses classes = way == Way::along_channels ? classes_of(phases, count) : PhaseClasses{};
  if (classes.in_place || !leaves_image(x.source, Extent(phases, count)) || all_finite(x.filters.data, x.filters.count))
    return correlate_finite(phases, count, way, classes);

  count_run(Algorithm::conv2d_nonfinite_weight);
  const std::vector<T> finite = finite_part(x.filters.data, x.filters.count);
  std::vector<Correlation<T>> finite_phases(phases, phases + count);
  for (Correlation<T>& phase : finite_phases) phase.filters.data = finite.data(), phase.relu = false;
  correlate_finite(finite_phases.data(), count, way, classes);
  for (int64_t p = 0; p < count; ++p) add_nonfinite(phases[p]);
  if (x.relu) rectify(x.output, x.source.count * x.out_lines.image_stride);
}

#define INSTANTIATE(T)                                   \
  template bool sums_in_order(const Correlation<T>&);    \
  template bool multiplies_pairs(const Correlation<T>&); \
  template void correlate(const Correlation<T>*, int64_t);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
