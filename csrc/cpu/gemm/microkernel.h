// The microkernel of every matrix product here: C[i, j] (+)= sum over k of A[i, k] B[k, j], in register tiles, and the
// macrokernel that runs it over a block of C.
//
// The operands are indirect (Dukhan, "The Indirect Convolution Algorithm", 2019): neither has to be a matrix in memory.
// Each element of A and each vector of B is found by adding the offset of its row or vector to the offset of its k, so
// that the patches of an image are multiplied where the image lies, without im2col: a tap of a convolution is just
// another offset.
//
// A tile of rows x vectors accumulators stays in registers over all k: with AVX-512, 6 x 4 vectors of 16 floats take 24
// fused multiply-adds for 4 loads and 6 broadcasts. Narrow products use 8 rows, because that many row pointers fit in
// registers; taller tiles are slower.
//
// Every sum is one chain of fused multiply-adds in the order of k, whichever tile computes it, so results do not depend
// on how C is cut into tiles.
#pragma once

#include <array>

#include "operand.h"

namespace pyops::cpu {

// A[i, k] = data[offsets[i] + steps[k]]; T is an operand type of gemm/operand.h.
template <class T>
struct OperandA {
  const T* data;
  const int64_t* offsets;
  const int64_t* steps;
  // If the rows come from memory and each reads one contiguous piece: the size of that piece. It is prefetched two
  // tiles ahead, during the first steps, because the hardware prefetcher does not follow the rows of a tile.
  int64_t bytes_ahead = 0;
};

// B[k, j * lanes ...] is the vector at data + offsets[j] + steps[k]; all its lanes are read.
template <class T>
struct OperandB {
  const T* data;
  const int64_t* offsets;
  const int64_t* steps;
};

// The most rows of a register tile by its width in vectors: what the registers hold beside one row of B. Only the
// product of a single row is wider than max_vectors, to have enough chains of FMAs that do not wait for one another.
// With AVX2, 3 x 4 is faster than 6 x 2.
constexpr std::array<int, 8> tile_rows =
    by_capability<std::array<int, 8>>({4, 1}, {8, 6, 4, 3, 1, 1, 1, 1}, {8, 8, 8, 6, 1, 1, 1, 1});
constexpr int most_vectors = by_capability(2, 8, 8), max_vectors = most_vectors / 2;

// The most steps of one sum. With 64 columns a panel of B is 36 KB, which stays in the L1 cache. Longer chunks are less
// accurate: with chunks of 192, the input gradient of a 3x3 convolution over 64 channels, summed in three of them, had
// 1.6 times stock's error, and 1.5 are allowed.
constexpr int64_t KC = 144;

// C[i, j] is the vector at data + rows[i] + vectors[j], of which the first lanes[j] elements exist. A sum over more
// than KC steps takes several calls: `accumulate` adds to the sums that C holds already, and the `last` call adds a
// bias (one number for each row, or one vector for each vector of columns) and rectifies.
template <class T>
struct OperandC {
  T* data;
  const int64_t* rows;
  const int64_t* vectors;
  const int32_t* lanes = nullptr;  // null: all of them
  const T* row_bias = nullptr;
  const T* column_bias = nullptr;
  bool relu = false;
  // For bfloat16 pairs, the last call stores the sums rounded at rounded + rounded_rows[i] + rounded_vectors[j] instead
  // of in `data`; null: it does not.
  c10::BFloat16* rounded = nullptr;
  const int64_t* rounded_rows = nullptr;
  const int64_t* rounded_vectors = nullptr;
};

// Computes `rows` x `vectors` vectors of sums over kc <= KC steps.
template <class T>
void macrokernel(int64_t rows, int64_t vectors, int64_t kc, OperandA<T> a, OperandB<T> b,
                 OperandC<Accumulator<T>> target, bool accumulate, bool last);

// Consecutive rows that are summed over the same kc steps; the steps are in bytes.
struct RowRun {
  int64_t rows, kc;
  const int64_t *a_steps, *b_steps;
};

// One run of `rows` rows over kc steps. Its steps in bytes are kept in `steps`, which has room for 2 KC of them.
template <class T>
RowRun run_of(int64_t rows, const int64_t* a_steps, const int64_t* b_steps, int64_t kc, int64_t* steps) {
  constexpr int64_t bytes = sizeof(T);
  for (int64_t i = 0; i < kc; ++i) steps[i] = a_steps[i] * bytes, steps[KC + i] = b_steps[i] * bytes;
  return {rows, kc, steps, steps + KC};
}

// Computes runs of rows that follow one another, each over its own steps.
template <class T>
void macrokernel(const RowRun* runs, int64_t run_count, int64_t vectors, OperandA<T> a, OperandB<T> b,
                 OperandC<Accumulator<T>> target, bool accumulate, bool last);

// Stores the sums in a row-major matrix of rows x (vectors * lanes) with a row stride of sums_stride, without an
// epilogue.
template <class T>
void macrokernel(int64_t rows, int64_t vectors, int64_t kc, OperandA<T> a, OperandB<T> b, Accumulator<T>* sums,
                 int64_t sums_stride, bool accumulate);

#define PYOPS_MACROKERNEL(external, T)                                                                              \
  external template void macrokernel(const RowRun*, int64_t, int64_t, OperandA<T>, OperandB<T>,                     \
                                     OperandC<Accumulator<T>>, bool, bool);                                         \
  external template void macrokernel(int64_t, int64_t, int64_t, OperandA<T>, OperandB<T>, OperandC<Accumulator<T>>, \
                                     bool, bool);                                                                   \
  external template void macrokernel(int64_t, int64_t, int64_t, OperandA<T>, OperandB<T>, Accumulator<T>*, int64_t, \
                                     bool);
PYOPS_MACROKERNEL(extern, float)
PYOPS_MACROKERNEL(extern, double)
PYOPS_MACROKERNEL(extern, Bf16Pair)

}  // namespace pyops::cpu
