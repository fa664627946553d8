// The operands that the microkernel multiplies: numbers of the compute type, or pairs of bfloat16.
//
// Pairs are chosen for bfloat16 where the CPU has vdpbf16ps or a tile unit, because their operands need no conversion
// and an instruction multiplies more of them than a float32 fused multiply-add does. A process that uses a tile unit
// computes all products of pairs with it, in the order of gemm/tile_kernel.h. Otherwise vdpbf16ps performs two float32
// multiply-adds in each lane, the second number of the pair first: sum = first * first + (second * second + sum), each
// rounded to nearest. Both treat denormal numbers as zeros, as stock does on a CPU that has them.
#pragma once

#include <cstring>

#include "../simd/vec.h"
#include "tile_unit.h"

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

// Rounds to nearest, ties to even. A denormal number becomes a zero of its sign, and a NaN is quiet: what vcvtneps2bf16
// computes.
inline c10::BFloat16 rounded_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) {
    bits |= 0x400000;
  } else if (magnitude < 0x00800000) {
    bits &= 0x80000000;
  } else {
    bits += 0x7FFF + (bits >> 16 & 1);
  }
  return c10::BFloat16(static_cast<uint16_t>(bits >> 16), c10::BFloat16::from_bits());
}

#if defined(CPU_CAPABILITY_AVX512)
// Whether the CPU has AVX512_BF16, whose instructions are vdpbf16ps and conversions.
inline bool has_bfloat16_instructions() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}
#endif

// Stores the first lanes of a vector of sums of pairs, each as rounded_to_bfloat16.
C10_ALWAYS_INLINE void store_rounded(c10::BFloat16* to, const Vec<float>& sum, int64_t lanes) {
#if defined(CPU_CAPABILITY_AVX512)
  if (has_bfloat16_instructions()) {
    const __m512 s = sum;
    __m256i numbers;
    asm("vcvtneps2bf16 %1, %0" : "=v"(numbers) : "v"(s));
    return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << lanes) - 1), numbers);
  }
#endif
  float values[Vec<float>::size()];
  sum.store(values);
  for (int64_t i = 0; i < lanes; ++i) to[i] = rounded_to_bfloat16(values[i]);
}
#if defined(CPU_CAPABILITY_AVX512)
// Stores two adjacent vectors, on a CPU with AVX512_BF16.
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

// Whether products of operands F run on a tile unit, whose sums have an order of their own.
template <class F>
bool uses_tiles() {
#if defined(CPU_CAPABILITY_AVX512)
  return is_pair<F> && tile_unit() != TileUnit::none;
#else
  return false;
#endif
}

// Whether products of T use bfloat16 pairs in this process.
template <class T>
bool has_pairs() {
#if defined(CPU_CAPABILITY_AVX512)
  return std::is_same_v<T, c10::BFloat16> && (has_bfloat16_instructions() || uses_tiles<Bf16Pair>());
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
