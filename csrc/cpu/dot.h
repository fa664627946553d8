// Register tiles of dot products: dot_rows x dot_columns sums, as many as the registers hold beside a vector of one
// side and one of each column of the other.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "common.h"

namespace pyops::cpu {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int dot_rows = 4, dot_columns = 6;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int dot_rows = 3, dot_columns = 3;
#else
constexpr int dot_rows = 2, dot_columns = 2;
#endif

template <int n>
using Number = std::integral_constant<int, n>;

template <class F, int... I>
constexpr auto dot_tiles(std::integer_sequence<int, I...>) {
  return std::array<void (*)(const F&, int64_t, int64_t), sizeof...(I)>{[](const F& f, int64_t row, int64_t column) {
    f(Number<I / dot_columns + 1>{}, Number<I % dot_columns + 1>{}, row, column);
  }...};
}

// f(Number<height>, Number<width>, row, column) for each tile of rows x columns sums.
template <class F>
void for_each_dot_tile(int64_t rows, int64_t columns, const F& f) {
  constexpr auto tiles = dot_tiles<F>(std::make_integer_sequence<int, dot_rows * dot_columns>{});
  for (int64_t o = 0; o < columns; o += dot_columns) {
    const int64_t width = std::min(int64_t{dot_columns}, columns - o);
    for (int64_t r = 0; r < rows; r += dot_rows)
      tiles[(std::min(int64_t{dot_rows}, rows - r) - 1) * dot_columns + width - 1](f, r, o);
  }
}

}  // namespace pyops::cpu
