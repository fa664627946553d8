// How kernels number and address the elements of images [N, C, H, W], which are dense in one of two layouts.
#pragma once

#include "../common.h"

namespace pyops::cuda {

template <class Index>
struct Position {
  Index n, c, h, w;
};

template <class Index>
struct Pixel {
  Index n, h, w;
};

// Elements are numbered in memory order: N C H W, or N H W C if channels_last.
template <class Index>
struct Images {
  Divider<Index> C, H, W;
  Index n_stride, c_stride, h_stride, w_stride;
  int64_t count;
  bool channels_last;

  Images(int64_t N, int64_t C, int64_t H, int64_t W, bool channels_last)
      : C(C),
        H(H),
        W(W),
        n_stride(static_cast<Index>(C * H * W)),
        c_stride(static_cast<Index>(channels_last ? 1 : H * W)),
        h_stride(static_cast<Index>(channels_last ? W * C : W)),
        w_stride(static_cast<Index>(channels_last ? C : 1)),
        count(N * C * H * W),
        channels_last(channels_last) {}

  __device__ __forceinline__ Index height() const { return H.value(); }
  __device__ __forceinline__ Index width() const { return W.value(); }

  // Pixels are numbered in the order N H W.
  __device__ __forceinline__ Pixel<Index> pixel(Index number) const {
    Pixel<Index> p;
    p.w = take_digit(number, W);
    p.h = take_digit(number, H);
    p.n = number;
    return p;
  }

  __device__ __forceinline__ Position<Index> position(Index i) const {
    Position<Index> p;
    if (channels_last) {
      p.c = take_digit(i, C);
      p.w = take_digit(i, W);
      p.h = take_digit(i, H);
    } else {
      p.w = take_digit(i, W);
      p.h = take_digit(i, H);
      p.c = take_digit(i, C);
    }
    p.n = i;
    return p;
  }

  __device__ __forceinline__ Index offset(Index n, Index c, Index h, Index w) const {
    return n * n_stride + c * c_stride + h * h_stride + w * w_stride;
  }
};

// Along one dimension, the taps [begin, end) of a window that lie in [0, size). Tap 0 lies at `start`, and the taps are
// `dilation` apart.
template <class Index>
struct Taps {
  Index begin, end;

  __device__ __forceinline__ Taps(Index start, Index kernel, Index dilation, Index size) {
    begin = start >= 0 ? 0 : dilation == 1 ? -start : (dilation - 1 - start) / dilation;
    const Index room = size - start;  // taps whose offset is below this are inside
    end = room <= 0 ? 0 : dilation == 1 ? room : (room + dilation - 1) / dilation;
    if (end > kernel) end = kernel;
  }
};

}  // namespace pyops::cuda
