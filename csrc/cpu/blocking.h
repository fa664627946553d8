// What every product here shares: the cut of K into chunks, and the tasks of the threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "tile.h"

namespace pyops::cpu {

// f(k, kc, first, last) for each chunk of [begin, end); once, with kc = 0, where that is empty. Chunks are about even,
// of at most `most` terms, and of a size that the squares of transpose.h divide. Inlined: what f captures stays in
// registers (linear of 1x400 -> 120 3.6 us instead of 4.0).
template <int64_t most = KC, class F>
C10_ALWAYS_INLINE void for_each_chunk(int64_t begin, int64_t end, const F& f) {
  const int64_t chunks = std::max(ceil_div(end - begin, most), int64_t{1});
  const int64_t size = ceil_div(ceil_div(end - begin, chunks), 16) * 16;
  for (int64_t k = begin, i = 0; i < chunks; ++i, k += size)
    f(k, std::clamp(end - k, int64_t{0}, size), i == 0, i == chunks - 1);
}

// Work below this many operations, 5 to 20 us of a core, is not worth a fork of the threads.
constexpr double fork_flops = 1 << 20;
// How many tasks to cut work into for any number of threads to share it evenly.
constexpr int64_t enough_tasks = 16;

inline int64_t tasks_worth(double flops) {
  return std::clamp(static_cast<int64_t>(flops / fork_flops), int64_t{1}, enough_tasks);
}

// f(begin, end) for the tasks of each thread, and of one if there is little work.
template <class F>
void for_each_range(int64_t tasks, double flops, const F& f) {
  at::parallel_for(0, tasks, flops < fork_flops ? tasks : 1, f);
}

// f(i) for every task.
template <class F>
void for_each_task(int64_t tasks, double flops, const F& f) {
  for_each_range(tasks, flops, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace pyops::cpu
