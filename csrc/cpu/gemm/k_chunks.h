// Cuts the sums of a product into chunks of K. The cut depends on K alone, and therefore so do the bits of a result.
#pragma once

#include <algorithm>

#include "microkernel.h"

namespace pyops::cpu {

// f(k, kc, first, last) for each chunk of [begin, end); f is called once, with kc = 0, if that range is empty. Chunks
// are about equal, have at most KC steps of `step` terms, and begin at multiples of 16 steps from `begin`, so that the
// 16x16 transposes of simd/transpose.h and the pieces of gemm/tile_kernel.h stay whole. The function is inlined so that
// what f captures stays in registers.
template <int64_t step = 1, class F>
C10_ALWAYS_INLINE void for_each_chunk(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t unit = 16 * step;
  const int64_t chunks = std::max(ceil_div(end - begin, KC * step), int64_t{1});
  const int64_t size = ceil_div(ceil_div(end - begin, chunks), unit) * unit;
  for (int64_t k = begin, i = 0; i < chunks; ++i, k += size)
    f(k, std::clamp(end - k, int64_t{0}, size), i == 0, i == chunks - 1);
}

}  // namespace pyops::cpu
