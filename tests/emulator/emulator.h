// Runs CUDA kernels on a CPU, for tests: g++ compiles the .cu files that nvcc compiles for a GPU, with this folder
// first on the include path, where cuda_runtime.h leads here. It works on x86-64 only.
//
// A launch runs its blocks one after another, and each thread of a block as a fiber, which runs until it ends or waits
// for its block or its warp. By default, launches alternate between three orders of threads and blocks: forward,
// reverse and shuffled. So a result that needs a missing barrier, or needs one block to run before another, differs
// between launches.
//
// These mistakes are reported, with block and thread, by abort():
//   - a barrier that some thread of the block, unless it has ended, never reaches, and threads at different barriers;
//   - lanes of a warp that wait for each other at different operations, with different masks, or for an ended lane;
//   - a kernel whose limit of shared memory changes;
//   - misuse of the PTX instructions of ptx.h.
// Shared memory that was never written reads as NaN (0xff bytes). Misaligned vector accesses of C++ are left to
// UndefinedBehaviorSanitizer. Time, bank conflicts and caches are not modelled.
#pragma once

#if !defined(__x86_64__)
#error "the emulator switches stacks of x86-64"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// CUDA's built-in variables.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 128 << 10;

enum class Order { forward, reverse, shuffled, alternating };
inline Order order = Order::alternating;

inline int64_t largest_32_bit_offset = 20000;  // PYOPS_LARGEST_32_BIT_OFFSET of the kernels

// What a thread is doing. Its `site` tells barriers and warp operations in the source apart.
enum class State { fresh, ready, at_barrier, in_warp, done };

// A cp.async in flight: `bytes` from `source`, then zeros.
struct Copy {
  unsigned char* target;
  const void* source;
  size_t bytes, zeros;
};

struct Thread {
  State state = State::fresh;
  const char* site = nullptr;
  unsigned mask = 0;           // of the warp operation it waits at
  std::vector<Copy> copies;    // in flight, in order
  std::vector<size_t> groups;  // the number of copies in each committed group
  size_t open_copies = 0;      // copies that are not committed yet
  uint3 index;
  int number, parity;
  void* stack_pointer;
  std::unique_ptr<char[]> stack;
};

struct Warp {
  alignas(16) unsigned char slots[2][warp_size][64];  // for one operation and the next
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<char[]>> stacks;  // not in use
  const std::function<void()>* body = nullptr;
  void* scheduler = nullptr;  // its stack pointer
  Thread* current = nullptr;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};
inline Block block;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u %u %u, thread %u %u %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  std::abort();
}

// Saves the callee-saved registers and the stack pointer, and continues on another stack.
extern "C" void pyops_emulator_switch(void** save, void* load);
__asm__(
    ".text\n.weak pyops_emulator_switch\n.hidden pyops_emulator_switch\npyops_emulator_switch:\n"
    "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
    "movq %rsp, (%rdi); movq %rsi, %rsp\n"
    "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret\n");

inline void leave() {
  pyops_emulator_switch(&block.current->stack_pointer, block.scheduler);
}

inline void run_thread() {
  (*block.body)();
  if (!block.current->copies.empty()) fail("a thread ends with copies of cp.async that it has not waited for");
  block.current->state = State::done;
  leave();
  std::abort();  // a thread that has ended is never resumed
}

inline void resume(Thread& thread) {
  if (thread.state == State::fresh) {
    if (block.stacks.empty()) block.stacks.emplace_back(new char[stack_bytes]);
    thread.stack = std::move(block.stacks.back());
    block.stacks.pop_back();
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(thread.stack.get(), stack_bytes);  // the frame of run_thread, which never returned
#endif
    const auto top = reinterpret_cast<uintptr_t>(thread.stack.get() + stack_bytes) & ~uintptr_t{15};
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;  // where run_thread would return to
    *--stack = reinterpret_cast<void*>(&run_thread);
    for (int i = 0; i < 6; ++i) *--stack = nullptr;
    thread.stack_pointer = stack;
  }
  thread.state = State::ready;
  block.current = &thread;
  threadIdx = thread.index;
  pyops_emulator_switch(&block.scheduler, thread.stack_pointer);
  if (thread.state == State::done) block.stacks.push_back(std::move(thread.stack));
}

// Lets the threads that wait at the block's barrier continue if no others are left that have not ended.
inline bool release_barrier() {
  const char* site = nullptr;
  for (const Thread& thread : block.threads) {
    if (thread.state == State::done) continue;
    if (thread.state != State::at_barrier) return false;
    if (site != nullptr && site != thread.site) fail("threads of a block met at different barriers");
    site = thread.site;
  }
  for (Thread& thread : block.threads)
    if (thread.state == State::at_barrier) thread.state = State::ready;
  return site != nullptr;
}

[[noreturn]] inline void report_deadlock() {
  for (const Thread& thread : block.threads) {
    if (thread.state != State::in_warp) continue;
    threadIdx = thread.index;
    fail("lanes of a warp wait at different operations, with different masks, or for a lane that has ended");
  }
  fail("a barrier that not every thread reaches");
}

inline void run_block(const std::vector<int>& thread_order) {
  if (block.shared_bytes) std::memset(block.shared, 0xff, block.shared_bytes);
  for (int i = 0; i < static_cast<int>(block.threads.size()); ++i) {
    Thread& thread = block.threads[i];
    const unsigned n = i;
    thread.state = State::fresh;
    thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
    thread.number = i;
    thread.parity = 0;
    thread.groups.clear();
  }
  for (bool any_left = true; any_left;) {
    bool any_ran = any_left = false;
    for (const int i : thread_order) {
      Thread& thread = block.threads[i];
      if (thread.state == State::fresh || thread.state == State::ready) resume(thread), any_ran = true;
      any_left |= thread.state != State::done;
    }
    if (any_left && !release_barrier() && !any_ran) report_deadlock();
  }
}

inline std::vector<int64_t> permutation(int64_t count, Order order, std::minstd_rand& random) {
  std::vector<int64_t> result(count);
  std::iota(result.begin(), result.end(), 0);
  if (order == Order::reverse) std::reverse(result.begin(), result.end());
  if (order == Order::shuffled) std::shuffle(result.begin(), result.end(), random);
  return result;
}

inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  static unsigned launches = 0;
  const Order chosen = order == Order::alternating ? static_cast<Order>(launches++ % 3) : order;
  std::minstd_rand random(launches);

  gridDim = grid, blockDim = threads;
  const int64_t count = int64_t{threads.x} * threads.y * threads.z;
  block.threads.resize(count);
  block.warps.resize((count + warp_size - 1) / warp_size);
  block.body = &body;
  block.shared_bytes = shared_bytes;
  block.shared = nullptr;
  if (shared_bytes && posix_memalign(reinterpret_cast<void**>(&block.shared), 128, shared_bytes)) std::abort();
  const auto shuffled = permutation(count, chosen, random);
  const std::vector<int> thread_order(shuffled.begin(), shuffled.end());
  for (const int64_t i : permutation(int64_t{grid.x} * grid.y * grid.z, chosen, random)) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(thread_order);
  }
  std::free(block.shared);
}

// ---- what a kernel calls ----

inline void barrier(const char* site) {
  block.current->site = site;
  block.current->state = State::at_barrier;
  leave();
}

// Waits for the lanes of the mask, which must arrive at the same operation with the same mask. The last lane to arrive
// calls `last` while the others wait.
template <class Last>
void meet(unsigned mask, const char* site, const Last& last) {
  Thread& self = *block.current;
  const int first = self.number / warp_size * warp_size, lane = self.number - first;
  if ((mask >> lane & 1) == 0) fail("a lane's mask does not name the lane itself");
  self.site = site, self.mask = mask, self.state = State::in_warp;
  bool complete = true;
  for (int i = 0; i < warp_size && complete; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (first + i >= static_cast<int>(block.threads.size())) fail("a mask names a lane that the block does not have");
    const Thread& other = block.threads[first + i];
    complete = other.state == State::in_warp && other.site == site && other.mask == mask;
  }
  if (!complete) return leave();
  last();
  for (int i = 0; i < warp_size; ++i)
    if (mask >> i & 1) block.threads[first + i].state = State::ready;
}
inline void meet(unsigned mask, const char* site) {
  meet(mask, site, [] {});
}

// What the lanes of the mask passed to one call, by lane. Its memory stays valid until the warp's next call but one.
template <class T>
class Exchange {
 public:
  Exchange(unsigned mask, const T& value, const char* site) {
    static_assert(sizeof(T) <= sizeof(Warp::slots[0][0]));
    Thread& self = *block.current;
    slots_ = block.warps[self.number / warp_size].slots[self.parity ^= 1];
    std::memcpy(slots_[self.number % warp_size], &value, sizeof(T));
    meet(mask, site);
  }
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots_[lane], sizeof(T));
    return value;
  }

 private:
  unsigned char (*slots_)[64];
};

inline int lane() {
  return block.current->number % warp_size;
}

template <class T>
T shuffle(unsigned mask, const T& value, int source, int width, const char* site) {
  const Exchange<T> all(mask, value, site);
  const int first = lane() / width * width;
  const bool inside = source >= first && source < first + width;
  if (inside && (mask >> source & 1) == 0) fail("a shuffle reads from a lane that its mask does not name");
  return inside ? all[source] : value;
}

inline unsigned ballot(unsigned mask, bool vote, const char* site) {
  const Exchange<bool> all(mask, vote, site);
  unsigned result = 0;
  for (int i = 0; i < warp_size; ++i)
    if (mask >> i & 1) result |= static_cast<unsigned>(all[i]) << i;
  return result;
}

}  // namespace emulator

// A string that identifies a place in the source.
#define EMULATOR_TEXT(line) #line
#define EMULATOR_LINE(line) EMULATOR_TEXT(line)
#define EMULATOR_SITE __FILE__ ":" EMULATOR_LINE(__LINE__)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__ __attribute__((noinline))

#define __syncthreads() emulator::barrier(EMULATOR_SITE)
#define __syncwarp(...) emulator::meet(0xffffffffu, EMULATOR_SITE)
#define __shfl_sync(mask, value, source) \
  emulator::shuffle(mask, value, emulator::lane() / 32 * 32 + (source), 32, EMULATOR_SITE)
#define __shfl_xor_sync(mask, value, bits) emulator::shuffle(mask, value, emulator::lane() ^ (bits), 32, EMULATOR_SITE)
#define __shfl_down_sync(mask, value, delta) \
  emulator::shuffle(mask, value, emulator::lane() + (delta), 32, EMULATOR_SITE)
#define __ballot_sync(mask, vote) emulator::ballot(mask, vote, EMULATOR_SITE)

using std::max;
using std::min;

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

#include "ptx.h"
