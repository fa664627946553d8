// Products of bfloat16 pairs on a tile unit (gemm/tile_unit.h), with the operands and the epilogue of
// gemm/microkernel.h: macrokernel() calls this one if the process uses a tile unit.
//
// C is computed in blocks of tiles of 16 rows by one vector of columns, and K in pieces of 16 steps. A tile of A is 16
// rows of 16 pairs, a tile of B 16 steps of one vector of pairs. Four tiles of C collect the sums, so that four chains
// of instructions are in flight: 2 x 2 tiles, 1 x 4 for few rows, or 4 x 1 for a single vector of columns.
//
// Tiles whose rows lie a constant stride apart are loaded from the operand itself, and others from a staged copy, which
// is zero where a last piece has fewer than 16 steps. The copy of some rows of A serves all vectors of columns, and
// that of B all rows of a run.
//
// Every sum is taken in the order of k over the pieces. Each piece adds the sum of its even terms plus the sum of its
// odd terms, with the arithmetic of TileModel::multiply_add: denormal numbers are zeros. Neither the position in C nor
// the size of C has any influence. The sums of single calls are then added to C in float32 as usual, denormal numbers
// included, so a sum over several calls is the sum, in order, of those of the calls.
#pragma once

#include "microkernel.h"
#include "tile_unit.h"

namespace pyops::cpu {

// Computes what macrokernel() of gemm/microkernel.h does. No memory is read but that of the operands' elements. The
// unit's state is configured when this begins and released when it returns.
template <class Unit>
void tile_macrokernel(const RowRun* runs, int64_t run_count, int64_t vectors, const OperandA<Bf16Pair>& a,
                      OperandB<Bf16Pair> b, OperandC<float> target, bool accumulate, bool last);

#if defined(__x86_64__)
extern template void tile_macrokernel<AmxTiles>(const RowRun*, int64_t, int64_t, const OperandA<Bf16Pair>&,
                                                OperandB<Bf16Pair>, OperandC<float>, bool, bool);
#endif
extern template void tile_macrokernel<TileModel>(const RowRun*, int64_t, int64_t, const OperandA<Bf16Pair>&,
                                                 OperandB<Bf16Pair>, OperandC<float>, bool, bool);

}  // namespace pyops::cpu
