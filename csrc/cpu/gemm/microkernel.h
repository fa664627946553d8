// The inner product of every matrix product here: sums[i, j] (+)= sum over k of A[i, k] B[k, j], in register tiles.
//
// Neither operand has to be a matrix in memory. Each element of A and each vector of B is found by adding an offset of
// its row or vector and one of its k, so that the patches of an image are multiplied where the image lies, without
// being gathered (no im2col): a tap of a convolution is just another offset.
//
// A tile of `rows` x `vectors` accumulators stays in registers over all k: with AVX-512, 6 x 4 vectors of 16 floats do
// 24 fused multiply-adds on 4 loads and 6 broadcasts. Narrow products take 8 rows, for which there are pointers in
// registers (12 and 16 rows were 13 and 18 % slower). Every sum is one chain of fused multiply-adds in the order of k,
// whatever tile computes it: results do not depend on how tiles are laid.
#pragma once

#include <array>

#include "operand.h"

namespace pyops::cpu {

// T is what is multiplied, the operands of gemm/operand.h. A[i, k] = data[offsets[i] + steps[k]]
template <class T>
struct OperandA {
  const T* data;
  const int64_t* offsets;
  const int64_t* steps;
  // Where the rows come from memory, from one piece of so many bytes for each: it is fetched two tiles ahead, from the
  // first step on. The hardware does not follow a tile's rows: conv2d 8x256x56x56 -> 64 1x1 channels-last 4.8 ms
  // without, 3.4 with.
  int64_t bytes_ahead = 0;
};

// B[k, j * lanes ...] is the vector at data + offsets[j] + steps[k]; all its lanes are read.
template <class T>
struct OperandB {
  const T* data;
  const int64_t* offsets;
  const int64_t* steps;
};

// Rows of a register tile by its width in vectors: what the registers hold beside a row of B. Only a product of a
// single row is wider than max_vectors, or else its few sums would wait for one another.
#if defined(CPU_CAPABILITY_AVX512)
constexpr std::array<int, 8> tile_rows = {8, 8, 8, 6, 1, 1, 1, 1};  // 32 registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr std::array<int, 8> tile_rows = {8, 6, 4, 3, 1, 1, 1, 1};  // 16 registers; 6 x 2 is 2 to 8 % slower
#else
constexpr std::array<int, 2> tile_rows = {4, 1};  // 16 registers, of which a Vectorized takes two
#endif
constexpr int most_vectors = static_cast<int>(tile_rows.size()), max_vectors = most_vectors / 2;

// The most terms of one sum: with 64 columns a panel of B is 36 KB, which stays in the L1 cache. Chunks of 192 are as
// fast, but the input gradient of a convolution over 64 channels, 3x3, summed in three of them, had 1.6 times stock's
// error, and 1.5 are allowed.
constexpr int64_t KC = 144;

// Where the sums go: sums[i, j] is the vector at data + rows[i] + vectors[j], of which the first lanes[j] elements
// exist. A sum over more than KC terms takes several calls: `accumulate` adds to what is there, and the `last` one adds
// a bias (one number a row, or one vector a vector) and rectifies.
template <class T>
struct OperandC {
  T* data;
  const int64_t* rows;
  const int64_t* vectors;
  const int32_t* lanes = nullptr;  // null: all of them
  const T* row_bias = nullptr;
  const T* column_bias = nullptr;
  bool relu = false;
  // Of pairs of bfloat16: where the last call puts the sums instead, rounded, in the same way; null: nowhere.
  c10::BFloat16* rounded = nullptr;
  const int64_t* rounded_rows = nullptr;
  const int64_t* rounded_vectors = nullptr;
};

// kc <= KC.
template <class T>
void macrokernel(int64_t rows, int64_t vectors, int64_t kc, OperandA<T> a, OperandB<T> b,
                 OperandC<Accumulator<T>> target, bool accumulate, bool last);

// A run of rows that are summed over the same terms, kc of them; steps in bytes.
struct RowRun {
  int64_t rows, kc;
  const int64_t *a_steps, *b_steps;
};

// All of kc terms, for `rows` rows. `steps` is room for 2 KC steps.
template <class T>
RowRun run_of(int64_t rows, const int64_t* a_steps, const int64_t* b_steps, int64_t kc, int64_t* steps) {
  constexpr int64_t bytes = sizeof(T);
  for (int64_t i = 0; i < kc; ++i) steps[i] = a_steps[i] * bytes, steps[KC + i] = b_steps[i] * bytes;
  return {rows, kc, steps, steps + KC};
}

// The same for runs of rows that follow one another, each over steps of its own.
template <class T>
void macrokernel(const RowRun* runs, int64_t run_count, int64_t vectors, OperandA<T> a, OperandB<T> b,
                 OperandC<Accumulator<T>> target, bool accumulate, bool last);

// The same into a row-major matrix of sums, rows x (vectors * lanes), at distance sums_stride.
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
