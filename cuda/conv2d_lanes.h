// How the direct kernels of convolutions in groups share out their work.
//
// A thread computes a strip of `strip_rows` pixels one above the other. A block is `lanes` along the channels by
// `slots` of strips, and goes on to further strips with the weights of its lanes, which it has in shared memory.
// Neighbouring threads read neighbours in memory in either layout: N H W C has lanes side by side; N C H W has one
// lane, and slots that follow each other along x, so that columns are read side by side without any need for alignment.
#pragma once

#include <algorithm>

#include "conv2d_generic.h"

namespace pyops::cuda {

constexpr int strip_rows = 4;

// Blocks for which an SM has registers at least: two of 256 threads leave 128 to a thread.
template <class T>
constexpr int blocks_at_least = std::is_same_v<T, double> ? 1 : 2;

// Blocks of a launch: some times what a large GPU holds at a time (132 SMs with two or three each). More would only
// load the same weights again. The tests set it low.
#ifndef PYOPS_MOST_BLOCKS
#define PYOPS_MOST_BLOCKS 1024
#endif

struct Strip {
  int32_t n, y, x;  // of the uppermost pixel
};

struct Lanes {
  Divider<int32_t> lanes, chunks;       // of a block; blocks that cover all lanes
  Divider<int32_t> strips_w, strips_h;  // of an image
  int32_t total, slots, strips, tiles;  // tiles of strips, of which each chunk has as many blocks
  unsigned threads = 32;

  // `total` lanes, up to `most` of them in a block, for images [N, H, W].
  Lanes(int64_t total, int64_t most, int64_t N, int64_t H, int64_t W)
      : lanes(ceil_div(total, ceil_div(total, most))),
        chunks(ceil_div(total, most)),
        strips_w(W),
        strips_h(ceil_div(H, strip_rows)),
        total(static_cast<int32_t>(total)),
        strips(static_cast<int32_t>(N * ceil_div(H, strip_rows) * W)) {
    while (threads < block_threads && threads < int64_t{lanes.value()} * strips) threads *= 2;
    slots = static_cast<int32_t>(threads) / lanes.value();
    tiles = static_cast<int32_t>(std::min(ceil_div(strips, slots), ceil_div(PYOPS_MOST_BLOCKS, chunks.value())));
  }

  int64_t blocks() const { return int64_t{tiles} * chunks.value(); }

  // The lane of this thread among those of its block, and the slot, which is none if not below `slots`.
  __device__ __forceinline__ int32_t slot(int32_t& lane) const {
    auto slot = static_cast<int32_t>(threadIdx.x);
    lane = take_digit(slot, lanes);
    return slot;
  }
  // The first lane of this block among all.
  __device__ __forceinline__ int32_t first_lane(int32_t& tile) const {
    tile = static_cast<int32_t>(blockIdx.x);
    return take_digit(tile, chunks) * lanes.value();
  }
  __device__ __forceinline__ Strip strip(int32_t number) const {
    Strip s;
    s.x = take_digit(number, strips_w);
    s.y = take_digit(number, strips_h) * strip_rows;
    s.n = number;
    return s;
  }
};

template <class T>
struct Operands {
  const T *source, *weight, *bias;
  T* result;

  explicit Operands(const CorrelationArgs& x)
      : source(static_cast<const T*>(x.source)),
        weight(static_cast<const T*>(x.weight)),
        bias(static_cast<const T*>(x.bias)),
        result(static_cast<T*>(x.result)) {}
};

// What of CorrelationArgs does not depend on the type of the elements.
struct Correlation {
  Conv<int32_t> conv;
  Images<int32_t> source, result;
  bool gradient, relu;

  explicit Correlation(const CorrelationArgs& x)
      : conv(x.shape),
        source(x.gradient ? conv.output : conv.input),
        result(x.gradient ? conv.input : conv.output),
        gradient(x.gradient),
        relu(x.relu) {}

  // The row of the source that tap i of row y of the result meets; negative: none.
  __device__ __forceinline__ int32_t source_row(int32_t y, int32_t i) const {
    return gradient ? position(y + conv.padding_h - i * conv.dilation_h, conv.stride_h, source.height())
                    : inside(conv.input_h(y, i), source.height());
  }
  __device__ __forceinline__ int32_t source_column(int32_t x, int32_t j) const {
    return gradient ? position(x + conv.padding_w - j * conv.dilation_w, conv.stride_w, source.width())
                    : inside(conv.input_w(x, j), source.width());
  }

  template <class T>
  __device__ __forceinline__ T finish(Compute<T> sum, const T* bias, int32_t channel) const {
    const T value = finish_conv(sum, bias, channel);
    return relu ? narrow<T>(rectified(widen(value))) : value;
  }

  // Taps outside counted as 0 in the sums of a strip, and that times an infinity is NaN: takes the sums of `count`
  // channels that are NaN again, over the taps inside.
  template <class T>
  __device__ __forceinline__ void mend(const Operands<T>& x, const Strip& strip, int32_t first, int32_t count) const {
    const int32_t rows = min(strip_rows, result.height() - strip.y);
#pragma unroll 1
    for (int32_t k = 0; k < rows * count; ++k) {
      const Position<int32_t> at{strip.n, first + k % count, strip.y + k / count, strip.x};
      T& value = x.result[result.offset(at.n, at.c, at.h, at.w)];
      if (widen(value) == widen(value)) continue;
      value =
          finish(gradient ? gradient_of_input(conv, x.source, x.weight, at) : convolve(conv, x.source, x.weight, at),
                 x.bias, at.c);
    }
  }

 private:
  static __device__ __forceinline__ int32_t inside(int32_t at, int32_t size) { return at < size ? at : -1; }
  static __device__ __forceinline__ int32_t position(int32_t distance, const Divider<int32_t>& stride, int32_t size) {
    if (distance < 0 || take_digit(distance, stride) != 0) return -1;
    return inside(distance, size);
  }
};

// The elements at p, or zeros.
template <class T, int n>
__device__ __forceinline__ Vector<T, n> load_or_zero(bool inside, const T* p) {
  return inside ? *reinterpret_cast<const Vector<T, n>*>(p) : Vector<T, n>{};
}

}  // namespace pyops::cuda
