// The weight gradient of conv2d with the vectors along the output channels:
//
//   grad_weight [(channel, tap), O] = input tile [(channel, tap), pixels] grad_output [pixels, O]
//
// It is chosen where the output channels fill vectors. Values of the input tile are broadcast, and a tile of
// grad_output is transposed to [pixels, O], unless it is channels-last already. Guarantees: those of
// conv2d/weight_gradient.cpp.
#pragma once

#include "border_taps.h"
#include "problem.h"

namespace pyops::cpu {

// The pixels of output tile b of grad_output as rows of operand B, over the output channels [o, o + count) of its
// group. They are read in place or copied into panels.
template <class F, class T>
OperandB<F> grad_rows(const Conv2dShape& s, const T* grad_output, const OutputTile& b, int64_t o, int64_t count) {
  constexpr int64_t lanes = OperandVec<F>::size();
  const Layout layout(s.O, s.OH, s.OW, s.channels_last);
  const int64_t width = panel_width<Accumulator<F>>(count), panels = ceil_div(count, width), row = b.rows * s.OW;
  const int64_t pixels = b.images * row, image = k_per_step<F> * layout.image_stride;
  const T* first =
      grad_output + b.n * image + b.y * layout.y_stride + (b.g * (s.O / s.groups) + o) * layout.channel_stride;
  if constexpr (std::is_same_v<T, F>)
    if (s.channels_last && count % lanes == 0)
      return {first, multiples(Scratch::b_offsets, count / lanes, lanes), multiples(Scratch::b_steps, pixels, s.O)};
  F* copy = scratch<F>(Scratch::grad_rows, panels * width * pixels);
  const int64_t piece = s.channels_last ? 1 : row;  // pixels copied at once, so that memory is read in order
  for (int64_t p = 0; p < pixels; p += piece) {
    const T* source = first + p / row * image + p % row * s.O;
    for (int64_t c = 0; c < count; c += width) {
      const int64_t columns = std::min(width, count - c);
      F* target = copy + c * pixels + p * width;
      if (s.channels_last) {
        copy_operand(target, source + c, columns, 1, layout.image_stride, k_per_step<F>);
      } else {
        transpose_operand(target, width, source + c * layout.channel_stride, layout.channel_stride, layout.image_stride,
                          columns, row);
      }
      for (int64_t i = 0; i < piece && columns < width; ++i)
        std::fill(target + i * width + columns, target + (i + 1) * width, F{});
    }
  }
  return {copy, panel_offsets<F>(Scratch::b_offsets, panels * width / lanes, pixels, width),
          multiples(Scratch::b_steps, pixels, width)};
}

// sums[row, vectors] (+)= the sum over the pixels of a tile of input tile(row, pixel) * grad(pixel), where row =
// (channel, tap). If that pays or the images are read in place, each tap sums only over the pixels for which it lies
// inside.
template <class F, class T>
void wgrad_gemm_outputs(const ConvInput<T>& s, const OutputTile& tile, const InputTile<F>& w, const OperandB<F>& grad,
                        int64_t vectors, Accumulator<F>* sums, const int64_t* sum_rows, bool accumulate,
                        bool in_place) {
  constexpr int64_t lanes = OperandVec<F>::size();
  // A tap has a row for each channel. With fewer rows than a register tile, too few chains of sums are in flight to
  // hide the latency of an FMA, and multiplying the zeros around the images is cheaper.
  // On a tile unit, the operands of each tap would have to be copied by themselves.
  const bool skips = tile.channels >= tile_rows[0] && !uses_tiles<F>() && should_skip_border_taps(s);
  const bool by_tap = in_place || skips;
  // A tile unit reads the channels of a tap as they lie in a channels-last tile.
  const bool tap_major = by_tap || uses_tiles<F>();
  const int64_t rows = tile.channels * s.tap_count, run_count = by_tap ? s.tap_count : 1;
  const int64_t* patch = patch_offsets(Scratch::a_offsets, w, s, tile.channels);
  int64_t* offsets = scratch<int64_t>(Scratch::row_offsets, rows);
  int64_t* targets = scratch<int64_t>(Scratch::target_rows, rows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = tap_major && !s.tap_by_tap ? i % tile.channels * s.tap_count + i / tile.channels : i;
    offsets[i] = patch[row], targets[i] = sum_rows[row];
  }
  const int64_t pixel_count = tile.images * tile.rows * s.out_width;
  const OperandC<Accumulator<F>> target{sums, targets, multiples(Scratch::target_vectors, vectors, lanes)};
  const int64_t* pixels = pixel_offsets(Scratch::a_steps, w, tile, s.out_width);
  RowRun runs[64];
  int64_t* steps = scratch<int64_t>(Scratch::run_steps, run_count * 2 * KC);
  for_each_chunk(0, pixel_count, [&](int64_t k, int64_t kc, bool first, bool) {
    for (int64_t r = 0; r < run_count; ++r)
      runs[r] = run_of_pixels<F>(rows / run_count, s, tile, by_tap ? s.taps + r : nullptr, pixels, grad.steps, k,
                                 k + kc, steps + r * 2 * KC);
    macrokernel<F>(runs, run_count, vectors, {w.data, offsets, nullptr}, {grad.data, grad.offsets, nullptr}, target,
                   accumulate || !first, /*last=*/false);
  });
}

// Whether to read the images in place, with each tap summed over the pixels for which it lies inside. A register tile
// then covers channels of a single tap, and its pixels must lie at most 256 bytes apart: with larger strides they map
// to few sets of the L1 cache.
template <class T>
bool should_read_in_place(const ConvInput<T>& s, bool by_pixel, int64_t c_block) {
  return std::is_same_v<T, Compute<T>> && by_pixel && c_block == s.x_stride && c_block >= 16 &&
         c_block * int64_t{sizeof(T)} <= 256 && s.tap_count <= 64;
}

}  // namespace pyops::cpu
