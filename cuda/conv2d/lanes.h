// How the direct kernels of grouped convolutions divide their work.
//
// A thread computes a strip of `strip_rows` pixels, one above another. A block takes `lanes` lanes of channels by
// `slots` strips, and continues with further strips of the same lanes, whose weights it has in shared memory.
// Neighbouring threads read neighbouring elements in either layout: in N H W C the lanes are contiguous; in N C H W a
// block has one lane, and its slots follow one another along x, so that columns are read contiguously without any need
// for alignment.
#pragma once

#include <algorithm>

#include "direct.h"

namespace pyops::cuda {

constexpr int strip_rows = 4;

// The fewest blocks for which an SM must have registers: two of 256 threads leave 128 registers to a thread.
template <class T>
constexpr int blocks_at_least = std::is_same_v<T, double> ? 1 : 2;

// The number of blocks of a launch, several times what a large GPU holds at a time (132 SMs with two or three each).
// More would only load the same weights again. The tests set it low.
#ifndef PYOPS_MOST_BLOCKS
#define PYOPS_MOST_BLOCKS 1024
#endif

struct Strip {
  int32_t n, y, x;  // the uppermost pixel
};

struct Lanes {
  Divider<int32_t> lanes, chunks;       // lanes of a block; blocks that cover all lanes
  Divider<int32_t> strips_w, strips_h;  // strips of an image
  int32_t total, slots, strips, tiles;  // tiles: the blocks of each chunk, which share the strips
  unsigned threads = 32;

  // Divides images [N, H, W] with `total` lanes, at most `most` of them in a block.
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

  // Returns the slot of this thread, which has work only if it is below `slots`, and sets its lane within the block.
  __device__ __forceinline__ int32_t slot(int32_t& lane) const {
    auto slot = static_cast<int32_t>(threadIdx.x);
    lane = take_digit(slot, lanes);
    return slot;
  }
  // Returns the first lane of this block among all lanes, and sets its tile.
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

  explicit Operands(const ConvolutionArgs& x)
      : source(static_cast<const T*>(x.source)),
        weight(static_cast<const T*>(x.weight)),
        bias(static_cast<const T*>(x.bias)),
        result(static_cast<T*>(x.result)) {}
};

// The part of ConvolutionArgs that does not depend on the type of the elements.
struct LaneConvolution {
  Conv<int32_t> conv;
  Images<int32_t> source, result;
  bool gradient, relu;

  explicit LaneConvolution(const ConvolutionArgs& x)
      : conv(x.shape),
        source(x.gradient ? conv.output : conv.input),
        result(x.gradient ? conv.input : conv.output),
        gradient(x.gradient),
        relu(x.relu) {}

  // The row of the source that tap i of row y of the result reads; negative if there is none.
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

  // In the sums of a strip, taps outside the image counted as 0, which gives NaN if the other factor is infinite. For
  // `count` channels, this takes the sums that are NaN again, over the taps inside.
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

// The elements at p if they are inside, else zeros.
template <class T, int n>
__device__ __forceinline__ Vector<T, n> load_or_zero(bool inside, const T* p) {
  return inside ? *reinterpret_cast<const Vector<T, n>*>(p) : Vector<T, n>{};
}

}  // namespace pyops::cuda
