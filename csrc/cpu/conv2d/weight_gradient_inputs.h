// The weight gradient of conv2d with the vectors along (tap, input channel):
//
//   grad_weight [O, (tap, channel)] = grad_output [O, pixels] input tile [pixels, (tap, channel)]
//
// It is chosen for few output channels (choose_lanes of conv2d/weight_gradient.cpp). A product whose vectors run along
// 16 output channels is one vector wide and takes a load for each FMA, while the input tile of a 3x3 kernel over 16
// channels has nine vectors. The output channels are the rows of the register tiles: their gradients are broadcast, and
// the input tile is channels-last. It multiplies the zeros around the images, so its caller keeps gradients that are
// not finite out of it where a tap leaves the image. Guarantees: those of conv2d/weight_gradient.cpp.
#pragma once

#include "../gemm/gemm.h"
#include "problem.h"

namespace pyops::cpu {

// Where the channels of each tap begin in a row of sums along the inputs, followed by the length of the row. Taps that
// are neighbours in the image are adjacent, others begin a new vector: a 3x3 kernel over 24 channels takes 15 vectors
// of 16 lanes instead of 18.
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
