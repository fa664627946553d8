// The cut of a product's sums into chunks of K, which depends on K alone: so do the bits of a result.
#pragma once

#include <algorithm>

#include "microkernel.h"

namespace pyops::cpu {

// f(k, kc, first, last) for each chunk of [begin, end); once, with kc = 0, where that is empty. Chunks are about even,
// of at most `most` terms, and of a size that the squares of simd/transpose.h divide. Inlined: what f captures stays in
// registers (linear of 1x400 -> 120 3.6 us instead of 4.0).
template <int64_t most = KC, class F>
C10_ALWAYS_INLINE void for_each_chunk(int64_t begin, int64_t end, const F& f) {
  const int64_t chunks = std::max(ceil_div(end - begin, most), int64_t{1});
  const int64_t size = ceil_div(ceil_div(end - begin, chunks), 16) * 16;
  for (int64_t k = begin, i = 0; i < chunks; ++i, k += size)
    f(k, std::clamp(end - k, int64_t{0}, size), i == 0, i == chunks - 1);
}

}  // namespace pyops::cpu
