// The operands that the microkernel multiplies: numbers of the compute type, or pairs of bfloat16.
//
// Pairs are chosen for bfloat16 where the CPU has vdpbf16ps. That instruction multiplies two pairs and adds both
// products, at twice the rate of float32 fused multiply-adds, and its operands need no conversion. In each lane it
// performs two float32 multiply-adds, the second number of the pair first: sum = first * first + (second * second +
// sum), each rounded to nearest. It treats denormal numbers as zeros, as stock does on a CPU that has it.
#pragma once

#include <cstring>

#include "../simd/vec.h"

namespace pyops::cpu {

// Terms 2 k and 2 k + 1 of a sum, adjacent in memory at any even address.
struct Bf16Pair {
  c10::BFloat16 first, second;
};

template <class F>
constexpr bool is_pair = std::is_same_v<F, Bf16Pair>;
template <class F>
constexpr int64_t k_per_step = is_pair<F> ? 2 : 1;
template <class F>
using Accumulator = std::conditional_t<is_pair<F>, float, F>;

// A vector of operands in a register; pairs are held as if their bits were floats.
template <class F>
using OperandVec = Vec<Accumulator<F>>;

template <class F>
C10_ALWAYS_INLINE OperandVec<F> broadcast(const void* p) {
  Accumulator<F> bits;
  std::memcpy(&bits, p, sizeof(F));
  return OperandVec<F>(bits);
}

template <class F>
C10_ALWAYS_INLINE Vec<Accumulator<F>> multiply_add(OperandVec<F> a, OperandVec<F> b, Vec<Accumulator<F>> sum) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (is_pair<F>) {
    // In assembly, because the compiler may not use this instruction set anywhere else.
    __m512 s = sum;
    asm("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(static_cast<__m512>(a)), "v"(static_cast<__m512>(b)));
    return s;
  } else
#endif
    return at::vec::fmadd(a, b, sum);
}

#if defined(CPU_CAPABILITY_AVX512)
// Stores sums of pairs rounded to nearest, ties to even; denormal numbers become zeros, as in the products.
C10_ALWAYS_INLINE void store_rounded(c10::BFloat16* to, __m512 sum, int64_t lanes) {
  __m256i numbers;
  asm("vcvtneps2bf16 %1, %0" : "=v"(numbers) : "v"(sum));
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << lanes) - 1), numbers);
}
// Stores two adjacent vectors.
C10_ALWAYS_INLINE void store_rounded(c10::BFloat16* to, __m512 first, __m512 second) {
  __m512i numbers;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(numbers) : "v"(first), "v"(second));
  _mm512_storeu_si512(to, numbers);
}
#endif

// I(T, F) for every floating type T and each operand type F that its products can use.
#if defined(CPU_CAPABILITY_AVX512)
#define FOR_EACH_PAIR(I) I(c10::BFloat16, Bf16Pair)
#else
#define FOR_EACH_PAIR(I)
#endif
#define FOR_EACH_OPERAND(I) \
  I(float, float) I(double, double) I(c10::BFloat16, float) I(c10::Half, float) FOR_EACH_PAIR(I)

// Whether products of T use bfloat16 pairs on this CPU.
template <class T>
bool has_pairs() {
#if defined(CPU_CAPABILITY_AVX512)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return std::is_same_v<T, c10::BFloat16> && supported;
#else
  return false;
#endif
}

// f(F{}) with the operand type F of products of T: pairs if `pairs` is set, otherwise the compute type.
template <class T, class Function>
void dispatch_operand(const Function& f, [[maybe_unused]] bool pairs = has_pairs<T>()) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (pairs) return f(Bf16Pair{});
  }
#endif
  f(Compute<T>{});
}

}  // namespace pyops::cpu
