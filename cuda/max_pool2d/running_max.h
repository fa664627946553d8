// The running maximum of a window, for max_pool2d alone and fused with the ops before it.
#pragma once

#include "../common/images.h"

namespace pyops::cuda {

// The largest tap so far and its number. A tap wins if (v > max) || isnan(v): ties keep the first tap, and the last of
// several NaNs wins.
template <class T, class Index>
struct RunningMax {
  Compute<T> max = lowest<T>;
  Index tap = 0;

  __device__ __forceinline__ void update(Compute<T> value, Index number) {
    if (value > max || value != value) {
      max = value;
      tap = number;
    }
  }

  // With `rectify`, relu is applied to the maximum, with which it commutes. If the maximum is neither above 0 nor NaN,
  // the window passes no gradient, and its argmax is `dead`.
  __device__ __forceinline__ T value(bool rectify) const { return narrow<T>(rectify ? over_zero() : max); }
  template <class A>
  __device__ __forceinline__ A argmax(bool rectify, A dead) const {
    return rectify && max <= 0 ? dead : static_cast<A>(tap);
  }

 private:
  __device__ __forceinline__ Compute<T> over_zero() const { return max <= 0 ? Compute<T>(0) : max; }
};

}  // namespace pyops::cuda
