// The weight gradient of conv2d with the vectors along the width:
//
//   sums[(channel, tap), o] = sum over pixels of input tile((channel, tap), pixel) * grad_output(o, pixel)
//
// It is chosen where vectors along the output channels or the inputs would leave most lanes idle (choose_lanes of
// conv2d/weight_gradient.cpp). Each weight is a dot product of an input tile and a plane of the gradient. A register
// tile holds dot_rows x dot_columns of them (4 x 6 with AVX-512), whose lanes are added up at the end. It multiplies
// the zeros around the images, so its caller keeps gradients that are not finite out of it where a tap leaves the
// image. Guarantees: those of conv2d/weight_gradient.cpp.
#pragma once

#include "../gemm/dot_tile.h"
#include "problem.h"

namespace pyops::cpu {

// The pixels of a tile of grad_output, one plane for each output channel.
template <class C>
struct Planes {
  const C* data;
  int64_t channel_stride, image_stride;
};

// The planes of the output channels [o, o + count) of output tile b, in place if their pixels are contiguous and of the
// compute type.
template <class T>
Planes<Compute<T>> grad_planes(const Conv2dShape& s, const T* grad_output, const OutputTile& b, int64_t o,
                               int64_t count) {
  using C = Compute<T>;
  const Layout layout(s.O, s.OH, s.OW, s.channels_last);
  const T* source = grad_output + (b.g * (s.O / s.groups) + o) * layout.channel_stride + b.n * layout.image_stride +
                    b.y * layout.y_stride;
  if constexpr (std::is_same_v<T, C>) {
    if (layout.x_stride == 1) return {source, layout.channel_stride, layout.image_stride};
  }
  const int64_t pixels = b.rows * s.OW;  // of one image, x_stride apart
  C* planes = scratch<C>(Scratch::grad_rows, count * b.images * pixels);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t n = 0; n < b.images; ++n)
      copy_values(planes + (c * b.images + n) * pixels, source + c * layout.channel_stride + n * layout.image_stride,
                  pixels, layout.x_stride);
  return {planes, b.images * pixels, pixels};
}

// A run of at most a vector of neighbouring pixels of a row: where it begins in the input tile and in a plane.
struct Run {
  int64_t input, plane;
  int64_t lanes;
};

template <class C>
struct DotArgs {
  const C* input;
  const int64_t* offsets;  // of the rows (channel, tap) in the input tile
  const C* planes;
  int64_t plane_stride;
  const Run* runs;
  int64_t run_count;
  C* sums;
  int64_t sums_stride;
  bool accumulate;
};

// sums[r, o] (+)= the sum over all pixels of input tile(offsets[r], pixel) * plane o(pixel). This is one plain loop,
// because otherwise gcc keeps the sums in memory.
template <class C, int rows, int columns>
void dot_products(const DotArgs<C>& x) {
  using V = Vec<C>;
  V sum[rows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < columns; ++o) sum[r][o] = V(0);
  const C* row[rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) row[r] = x.input + x.offsets[r];
  for (int64_t i = 0; i < x.run_count; ++i) {
    const Run run = x.runs[i];
    const C* plane = x.planes + run.plane;
    V g[columns];
#pragma GCC unroll 8
    for (int o = 0; o < columns; ++o) g[o] = V::loadu(plane + o * x.plane_stride, run.lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V value = V::loadu(row[r] + run.input, run.lanes);
#pragma GCC unroll 8
      for (int o = 0; o < columns; ++o) sum[r][o] = at::vec::fmadd(value, g[o], sum[r][o]);
    }
  }
  C lanes[rows][columns][V::size()];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < columns; ++o) sum[r][o].store(lanes[r][o]);
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < columns; ++o) {
      C& target = x.sums[r * x.sums_stride + o];
      const C total = at::vec::vec_reduce_all([](const V& a, const V& b) { return a + b; }, V::loadu(lanes[r][o]));
      target = x.accumulate ? target + total : total;
    }
  }
}

// Computes the dot products of all rows (channel, tap) of the input tile with all planes of the gradient.
template <class C>
void wgrad_dot_products_width(const DotArgs<C>& x, int64_t rows, int64_t columns) {
  for_each_dot_tile(rows, columns, [&](auto tile_rows, auto tile_columns, int64_t row, int64_t column) {
    DotArgs<C> tile = x;
    tile.offsets += row;
    tile.planes += column * x.plane_stride;
    tile.sums += row * x.sums_stride + column;
    dot_products<C, decltype(tile_rows)::value, decltype(tile_columns)::value>(tile);
  });
}

// All runs of a tile, row by row.
template <class C>
const Run* runs_of(const InputTile<C>& w, const Planes<C>& planes, const OutputTile& b, int64_t width) {
  constexpr int64_t lanes = Vec<C>::size();
  Run* runs = scratch<Run>(Scratch::a_steps, b.images * b.rows * ceil_div(width, lanes));
  int64_t i = 0;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t y = 0; y < b.rows; ++y)
      for (int64_t x = 0; x < width; x += lanes)
        runs[i++] = {n * w.image_stride + y * w.y_step + x, n * planes.image_stride + y * width + x,
                     std::min(lanes, width - x)};
  return runs;
}

}  // namespace pyops::cpu
