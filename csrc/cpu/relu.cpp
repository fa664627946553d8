// output[i] = max(input[i], 0) and grad_input[i] = output[i] <= 0 ? 0 : grad_output[i], over flat arrays.
//
// Both are bound by memory, so all there is to gain is at the small end (no fork below about 20 us of work) and in the
// 16-bit floats: those are compared as the integers they are stored in. The order of their bits is the order of their
// values but for the negative ones, so one or two integer comparisons do, where widening to float32, comparing and
// rounding back takes about five times the instructions.
//
// Every element is computed by itself: the result does not depend on threads or position. A NaN stays a NaN and passes
// its gradient, -0.0 stays -0.0 and blocks it. output may be input: each vector is read before it is written.
#include <algorithm>
#include <limits>

#include "common.h"

namespace pyops::cpu {
namespace {

// Work is dealt out in blocks, which keep the vectors of every thread aligned as the arrays are; 32 of them take about
// as long to stream as a fork and join costs.
constexpr int64_t kBlock = 1024;
constexpr int64_t kGrainBlocks = 32;

// What a vector of T is computed as: itself, or for a 16-bit float its bits.
template <class T>
using Lane = std::conditional_t<is_reduced<T>, int16_t, T>;

// -inf in the bits of a 16-bit float. As signed integers, negative floats run from -0.0 = INT16_MIN through -inf to
// the negative NaNs, which end at -1.
template <class T>
constexpr int16_t kMinusInfinityBits =
    std::is_same_v<T, c10::Half> ? int16_t(0xFC00 - 0x10000) : int16_t(0xFF80 - 0x10000);

template <class T>
Vec<Lane<T>> rectified(const Vec<Lane<T>>& input) {
  const Vec<Lane<T>> zero(0);
  if constexpr (is_reduced<T>) {
    const Vec<int16_t> minus_zero(std::numeric_limits<int16_t>::min()), minus_infinity(kMinusInfinityBits<T>);
    return Vec<int16_t>::blendv(input, zero, (input > minus_zero) & (input <= minus_infinity));
  } else {
    return at::vec::clamp_min(input, zero);
  }
}

template <class T>
Vec<Lane<T>> gated(const Vec<Lane<T>>& grad_output, const Vec<Lane<T>>& output) {
  const Vec<Lane<T>> zero(0);
  if constexpr (is_reduced<T>) {
    const Vec<int16_t> minus_infinity(kMinusInfinityBits<T>);
    return Vec<int16_t>::blendv(grad_output, zero, (output <= minus_infinity) | (output == zero));
  } else {
    return Vec<T>::blendv(grad_output, zero, output <= zero);
  }
}

// output[i] = f(inputs[i]...), a vector at a time. f is a template argument because a call through a pointer, which gcc
// does not see through here, takes 1.6 times as long.
template <auto f, class L, class... Inputs>
void map(int64_t numel, L* output, const Inputs*... inputs) {
  constexpr int64_t n = Vec<L>::size();
  at::parallel_for(0, at::divup(numel, kBlock), kGrainBlocks, [&](int64_t first_block, int64_t last_block) {
    const int64_t end = std::min(last_block * kBlock, numel);
    int64_t i = first_block * kBlock;
    for (; i + n <= end; i += n) f(Vec<L>::loadu(inputs + i)...).store(output + i);
    if (i < end) f(Vec<L>::loadu(inputs + i, end - i)...).store(output + i, end - i);
  });
}

}  // namespace

void relu(const ReluArgs& args) {
  dispatch_real(args.dtype, [&](auto t) {
    using T = decltype(t);
    using L = Lane<T>;
    map<rectified<T>>(args.numel, static_cast<L*>(args.output), static_cast<const L*>(args.input));
  });
}

void relu_backward(const ReluBackwardArgs& args) {
  dispatch_real(args.dtype, [&](auto t) {
    using T = decltype(t);
    using L = Lane<T>;
    map<gated<T>>(args.numel, static_cast<L*>(args.grad_input), static_cast<const L*>(args.grad_output),
                  static_cast<const L*>(args.output));
  });
}

}  // namespace pyops::cpu
