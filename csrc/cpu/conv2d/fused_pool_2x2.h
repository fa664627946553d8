// output = relu(max_pool2d(conv2d(input, weight, bias))) of one CHWN block of images (conv2d/chwn.h), for
// non-overlapping 2x2 windows. It is chosen by conv2d_relu_max_pool2d.cpp where no tap leaves the image.
//
// The rows of a register tile are filters and its four columns are the pixels of one window, so that only the largest
// of four sums is stored. The filters are packed so that a tile reads them contiguously.
//
// A sum runs over (channel, tap) in the chunks of gemm.h, so the result is bit-identical to that of
// BatchLanesConvolution followed by pooling.
#pragma once

#include <array>

#include "../gemm/dot_tile.h"
#include "../max_pool2d/running_max.h"
#include "chwn.h"
#include "problem.h"

namespace pyops::cpu {

// The running maximum of windows before their first tap. It starts at 0, with the dead window's number as its tap, so
// that only values above 0 and NaN replace it. A is uint8_t, or void where no argmax is needed.
template <class C, class A>
RunningMax<C, A> rectified_max(int64_t taps) {
  return RunningMax<C, A>(static_cast<uint8_t>(dead_window(taps)), C(0));
}

// Stores the maxima (and taps) of a vector of windows at `offset` in their block.
template <class C, class A>
void store_max(const RunningMax<C, A>& best, C* pooled, uint8_t* argmax, int64_t offset) {
  best.max().store(pooled + offset);
  if constexpr (!std::is_void_v<A>) {
    const auto taps = best.tap();
    std::copy_n(taps.begin(), lanes_of<C>, argmax + offset);
  }
}

// Rounds to a 16-bit T and back, as the separate ops do when the convolution writes its output.
template <class T>
Vec<Compute<T>> rounded(const Vec<Compute<T>>& values) {
  if constexpr (!is_reduced<T>) {
    return values;
  } else {
    T written[lanes_of<T>];
    store(written, values, lanes_of<T>);
    return load(written, lanes_of<T>);
  }
}

template <class T>
class Pooled2x2 {
  using C = Compute<T>;
  using V = Vec<C>;

 public:
  // Whether the windows are 2x2 and no tap leaves the image.
  static bool takes(const ConvProblem<T>& x, const MaxPool2dShape& pool) {
    return pool.kernel_h == 2 && pool.kernel_w == 2 && !reaches_outside(x.input, ReceptiveField(x.input));
  }

  // The tables lie in this thread's scratch, until the thread constructs another one.
  Pooled2x2(const ConvProblem<T>& x, const MaxPool2dShape& pool) : x_(x), pool_(pool) {
    const ConvInput<T>& s = x.input;
    const int64_t K = x.depth(), O = x.out_channels;
    int64_t* steps = scratch<int64_t>(Scratch::source_steps, K);
    for (int64_t k = 0; k < K; ++k) {
      const Tap& tap = s.tap(k);
      steps[k] = (s.channel(k) * s.channel_stride + tap.dy * s.y_stride + tap.dx * s.x_stride) * lanes_of<T>;
    }
    C* filters = scratch<C>(Scratch::weight, x.groups * O * K);
    steps_ = steps, filters_ = filters;
    for (int64_t g = 0; g < x.groups; ++g)
      for_each_even_part(x_.out_channels, most_rows, [&](int64_t o, int64_t rows) {
        for (int64_t k = 0; k < K; ++k)
          for (int64_t i = 0; i < rows; ++i) *filters++ = static_cast<C>(x.filters.at(g, o + i)[x.filter_step(k)]);
      });
  }

  // Computes one block. A null argmax is not written.
  void operator()(const C* source, C* pooled, uint8_t* argmax, const Team& team) const {
    team.share([&](Share share) { pool(source, pooled, argmax, share.of(pool_.OH * pool_.OW)); });
  }

 private:
  void pool(const C* source, C* pooled, uint8_t* argmax, Range windows) const {
    const auto& tiles = argmax ? tiles_with_argmax : tiles_without_argmax;
    const ConvInput<T>& s = x_.input;
    const Layout out(pool_.C, pool_.OH, pool_.OW, pool_.channels_last);
    const int64_t right = s.step_w * s.x_stride * lanes_of<T>, below = s.step_h * s.y_stride * lanes_of<T>;
    const C* filters = filters_;
    for (int64_t g = 0; g < x_.groups; ++g, filters += x_.out_channels * x_.depth()) {
      const C* images = source + g * s.channels * s.channel_stride * lanes_of<T>;
      for (int64_t i = windows.begin; i < windows.end; ++i) {
        const int64_t y = i / pool_.OW, x = i % pool_.OW;
        const C* pixel = images + 2 * y * below + 2 * x * right;
        for_each_even_part(x_.out_channels, most_rows, [&](int64_t o, int64_t rows) {
          const int64_t channel = g * x_.out_channels + o;
          const int64_t window = channel * out.channel_stride + y * out.y_stride + x * out.x_stride;
          tiles[rows - 1](*this, {pixel, pixel + right, pixel + below, pixel + below + right}, filters + o * x_.depth(),
                          x_.bias ? x_.bias + channel : nullptr,
                          {pooled, argmax, window * lanes_of<T>, out.channel_stride * lanes_of<T>});
        });
      }
    }
  }

  static constexpr int most_rows = by_capability(1, 3, 6);  // of four sums each

  // The windows of one pooled pixel in a block; those of neighbouring channels lie `stride` apart.
  struct Target {
    C* pooled;
    uint8_t* argmax;
    int64_t first, stride;
  };

// These warnings are false alarms: a chunk reads only those `totals` that the chunk before it has written.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
  template <class A, int rows>
  static void tile(const Pooled2x2& x, const std::array<const C*, 4>& pixels, const C* filters, const T* bias,
                   const Target& target) {
    C totals[rows][4][lanes_of<T>];
    for_each_chunk(0, x.x_.depth(), [&](int64_t k, int64_t kc, bool first, bool last) {
      V sum[rows][4];
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[i][j] = V(0);
      const std::array<const C*, 4> pixel = pixels;
      const C* row = filters + k * rows;
      for (const int64_t *step = x.steps_ + k, *end = step + kc; step < end; ++step, row += rows) {
        V filter[rows];
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) filter[i] = V(row[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const V value = V::loadu(pixel[j] + *step);
#pragma GCC unroll 8
          for (int i = 0; i < rows; ++i) sum[i][j] = at::vec::fmadd(filter[i], value, sum[i][j]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          if (!first) sum[i][j] = V::loadu(totals[i][j]) + sum[i][j];
          if (!last) sum[i][j].store(totals[i][j]);
        }
      if (last) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          const V bias_of_row(bias ? static_cast<C>(bias[i]) : C(0));
          auto best = rectified_max<C, A>(4);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) best.update(rounded<T>(bias ? sum[i][j] + bias_of_row : sum[i][j]), j);
          store_max(best, target.pooled, target.argmax, target.first + i * target.stride);
        }
      }
    });
  }
#pragma GCC diagnostic pop

  template <class A, int... I>
  static constexpr auto all_tiles(std::integer_sequence<int, I...>) {
    return std::array{&tile<A, I + 1>...};
  }
  static constexpr auto tiles_with_argmax = all_tiles<uint8_t>(std::make_integer_sequence<int, most_rows>{});
  static constexpr auto tiles_without_argmax = all_tiles<void>(std::make_integer_sequence<int, most_rows>{});

  const ConvProblem<T> x_;
  const MaxPool2dShape pool_;
  const int64_t* steps_;  // the offset of each term in an input block
  const C* filters_;
};

}  // namespace pyops::cpu
