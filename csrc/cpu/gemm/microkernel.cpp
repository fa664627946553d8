// The microkernel of gemm/microkernel.h, one instance for each height and width of a register tile, and the macrokernel
// that covers a block of C with such tiles.
#include "microkernel.h"

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <utility>

#include "epilogue.h"
#include "tile_kernel.h"

namespace pyops::cpu {
namespace {

template <class T>
struct TileArgs {
  int64_t kc;
  // The steps of both operands are in bytes, so that a load adds base and step as they are: any instruction in the loop
  // that is not an FMA costs throughput.
  OperandA<T> a;
  OperandB<T> b;
  OperandC<Accumulator<T>> target;
  bool accumulate, last;
  const char* ahead = nullptr;  // data that a later tile reads: one cache line is prefetched in each of the first steps
  int64_t lines_ahead = 0;
};

// Brings the sums of a tile, `runs` runs of `count` sums in each row, to the L1 cache while they are not yet needed.
template <int rows, int runs, class T>
C10_ALWAYS_INLINE void fetch_sums(const OperandC<T>& target, int64_t count) {
#pragma GCC unroll 32
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 32
    for (int j = 0; j < runs; ++j)
      prefetch(target.data + target.rows[i] + target.vectors[j], count * int64_t{sizeof(T)});
}

// The body is one function, however long, and its loops over compile-time counts are unrolled, because only so do the
// sums stay in registers from the first product to the epilogue. `adjacent` means that the vectors
// are adjacent both in B and in C: then one pointer serves all of them, and the pointers of all rows fit in registers.
template <class T, int rows, int vectors, bool adjacent>
void tile(const TileArgs<T>& x) {
  using V = Vec<Accumulator<T>>;
  constexpr int64_t lanes = V::size();
  const char* a[rows];
  const char* b[adjacent ? 1 : vectors];
  V sum[rows][vectors];
#pragma GCC unroll 32
  for (int j = 0; j < (adjacent ? 1 : vectors); ++j) b[j] = reinterpret_cast<const char*>(x.b.data + x.b.offsets[j]);
#pragma GCC unroll 32
  for (int i = 0; i < rows; ++i) {
    a[i] = reinterpret_cast<const char*>(x.a.data + x.a.offsets[i]);
#pragma GCC unroll 32
    for (int j = 0; j < vectors; ++j) sum[i][j] = V(0);
  }
  const auto multiply_step = [&](int64_t k) __attribute__((always_inline)) {
    const int64_t a_step = x.a.steps[k], b_step = x.b.steps[k];
    const auto a_value = [&](int i) { return broadcast<T>(a[i] + a_step); };
    const auto b_value = [&](int j) {
      return adjacent ? V::loadu(b[0] + b_step + j * lanes * sizeof(T)) : V::loadu(b[j] + b_step);
    };
    // Keep the shorter operand in registers and stream the longer one.
    V kept[std::min(rows, vectors)];
    if constexpr (rows < vectors) {
#pragma GCC unroll 32
      for (int i = 0; i < rows; ++i) kept[i] = a_value(i);
#pragma GCC unroll 32
      for (int j = 0; j < vectors; ++j) {
        const V value = b_value(j);
#pragma GCC unroll 32
        for (int i = 0; i < rows; ++i) sum[i][j] = multiply_add<T>(kept[i], value, sum[i][j]);
      }
    } else {
#pragma GCC unroll 32
      for (int j = 0; j < vectors; ++j) kept[j] = b_value(j);
#pragma GCC unroll 32
      for (int i = 0; i < rows; ++i) {
        const V value = a_value(i);
#pragma GCC unroll 32
        for (int j = 0; j < vectors; ++j) sum[i][j] = multiply_add<T>(value, kept[j], sum[i][j]);
      }
    }
  };
  if (x.accumulate) fetch_sums<rows, adjacent ? 1 : vectors>(x.target, (adjacent ? vectors : 1) * lanes);
  int64_t k = 0;
  for (; k < x.lines_ahead; ++k) {
    __builtin_prefetch(x.ahead + k * cache_line);
    multiply_step(k);
  }
  for (; k < x.kc; ++k) multiply_step(k);
  const OperandC<Accumulator<T>>& target = x.target;
  const auto for_each_sum = [&](const auto& f) {
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i) {
      Accumulator<T>* const row = target.data + target.rows[i] + (adjacent ? target.vectors[0] : 0);
#pragma GCC unroll 32
      for (int j = 0; j < vectors; ++j) f(i, j, adjacent ? row + j * lanes : row + target.vectors[j], sum[i][j]);
    }
  };
  if (target.lanes) {
    for_each_sum([&](int i, int j, Accumulator<T>* to, V value) {
      store_sums<T>(target, x.accumulate, x.last, i, j, to, value);
    });
  } else if (x.last && (target.row_bias || target.column_bias || target.relu || target.rounded)) {
    if (x.accumulate)
      for_each_sum([&](int i, int j, Accumulator<T>* to, V value) { sum[i][j] = V::loadu(to) + value; });
    if (target.row_bias)
      for_each_sum([&](int i, int j, Accumulator<T>*, V value) { sum[i][j] = value + V(target.row_bias[i]); });
    if (target.column_bias)
      for_each_sum([&](int i, int j, Accumulator<T>*, V value) {
        sum[i][j] = value + V::loadu(target.column_bias + j * lanes);
      });
    if (target.relu)
      for_each_sum([&](int i, int j, Accumulator<T>*, V value) { sum[i][j] = at::vec::clamp_min(value, V(0)); });
    if constexpr (is_pair<T>) {
      if (target.rounded) {
        // Keep these in registers: as far as the compiler knows, a store may overwrite the pointers themselves.
        c10::BFloat16* const rounded = target.rounded + (adjacent ? target.rounded_vectors[0] : 0);
        const int64_t* const rounded_rows = target.rounded_rows;
#pragma GCC unroll 32
        for (int i = 0; i < rows; ++i) {
          c10::BFloat16* const row = rounded + rounded_rows[i];
#pragma GCC unroll 32
          for (int j = 0; j < vectors; ++j) {
            c10::BFloat16* const to = adjacent ? row + j * lanes : row + target.rounded_vectors[j];
            if (!adjacent || (j + 1 == vectors && vectors % 2 != 0))
              store_rounded(to, sum[i][j], lanes);
            else if (j % 2 == 0)
              store_rounded(to, sum[i][j], sum[i][std::min(j + 1, vectors - 1)]);
          }
        }
        return;
      }
    }
    for_each_sum([](int, int, Accumulator<T>* to, V value) { value.store(to); });
  } else if (x.accumulate) {
    for_each_sum([](int, int, Accumulator<T>* to, V value) { (V::loadu(to) + value).store(to); });
  } else {
    for_each_sum([](int, int, Accumulator<T>* to, V value) { value.store(to); });
  }
}

template <class T>
using Tile = void (*)(const TileArgs<T>&);

template <class T, int vectors, bool adjacent, int... I>
constexpr auto tiles_of_width(std::integer_sequence<int, I...>) {
  return std::array<Tile<T>, tile_rows[0]>{tile<T, I + 1, vectors, adjacent>...};
}

// tiles<T, adjacent>[vectors - 1][rows - 1]
template <class T, bool adjacent, int... J>
constexpr auto all_tiles(std::integer_sequence<int, J...>) {
  return std::array<std::array<Tile<T>, tile_rows[0]>, most_vectors>{
      tiles_of_width<T, J + 1, adjacent>(std::make_integer_sequence<int, tile_rows[J]>{})...};
}
template <class T, bool adjacent>
constexpr auto tiles = all_tiles<T, adjacent>(std::make_integer_sequence<int, most_vectors>{});

template <class T>
bool are_adjacent(const int64_t* offsets, int64_t vectors) {
  bool adjacent = true;
  for (int64_t j = 1; j < vectors; ++j) adjacent &= offsets[j] - offsets[j - 1] == OperandVec<T>::size();
  return adjacent;
}

template <class T>
bool are_full(const int32_t* lanes, int64_t vectors) {
  return std::all_of(lanes, lanes + vectors, [](int32_t count) { return count == OperandVec<T>::size(); });
}

// Makes the next tile prefetch the first bytes of the tile that is `rows` rows further on.
template <class T>
void fetch_ahead(TileArgs<T>& x, int64_t bytes, int64_t rows) {
  x.lines_ahead = std::min(x.kc, bytes / cache_line);
  if (x.lines_ahead > 0) x.ahead = reinterpret_cast<const char*>(x.a.data + x.a.offsets[rows]) + x.a.steps[0];
}

}  // namespace

template <class T>
void macrokernel(const RowRun* runs, int64_t run_count, int64_t vectors, OperandA<T> a, OperandB<T> b,
                 OperandC<Accumulator<T>> target, bool accumulate, bool last) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (is_pair<T>) {
    if (tile_unit() == TileUnit::amx)
      return tile_macrokernel<AmxTiles>(runs, run_count, vectors, a, b, target, accumulate, last);
    if (tile_unit() == TileUnit::model)
      return tile_macrokernel<TileModel>(runs, run_count, vectors, a, b, target, accumulate, last);
  }
#endif
  const int64_t widest = run_count == 1 && runs[0].rows == 1 ? most_vectors : max_vectors;
  // Sums that wait in scratch to be rounded are whole, adjacent vectors.
  const bool rounds = target.rounded && last, waits = target.rounded && !last;
  // Panels are as even as possible: 13 vectors make panels of 4, 3, 3 and 3.
  const int64_t panels = ceil_div(vectors, widest);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t width = vectors / panels + (panel < vectors % panels), most_rows = tile_rows[width - 1];
    const bool adjacent = are_adjacent<T>(b.offsets, width) && are_adjacent<T>(target.vectors, width) &&
                          (!rounds || are_adjacent<T>(target.rounded_vectors, width));
    const auto& tiles_here = (adjacent ? tiles<T, true> : tiles<T, false>)[width - 1];
    TileArgs<T> args{0, a, b, target, accumulate, last};
    if (target.lanes && (waits || are_full<T>(target.lanes, width))) args.target.lanes = nullptr;
    for (const RowRun* run = runs; run < runs + run_count; ++run) {
      args.kc = run->kc, args.a.steps = run->a_steps, args.b.steps = run->b_steps;
      if (run->rows == 0) continue;
      const int64_t parts = ceil_div(run->rows, most_rows), smaller = run->rows / parts, larger = run->rows % parts;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t height = smaller + (part < larger);
        fetch_ahead(args, part + 3 < parts ? height * a.bytes_ahead : 0, 2 * height);
        tiles_here[height - 1](args);
        args.a.offsets += height;
        args.target.rows += height;
        if (target.rounded) args.target.rounded_rows += height;
        if (target.row_bias) args.target.row_bias += height;
      }
    }
    a.bytes_ahead = 0;  // the first panel has brought the rows of A into cache
    b.offsets += width;
    target.vectors += width;
    if (target.rounded) target.rounded_vectors += width;
    if (target.lanes) target.lanes += width;
    if (target.column_bias) target.column_bias += width * OperandVec<T>::size();
  }
}

template <class T>
void macrokernel(int64_t rows, int64_t vectors, int64_t kc, OperandA<T> a, OperandB<T> b,
                 OperandC<Accumulator<T>> target, bool accumulate, bool last) {
  int64_t steps[2 * KC];
  const RowRun run = run_of<T>(rows, a.steps, b.steps, kc, steps);
  macrokernel(&run, 1, vectors, a, b, target, accumulate, last);
}

template <class T>
void macrokernel(int64_t rows, int64_t vectors, int64_t kc, OperandA<T> a, OperandB<T> b, Accumulator<T>* sums,
                 int64_t sums_stride, bool accumulate) {
  const OperandC<Accumulator<T>> target{sums, multiples(Scratch::target_rows, rows, sums_stride),
                                        multiples(Scratch::target_vectors, vectors, OperandVec<T>::size())};
  macrokernel(rows, vectors, kc, a, b, target, accumulate, /*last=*/false);
}

PYOPS_MACROKERNEL(, float)
PYOPS_MACROKERNEL(, double)
#if defined(CPU_CAPABILITY_AVX512)
PYOPS_MACROKERNEL(, Bf16Pair)
#endif

}  // namespace pyops::cpu
