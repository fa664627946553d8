// Divides work into tasks and shares them among the threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "../common.h"
#include "simulation.h"

namespace pyops::cpu {

// f(begin, end) for each thread's part of [0, count), as at::parallel_for. Every parallel region of the kernels passes
// through here, and asks for the number of threads here, so that it can be simulated.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (simulation.is_on()) [[unlikely]]
    return simulation.parallel_for(count, grain, f);
  at::parallel_for(0, count, grain, f);
}

inline int64_t thread_count() {
  return simulation.is_on() ? simulation.threads() : at::get_num_threads();
}

inline bool is_in_parallel_region() {
  return simulation.is_in_region() || at::in_parallel_region();
}

// Work of fewer operations is not worth a fork of the threads.
constexpr double fork_flops = 1 << 20;
// Work that is large enough is cut into this many tasks, so that any number of threads share it evenly.
constexpr int64_t enough_tasks = 16;

inline int64_t tasks_worth(double flops) {
  return std::clamp(static_cast<int64_t>(flops / fork_flops), int64_t{1}, enough_tasks);
}

// The grain of parallel_for over items that are streamed rather than multiplied: how many of them are worth a fork.
// `vectors` is the number of vectors that an item reads from cache, edges and loop control included.
inline int64_t items_per_fork(int64_t vectors) {
  constexpr int64_t vectors_per_fork = 8192;  // fitted to measurements
  return std::max(int64_t{1}, vectors_per_fork / std::max(int64_t{1}, vectors));
}

// f(begin, end) for each thread's range of tasks; if there is little work, one thread takes them all.
template <class F>
void for_each_range(int64_t tasks, double flops, const F& f) {
  parallel_for(tasks, flops < fork_flops ? tasks : 1, f);
}

// f(i) for every task.
template <class F>
void for_each_task(int64_t tasks, double flops, const F& f) {
  for_each_range(tasks, flops, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// One of `count` shares of some work.
struct Share {
  int64_t index = 0, count = 1;

  // The part of [0, size) that belongs to this share: about as large as the others, in whole units.
  Range of(int64_t size, int64_t unit = 1) const {
    const int64_t units = ceil_div(size, unit);
    return {std::min(units * index / count * unit, size), std::min(units * (index + 1) / count * unit, size)};
  }
};

// The threads that work on a task together.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  // f(share) for each share; all of them are done when this returns.
  template <class F>
  void share(const F& f) const {
    if (threads_ == 1) return f(Share{});
    parallel_for(threads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(Share{i, threads_});
    });
  }

 private:
  const int64_t threads_;
};

// f(task, team) for every task. Full rounds of tasks run with one thread for each. If the tasks that remain would leave
// at least half of the threads idle and are large enough to split, all threads work together on each of them: a batch
// of 16 images, for example, is a single task of the algorithms that work on CHWN blocks. No result may depend on how a
// task is shared.
template <class F>
void for_each_shared_task(int64_t tasks, double flops, const F& f) {
  const int64_t threads = thread_count();
  const int64_t rest = tasks % threads;
  const bool worth = flops >= 0.25 * fork_flops * static_cast<double>(tasks * threads);  // for each share of a task
  const int64_t alone = worth && 2 * rest <= threads && !is_in_parallel_region() ? tasks - rest : tasks;
  for_each_task(alone, flops, [&](int64_t task) { f(task, Team(1)); });
  for (int64_t task = alone; task < tasks; ++task) f(task, Team(threads));
}

}  // namespace pyops::cpu
