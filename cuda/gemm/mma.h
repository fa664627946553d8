// sums[16, 8] += a[16, depth] b[depth, 8], computed by a warp, for each type of elements: the innermost step of
// gemm/gemm.h's main loop. The operands lie in shared memory as `Element`s. A lane loads four `Register`s of one (16
// rows of a, or 16 columns of b, which are two fragments), prepares them as an `Operand`, and multiplies.
//
//   16-bit  m16n8k16; the tensor cores round the sums, which are floats (by truncation, on the GPUs measured).
//   double  four m8n8k4, each a chain of fused multiply-adds.
//   TF32    m16n8k8 of floats rounded to TF32, only if torch's flag for the op allows it.
//   float   3xTF32: m16n8k8 of both parts of each element, see SplitMma.
#pragma once

#include "tensor_cores.h"

namespace pyops::cuda {

// An operand that is multiplied as it was loaded.
template <class R>
struct PlainOperand {
  R values[4];
};

template <class T>
struct HalfMma {
  using Element = T;
  using Sum = float;
  using Register = uint32_t;
  using Operand = PlainOperand<uint32_t>;
  static constexpr int depth = 16, unroll = 2;  // unroll: of the loop over a step of 64 bytes
  static __device__ __forceinline__ Operand prepare(const Register (&r)[4]) { return {r[0], r[1], r[2], r[3]}; }
  // Multiplies by the fragment of b that begins at its register `first`.
  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const Operand& a, const Operand& b, int first) {
    multiply_16_bit<T>(sums, a.values, {b.values[first], b.values[first + 1]});
  }
};

struct DoubleMma {
  using Element = double;
  using Sum = double;
  using Register = double;
  using Operand = PlainOperand<double>;
  static constexpr int depth = 8, unroll = 2;
  static __device__ __forceinline__ Operand prepare(const Register (&r)[4]) { return {r[0], r[1], r[2], r[3]}; }
  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const Operand& a, const Operand& b, int first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the halves of k, each for the upper and the lower rows
      multiply_double(sums[0], sums[1], a.values[2 * half], b.values[first + half]);
      multiply_double(sums[2], sums[3], a.values[2 * half + 1], b.values[first + half]);
    }
  }
};

struct Tf32Mma {
  using Element = float;
  using Sum = float;
  using Register = float;
  using Operand = PlainOperand<uint32_t>;
  static constexpr int depth = 8, unroll = 2;
  static __device__ __forceinline__ Operand prepare(const Register (&r)[4]) {
    return {to_tf32(r[0]), to_tf32(r[1]), to_tf32(r[2]), to_tf32(r[3])};
  }
  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const Operand& a, const Operand& b, int first) {
    multiply_tf32(sums, a.values, {b.values[first], b.values[first + 1]});
  }
};

// 3xTF32: a product of floats as three products of TF32. Each factor is x = big + small, where big is x rounded to TF32
// and small is the rest rounded to TF32; together they keep at least 22 bits. Then a b = a_big b_big + a_big b_small +
// a_small b_big, because the product of the small parts is below 2^-22 of a b. The tensor cores add up the three
// products for 8 terms at a time, the small ones first, and an ordinary addition adds that to the sum: otherwise the
// truncation of the tensor cores would add up to more than the rounding of floats does.
//
// An infinity or NaN has no small part and takes part only in the product of the big parts: times a small part, which
// may be 0 or have the other sign, it would turn an infinite sum into NaN. Finite numbers that would round to infinity
// are truncated instead. The small part loses digits for numbers below 2^-114, and numbers below 2^-137 become 0 (so
// that their product with an infinity is NaN).
struct SplitMma {
  using Element = float;
  using Sum = float;
  using Register = float;
  struct Operand {
    uint32_t big[4], small[4], finite[4];  // finite: big, or 0 if big is infinite or NaN
  };
  static constexpr int depth = 8, unroll = 1;  // more would spill registers

  static __device__ __forceinline__ Operand prepare(const Register (&r)[4]) {
    constexpr float largest = 0x1.fffffep127f, rounds_to_infinity = 0x1.ffep127f;
    Operand result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float size = fabsf(r[i]);
      const bool finite = size <= largest;
      result.big[i] = size >= rounds_to_infinity ? __float_as_uint(r[i]) & 0xffffe000u : to_tf32(r[i]);
      const uint32_t rest = to_tf32(r[i] - __uint_as_float(result.big[i]));
      result.small[i] = finite ? rest : 0;
      result.finite[i] = finite ? result.big[i] : 0;
    }
    return result;
  }
  static __device__ __forceinline__ void multiply(Sum (&sums)[4], const Operand& a, const Operand& b, int first) {
    float part[4] = {};
    multiply_tf32(part, a.small, {b.finite[first], b.finite[first + 1]});
    multiply_tf32(part, a.finite, {b.small[first], b.small[first + 1]});
    multiply_tf32(part, a.big, {b.big[first], b.big[first + 1]});
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += part[i];
  }
};

// Calls f(Mma()) for elements of type T. `tf32` allows float products of operands rounded to TF32.
template <class T, class F>
cudaError_t dispatch_mma(bool tf32, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    return f(DoubleMma());
  } else if constexpr (std::is_same_v<T, float>) {
    return tf32 ? f(Tf32Mma()) : f(SplitMma());
  } else {
    return f(HalfMma<T>());
  }
}

}  // namespace pyops::cuda
