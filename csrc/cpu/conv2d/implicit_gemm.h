// The ways of conv2d/convolve.cpp that are products of gemm/microkernel.h over input tiles, vectors along x and along
// the output channels, and the one of few output channels.
#pragma once

#include "border_taps.h"
#include "problem.h"

namespace pyops::cpu {

// F: the operands that are multiplied. Of pairs, everything here counts pairs of channels.
template <class T, class F>
struct GemmTask {
  const ConvProblem<T>* phases;
  const PixelClasses* classes;  // of each phase, along the channels
  const F* const* filters;      // of each phase and this group: [O][K], or panels of [K][width], or null
  int64_t width;                // of the panels
  OutputTile tile;
  const InputTile<F>& input;
  int64_t o, o_count;  // output channels

  // The part of the tile that phase p has.
  int64_t rows(int64_t p) const { return std::min(tile.rows, phases[p].input.out_height - tile.y); }
};

// output [O, pixels] = filters [O, K] input tile [K, pixels], of phase p: conv2d/implicit_gemm_width.cpp.
template <class T, class F>
void implicit_gemm_width(const GemmTask<T, F>& t, int64_t p);

// output [pixels, O] = input tile [pixels, K] filters^T [K, O], of all phases of the same rows, from p on:
// conv2d/implicit_gemm_channels.cpp.
template <class T, class F>
void implicit_gemm_channels(const GemmTask<T, F>& t, int64_t p);

// Whether the taps are rows of three neighbours, of which no pixel's middle one lies outside to the left or right.
template <class T>
bool has_rows_of_three_taps(const ConvInput<T>& s);

// The same for those, of one phase, for channels-last images with at most a vector of output channels, of the compute
// type: conv2d/direct_3wide.cpp.
template <class T>
void convolve_direct_3wide(const ConvProblem<T>& x);

// Rows [k, k + kc) of the panel of filters [o, o + columns) of group g, with zeros up to `width`.
template <class T, class F>
void pack_filters(F* panel, const ConvProblem<T>& x, int64_t g, int64_t o, int64_t columns, int64_t width, int64_t k,
                  int64_t kc);

}  // namespace pyops::cpu
