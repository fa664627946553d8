// Measures the peak rate of fused multiply-adds of a core: it computes independent chains in registers, enough of them
// to hide the latency. measure.py compiles this file for the machine it runs on.
#include <chrono>

namespace {

#if defined(__AVX512F__)
constexpr int bytes = 64, chains = 24;
#elif defined(__AVX__)
constexpr int bytes = 32, chains = 12;
#else
constexpr int bytes = 16, chains = 12;
#endif

template <class T>
double flops_per_second(long repetitions) {
  typedef T Vector __attribute__((vector_size(bytes)));
  Vector sum[chains] = {}, a = Vector{} + T(0.5), b = Vector{} + T(1e-9);
  const auto start = std::chrono::steady_clock::now();
  for (long i = 0; i < repetitions; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < chains; ++j) sum[j] = sum[j] * a + b;
#pragma GCC unroll 32
    for (int j = 0; j < chains; ++j) asm volatile("" : "+v"(sum[j]));  // makes gcc treat the sums as used
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 2.0 * chains * (bytes / sizeof(T)) * repetitions / seconds.count();
}

}  // namespace

extern "C" double fma_peak_float32(long repetitions) {
  return flops_per_second<float>(repetitions);
}
extern "C" double fma_peak_float64(long repetitions) {
  return flops_per_second<double>(repetitions);
}
