// The weight gradient of conv2d with the vectors along (tap, input channel): the output channels are the rows, whose
// gradients are broadcast where they lie, and an input tile of the input is copied pixel by pixel. For few output
// channels: a product whose vectors run along 16 of them is one vector wide and takes a load for each multiply-add,
// while the input tile of a 3x3 kernel over 16 channels is nine vectors. 8x16x32x32 -> 16, one core with AVX-512: 0.19
// ms, along the output channels 0.32, stock torch 0.24; channels-last 0.18, 0.28 and 0.18.
#pragma once

#include "../gemm/gemm.h"
#include "problem.h"

namespace pyops::cpu {

// Where each tap's channels begin in a row of sums along the inputs, and after them the length of the row. Taps that
// are neighbours in a row of the kernel follow one another, others begin a vector: of 24 channels, 3x3, 15 vectors,
// not 18.
template <class T>
const int64_t* tap_begins(const ConvInput<T>& s, int64_t channels) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  int64_t* begins = scratch<int64_t>(Scratch::tap_begins, s.tap_count + 1);
  for (int64_t t = 0, at = 0; t <= s.tap_count; ++t, at += channels) {
    const bool follows =
        t > 0 && t < s.tap_count && s.taps[t].dy == s.taps[t - 1].dy && s.taps[t].dx == s.taps[t - 1].dx + 1;
    begins[t] = at = follows ? at : ceil_div(at, lanes) * lanes;
  }
  return begins;
}

// sums[o, (tap, channel)] (+)= the sum over the pixels of a tile of grad(o, pixel) * input tile(pixel, tap, channel).
template <class F, class T>
void wgrad_gemm_inputs(const ConvInput<T>& s, const OutputTile& tile, const InputTile<F>& w, const OperandA<F>& grad,
                       int64_t out, const int64_t* begins, Accumulator<F>* sums, bool accumulate) {
  constexpr int64_t lanes = OperandVec<F>::size();
  const int64_t stride = begins[s.tap_count];
  int64_t* offsets = scratch<int64_t>(Scratch::row_offsets, stride / lanes);
  for (int64_t i = 0, t = 0; i < stride; i += lanes) {
    while (begins[t + 1] <= i) ++t;
    offsets[i / lanes] = w.tap_offset(s.taps[t]) + i - begins[t];
  }
  const int64_t* pixels = pixel_offsets(Scratch::source_pixels, w, tile, s.out_width);
  const int64_t count = tile.images * tile.rows * s.out_width;
  for_each_chunk(0, count, [&](int64_t k, int64_t kc, bool first, bool) {
    macrokernel<F>(out, stride / lanes, kc, {grad.data, grad.offsets, grad.steps + k}, {w.data, offsets, pixels + k},
                   sums, stride, accumulate || !first);
  });
}

}  // namespace pyops::cpu
