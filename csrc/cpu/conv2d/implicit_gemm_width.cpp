// A convolution as an implicit GEMM with the vectors along the width, where K = (channel, tap):
//
//   output [O, pixels] = filters [O, K] input tile [K, pixels]
//
// It is chosen where vectors along the output channels would take more vector operations for each pixel and term, as
// they do with few output channels. The values of the filters are broadcast, in place if they
// have the type of the operands. Every row of pixels begins a new vector, unless the rows are contiguous; then they are
// joined into one line. The sums of a channels-first output are stored directly where that is possible
// (gemm/epilogue.h). Guarantees: those of gemm.h.
#include <cmath>

#include "../gemm/epilogue.h"
#include "costs.h"
#include "implicit_gemm.h"
#include "nonfinite.h"

namespace pyops::cpu {

// The nest of loops over blocks, chunks and register tiles stands in one function, because every level uses the bounds
// of those outside it.
template <class T, class F>
void implicit_gemm_width(const GemmTask<T, F>& t, int64_t p) {
  using C = Accumulator<F>;
  constexpr int64_t lanes = Vec<C>::size();
  const ConvProblem<T>& x = t.phases[p];
  const InputTile<F>& w = t.input;
  const int64_t K = x.depth(), width = x.input.out_width;
  const Axis pixels = x.out_pixels();
  const bool direct = stores_directly<F, T> && pixels.x_stride == 1;
  const int64_t group = t.tile.g * x.out_channels;
  const Output<T> out{x.first_pixel() + group * x.out_channel_stride,
                      Axis::plain(x.out_channel_stride),
                      pixels,
                      x.bias ? x.bias + group : nullptr,
                      nullptr,
                      x.relu};

  const int64_t* patch = patch_offsets(Scratch::b_steps, w, x.input, x.input.channels);
  // Filters that are read in place have the strides of the weight; copied ones are [O][K].
  const bool in_place = std::is_same_v<T, F>;
  const int64_t* filter_rows = multiples(Scratch::a_offsets, x.out_channels, in_place ? x.filters.out_stride : K);
  int64_t* filter_steps = scratch<int64_t>(Scratch::a_steps, K);
  for (int64_t k = 0; k < K; ++k) filter_steps[k] = in_place ? x.filter_step(k) : k;

  // Contiguous rows are joined into one line, which leaves fewer lanes idle.
  const int64_t band_rows = t.rows(p);
  const bool joined = w.y_step == width && w.x_step == 1 && (pixels.y_stride == width || !direct);
  const int64_t line_rows = joined ? band_rows : 1, line_width = line_rows * width;
  const int64_t lines = t.tile.images * (band_rows / line_rows), line_vectors = ceil_div(line_width, lanes);
  const int64_t vectors = lines * line_vectors;
  int64_t* offsets = scratch<int64_t>(Scratch::b_offsets, vectors);
  int64_t* targets = scratch<int64_t>(Scratch::output_pixels, vectors);
  int64_t* firsts = scratch<int64_t>(Scratch::source_pixels, vectors);  // the first pixel of each vector
  int32_t* target_lanes = scratch<int32_t>(Scratch::target_lanes, vectors);
  for (int64_t line = 0, v = 0; line < lines; ++line) {
    const int64_t row = line * line_rows, n = row / band_rows, y = row % band_rows;
    for (int64_t j = 0; j < line_width; j += lanes, ++v) {
      offsets[v] = n * w.image_stride + y * w.y_step + j;
      targets[v] = (t.tile.n + n) * pixels.image_stride + (t.tile.y + y) * pixels.y_stride + j;
      firsts[v] = (t.tile.n + n) * pixels.pixels + (t.tile.y + y) * width + j;
      target_lanes[v] = static_cast<int32_t>(std::min(lanes, line_width - j));
    }
  }

  constexpr int64_t block_columns = 256;
  const int64_t blocks = ceil_div(vectors * lanes, block_columns);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t v = block * vectors / blocks, count = (block + 1) * vectors / blocks - v;
    for (int64_t m = t.o; m < t.o + t.o_count; m += MC) {
      const int64_t mc = std::min(MC, t.o + t.o_count - m), stride = count * lanes;
      const auto product = [&](const OperandC<C>& target) {
        for_each_chunk(0, K, [&](int64_t k, int64_t kc, bool first, bool last) {
          macrokernel<F>(mc, count, kc, {t.filters[p], filter_rows + m, filter_steps + k},
                         {w.data, offsets + v, patch + k}, target, !first, last);
        });
      };
      if constexpr (stores_directly<F, T>) {
        if (direct) {
          const OperandC<T> target{out.data,
                                   multiples(Scratch::target_rows, x.out_channels, x.out_channel_stride) + m,
                                   targets + v,
                                   line_width % lanes == 0 ? nullptr : target_lanes + v,
                                   out.row_bias ? out.row_bias + m : nullptr,
                                   nullptr,
                                   x.relu};
          with_epilogue<F>(target, mc, count * lanes, product);
          continue;
        }
      }
      C* sums = scratch<C>(Scratch::sums, mc * stride);
      product({sums, multiples(Scratch::target_rows, mc, stride), multiples(Scratch::target_vectors, count, lanes)});
      for (int64_t i = 0, end; i < count; i = end) {  // runs of contiguous pixels
        for (end = i + 1; end < count && firsts[v + end] == firsts[v + end - 1] + lanes;) ++end;
        const int64_t width = (end - 1 - i) * lanes + target_lanes[v + end - 1];
        write(out, sums + i * lanes, stride, m, mc, firsts[v + i], width);
      }
    }
  }
}

// ---- the algorithm ----

template <class T>
bool ImplicitGemmWidth<T>::supports(const Phases<T>&) {
  return true;
}

// Compares the estimated operations of both implicit GEMMs, in lanes for each pixel and term. The factors were fitted
// to measurements.
template <class T>
bool ImplicitGemmWidth<T>::profitable(const Phases<T>& phases) {
  constexpr double lanes = Vec<Compute<T>>::size();
  const ConvProblem<T>& x = phases.first();
  // A tile unit loads pixels as they lie in a channels-last copy, and vectors along the width only from a further copy.
  if (uses_tiles<Bf16Pair>() && multiplies_pairs(x)) return false;
  const auto taps = static_cast<double>(x.input.tap_count), O = static_cast<double>(x.out_channels);
  const double vectors = std::ceil(O / lanes);
  const double used = lane_utilization<Compute<T>>(are_rows_joined(x) ? x.input.pixels() : x.input.out_width);
  // Vectors that end with a row of pixels fill the register tiles badly, and channels-last images and outputs have to
  // be transposed.
  const double by_width = (x.channels_last ? 1.25 * (O + 9 / taps) : 1.15 * O) / used;
  // A register tile that is one vector wide takes a load for every FMA, direct_3wide fewer. With several x phases the
  // transpose does not count: vectors along the width would have to scatter their columns, which costs as much.
  const double transpose = x.x_phases > 1 ? 0 : transpose_cost(x);
  const bool direct_3wide = Direct3Wide<T>::supports(phases) && Direct3Wide<T>::profitable(phases);
  const double of_tiles = vectors > 1 ? 1 : direct_3wide ? 1.1 : 1.5;
  const double along_channels = of_tiles * vectors * lanes * (1 + transpose);
  return by_width < along_channels;
}

template <class T>
bool ImplicitGemmWidth<T>::sums_in_order(const Phases<T>&) {
  return true;
}

template <class T>
void ImplicitGemmWidth<T>::run(const Phases<T>& x) {
  convolve_exactly(x, [](const Phases<T>& finite) { implicit_gemm(finite, /*by_width=*/true, {}); });
}

#define INSTANTIATE(T) template struct ImplicitGemmWidth<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE
#define INSTANTIATE(T, F) template void implicit_gemm_width(const GemmTask<T, F>&, int64_t);
FOR_EACH_OPERAND(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
