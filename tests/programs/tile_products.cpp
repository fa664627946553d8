// The macrokernel over tiles on TileModel as a C function, for tests/ops/test_tiles.py. It is compiled together with
// csrc/cpu/gemm/tile_kernel.cpp, for any instruction set.
#include <vector>

#include "../../csrc/cpu/gemm/tile_kernel.h"

using namespace pyops::cpu;

struct Call {
  int64_t run_count;
  const int64_t *run_rows, *run_steps;
  const int64_t *a_steps, *b_steps;  // of all runs, one after the other, in pairs
  int64_t vectors;
  const Bf16Pair* a;
  const int64_t* a_offsets;
  const Bf16Pair* b;
  const int64_t* b_offsets;
  OperandC<float> target;
  bool accumulate, last;
};

extern "C" int64_t lanes() {
  return Vec<float>::size();
}

extern "C" uint16_t rounded(float value) {
  return rounded_to_bfloat16(value).x;
}

// Returns whether no instruction had wrong operands.
extern "C" bool multiply(const Call* call) {
  std::vector<std::vector<int64_t>> steps;
  std::vector<RowRun> runs;
  const int64_t *a_steps = call->a_steps, *b_steps = call->b_steps;
  for (int64_t i = 0; i < call->run_count; ++i) {
    const int64_t kc = call->run_steps[i];
    runs.push_back(run_of<Bf16Pair>(call->run_rows[i], a_steps, b_steps, kc, steps.emplace_back(2 * KC).data()));
    a_steps += kc, b_steps += kc;
  }
  try {
    tile_macrokernel<TileModel>(runs.data(), call->run_count, call->vectors, {call->a, call->a_offsets, nullptr},
                                {call->b, call->b_offsets, nullptr}, call->target, call->accumulate, call->last);
  } catch (const std::logic_error&) {
    return false;
  }
  return true;
}
