// The register tiles of tile.h, one instance for each height and width, and the walk over a block in such tiles.
#include "tile.h"

#include <utility>

namespace pyops::cpu {
namespace {

template <class T>
struct TileArgs {
  int64_t kc;
  Rows<T> a;
  Vectors<T> b;
  T* sums;
  int64_t sums_stride;
  bool accumulate;
};

// The loops over compile-time counts must be unrolled for the sums to stay in registers.
template <class T, int rows, int vectors>
void tile(const TileArgs<T>& x) {
  using V = Vec<T>;
  constexpr int64_t lanes = V::size();
  const T* a[rows];
  const T* b[vectors];
  V sum[rows][vectors];
#pragma GCC unroll 32
  for (int j = 0; j < vectors; ++j) b[j] = x.b.data + x.b.offsets[j];
#pragma GCC unroll 32
  for (int i = 0; i < rows; ++i) {
    a[i] = x.a.data + x.a.offsets[i];
#pragma GCC unroll 32
    for (int j = 0; j < vectors; ++j) sum[i][j] = V(0);
  }
  for (int64_t k = 0; k < x.kc; ++k) {
    const int64_t a_step = x.a.steps[k], b_step = x.b.steps[k];
    V b_row[vectors];
#pragma GCC unroll 32
    for (int j = 0; j < vectors; ++j) b_row[j] = V::loadu(b[j] + b_step);
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i) {
      const V a_value(a[i][a_step]);
#pragma GCC unroll 32
      for (int j = 0; j < vectors; ++j) sum[i][j] = at::vec::fmadd(a_value, b_row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < rows; ++i) {
    T* sums = x.sums + i * x.sums_stride;
#pragma GCC unroll 32
    for (int j = 0; j < vectors; ++j)
      (x.accumulate ? V::loadu(sums + j * lanes) + sum[i][j] : sum[i][j]).store(sums + j * lanes);
  }
}

template <class T>
using Tile = void (*)(const TileArgs<T>&);

template <class T, int vectors, int... I>
constexpr auto tiles_of_width(std::integer_sequence<int, I...>) {
  return std::array<Tile<T>, tile_rows[0]>{tile<T, I + 1, vectors>...};
}

// tiles[vectors - 1][rows - 1]
template <class T, int... J>
constexpr auto all_tiles(std::integer_sequence<int, J...>) {
  return std::array<std::array<Tile<T>, tile_rows[0]>, max_vectors>{
      tiles_of_width<T, J + 1>(std::make_integer_sequence<int, tile_rows[J]>{})...};
}
template <class T>
constexpr auto tiles = all_tiles<T>(std::make_integer_sequence<int, max_vectors>{});

// The share of the next of `parts` parts of `count`, as even as they can be: 13 in 4 parts is 4, 3, 3, 3.
int64_t next_share(int64_t count, int64_t parts) {
  return (count + parts - 1) / parts;
}

}  // namespace

template <class T>
void multiply(int64_t rows, int64_t vectors, int64_t kc, Rows<T> a, Vectors<T> b, T* sums, int64_t sums_stride,
              bool accumulate) {
  for (int64_t panels = (vectors + max_vectors - 1) / max_vectors; panels > 0; --panels) {
    const int64_t width = next_share(vectors, panels);
    const auto& tiles_here = tiles<T>[width - 1];
    TileArgs<T> args{kc, a, b, sums, sums_stride, accumulate};
    int64_t left = rows;
    for (int64_t parts = (rows + tile_rows[width - 1] - 1) / tile_rows[width - 1]; parts > 0; --parts) {
      const int64_t height = next_share(left, parts);
      tiles_here[height - 1](args);
      args.a.offsets += height;
      args.sums += height * sums_stride;
      left -= height;
    }
    b.offsets += width;
    sums += width * Vec<T>::size();
    vectors -= width;
  }
}

template void multiply(int64_t, int64_t, int64_t, Rows<float>, Vectors<float>, float*, int64_t, bool);
template void multiply(int64_t, int64_t, int64_t, Rows<double>, Vectors<double>, double*, int64_t, bool);

}  // namespace pyops::cpu
