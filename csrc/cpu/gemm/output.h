// The epilogue that writes sums to an output of any layout: a row or column of C may run over the pixels of a batch of
// images, and the output may be stored by columns.
#pragma once

#include <algorithm>

#include "../simd/transpose.h"

namespace pyops::cpu {

// Maps a row or column of C to an offset in memory: pixel (n, y, x) of a batch of images is at n * image_stride + y *
// y_stride + x * x_stride. A plain dimension is one endless row of pixels.
struct Axis {
  int64_t width, pixels;  // of an image; pixels = width * height
  int64_t image_stride, y_stride, x_stride;

  static constexpr int64_t endless = int64_t{1} << 62;
  static Axis plain(int64_t stride) { return {endless, endless, 0, 0, stride}; }

  int64_t offset(int64_t i) const {
    if (pixels == endless) return i * x_stride;
    const int64_t n = i / pixels, p = i % pixels;
    return n * image_stride + p / width * y_stride + p % width * x_stride;
  }
  // How many indices from i on lie x_stride apart in memory.
  int64_t run(int64_t i) const {
    if (pixels == endless) return endless;
    return y_stride == width * x_stride ? pixels - i % pixels : width - i % width;
  }
};

template <class Out>
struct Output {
  Out* data;
  Axis rows, columns;
  const Out* row_bias = nullptr;
  const Out* column_bias = nullptr;
  bool relu = false;
};

#if defined(CPU_CAPABILITY_AVX512)
// write() for an output that is stored by columns: squares of sums are transposed in registers.
template <class Out>
void write_squares(const Output<Out>& out, const float* sums, int64_t sums_stride, int64_t row, int64_t rows,
                   int64_t column, int64_t columns) {
  using V = Vec<float>;
  for (int64_t r = 0, height; r < rows; r += height) {
    height = std::min({int64_t{16}, rows - r, out.rows.run(row + r)});
    Out* target = out.data + out.rows.offset(row + r);
    const V row_bias = out.row_bias ? load(out.row_bias + row + r, height) : V(0);
    for (int64_t c = 0; c < columns; c += square_columns) {
      const int64_t width = std::min(square_columns, columns - c);
      __m512 square[square_columns];
      load_square(square, sums + r * sums_stride + c, sums_stride, height, width);
#pragma GCC unroll 16
      for (int64_t j = 0; j < square_columns; ++j) {
        if (j >= width) break;
        V value = square[j];
        if (out.column_bias) value = value + V(static_cast<float>(out.column_bias[column + c + j]));
        if (out.row_bias) value = value + row_bias;
        if (out.relu) value = at::vec::clamp_min(value, V(0));
        store(target + out.columns.offset(column + c + j), value, height);
      }
    }
  }
}
#endif

// C[row .., column ..] = sums[rows, columns] + bias, rectified if `out` asks for it.
template <class Out>
void write(const Output<Out>& out, const Compute<Out>* sums, int64_t sums_stride, int64_t row, int64_t rows,
           int64_t column, int64_t columns) {
  using T = Compute<Out>;
  constexpr int64_t lanes = Vec<T>::size();
  if (out.columns.x_stride != 1 && out.rows.x_stride == 1) {  // stored by columns: write the transpose
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, float>) return write_squares(out, sums, sums_stride, row, rows, column, columns);
#endif
    const Output<Out> flipped{out.data, out.columns, out.rows, out.column_bias, out.row_bias, out.relu};
    T block[lanes * lanes];
    for (int64_t r = 0; r < rows; r += lanes) {
      for (int64_t c = 0; c < columns; c += lanes) {
        const int64_t height = std::min(lanes, rows - r), width = std::min(lanes, columns - c);
        transpose(block, lanes, sums + r * sums_stride + c, sums_stride, height, width);
        write(flipped, block, lanes, column + c, width, row + r, height);
      }
    }
    return;
  }
  // The sums are written row by row, because rows may lie pages apart; the offsets of the columns are computed once for
  // all rows.
  struct Run {
    int64_t column, count, offset;
    Vec<T> bias;
  };
  constexpr int most_runs = 32;
  for (int64_t c = 0; c < columns;) {
    Run runs[most_runs];
    int run_count = 0;
    for (; c < columns && run_count < most_runs; ++run_count) {
      const int64_t count = std::min({lanes, columns - c, out.columns.run(column + c)});
      runs[run_count] = {c, count, out.columns.offset(column + c),
                         out.column_bias ? load(out.column_bias + column + c, count) : Vec<T>(0)};
      c += count;
    }
    for (int64_t r = 0; r < rows; ++r) {
      Out* target = out.data + out.rows.offset(row + r);
      const Vec<T> row_bias(out.row_bias ? static_cast<T>(out.row_bias[row + r]) : T(0));
      for (int i = 0; i < run_count; ++i) {
        Vec<T> value = Vec<T>::loadu(sums + r * sums_stride + runs[i].column, runs[i].count);
        if (out.column_bias) value = value + runs[i].bias;
        if (out.row_bias) value = value + row_bias;
        if (out.relu) value = at::vec::clamp_min(value, Vec<T>(0));
        store(target + runs[i].offset, value, runs[i].count, out.columns.x_stride);
      }
    }
  }
}

}  // namespace pyops::cpu
