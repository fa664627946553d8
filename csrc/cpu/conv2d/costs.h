// Estimates of the costs that the choice of a convolution's algorithm compares.
#pragma once

#include "problem.h"

namespace pyops::cpu {

// The fraction of their lanes that vectors along a dimension of this size use.
template <class T>
double lane_utilization(int64_t size) {
  constexpr int64_t lanes = Vec<T>::size();
  return static_cast<double>(size) / static_cast<double>(ceil_div(size, lanes) * lanes);
}

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

}  // namespace pyops::cpu
