// The macrokernel over tiles of gemm/tile_kernel.h: which tiles are staged, the loops, and the blocks of tiles.
#include "tile_kernel.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../simd/transpose.h"
#include "epilogue.h"

namespace pyops::cpu {
namespace {

constexpr int64_t lanes = Vec<float>::size();                  // the columns of a tile of B or C
constexpr int64_t height = 16, piece = 16, pair = 4;           // the rows of a tile, the steps of a piece, bytes
constexpr int64_t a_row = piece * pair, c_row = lanes * pair;  // bytes
constexpr int64_t most_pieces = ceil_div(KC, piece), most_strip = 4 * height;
constexpr int64_t most_columns = 64;  // vectors of B at a time, of which at most 576 KB are staged with AVX-512

template <class F, int... i>
C10_ALWAYS_INLINE void for_each_of(const F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>()), ...);
}
// f(0), f(1), ... f(n - 1), with constants as the arguments.
template <int n, class F>
C10_ALWAYS_INLINE void for_each_index(const F& f) {
  for_each_of(f, std::make_integer_sequence<int, n>());
}

// ---- operands ----

// A tile in memory. Its rows are `stride` bytes apart.
struct TileInMemory {
  const char* data;
  int64_t stride;
};

// Up to 16 offsets in bytes, cut into segments in which each offset lies one pair after the one before.
struct Segments {
  int64_t count = 0;
  int64_t begins[piece + 1] = {};  // begins[count]: the number of offsets

  template <class Offset>
  static Segments of(int64_t size, const Offset& offset) {
    Segments s;
    for (int64_t i = 0; i < size; ++i)
      if (i == 0 || offset(i) - offset(i - 1) != pair) s.begins[s.count++] = i;
    s.begins[s.count] = size;
    return s;
  }
  bool is_whole() const { return count == 1 && begins[1] == piece; }
};

// Fills 16 pairs at `to` with those at from + offset(i), for the offsets of the segments, and then with zeros.
template <class Offset>
void gather_pairs(char* to, const char* from, const Segments& segments, const Offset& offset) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 pairs = _mm512_setzero_ps();
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t begin = segments.begins[s], end = segments.begins[s + 1];
    const auto mask = static_cast<__mmask16>((1u << end) - (1u << begin));
    pairs = _mm512_mask_loadu_ps(pairs, mask, from + offset(begin) - begin * pair);
  }
  _mm512_storeu_ps(to, pairs);
#else
  std::memset(to, 0, a_row);
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t begin = segments.begins[s], count = segments.begins[s + 1] - begin;
    std::memcpy(to + begin * pair, from + offset(begin), count * pair);
  }
#endif
}

// The steps of a run, by pieces, and its tiles of B.
struct Pieces {
  const int64_t* a_steps;
  int64_t count;
  Segments a_segments[most_pieces];
  TileInMemory b[most_pieces];
  bool b_staged[most_pieces];

  // Stages the tiles of `vectors` vectors of B whose steps are not a constant stride apart.
  Pieces(const RowRun& run, const OperandB<Bf16Pair>& b_operand, int64_t vectors)
      : a_steps(run.a_steps), count(ceil_div(run.kc, piece)) {
    char* copy = reinterpret_cast<char*>(scratch<float>(Scratch::staged_b, count * vectors * piece * lanes));
    for (int64_t p = 0; p < count; ++p, copy += vectors * piece * c_row) {
      const int64_t steps = std::min(run.kc - p * piece, piece), *of_b = run.b_steps + p * piece;
      a_segments[p] = Segments::of(steps, [&](int64_t i) { return a_steps[p * piece + i]; });
      const int64_t stride = of_b[steps - 1] - of_b[std::max(steps - 2, int64_t{0})];
      b_staged[p] = steps < piece;
      for (int64_t i = 1; i < steps; ++i) b_staged[p] |= of_b[i] - of_b[i - 1] != stride;
      if (b_staged[p]) stage_b(copy, b_operand, of_b, steps, vectors);
      b[p] = b_staged[p] ? TileInMemory{copy, c_row}
                         : TileInMemory{reinterpret_cast<const char*>(b_operand.data) + of_b[0], stride};
    }
  }

  // The tile of piece p and vector j, of which `offsets` has the offset in B.
  TileInMemory b_tile(int64_t p, const int64_t* offsets, int64_t j) const {
    return {b[p].data + (b_staged[p] ? j * piece * c_row : offsets[j] * pair), b[p].stride};
  }

 private:
  // copy[j, k] = vector j of step k, with zeros for the missing steps of a piece.
  static void stage_b(char* copy, const OperandB<Bf16Pair>& b, const int64_t* steps, int64_t count, int64_t vectors) {
    using V = Vec<float>;
    for (int64_t k = 0; k < piece; ++k) {
      const char* row = reinterpret_cast<const char*>(b.data) + (k < count ? steps[k] : 0);
      for (int64_t j = 0; j < vectors; ++j)
        (k < count ? V::loadu(row + b.offsets[j] * pair) : V(0)).store(copy + (j * piece + k) * c_row);
    }
  }
};

// The tiles of A of up to 64 rows.
struct Strip {
  TileInMemory tiles[most_strip / height][most_pieces];

  // `passes`: how often the tiles will be loaded.
  Strip(const OperandA<Bf16Pair>& a, int64_t first_row, int64_t rows, const Pieces& pieces, int64_t passes) {
    char* copy = reinterpret_cast<char*>(scratch<float>(Scratch::staged_a, most_strip * most_pieces * piece));
    const char* data = reinterpret_cast<const char*>(a.data);
    for (int64_t i = 0; i * height < rows; ++i) {
      const int64_t* offsets = a.offsets + first_row + i * height;
      const int64_t here = std::min(rows - i * height, height);
      const auto offset = [&](int64_t r) { return offsets[r] * pair; };
      const Segments segments = Segments::of(here, offset);
      const int64_t stride = here > 1 ? offset(1) - offset(0) : a_row;
      bool uniform = true;
      for (int64_t r = 1; r < here; ++r) uniform &= offset(r) - offset(r - 1) == stride;
      // With such a stride the rows of a strip share a few sets of the L1 cache, where they evict one another.
      const bool evicting = passes > 2 && stride % 2048 == 0;
      for (int64_t p = 0; p < pieces.count; ++p, copy += height * a_row) {
        const int64_t* steps = pieces.a_steps + p * piece;
        if (uniform && !evicting && pieces.a_segments[p].is_whole()) {
          tiles[i][p] = {data + offset(0) + steps[0], stride};
        } else {
          stage(copy, data, here, segments, offset, pieces.a_segments[p], steps);
          tiles[i][p] = {copy, a_row};
        }
      }
    }
  }

 private:
  // copy[r, k] = the pair of row r and step k, with zeros for missing steps. If the rows lie in fewer segments than the
  // steps, the tile is gathered step by step and transposed, which costs about as much as four segments more.
  template <class Offset>
  static void stage(char* copy, const char* data, int64_t rows, const Segments& of_rows, const Offset& offset,
                    const Segments& of_steps, const int64_t* steps) {
    if (of_steps.count <= of_rows.count + 4) {
      for (int64_t r = 0; r < rows; ++r)
        gather_pairs(copy + r * a_row, data + offset(r), of_steps, [&](int64_t k) { return steps[k]; });
      return;
    }
    alignas(64) float transposed[piece * height] = {};
    for (int64_t k = 0; k < of_steps.begins[of_steps.count]; ++k)
      gather_pairs(reinterpret_cast<char*>(transposed + k * height), data + steps[k], of_rows, offset);
    transpose(reinterpret_cast<float*>(copy), piece, transposed, height, piece, rows);
  }
};

// ---- blocks of tiles ----

// The registers: tiles of C, then two of A and two of B. Tile (i, j) of a block of two rows of tiles is in 2 i + j.
template <int rows>
constexpr int c_register(int i, int j) {
  return rows == 2 ? 2 * i + j : i + j;
}
constexpr int a_register = 4, b_register = 6;

// The shapes of the registers for a strip: one tile of `rows` rows, or two of which the second has the rest, or four
// whole ones.
TileConfiguration configuration(int64_t rows) {
  TileConfiguration c;
  const int64_t first = std::min(rows, height), second = rows > height ? std::min(rows - height, height) : first;
  for (int t = 0; t < 4; ++t) c.set(t, t < 2 ? first : second, c_row);
  c.set(a_register, first, a_row), c.set(a_register + 1, second, a_row);
  c.set(b_register, piece, c_row), c.set(b_register + 1, piece, c_row);
  return c;
}

// Stores rows x columns tiles of sums as a matrix that is `columns` vectors wide.
template <class Unit, int rows, int columns>
void multiply_block(Unit& unit, const Strip& a, const Pieces& pieces, const int64_t* b_offsets, int64_t j,
                    float* sums) {
  static_assert(rows * columns <= 4 && (rows <= 2 || columns == 1));
  const auto load_a = [&](auto i, int64_t p) __attribute__((always_inline)) {
    unit.template load<a_register + i % 2>(a.tiles[i][p].data, a.tiles[i][p].stride);
  };
  const auto load_b = [&](auto column, int64_t p) __attribute__((always_inline)) {
    const TileInMemory tile = pieces.b_tile(p, b_offsets, j + column);
    unit.template load<b_register + column % 2>(tile.data, tile.stride);
  };
  for_each_index<rows>([&](auto i) {
    for_each_index<columns>([&](auto column) { unit.template zero<c_register<rows>(i, column)>(); });
  });
  for (int64_t p = 0; p < pieces.count; ++p) {
    if constexpr (rows <= 2) for_each_index<rows>([&](auto i) { load_a(i, p); });
    for_each_index<columns>([&](auto column) {
      load_b(column, p);
      for_each_index<rows>([&](auto i) {
        if constexpr (rows > 2) load_a(i, p);
        unit.template multiply_add<c_register<rows>(i, column), a_register + i % 2, b_register + column % 2>();
      });
    });
  }
  for_each_index<rows>([&](auto i) {
    for_each_index<columns>([&](auto column) {
      unit.template store<c_register<rows>(i, column)>(sums + (i * height * columns + column) * lanes, columns * c_row);
    });
  });
}

template <class Unit>
using Block = void (*)(Unit&, const Strip&, const Pieces&, const int64_t*, int64_t, float*);

// The function for a strip that is `tiles` tiles high and blocks that are `columns` vectors wide.
template <class Unit>
Block<Unit> block_of(int64_t tiles, int64_t columns) {
  constexpr Block<Unit> one[] = {multiply_block<Unit, 1, 1>, multiply_block<Unit, 1, 2>, multiply_block<Unit, 1, 3>,
                                 multiply_block<Unit, 1, 4>};
  constexpr Block<Unit> two[] = {multiply_block<Unit, 2, 1>, multiply_block<Unit, 2, 2>};
  return tiles == 1 ? one[columns - 1] : tiles == 2 ? two[columns - 1] : multiply_block<Unit, 4, 1>;
}

// ---- loops ----

// Computes the rows of one run, of which `first_row` is the first, over up to most_columns vectors.
template <class Unit>
void multiply_run(Unit& unit, int64_t& configured, const RowRun& run, int64_t first_row, int64_t vectors,
                  const OperandA<Bf16Pair>& a, const OperandB<Bf16Pair>& b, const OperandC<float>& target,
                  bool accumulate, bool last) {
  const Pieces pieces(run, b, vectors);
  alignas(64) float sums[most_strip * lanes];
  for (int64_t row = first_row, end = first_row + run.rows, rows; row < end; row += rows) {
    rows = std::min(end - row, vectors == 1 && end - row >= most_strip ? most_strip : 2 * height);
    if (configured != rows) unit.configure(configuration(rows)), configured = rows;
    const int64_t tiles = ceil_div(rows, height), widest = tiles == 1 ? 4 : 2;
    const Strip strip(a, row, rows, pieces, ceil_div(vectors, widest));
    for (int64_t j = 0, columns; j < vectors; j += columns) {
      columns = std::min(vectors - j, widest);
      block_of<Unit>(tiles, columns)(unit, strip, pieces, b.offsets, j, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c)
          store_sums<Bf16Pair>(target, accumulate, last, row + r, j + c,
                               target.data + target.rows[row + r] + target.vectors[j + c],
                               Vec<float>::loadu(sums + (r * columns + c) * lanes));
    }
  }
}

}  // namespace

template <class Unit>
void tile_macrokernel(const RowRun* runs, int64_t run_count, int64_t vectors, const OperandA<Bf16Pair>& a,
                      OperandB<Bf16Pair> b, OperandC<float> target, bool accumulate, bool last) {
  if (target.rounded && !last) target.lanes = nullptr;  // sums that wait in scratch to be rounded are whole vectors
  Unit unit;
  int64_t configured = 0;  // the rows of the strip that the registers are configured for
  for (int64_t j = 0; j < vectors; j += most_columns) {
    int64_t row = 0;
    for (const RowRun* run = runs; run < runs + run_count; row += run++->rows)
      if (run->rows > 0)
        multiply_run(unit, configured, *run, row, std::min(vectors - j, most_columns), a, b, target, accumulate, last);
    b.offsets += most_columns, target.vectors += most_columns;
    if (target.rounded) target.rounded_vectors += most_columns;
    if (target.lanes) target.lanes += most_columns;
    if (target.column_bias) target.column_bias += most_columns * lanes;
  }
}

#define PYOPS_TILE_MACROKERNEL(Unit)                                                                                   \
  template void tile_macrokernel<Unit>(const RowRun*, int64_t, int64_t, const OperandA<Bf16Pair>&, OperandB<Bf16Pair>, \
                                       OperandC<float>, bool, bool);
#if defined(__x86_64__)
PYOPS_TILE_MACROKERNEL(AmxTiles)
#endif
PYOPS_TILE_MACROKERNEL(TileModel)

}  // namespace pyops::cpu
