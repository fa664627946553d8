// The bias gradients: sums over the rows of a matrix, or over the pixels of channels-first images.
//
// The terms are summed in levels: blocks of 16 rows, chunks of at most 256 terms per lane, then the chunks in order.
// This is as accurate as stock's sums; one long sum is not, and over 64 rows it had three times stock's error. Chunks
// depend on the shape only, so the result is the same for any number of threads.
#pragma once

#include <algorithm>

#include "gemm.h"

namespace pyops::cpu {

// target[c] = sum over r of source[r, c], row-major [rows, columns]: the bias gradient of linear and of channels-last
// images.
template <class In>
void sum_rows(In* target, const In* source, int64_t rows, int64_t columns) {
  using T = Compute<In>;
  constexpr int64_t lanes = Vec<T>::size(), chunk = 256, block = 16;
  const int64_t chunks = std::max(ceil_div(rows, chunk), int64_t{1});
  T* partial = scratch<T>(Scratch::partial_sums, chunks * columns);
  for_each_task(chunks, static_cast<double>(rows) * columns, [&](int64_t i) {
    const In* begin = source + i * chunk * columns;
    const int64_t count = std::min(chunk, rows - i * chunk);
    for (int64_t c = 0; c < columns; c += lanes) {
      const int64_t width = std::min(lanes, columns - c);
      Vec<T> sum(0);
      for (int64_t first = 0; first < count; first += block) {
        Vec<T> of_block(0);
        for (int64_t r = first; r < std::min(first + block, count); ++r)
          of_block = of_block + load(begin + r * columns + c, width);
        sum = sum + of_block;
      }
      sum.store(partial + i * columns + c, static_cast<int>(width));
    }
  });
  for (int64_t c = 0; c < columns; ++c) {
    T sum = partial[c];
    for (int64_t i = 1; i < chunks; ++i) sum += partial[i * columns + c];
    target[c] = static_cast<In>(sum);
  }
}

// target[c] = sum over n, p of source[n, c, p]: the bias gradient of a batch of channels-first images.
template <class In>
void sum_planes(In* target, const In* source, int64_t images, int64_t channels, int64_t pixels) {
  using T = Compute<In>;
  constexpr int64_t lanes = Vec<T>::size(), chunk = 256 * lanes;
  for_each_task(channels, static_cast<double>(images) * channels * pixels, [&](int64_t c) {
    T total = 0;
    for (int64_t n = 0; n < images; ++n) {
      const In* plane = source + (n * channels + c) * pixels;
      for (int64_t p = 0; p < pixels; p += chunk) {
        const int64_t end = std::min(p + chunk, pixels);
        Vec<T> sum(0);
        for (int64_t i = p; i < end; i += lanes) sum = sum + load(plane + i, std::min(lanes, end - i));
        total += at::vec::vec_reduce_all([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, sum);
      }
    }
    target[c] = static_cast<In>(total);
  });
}

}  // namespace pyops::cpu
