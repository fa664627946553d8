// A simulation of more threads than the machine has, for bench/scaling.py. While it is on, a parallel region is cut as
// at::parallel_for would cut it for that many threads, and one thread computes the parts in turn. The time of every
// part is recorded, and so is that of the kernels as a whole: what a call would take with all of the threads is the
// time outside of the regions, plus the longest part of each. It is the thread's CPU time, because other programs may
// interrupt a part.
//
// A simulation is switched on for the whole process, and only one thread may call kernels meanwhile. No result differs.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <vector>

#include "../common.h"

namespace pyops::cpu {

class Simulation {
 public:
  struct Region {
    int64_t tasks;
    std::vector<double> seconds;  // of each part
  };

  bool is_on() const { return threads_ > 0; }
  bool is_in_region() const { return in_region_; }
  int64_t threads() const { return threads_; }
  double seconds() const { return seconds_; }  // of all kernels
  const std::vector<Region>& regions() const { return regions_; }

  // Simulates that many threads from now on, or none if there are 0, and forgets what was recorded.
  void start(int64_t threads) {
    threads_ = threads, seconds_ = 0;
    regions_.clear();
  }
  void add_seconds(double seconds) { seconds_ += seconds; }

  // Runs f(begin, end) over [0, count) as at::parallel_for with OpenMP does (ATen/ParallelOpenMP.h), part by part.
  template <class F>
  void parallel_for(int64_t count, int64_t grain, const F& f) {
    if (count <= std::max(grain, int64_t{1}) || in_region_ || threads_ == 1) {
      if (count > 0) f(0, count);
      return;
    }
    const InRegion in_region(in_region_);
    const int64_t most = grain > 0 ? ceil_div(count, grain) : threads_;
    const int64_t part = ceil_div(count, std::min(threads_, most));
    Region region{count, {}};
    region.seconds.reserve(threads_);
    for (int64_t begin = 0; begin < count; begin += part) {
      const double start = cpu_seconds();
      f(begin, std::min(begin + part, count));
      region.seconds.push_back(cpu_seconds() - start);
    }
    regions_.push_back(std::move(region));
  }

  static double cpu_seconds() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }

 private:
  struct InRegion {
    explicit InRegion(bool& flag) : flag(flag) { flag = true; }
    ~InRegion() { flag = false; }
    bool& flag;
  };

  int64_t threads_ = 0;
  bool in_region_ = false;
  double seconds_ = 0;
  std::vector<Region> regions_;
};

inline Simulation simulation;

// A kernel of the module's table, which records its time while a simulation is on.
template <auto kernel>
struct Recorded;
template <class Result, class Args, Result (*kernel)(const Args&)>
struct Recorded<kernel> {
  static Result run(const Args& args) {
    if (!simulation.is_on()) [[likely]]
      return kernel(args);
    const Timer timer;
    return kernel(args);
  }

 private:
  struct Timer {
    ~Timer() { simulation.add_seconds(Simulation::cpu_seconds() - start); }
    const double start = Simulation::cpu_seconds();
  };
};

}  // namespace pyops::cpu
