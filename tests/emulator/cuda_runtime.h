// The part of the CUDA runtime that the kernels use, for the emulator.
#pragma once

#include <cmath>
#include <map>

#include "emulator.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {
constexpr size_t shared_without_asking = 48 << 10, largest_shared = 99 << 10;  // compute capability 8.6
inline std::map<void*, size_t> shared_asked_for;                               // by kernel
inline size_t shared_allowed(void* kernel) {
  const auto asked = shared_asked_for.find(kernel);
  return asked == shared_asked_for.end() ? shared_without_asking : asked->second;
}
}  // namespace emulator

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > emulator::largest_shared) return cudaErrorInvalidValue;
  const auto limit = emulator::shared_asked_for.emplace(reinterpret_cast<void*>(kernel), bytes).first->second;
  if (limit != static_cast<size_t>(bytes)) emulator::fail("the limit changes that another thread may rely on");
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 &grid = config->gridDim, &threads = config->blockDim;
  const bool possible = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 2147483647u && grid.y <= 65535u &&
                        grid.z <= 65535u && threads.x > 0 && threads.y > 0 && threads.z > 0 && threads.z <= 64u &&
                        threads.x <= 1024u && uint64_t{threads.x} * threads.y * threads.z <= 1024u;
  if (!possible) return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > emulator::shared_allowed(reinterpret_cast<void*>(kernel)))
    return cudaErrorInvalidValue;
  emulator::launch(grid, threads, config->dynamicSmemBytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
