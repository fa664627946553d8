// The epilogue of the microkernel, and products whose output it stores directly: an output with contiguous rows, of the
// accumulator's own type or, for operands that are bfloat16 pairs, of bfloat16. Sums of pairs collect in scratch as
// float32, and the last call rounds them in registers, which is cheaper than a second pass over the sums. Every other
// output takes its sums from scratch through write() of gemm/output.h.
#pragma once

#include "../runtime/scratch.h"
#include "microkernel.h"
#include "output.h"

namespace pyops::cpu {

// Whether the microkernel can store sums of products of F directly in an output of this type.
template <class F, class Out>
constexpr bool stores_directly =
    std::is_same_v<Out, Accumulator<F>> || (is_pair<F> && std::is_same_v<Out, c10::BFloat16>);

// Stores vector j of row i of the sums of one call at `to`, or rounded, as OperandC says. The vector may be partial.
template <class F>
C10_ALWAYS_INLINE void store_sums(const OperandC<Accumulator<F>>& target, bool accumulate, bool last, int64_t i,
                                  int64_t j, Accumulator<F>* to, const Vec<Accumulator<F>>& of_call) {
  using V = Vec<Accumulator<F>>;
  const int lanes = target.lanes ? target.lanes[j] : static_cast<int>(V::size());
  V sum = of_call;
  if (accumulate) sum = V::loadu(to, lanes) + sum;
  if (last) {
    if (target.row_bias) sum = sum + V(target.row_bias[i]);
    if (target.column_bias) sum = sum + V::loadu(target.column_bias + j * V::size(), lanes);
    if (target.relu) sum = at::vec::clamp_min(sum, V(0));
    if constexpr (is_pair<F>)
      if (target.rounded)
        return store_rounded(target.rounded + target.rounded_rows[i] + target.rounded_vectors[j], sum, lanes);
  }
  sum.store(to, lanes);
}

// The values in the compute type: in place if they have it already, otherwise converted into scratch; null if there are
// none.
template <class T>
const Compute<T>* in_compute_type(Scratch use, const T* values, int64_t count) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    return values;
  } else {
    if (values == nullptr) return nullptr;
    Compute<T>* converted = scratch<Compute<T>>(use, count);
    copy_values(converted, values, count, 1);
    return converted;
  }
}

// Calls product(c) with the operand C through which `rows` x `columns` sums end up in `out`.
template <class F, class Out, class Product>
void with_epilogue(const OperandC<Out>& out, int64_t rows, int64_t columns, const Product& product) {
  using T = Accumulator<F>;
  static_assert(stores_directly<F, Out>);
  if constexpr (std::is_same_v<Out, T>) {
    product(out);
  } else {
    // A sum over several calls collects in scratch until the last one; a sum that one call completes never touches it.
    constexpr int64_t lanes = Vec<T>::size();
    const int64_t vectors = ceil_div(columns, lanes), stride = vectors * lanes;
    product(OperandC<T>{scratch<T>(Scratch::sums, rows * stride), multiples(Scratch::sums_rows, rows, stride),
                        multiples(Scratch::sums_vectors, vectors, lanes), out.lanes,
                        in_compute_type(Scratch::row_bias, out.row_bias, rows),
                        in_compute_type(Scratch::column_bias, out.column_bias, columns), out.relu, out.data, out.rows,
                        out.vectors});
  }
}

}  // namespace pyops::cpu
