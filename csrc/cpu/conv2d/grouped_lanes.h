// Convolutions of narrow groups over channels-last images, with vectors along the channels of several groups
// (conv2d/grouped_lanes.cpp).
#pragma once

#include "problem.h"

namespace pyops::cpu {

// Whether the instruction set has permutations of a whole vector.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool can_permute = true;
#else
constexpr bool can_permute = false;
#endif

// Whether groups of `in` and `out` channels should share vectors of C. They should where whole groups fill at least
// half of the lanes.
template <class C>
bool should_use_grouped_lanes(int64_t groups, int64_t in, int64_t out) {
  constexpr int64_t lanes = Vec<C>::size();
  const int64_t wider = std::max(in, out);
  if (!can_permute || groups < 2 || wider < 2 || wider > lanes) return false;
  const int64_t at_once = std::min(groups, lanes / wider);
#if defined(CPU_CAPABILITY_AVX2)
  if (in != out || at_once * in != lanes) return false;  // without masks, a partial vector goes through memory
#endif
  return 2 * at_once * out >= lanes;
}

// Computes the phases of a convolution, as convolve (conv2d/problem.h) does.
template <class T>
void convolve_grouped_lanes(const ConvProblem<T>* phases, int64_t count);

// Computes grad_weight. Every tap must meet the image.
template <class T>
void weight_gradient_grouped_lanes(const Conv2dShape& s, const ConvInput<T>& source, const T* grad_output,
                                   T* grad_weight);

}  // namespace pyops::cpu
