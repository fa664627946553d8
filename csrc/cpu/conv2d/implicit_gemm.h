// What conv2d/implicit_gemm.cpp, which cuts an implicit GEMM into tasks, shares with the inner loops: those with the
// vectors along the width (conv2d/implicit_gemm_width.cpp) and along the output channels
// (conv2d/implicit_gemm_channels.cpp).
#pragma once

#include "algorithms.h"
#include "border_taps.h"

namespace pyops::cpu {

// The pixel classes of each phase, which implicit_gemm_channels reads.
struct PhaseClasses {
  const PixelClasses* data = nullptr;
  bool in_place = false;  // no phase multiplies zeros around the images, which are then read in place
};

// Runs an implicit GEMM with the vectors along the width or along the output channels.
template <class T>
void implicit_gemm(const Phases<T>& x, bool by_width, PhaseClasses classes);

// One task of an implicit GEMM. F is the type of the operands; if they are pairs, all channels are counted in pairs.
template <class T, class F>
struct GemmTask {
  const ConvProblem<T>* phases;
  const PixelClasses* classes;  // one for each phase; read by implicit_gemm_channels only
  // The filters of this group, one pointer for each phase. implicit_gemm_width reads them as [O][K], or in place in the
  // weight; implicit_gemm_channels as panels of [K][width], which it packs itself if this is null.
  const F* const* filters;
  int64_t width;
  OutputTile tile;
  const InputTile<F>& input;
  int64_t o, o_count;  // output channels

  // The rows of the tile that phase p has.
  int64_t rows(int64_t p) const { return std::min(tile.rows, phases[p].input.out_height - tile.y); }
};

// Computes output [O, pixels] = filters [O, K] input tile [K, pixels] of phase p (conv2d/implicit_gemm_width.cpp).
template <class T, class F>
void implicit_gemm_width(const GemmTask<T, F>& t, int64_t p);

// Computes output [pixels, O] = input tile [pixels, K] filters^T [K, O] of phase p and all phases after it that write
// the same rows (conv2d/implicit_gemm_channels.cpp).
template <class T, class F>
void implicit_gemm_channels(const GemmTask<T, F>& t, int64_t p);

// Packs rows [k, k + kc) of the panel of filters [o, o + columns) of group g, with zeros up to `width`.
template <class T, class F>
void pack_filters(F* panel, const ConvProblem<T>& x, int64_t g, int64_t o, int64_t columns, int64_t width, int64_t k,
                  int64_t kc);

}  // namespace pyops::cpu
