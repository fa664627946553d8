// The two implicit GEMMs over input tiles (conv2d/input_tile.h), where K = (channel, tap):
//
//   output [O, pixels] = filters [O, K] input tile [K, pixels]      vectors along the width, filters broadcast
//   output [pixels, O] = input tile [pixels, K] filters^T [K, O]    vectors along the channels, inputs broadcast
//
// This file cuts the work into tasks and packs the filters. When each is chosen and its inner loops are in
// conv2d/implicit_gemm_width.cpp and conv2d/implicit_gemm_channels.cpp.
//
// A task is a tile of output rows (or several small images) of one group and, if there are few tiles, a part of the
// output channels. With the vectors along the channels, the filters are packed into panels, once for all tiles if there
// are several. An even number of bfloat16 channels is multiplied in pairs where the CPU supports it (gemm/operand.h);
// then K = (pair, tap), and on a tile unit K = (tap, pair).
//
// Guarantees: those of gemm.h. Borders are exact even if the weight is infinite or NaN (conv2d/nonfinite.h).
#include "implicit_gemm.h"

namespace pyops::cpu {
namespace {

// The filters of all groups and phases as the implicit GEMMs read them: filters[g * count + p] are those of group g and
// phase p.
template <class F, class T>
const F** pack_all_filters(const Phases<T>& phases, bool by_width, int64_t width) {
  const ConvProblem<T>& x = phases.first();
  const int64_t count = phases.count, O = x.out_channels, panels = ceil_div(O, width);
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

// On a tile unit the sums run tap by tap, so that the pairs of a pixel that a piece of K takes are adjacent.
template <class T>
ConvProblem<T> paired(ConvProblem<T> x) {
  x.input = paired(x.input);
  x.input.tap_by_tap |= uses_tiles<Bf16Pair>();
  x.filters.second = x.filters.channel_stride, x.filters.channel_stride *= 2;
  return x;
}

template <class F, class T>
void multiply(const Phases<T>& phases, bool by_width, PhaseClasses classes) {
  constexpr int64_t lanes = OperandVec<F>::size();
  const ConvProblem<T>& x = phases.first();
  const ConvInput<T>& s = x.input;
  const ReceptiveField field(phases.data, phases.count);
  const OutputTileSize size(s, field, s.channels);
  const int64_t image_tiles = ceil_div(s.count, size.images), row_tiles = ceil_div(s.out_height, size.rows);
  const int64_t O = x.out_channels, tiles = x.groups * image_tiles * row_tiles, width = panel_width<Accumulator<F>>(O);
  double flops = 0;
  for (const ConvProblem<T>& phase : phases)
    flops += 2.0 * s.count * phase.input.pixels() * x.groups * O * phase.depth() * k_per_step<F>;
  const int64_t o_unit = by_width ? lanes : width;
  const int64_t o_part = ceil_div(ceil_div(O, ceil_div(tasks_worth(flops), tiles)), o_unit) * o_unit;
  const int64_t o_parts = ceil_div(O, o_part);

  // With a single tile in each group, its tasks pack the filters themselves and multiply them while they are in cache.
  // Not so for a tile unit: filters that are stored channel by channel are read in order only if all are packed at
  // once.
  const bool packed_before = by_width || tiles > x.groups || uses_tiles<F>();
  const F** filters = packed_before ? pack_all_filters<F>(phases, by_width, width) : nullptr;
  const bool tile_by_pixel = x.channels_last || (uses_tiles<F>() && !by_width);
  for_each_range(tiles * o_parts, flops, [&](int64_t begin, int64_t end) {
    InputTile<F> input{};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task % o_parts * o_part, y = task / o_parts % row_tiles * size.rows;
      const int64_t g = task / o_parts / row_tiles % x.groups;
      const int64_t n = task / o_parts / row_tiles / x.groups * size.images;
      const OutputTile tile{
          g, 0, s.channels, n, std::min(size.images, s.count - n), y, std::min(size.rows, s.out_height - y)};
      if (task == begin || o == 0) input = input_tile<F>(s, field, tile, tile_by_pixel, by_width, classes.in_place);
      const GemmTask<T, F> t{
          phases.data, classes.data,           filters ? filters + g * phases.count : nullptr, width, tile, input,
          o,           std::min(o_part, O - o)};
      for (int64_t p = 0; p < phases.count; p += by_width ? 1 : x.x_phases) {
        if (t.rows(p) <= 0) continue;
        by_width ? implicit_gemm_width(t, p) : implicit_gemm_channels(t, p);
      }
    }
  });
}

}  // namespace

template <class T>
void implicit_gemm(const Phases<T>& x, bool by_width, PhaseClasses classes) {
  const bool pairs = multiplies_pairs(x.first());
  auto* of_pairs = scratch<ConvProblem<T>>(Scratch::phases_of_pairs, x.count);
  for (int64_t p = 0; p < x.count && pairs; ++p) of_pairs[p] = paired(x[p]);
  const Phases<T> phases{pairs ? of_pairs : x.data, x.count};
  dispatch_operand<T>([&](auto operand) { multiply<decltype(operand)>(phases, by_width, classes); }, pairs);
}

template <class T>
bool multiplies_pairs(const ConvProblem<T>& x) {
  return could_multiply_pairs(x) && !is_worth_batch_lanes(x, Vec<Compute<T>>::size());
}

#define INSTANTIATE(T)                                   \
  template bool multiplies_pairs(const ConvProblem<T>&); \
  template void implicit_gemm(const Phases<T>&, bool, PhaseClasses);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
