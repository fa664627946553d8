// Algorithms as values. Where an op can be computed in several ways, a table lists its algorithms in order of
// preference, and `choose` takes the first that supports the problem and is profitable. An algorithm can be forced
// (PYOPS_ALGORITHM, pyops.testing.force_algorithm); then it is taken for every problem, and one that it does not
// support is refused.
//
// A row of a table is a struct with at least these members, where Problem is what the op computes:
//
//   const char *name, *file;               // file: where the algorithm is, from the root of the repository
//   bool (*supports)(const Problem&);      // whether the algorithm computes the problem right
//   bool (*profitable)(const Problem&);    // whether to choose it for a problem that it supports
//   void (*run)(const Problem&);
//
// The last row is chosen whenever no other one is, so it supports all problems that are left for it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyops {

// Counts one run. A load and a store replace one atomic addition, which would lock the bus in every call. Threads that
// count at the same time may lose a count, but a count never returns to zero.
inline void count_run(std::atomic<int64_t>& runs) {
  runs.store(runs.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

// An op in one direction, such as "conv2d.forward": the algorithms of its table, which of them is forced, and how often
// each has run in this process.
class Choice {
 public:
  static constexpr size_t most_algorithms = 12;
  struct Named {
    const char *name, *file;
  };

  constexpr explicit Choice(const char* op) : op_(op) {}

  // Takes the names of the table's rows. Returns true, so that a file can call it once, when its module is loaded, by
  // initializing a constant.
  template <class Row, size_t n>
  bool list(const Row (&table)[n]) {
    static_assert(n <= most_algorithms);
    for (count_ = 0; count_ < n; ++count_) algorithms_[count_] = {table[count_].name, table[count_].file};
    return true;
  }

  const char* op() const { return op_; }
  size_t count() const { return count_; }
  const Named& algorithm(size_t i) const { return algorithms_[i]; }
  std::atomic<int64_t>& runs(size_t i) { return runs_[i]; }

  // The row that is forced, or -1.
  int forced() const { return forced_.load(std::memory_order_relaxed); }
  void force(int row) { forced_.store(row, std::memory_order_relaxed); }

 private:
  const char* op_;
  size_t count_ = 0;
  Named algorithms_[most_algorithms] = {};
  std::atomic<int> forced_{-1};
  std::atomic<int64_t> runs_[most_algorithms] = {};
};

// Raises the error of a forced algorithm that does not support the problem.
template <class Row, size_t n, class Problem>
[[noreturn]] void refuse_forced(const Choice& choice, const Row (&table)[n], const char* name, const Problem& x) {
  std::string others;
  for (const Row& row : table)
    if (row.supports(x)) others += (others.empty() ? "" : ", ") + std::string(row.name);
  throw std::runtime_error(std::string(choice.op()) + ": the algorithm " + name +
                           " is forced, but it does not support this problem; these do: " + others);
}

// The row of the algorithm that is taken for a problem.
template <class Row, size_t n, class Problem>
size_t chosen_row(const Choice& choice, const Row (&table)[n], const Problem& x) {
  if (const int forced = choice.forced(); forced >= 0) {
    if (!table[forced].supports(x)) refuse_forced(choice, table, table[forced].name, x);
    return forced;
  }
  size_t i = 0;
  while (i + 1 < n && !(table[i].supports(x) && table[i].profitable(x))) ++i;
  return i;
}

// Chooses the algorithm for a problem that is about to be computed, and counts its run.
template <class Row, size_t n, class Problem>
const Row& choose(Choice& choice, const Row (&table)[n], const Problem& x) {
  const size_t i = chosen_row(choice, table, x);
  count_run(choice.runs(i));
  return table[i];
}

}  // namespace pyops
