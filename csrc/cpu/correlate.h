// The ways of correlate.cpp that are products of tile.h over windows, vectors along x and along the output channels,
// and the one of few output channels.
#pragma once

#include "borders.h"
#include "conv2d.h"

namespace pyops::cpu {

// F: the factors that are multiplied. Of pairs, everything here counts pairs of channels.
template <class T, class F>
struct Task {
  const Correlation<T>* phases;
  const PixelClasses* classes;  // of each phase, along the channels
  const F* const* filters;      // of each phase and this group: [O][K], or panels of [K][width], or null
  int64_t width;                // of the panels
  Band band;
  const Window<F>& window;
  int64_t o, o_count;  // output channels

  // The part of the band that phase p has.
  int64_t rows(int64_t p) const { return std::min(band.rows, phases[p].source.out_height - band.y); }
};

// output [O, pixels] = filters [O, K] window [K, pixels], of phase p: correlate_along_x.cpp.
template <class T, class F>
void multiply_along_x(const Task<T, F>& t, int64_t p);

// output [pixels, O] = window [pixels, K] filters^T [K, O], of all phases of the same rows, from p on:
// correlate_along_channels.cpp.
template <class T, class F>
void multiply_along_channels(const Task<T, F>& t, int64_t p);

// Whether the taps are rows of three neighbours, of which no pixel's middle one lies outside to the left or right.
template <class T>
bool has_triples(const Source<T>& s);

// The same for those, of one phase, for channels-last images with at most a vector of output channels, of the compute
// type: correlate_by_triples.cpp.
template <class T>
void correlate_by_triples(const Correlation<T>& x);

// Rows [k, k + kc) of the panel of filters [o, o + columns) of group g, with zeros up to `width`.
template <class T, class F>
void pack_filters(F* panel, const Correlation<T>& x, int64_t g, int64_t o, int64_t columns, int64_t width, int64_t k,
                  int64_t kc);

}  // namespace pyops::cpu
