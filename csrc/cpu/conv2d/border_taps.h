// Finds which taps of which output pixels lie inside of the image; the others meet the zeros around it. Where many taps
// lie outside, the products skip them: of a 3x3 kernel with padding 1 they are 18 % on 7x7 images and 9 % on 14x14.
// Images that are read in place have no zeros around them, so there all outside taps are skipped.
//
// Skipping a tap changes no bit of a sum, because adding a zero does not either. Only on a tile unit
// (gemm/tile_kernel.h) it changes which terms a piece of the sum has, so there only the shape and the layout may
// decide.
#pragma once

#include <bit>

#include "../gemm/microkernel.h"
#include "input_tile.h"

namespace pyops::cpu {

inline bool is_inside(int64_t out, int64_t step, int64_t offset, int64_t size) {
  const int64_t at = out * step + offset;
  return at >= 0 && at < size;
}

// The share of the (pixel, tap) products that meet the image; 1 where there is no tap.
template <class In>
double fraction_inside(const ConvInput<In>& s) {
  if (s.tap_count == 0) return 1;
  int64_t met = 0;
  for (int64_t t = 0; t < s.tap_count; ++t) {
    int64_t rows = 0, columns = 0;
    for (int64_t y = 0; y < s.out_height; ++y) rows += is_inside(y, s.step_h, s.taps[t].dy, s.height);
    for (int64_t x = 0; x < s.out_width; ++x) columns += is_inside(x, s.step_w, s.taps[t].dx, s.width);
    met += rows * columns;
  }
  return static_cast<double>(met) / static_cast<double>(s.pixels() * s.tap_count);
}

// ---- sets of taps ----

using TapSet = uint64_t;  // bit t: tap t
constexpr TapSet all_taps = ~TapSet{0};

template <class In>
TapSet taps_of_row(const ConvInput<In>& s, int64_t y) {
  TapSet set = 0;
  for (int64_t t = 0; t < s.tap_count; ++t) set |= TapSet{is_inside(y, s.step_h, s.taps[t].dy, s.height)} << t;
  return set;
}
template <class In>
TapSet taps_of_column(const ConvInput<In>& s, int64_t x) {
  TapSet set = 0;
  for (int64_t t = 0; t < s.tap_count; ++t) set |= TapSet{is_inside(x, s.step_w, s.taps[t].dx, s.width)} << t;
  return set;
}

// Whether enough taps lie outside to be worth the cost of listing those inside, and a TapSet can hold all taps.
template <class In>
bool should_skip_border_taps(const ConvInput<In>& s) {
  return s.tap_count <= 64 && fraction_inside(s) < 0.97;
}

// ---- classes of pixels ----

// Cuts an axis of `count` output coordinates into spans for which the same taps lie inside, and returns their number.
// offset(tap) is the coordinate of a tap on that axis.
template <class In, class Offset>
int64_t cut(Range* spans, const ConvInput<In>& s, int64_t count, int64_t step, int64_t size, const Offset& offset) {
  int64_t spans_found = 0;
  for (int64_t i = 0; i < count; ++i) {
    bool same = i > 0;
    for (int64_t t = 0; t < s.tap_count && same; ++t)
      same = is_inside(i, step, offset(s.taps[t]), size) == is_inside(i - 1, step, offset(s.taps[t]), size);
    if (!same) spans[spans_found++] = {i, i};
    ++spans[spans_found - 1].end;
  }
  return spans_found;
}
template <class In>
int64_t cut_rows(Range* spans, const ConvInput<In>& s) {
  return cut(spans, s, s.out_height, s.step_h, s.height, [](const Tap& t) { return t.dy; });
}
template <class In>
int64_t cut_columns(Range* spans, const ConvInput<In>& s) {
  return cut(spans, s, s.out_width, s.step_w, s.width, [](const Tap& t) { return t.dx; });
}

// A rectangle of pixels for which the same taps are multiplied.
struct PixelClass {
  Range rows, columns;
  TapSet taps;
};

// A partition of the output pixels into classes for which the same taps lie inside. It is a single class with all taps
// where skipping does not pay, or where there would be too many classes or taps.
struct PixelClasses {
  static constexpr int64_t most = 49;  // the classes of a 7x7 kernel with padding all around
  PixelClass classes[most];
  int64_t count = 1;
  bool exact = false;  // whether every tap that a class multiplies lies inside for all of its pixels

  // `wanted`: partition the pixels rather than multiply zeros.
  template <class In>
  PixelClasses(const ConvInput<In>& s, bool wanted) {
    const Range all_rows{0, s.out_height}, all_columns{0, s.out_width};
    classes[0] = {all_rows, all_columns, all_taps};
    if (!wanted) return;
    Range* rows = scratch<Range>(Scratch::spans, s.out_height + s.out_width);
    const int64_t row_count = cut_rows(rows, s);
    Range* columns = rows + row_count;
    const int64_t column_count = cut_columns(columns, s);
    exact = row_count * column_count <= most && s.tap_count <= 64;
    if (!exact) return;
    count = 0;
    for (const Range* row = rows; row < rows + row_count; ++row)
      for (const Range* column = columns; column < columns + column_count; ++column)
        classes[count++] = {*row, *column, taps_of_row(s, row->begin) & taps_of_column(s, column->begin)};
  }

  const PixelClass& operator[](int64_t i) const { return classes[i]; }
};

// ---- runs over the taps inside, for macrokernel() of gemm/microkernel.h ----

// A run of `rows` rows over those of kc terms whose tap is in `set`; taps[i] is the bit of term i's tap.
template <class F>
RowRun run_of_terms(int64_t rows, TapSet set, const TapSet* taps, const int64_t* a_steps, const int64_t* b_steps,
                    int64_t kc, int64_t* steps) {
  constexpr int64_t bytes = sizeof(F);
  int64_t kept = 0, i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  // Compress eight steps at a time: a scalar loop takes a noticeable share of the convolution.
  for (; i + 8 <= kc; i += 8) {
    const __mmask8 inside = _mm512_test_epi64_mask(_mm512_loadu_si512(taps + i), _mm512_set1_epi64(set));
    const auto copy = [&](int64_t* to, const int64_t* from) {
      const __m512i in_bytes = _mm512_slli_epi64(_mm512_loadu_si512(from), std::countr_zero(uint64_t{bytes}));
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(inside, in_bytes));
    };
    copy(steps + kept, a_steps + i), copy(steps + KC + kept, b_steps + i);
    kept += std::popcount(static_cast<unsigned>(inside));
  }
#endif
  for (; i < kc; ++i) {
    steps[kept] = a_steps[i] * bytes, steps[KC + kept] = b_steps[i] * bytes;
    kept += int64_t{(set & taps[i]) != 0};
  }
  return {rows, kept, steps, steps + KC};
}

// A run of `rows` rows over those of the pixels [begin, end) of a tile for which `tap` lies inside; over all of them if
// tap is null.
template <class F, class In>
RowRun run_of_pixels(int64_t rows, const ConvInput<In>& s, const OutputTile& tile, const Tap* tap,
                     const int64_t* a_steps, const int64_t* b_steps, int64_t begin, int64_t end, int64_t* steps) {
  constexpr int64_t bytes = sizeof(F);
  Range lines{0, tile.rows}, columns{0, s.out_width};
  if (tap != nullptr) {
    lines = range_inside(tile.y * s.step_h + tap->dy, s.step_h, tile.rows, s.height);
    columns = range_inside(tap->dx, s.step_w, s.out_width, s.width);
  }
  int64_t kept = 0;
  for (int64_t line = begin / s.out_width; line * s.out_width < end; ++line) {
    const int64_t row = line % tile.rows, first = line * s.out_width, until = std::min(first + columns.end, end);
    if (row < lines.begin || row >= lines.end) continue;
    for (int64_t i = std::max(first + columns.begin, begin); i < until; ++i, ++kept)
      steps[kept] = a_steps[i] * bytes, steps[KC + kept] = b_steps[i] * bytes;
  }
  return {rows, kept, steps, steps + KC};
}

}  // namespace pyops::cpu
