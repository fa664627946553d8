// The instructions of Ampere and later that the matrix product uses: asynchronous copies to shared memory, loads of
// fragments, and products on tensor cores. On a GPU they are PTX; in the tests the emulator provides them.
#pragma once

#include "../common.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "pyops needs a compute capability of 8.0 at least: see TORCH_CUDA_ARCH_LIST"
#endif

namespace pyops::cuda {

// Starts a copy of the first `count` of `bytes` bytes (4, 8 or 16, to which both addresses are aligned) to shared
// memory, and of zeros to the rest. If count is 0, nothing is read. Copies of 16 bytes bypass the L1 cache.
template <int bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* source, int count) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#ifdef PYOPS_EMULATED
  emulator::copy_async(shared, source, bytes, static_cast<size_t>(count));
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const auto from = __cvta_generic_to_global(source);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(count) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes), "r"(count)
                 : "memory");
  }
#endif
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#ifdef PYOPS_EMULATED
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the latest `pending` groups of this thread have arrived.
template <int pending>
__device__ __forceinline__ void wait_copies() {
#ifdef PYOPS_EMULATED
  emulator::wait_copies(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Loads four matrices of 8 rows of 16 bytes from shared memory. Lane l gives the address of row l % 8 of matrix l / 8,
// and receives the (l % 4)-th 4 bytes of row l / 4 of each matrix. With `transposed`, the elements have 16 bits, and
// the lane receives that part of the transposed matrices.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4], const void* row) {
#ifdef PYOPS_EMULATED
  emulator::load_matrices(result, row, transposed, transposed ? "ldmatrix.trans" : "ldmatrix");
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// The bits of a float rounded to TF32, which has 10 bits after the point; the 13 bits below them are 0. Ties round away
// from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef PYOPS_EMULATED
  return emulator::to_tf32(value);
#else
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
#endif
}

// sums[16, 8] += a[16, K] b[K, 8], computed by a warp. Lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of rows l / 4
// and l / 4 + 8 of the sums. Its registers of a belong to the blocks (rows 0 to 7, first half of K), (8 to 15, first),
// (0 to 7, second), (8 to 15, second), and those of b to the first and second half of K. Within each block, which is 8
// by K / 2, the lane holds the (l % 4)-th 4 bytes of row l / 4, or for b of column l / 4.

// K = 16, with 16-bit elements.
template <class T>
__device__ __forceinline__ void multiply_16_bit(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef PYOPS_EMULATED
  emulator::multiply_16_bit<T>(sums, a, b, [](T value) { return widen(value); });
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// K = 8, with TF32 elements.
__device__ __forceinline__ void multiply_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef PYOPS_EMULATED
  emulator::multiply_tf32(sums, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// sums[8, 8] += a[8, 4] b[4, 8] of doubles, computed by a warp. Lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of row
// l / 4 of the sums, a[l / 4, l % 4] and b[l % 4, l / 4].
__device__ __forceinline__ void multiply_double(double& sum0, double& sum1, double a, double b) {
#ifdef PYOPS_EMULATED
  double sums[2] = {sum0, sum1};
  emulator::multiply_double(sums, a, b);
  sum0 = sums[0];
  sum1 = sums[1];
#else
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sum0), "+d"(sum1)
      : "d"(a), "d"(b));
#endif
}

}  // namespace pyops::cuda
