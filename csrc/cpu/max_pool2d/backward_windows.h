// The windows whose gradients an element of max_pool2d's backward gathers.
#pragma once

#include "lanes.h"

namespace pyops::cpu {

// The windows, as an array of gradients and one of taps.
template <class T>
struct Windows {
  using C = Compute<T>;

  Flat<T> grad;
  const uint8_t* argmax;

  // sum + the gradients of those windows, in the vector from `first` on, whose argmax is `tap`; only the windows in
  // `lanes` count. Reads whole vectors.
  Vec<C> add(Vec<C> sum, int64_t first, int64_t tap, LaneRange lanes = {0, lanes_of<T>}) const {
    const auto gradients = load_whole(grad.data + first);
#ifdef CPU_CAPABILITY_AVX512
    // One comparison of bytes gives a mask register, which Vectorized does not offer.
    if constexpr (std::is_same_v<C, float>) {
      const __m128i taps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(argmax + first));
      const __mmask16 chosen = _mm_mask_cmpeq_epi8_mask(lanes.mask16(), taps, _mm_set1_epi8(static_cast<char>(tap)));
      return _mm512_mask_add_ps(sum, chosen, sum, gradients);
    }
#endif
    const Vec<C> chosen = gradients & (widen<C>(argmax + first) == Vec<C>(static_cast<C>(tap)));
    return sum + (lanes.end - lanes.begin < lanes_of<T> ? lanes.select(chosen, C(0)) : chosen);
  }

  // add() for vectors that may reach beyond the tensor: reads only these lanes if the whole vector does not exist.
  Vec<C> add_edge(Vec<C> sum, int64_t first, int64_t tap, LaneRange lanes) const {
    if (grad.holds(first, lanes_of<T>)) return add(sum, first, tap, lanes);
    std::array<C, lanes_of<T>> chosen{};
    for (int64_t l = lanes.begin; l < lanes.end; ++l) {
      if (argmax[first + l] == tap) chosen[l] = grad.data[first + l];
    }
    return sum + Vec<C>::loadu(chosen.data());
  }
};

}  // namespace pyops::cpu
