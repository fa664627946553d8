// The sum of partial products: of a matrix product whose K is split, or of the parts of a batch.
#pragma once

#include "../runtime/parallel.h"
#include "output.h"

namespace pyops::cpu {

// out[M, columns] = the sum, in order, of the first columns of `parts` matrices of [M, N] partial sums that lie
// part_stride elements apart. The sums of the first part are overwritten.
template <class Out>
void sum_parts(const Output<Out>& out, Compute<Out>* sums, int64_t parts, int64_t part_stride, int64_t M, int64_t N,
               int64_t columns) {
  using T = Compute<Out>;
  constexpr int64_t lanes = Vec<T>::size(), rows_at_once = 16;
  for_each_task(ceil_div(M, rows_at_once), 4.0 * parts * M * N, [&](int64_t task) {
    const int64_t m = task * rows_at_once, rows = std::min(rows_at_once, M - m);
    T* first = sums + m * N;
    for (int64_t part = 1; part < parts; ++part) {
      const T* more = first + part * part_stride;
      for (int64_t i = 0; i < rows * N; i += lanes) {
        const int64_t count = std::min(lanes, rows * N - i);
        (Vec<T>::loadu(first + i, count) + Vec<T>::loadu(more + i, count)).store(first + i, static_cast<int>(count));
      }
    }
    write(out, first, N, m, rows, 0, columns);
  });
}

template <class Out>
void sum_parts(const Output<Out>& out, Compute<Out>* sums, int64_t parts, int64_t part_stride, int64_t M, int64_t N) {
  sum_parts(out, sums, parts, part_stride, M, N, N);
}

}  // namespace pyops::cpu
