// Register tiles of dot products: dot_rows x dot_columns accumulators, as many as the registers hold beside one vector
// of one operand and a vector of each column of the other.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "../simd/vec.h"

namespace pyops::cpu {

constexpr int dot_rows = by_capability(2, 4, 4), dot_columns = by_capability(2, 3, 6);

template <int n>
using Number = std::integral_constant<int, n>;

template <class F, int... I>
constexpr auto dot_tiles(std::integer_sequence<int, I...>) {
  return std::array<void (*)(const F&, int64_t, int64_t), sizeof...(I)>{[](const F& f, int64_t row, int64_t column) {
    f(Number<I / dot_columns + 1>{}, Number<I % dot_columns + 1>{}, row, column);
  }...};
}

// f(first, count) for about equal parts of [0, size), the fewest that have at most `most` elements each.
template <class F>
void for_each_even_part(int64_t size, int64_t most, const F& f) {
  for (int64_t first = 0, parts = ceil_div(size, most); parts > 0; --parts) {
    const int64_t count = ceil_div(size - first, parts);
    f(first, count), first += count;
  }
}

// f(Number<height>, Number<width>, row, column) for each register tile of rows x columns sums.
template <class F>
void for_each_dot_tile(int64_t rows, int64_t columns, const F& f) {
  constexpr auto tiles = dot_tiles<F>(std::make_integer_sequence<int, dot_rows * dot_columns>{});
  for_each_even_part(columns, dot_columns, [&](int64_t column, int64_t width) {
    for_each_even_part(rows, dot_rows, [&](int64_t row, int64_t height) {
      tiles[(height - 1) * dot_columns + width - 1](f, row, column);
    });
  });
}

}  // namespace pyops::cpu
