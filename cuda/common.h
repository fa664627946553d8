// Types, dispatch, launches and index arithmetic that the CUDA kernels share. No .cu file includes a torch header, so
// they compile in seconds, with or without torch, and g++ can compile them for the emulator of the tests
// (tests/emulator), where PYOPS_EMULATED is defined.
//
// All kernels follow these rules. A launcher takes pointers, 64-bit sizes and a stream, and returns cudaError_t. Memory
// comes only from the Workspace. A launcher never waits for the device, and the host decides nothing by data, so that
// launches can be captured in a graph. No sum is atomic: partial sums are taken over parts that depend only on the
// shape and are added in a fixed order, so every run gives the same bits. Batch and rows are in grid.x, because y and z
// are limited to 65535.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "launchers.h"

namespace pyops::cuda {

// Arithmetic on the 16-bit types is done in float, and the result is rounded once, when it is stored.
template <class T>
constexpr bool is_reduced = std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;
template <class T>
using Compute = std::conditional_t<is_reduced<T>, float, T>;

template <class T>
__host__ __device__ __forceinline__ Compute<T> widen(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <class T, class C>
__host__ __device__ __forceinline__ T narrow(C value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// The maximum of no elements.
template <class T>
constexpr auto lowest = static_cast<Compute<T>>(std::is_integral_v<T> ? std::numeric_limits<Compute<T>>::min()
                                                                      : -std::numeric_limits<Compute<T>>::infinity());

// max(value, 0), which keeps NaN and -0.0.
template <class C>
__device__ __forceinline__ C rectified(C value) {
  if constexpr (std::is_unsigned_v<C>) {
    return value;
  } else {
    return value < C(0) ? C(0) : value;
  }
}

// a * b + c, rounded once with every compiler: sums must not depend on which products a compiler contracts.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// Calls f(T{}) for the floating-point type that `dtype` names.
template <class F>
cudaError_t dispatch_floating(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f16:
      return f(__half{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Like dispatch_floating, for the integer types as well.
template <class F>
cudaError_t dispatch_real(DType dtype, F&& f) {
  switch (dtype) {
    case DType::u8:
      return f(uint8_t{});
    case DType::i8:
      return f(int8_t{});
    case DType::i16:
      return f(int16_t{});
    case DType::i32:
      return f(int32_t{});
    case DType::i64:
      return f(int64_t{});
    default:
      return dispatch_floating(dtype, f);
  }
}

// Offsets up to this one are computed in 32 bits, which leaves room for one more term. The tests set it low, so that
// they cover both widths.
#ifndef PYOPS_LARGEST_32_BIT_OFFSET
#define PYOPS_LARGEST_32_BIT_OFFSET (int64_t{1} << 30)
#endif

// Calls f(Index{}) for the type in which every offset up to `largest` can be computed.
template <class F>
cudaError_t dispatch_index(int64_t largest, F&& f) {
  return largest <= PYOPS_LARGEST_32_BIT_OFFSET ? f(int32_t{}) : f(int64_t{});
}

// Evaluates an expression of type cudaError_t and, if it is an error, returns it from the enclosing function.
#define PYOPS_RETURN_ON_ERROR(expression)                                           \
  do {                                                                              \
    if (const cudaError_t error = (expression); error != cudaSuccess) return error; \
  } while (false)

constexpr int block_threads = 256;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The dynamic shared memory that a block can have from compute capability 8.0 on, with and without opting in. A kernel
// that needs more than the second opts in to all of the first: the limit belongs to the function, and a concurrent
// launch of the same kernel may rely on it.
constexpr size_t shared_bytes_at_most = 99 << 10, shared_bytes_without_asking = 48 << 10;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > shared_bytes_without_asking)
    PYOPS_RETURN_ON_ERROR(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int{shared_bytes_at_most}));
  const cudaLaunchConfig_t config{dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, stream, nullptr, 0};
  PYOPS_RETURN_ON_ERROR(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  return cudaGetLastError();
}

// Launches one thread for each of `count` items.
template <class... Parameters, class... Arguments>
cudaError_t launch_for(void (*kernel)(Parameters...), int64_t count, cudaStream_t stream, Arguments... arguments) {
  return launch(kernel, ceil_div(count, block_threads), dim3(block_threads), 0, stream, arguments...);
}

__device__ __forceinline__ int64_t thread_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef PYOPS_EMULATED
  return reinterpret_cast<T*>(emulator::block.shared);
#else
  extern __shared__ __align__(128) unsigned char pyops_shared[];
  return reinterpret_cast<T*>(pyops_shared);
#endif
}

// Contiguous elements, which are read and written up to 16 bytes at a time.
template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Vector {
  static constexpr int size = n;
  T values[n];
};
template <class T>
using Pack = Vector<T, 16 / sizeof(T)>;

template <class... Pointers>
bool aligned_to(size_t bytes, const Pointers*... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % bytes == 0;
}
template <class... Pointers>
bool aligned_to_packs(const Pointers*... pointers) {
  return aligned_to(16, pointers...);
}

__device__ __forceinline__ uint32_t high_product(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}
__device__ __forceinline__ uint64_t high_product(uint64_t a, uint64_t b) {
  return __umul64hi(a, b);
}

// Divides by a number that is the same for all threads. It multiplies instead, which is exact for dividends from 0 and
// divisors from 1 up to the largest Index (Granlund and Montgomery, 1994) and takes a few instructions instead of
// twenty or a call.
template <class Index>
struct Divider {
  using Unsigned = std::make_unsigned_t<Index>;
  Unsigned divisor, multiplier;
  uint32_t shift = 0;

  explicit Divider(int64_t d) : divisor(static_cast<Unsigned>(d)) {
    using Wide = std::conditional_t<sizeof(Index) == 4, uint64_t, unsigned __int128>;
    while ((Wide(1) << shift) < divisor) ++shift;
    multiplier = static_cast<Unsigned>((((Wide(1) << shift) - divisor) << (8 * sizeof(Index))) / divisor + 1);
  }
  __host__ __device__ __forceinline__ Index value() const { return static_cast<Index>(divisor); }
  __device__ __forceinline__ Index quotient(Index n) const {
    const auto dividend = static_cast<Unsigned>(n);
    return static_cast<Index>((high_product(dividend, multiplier) + dividend) >> shift);
  }
};

// Removes the last digit of n in the given base, and returns it.
template <class Index>
__device__ __forceinline__ Index take_digit(Index& n, const Divider<Index>& base) {
  const Index rest = base.quotient(n), digit = n - rest * base.value();
  n = rest;
  return digit;
}

}  // namespace pyops::cuda
