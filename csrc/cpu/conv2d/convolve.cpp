// The convolution at the heart of conv2d's forward and input gradient:
//
//   output[g, o, pixel] = bias + sum over (channel, tap) of filter(g, o, channel, tap) * input(pixel, channel, tap)
//
// choose_algorithm picks one of the algorithms of this folder by the shape. Two of them are implicit GEMMs over input
// tiles (conv2d/input_tile.h), driven by this file, where K = (channel, tap):
//
//   output [O, pixels] = filters [O, K] input tile [K, pixels]      vectors along the width, filters broadcast
//   output [pixels, O] = input tile [pixels, K] filters^T [K, O]    vectors along the channels, inputs broadcast
//
// Their task is a tile of output rows (or several small images) of one group and, if there are few tiles, a part of the
// output channels. With the vectors along the channels, the filters are packed into panels, once for all tiles if there
// are several. An even number of bfloat16 channels is multiplied in pairs where the CPU supports it (gemm/operand.h);
// then K = (pair, tap).
//
// Guarantees: those of gemm.h. Borders are exact even if the weight is infinite or NaN (conv2d/nonfinite.h).
#include <cmath>

#include "grouped_lanes.h"
#include "implicit_gemm.h"
#include "nonfinite.h"

namespace pyops::cpu {
namespace {

// Whether the rows of pixels are contiguous in the image or in the input tile copied from it, as they are with a single
// tap.
template <class T>
bool are_rows_joined(const ConvProblem<T>& x) {
  return x.input.tap_count == 1 && x.x_phases == 1;
}

// The cost of transposing a channels-first output, relative to that of a product with the vectors along the channels.
// For each element it is about that of 23 terms (fitted to measurements).
template <class T>
double transpose_cost(const ConvProblem<T>& x) {
  return x.channels_last ? 0 : 23 / static_cast<double>(x.depth());
}

template <class T>
bool is_depthwise(const ConvProblem<T>& x) {
  return x.groups > 1 && x.input.channels == 1 && x.out_channels == 1 &&
         (x.channels_last || x.out_pixels().x_stride == 1);
}

// Whether convolve_depthwise takes each sum in one chain where the other algorithms take it in chunks of KC terms.
template <class T>
bool has_long_chains(const ConvProblem<T>& x) {
  return is_depthwise(x) && x.depth() > KC;
}

// Whether the batch should be in the lanes: the lanes that other algorithms would leave idle or spend on the zeros
// around an image must outweigh the transposes of a block of `count` images into cache and back.
template <class T>
bool should_use_batch_lanes(const ConvProblem<T>& x, int64_t count) {
  const ConvInput<T>& s = x.input;
  constexpr int64_t lanes = Vec<Compute<T>>::size(), most_elements = (1 << 20) / sizeof(Compute<T>);
  const int64_t out = x.groups * x.out_channels * s.pixels();
  if (count < lanes || (s.image_stride + out) * lanes > most_elements || has_long_chains(x)) return false;
  const double inside = fraction_inside(s), products = inside * static_cast<double>(out * x.depth());
  const double transposes = 8.0 * static_cast<double>(s.image_stride + out);
  // The factors are fitted to measurements. Vectors along the width end at every row. Along the channels, a tile that
  // is one vector wide has too few chains of sums to hide the latency of an FMA; a wider one pays for the transpose of
  // a channels-first output, but bfloat16 pairs make up for that.
  const double by_width =
      are_rows_joined(x) ? lane_utilization<Compute<T>>(s.pixels()) : 0.75 * lane_utilization<Compute<T>>(s.out_width);
  const double chains = x.out_channels <= lanes ? 0.6 : has_pairs<T>() ? 1 : 1 / (1 + transpose_cost(x));
  const double channels = lane_utilization<Compute<T>>(x.out_channels) * chains;
  const double others = std::max(by_width, channels);
  return lane_utilization<Compute<T>>(count) * products / (products + transposes) > inside * others;
}

// Whether a broadcast input value can serve three taps at once. A problem that would use batch lanes at some batch size
// never does this: the sums run in another order, and a sample's result must not depend on the batch it is in.
template <class T>
bool should_use_direct_3wide(const ConvProblem<T>& x, int64_t count) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  if constexpr (std::is_same_v<T, Compute<T>>)
    return count == 1 && x.channels_last && x.out_channels <= lanes && has_rows_of_three_taps(x.input) &&
           !should_use_batch_lanes(x, lanes);
  return false;
}

// Whether the vectors should run along the width, with weights broadcast, rather than along the output channels, with
// input values broadcast. Compares the lanes that each takes for one pixel and term, with factors fitted to
// measurements.
template <class T>
bool should_use_width_lanes(const ConvProblem<T>& x, bool direct_3wide) {
  constexpr double lanes = Vec<Compute<T>>::size();
  const auto taps = static_cast<double>(x.input.tap_count), O = static_cast<double>(x.out_channels);
  const double vectors = std::ceil(O / lanes);
  const double used = lane_utilization<Compute<T>>(are_rows_joined(x) ? x.input.pixels() : x.input.out_width);
  // Lines make for shorter register tiles, and channels-last images and their outputs have to be transposed.
  const double by_width = (x.channels_last ? 1.25 * (O + 9 / taps) : 1.15 * O) / used;
  // A register tile that is one vector wide takes a load for every FMA, direct_3wide fewer. With several x phases the
  // transpose does not count: vectors along the width would have to scatter their columns, which costs as much.
  const double transpose = x.x_phases > 1 ? 0 : transpose_cost(x);
  const double of_tiles = vectors > 1 ? 1 : direct_3wide ? 1.1 : 1.5;
  const double along_channels = of_tiles * vectors * lanes * (1 + transpose);
  return by_width < along_channels;
}

// The filters of all groups and phases as the implicit GEMMs read them: filters[g * count + p] are those of group g and
// phase p.
template <class F, class T>
const F** pack_all_filters(const ConvProblem<T>* phases, int64_t count, bool by_width, int64_t width) {
  const ConvProblem<T>& x = phases[0];
  const int64_t O = x.out_channels, panels = ceil_div(O, width);
  const F** filters = scratch<const F*>(Scratch::phase_filters, count * x.groups);
  if constexpr (std::is_same_v<T, F>) {
    if (by_width) {  // they are read in place
      for (int64_t i = 0; i < count * x.groups; ++i) filters[i] = phases[i % count].filters.at(i / count, 0);
      return filters;
    }
  }
  const auto group_size = [&](int64_t p) { return (by_width ? O : panels * width) * phases[p].depth(); };
  int64_t size = 0;
  for (int64_t p = 0; p < count; ++p) size += x.groups * group_size(p);
  F* target = scratch<F>(Scratch::weight, size);
  for (int64_t i = 0; i < count * x.groups; ++i) filters[i] = target, target += group_size(i % count);
  for_each_task(count * x.groups * panels, 16.0 * size, [&](int64_t task) {
    const int64_t i = task / panels, o = task % panels * width, columns = std::min(width, O - o), g = i / count;
    const ConvProblem<T>& phase = phases[i % count];
    const int64_t K = phase.depth();
    F* target = const_cast<F*>(filters[i]) + o * K;
    if (!by_width) return pack_filters(target, phase, g, o, columns, width, 0, K);
    for (int64_t f = o; f < o + columns; ++f)
      for (int64_t k = 0; k < K; ++k)
        *target++ = operand_at<F>(phase.filters.at(g, f) + phase.filter_step(k), phase.filters.second, k_per_step<F>);
  });
  return filters;
}

// The filters as convolve_depthwise reads them: each with its taps contiguous.
template <class T>
const T* filters_of_taps(const ConvProblem<T>& x) {
  const int64_t taps = x.input.tap_count;
  T* selected = scratch<T>(Scratch::partial_sums, x.groups * taps);
  for (int64_t g = 0; g < x.groups; ++g)
    for (int64_t t = 0; t < taps; ++t) selected[g * taps + t] = x.filters.at(g, 0)[x.filter_step(t)];
  return selected;
}

template <class T>
ConvProblem<T> paired(ConvProblem<T> x) {
  x.input = paired(x.input);
  x.filters.second = x.filters.channel_stride, x.filters.channel_stride *= 2;
  return x;
}

template <class T>
bool has_narrow_groups(const ConvProblem<T>& x) {
  return x.groups > 1 && lane_utilization<Compute<T>>(x.out_channels) <= 0.5;
}

enum class ConvAlgorithm {
  grouped_lanes,
  grouped_planes,
  batch_lanes,
  depthwise,
  implicit_gemm_width,
  direct_3wide,
  implicit_gemm_channels
};

// The algorithms in order of preference; the first that applies is chosen.
template <class T>
ConvAlgorithm choose_algorithm(const ConvProblem<T>* phases, int64_t count) {
  const ConvProblem<T>& x = phases[0];
  // Groups that are too narrow for a vector of their own share one, and nothing is copied or transposed.
  if (x.channels_last && should_use_grouped_lanes<Compute<T>>(x.groups, x.input.channels, x.out_channels))
    return ConvAlgorithm::grouped_lanes;
  // Narrow groups that cannot share vectors would leave most lanes idle; as planes, they can be convolved along the
  // width.
  if (x.channels_last && has_narrow_groups(x) && !is_depthwise(x)) return ConvAlgorithm::grouped_planes;
  // Small images with few channels would leave lanes idle or multiply many zeros; a batch fills the lanes.
  if (count == 1 && should_use_batch_lanes(x, x.input.count)) return ConvAlgorithm::batch_lanes;
  // A group would be a matrix of a single row, whose operands take longer to lay out than to multiply.
  if (is_depthwise(x)) return ConvAlgorithm::depthwise;
  // Few output channels fill only a small part of a vector.
  const bool direct_3wide = should_use_direct_3wide(x, count);
  if (should_use_width_lanes(x, direct_3wide)) return ConvAlgorithm::implicit_gemm_width;
  // A register tile of one vector of output channels takes a load for every FMA, unless three taps share it.
  if (direct_3wide) return ConvAlgorithm::direct_3wide;
  // Many output channels fill whole vectors, whatever the size of the images.
  return ConvAlgorithm::implicit_gemm_channels;
}

// The pixel classes of each phase, which implicit_gemm_channels reads.
struct PhaseClasses {
  const PixelClasses* data = nullptr;
  bool in_place = false;  // no phase multiplies zeros around the images, which are then read in place
};

template <class T>
PhaseClasses classify_pixels(const ConvProblem<T>* phases, int64_t count) {
  // Channels-first planes may be a page or more apart, too far to be read pixel by pixel: they are copied and padded
  // with zeros.
  bool in_place = phases[0].channels_last && (std::is_same_v<T, Compute<T>> || multiplies_pairs(phases[0]));
  PixelClasses* classes = scratch<PixelClasses>(Scratch::classes, count);
  for (int64_t p = 0; p < count; ++p) {
    classes[p] = PixelClasses(phases[p].input, /*wanted=*/in_place);
    in_place &= classes[p].exact;
  }
  return {classes, in_place};
}

template <class F, class T>
void implicit_gemm(const ConvProblem<T>* phases, int64_t count, ConvAlgorithm algorithm, PhaseClasses classes) {
  constexpr int64_t lanes = OperandVec<F>::size();
  const ConvProblem<T>& x = phases[0];
  const ConvInput<T>& s = x.input;
  const bool by_width = algorithm == ConvAlgorithm::implicit_gemm_width;
  count_run(by_width ? Algorithm::conv2d_implicit_gemm_width : Algorithm::conv2d_implicit_gemm_channels);
  const ReceptiveField field(phases, count);
  const OutputTileSize size(s, field, s.channels);
  const int64_t image_tiles = ceil_div(s.count, size.images), row_tiles = ceil_div(s.out_height, size.rows);
  const int64_t O = x.out_channels, tiles = x.groups * image_tiles * row_tiles, width = panel_width<Accumulator<F>>(O);
  double flops = 0;
  for (int64_t p = 0; p < count; ++p)
    flops += 2.0 * s.count * phases[p].input.pixels() * x.groups * O * phases[p].depth() * k_per_step<F>;
  const int64_t o_unit = by_width ? lanes : width;
  const int64_t o_part = ceil_div(ceil_div(O, ceil_div(tasks_worth(flops), tiles)), o_unit) * o_unit;
  const int64_t o_parts = ceil_div(O, o_part);

  // With a single tile in each group, its tasks pack the filters themselves and multiply them while they are in cache.
  const F** filters = by_width || tiles > x.groups ? pack_all_filters<F>(phases, count, by_width, width) : nullptr;
  for_each_range(tiles * o_parts, flops, [&](int64_t begin, int64_t end) {
    InputTile<F> input{};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task % o_parts * o_part, y = task / o_parts % row_tiles * size.rows;
      const int64_t g = task / o_parts / row_tiles % x.groups;
      const int64_t n = task / o_parts / row_tiles / x.groups * size.images;
      const OutputTile tile{
          g, 0, s.channels, n, std::min(size.images, s.count - n), y, std::min(size.rows, s.out_height - y)};
      if (task == begin || o == 0) input = input_tile<F>(s, field, tile, x.channels_last, by_width, classes.in_place);
      const GemmTask<T, F> t{
          phases, classes.data,           filters ? filters + g * count : nullptr, width, tile, input,
          o,      std::min(o_part, O - o)};
      for (int64_t p = 0; p < count; p += by_width ? 1 : x.x_phases) {
        if (t.rows(p) <= 0) continue;
        by_width ? implicit_gemm_width(t, p) : implicit_gemm_channels(t, p);
      }
    }
  });
}

template <class T>
void convolve_finite(const ConvProblem<T>* phases, int64_t count, ConvAlgorithm algorithm, PhaseClasses classes) {
  if (algorithm == ConvAlgorithm::depthwise) {
    for (int64_t p = 0; p < count; ++p) convolve_depthwise(phases[p], filters_of_taps(phases[p]));
    return;
  }
  const bool pairs = multiplies_pairs(phases[0]);
  auto* of_pairs = scratch<ConvProblem<T>>(Scratch::phases_of_pairs, count);
  for (int64_t p = 0; p < count && pairs; ++p) of_pairs[p] = paired(phases[p]);
  dispatch_operand<T>(
      [&](auto operand) { implicit_gemm<decltype(operand)>(pairs ? of_pairs : phases, count, algorithm, classes); },
      pairs);
}

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

}  // namespace

template <class T>
bool multiplies_pairs(const ConvProblem<T>& x) {
  return has_pairs<T>() && x.input.channels % 2 == 0 && !should_use_batch_lanes(x, Vec<Compute<T>>::size());
}

template <class T>
bool sums_in_order(const ConvProblem<T>& x) {
  const ConvAlgorithm algorithm = choose_algorithm(&x, 1);
  return algorithm != ConvAlgorithm::grouped_lanes && algorithm != ConvAlgorithm::direct_3wide && !has_long_chains(x);
}

template <class T>
void convolve(const ConvProblem<T>* phases, int64_t count) {
  const ConvProblem<T>& x = phases[0];
  const ConvAlgorithm algorithm = choose_algorithm(phases, count);
  if constexpr (can_permute)
    if (algorithm == ConvAlgorithm::grouped_lanes) return convolve_grouped_lanes(phases, count);
  if (algorithm == ConvAlgorithm::grouped_planes) return convolve_grouped_planes(phases, count);
  if (algorithm == ConvAlgorithm::batch_lanes) return convolve_batch_lanes(x);
  if constexpr (std::is_same_v<T, Compute<T>>)
    if (algorithm == ConvAlgorithm::direct_3wide) return convolve_direct_3wide(x);
  const PhaseClasses classes =
      algorithm == ConvAlgorithm::implicit_gemm_channels ? classify_pixels(phases, count) : PhaseClasses{};
  if (classes.in_place || !reaches_outside(x.input, ReceptiveField(phases, count)) ||
      all_finite(x.filters.data, x.filters.count))
    return convolve_finite(phases, count, algorithm, classes);

  count_run(Algorithm::conv2d_nonfinite_weight);
  const std::vector<T> finite = finite_part(x.filters.data, x.filters.count);
  std::vector<ConvProblem<T>> finite_phases(phases, phases + count);
  for (ConvProblem<T>& phase : finite_phases) phase.filters.data = finite.data(), phase.relu = false;
  convolve_finite(finite_phases.data(), count, algorithm, classes);
  for (int64_t p = 0; p < count; ++p) add_nonfinite(phases[p]);
  if (x.relu) rectify(x.output, x.input.count * x.out_lines.image_stride);
}

#define INSTANTIATE(T)                                   \
  template bool sums_in_order(const ConvProblem<T>&);    \
  template bool multiplies_pairs(const ConvProblem<T>&); \
  template void convolve(const ConvProblem<T>*, int64_t);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
