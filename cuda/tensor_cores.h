// The tensor core instructions that the kernels use, on a GPU in PTX, in the tests as the emulator has them.
#pragma once

#include "common.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "pyops needs a compute capability of 8.0 at least: see TORCH_CUDA_ARCH_LIST"
#endif

namespace pyops::cuda {

// Four 8x8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8, and
// gets of each matrix elements (l / 4, 2 (l % 4)) and the next, or of the transposed matrix.
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

// sums[16, 8] += a[16, 16] b[16, 8] of a warp. Lane l holds of sums rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the
// next; of a the matrices (rows 0, k 0), (8, 0), (0, 8), (8, 8); of b those of k 0 and 8, columns as rows.
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef PYOPS_EMULATED
  emulator::multiply_16_bit<T>(sums, a, {b0, b1}, [](T value) { return widen(value); });
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

}  // namespace pyops::cuda
