// sums[16, 8] += a[16, depth] b[depth, 8] of a warp, for each type of the elements: what the main loop of gemm.h does
// in its innermost. `Element` lies in shared memory; a lane loads four `Register`s of it (16 rows of a, or 16 columns
// of b, which are two fragments), prepares them as `Operand`, and multiplies.
//
//   16-bit  m16n8k16, the sums are floats that the tensor cores round (by truncation, on the GPUs that were measured).
//   double  four m8n8k4, each of them fused multiply-adds.
//   TF32    m16n8k8 of floats rounded to TF32; only if torch's flag for the op says so.
//   float   3xTF32: m16n8k8 of both parts of each element, see SplitMma.
#pragma once

#include "tensor_cores.h"

namespace pyops::cuda {

// Operands that are multiplied as they are loaded.
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
  static constexpr int depth = 16, unroll = 2;  // of the loop over a step of 64 bytes
  static __device__ __forceinline__ Operand prepare(const Register (&r)[4]) { return {r[0], r[1], r[2], r[3]}; }
  // With the fragment of b that begins at its register `first`.
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
    for (int half = 0; half < 2; ++half) {  // of k, and in each the upper and the lower rows
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

// The product of floats by three of TF32: x = big + small, where big is x rounded to TF32 and small the rest rounded to
// TF32, which together keep 22 bits or more; a b is then a_big b_big + a_big b_small + a_small b_big, for the product
// of the small parts is below 2^-22 of it. The three are added up on the tensor cores for 8 terms at a time, the small
// ones first, and then to the sum by an ordinary addition: the truncation of tensor cores would else add up to more
// than the rounding of floats does.
//
// An infinity or NaN has no small part, and takes part in big times big alone: times a small part, which may be 0 or of
// the other sign, it would make NaN of a sum that is infinite. Finite numbers that would round to infinity are
// truncated instead. Of numbers below 2^-114 the small part loses digits, and those below 2^-137 are 0 (so that times
// an infinity they are NaN).
struct SplitMma {
  using Element = float;
  using Sum = float;
  using Register = float;
  struct Operand {
    uint32_t big[4], small[4], finite[4];  // finite: big, or 0 where that is infinite or NaN
  };
  static constexpr int depth = 8, unroll = 1;  // lest registers be spilled

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

// f(Mma()) for elements of T; `tf32` lets float products be of TF32.
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
