// output[i] = max(input[i], 0) and grad_input[i] = output[i] <= 0 ? 0 : grad_output[i], over flat arrays. Instead of
// the output, the backward can read a mask of one bit per element, so that less is saved and a third less memory is
// moved.
//
// Both are bound by memory, so only small tensors (no fork for little work) and 16-bit floats have something to gain.
// Those are compared as the integers they are stored in: the order of their bits is the order of their values except
// for negative ones, so one or two integer comparisons replace widening to float32, comparing and rounding back, which
// take about five times as many instructions. Several vectors are loaded before they are stored, which is faster in the
// L2 cache than alternating loads and stores.
//
// Every element is computed by itself, so the result does not depend on threads or position. A NaN stays a NaN and
// passes its gradient; -0.0 stays -0.0 and blocks it. output may be input: every element is read before it is written.
#include <algorithm>

#include "runtime/algorithms.h"
#include "runtime/parallel.h"
#include "simd/mask_bits.h"

namespace pyops::cpu {
namespace {

// The threads share the work in blocks, which keep the vectors of every thread aligned as the arrays are. To stream
// blocks_per_fork of them from memory takes about as long as a fork and join.
constexpr int64_t block_elements = 1024, blocks_per_fork = 32;

template <class T>
Vec<Lane<T>> rectified(const Vec<Lane<T>>& input) {
  const Vec<Lane<T>> zero(0);
  if constexpr (is_reduced<T>) {
    const Vec<int16_t> minus_zero(std::numeric_limits<int16_t>::min()), minus_infinity(minus_infinity_bits<T>);
    return Vec<int16_t>::blendv(input, zero, (input > minus_zero) & (input <= minus_infinity));
  } else {
    return at::vec::clamp_min(input, zero);
  }
}

template <class T>
Vec<Lane<T>> gated(const Vec<Lane<T>>& grad_output, const Vec<Lane<T>>& output) {
  const Vec<Lane<T>> zero(0);
  if constexpr (is_reduced<T>) {
    const Vec<int16_t> minus_infinity(minus_infinity_bits<T>);
    return Vec<int16_t>::blendv(grad_output, zero, (output <= minus_infinity) | (output == zero));
  } else {
    return Vec<T>::blendv(grad_output, zero, output <= zero);
  }
}

// output[i] = f(inputs[i]...) for i in [begin, end), several vectors at a time. f is a template argument because gcc
// does not see through a function pointer here, and would call it. The array pointers are arguments because a lambda's
// captures would be read again after every store.
template <auto f, class L, class... Inputs>
void map_range(int64_t begin, int64_t end, L* output, const Inputs*... inputs) {
  using V = Vec<L>;
  constexpr int64_t n = V::size(), vectors = 4;
  int64_t i = begin;
  for (; i + vectors * n <= end; i += vectors * n) {
    V values[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) values[v] = f(V::loadu(inputs + i + v * n)...);
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) values[v].store(output + i + v * n);
  }
  for (; i < end; i += n) {
    const int64_t count = std::min(n, end - i);
    f(V::loadu(inputs + i, count)...).store(output + i, static_cast<int>(count));
  }
}

template <auto f, class L, class... Inputs>
void map(int64_t numel, L* output, const Inputs*... inputs) {
  parallel_for(ceil_div(numel, block_elements), blocks_per_fork, [&](int64_t first_block, int64_t last_block) {
    map_range<f>(first_block * block_elements, std::min(last_block * block_elements, numel), output, inputs...);
  });
}

// f(word, first, count) for each word of a mask and the elements [first, first + count) that share it, 64 of them or
// what is left.
template <class F>
void for_each_word(int64_t numel, const F& f) {
  constexpr int64_t bits = 64;
  parallel_for(ceil_div(numel, block_elements), blocks_per_fork, [&](int64_t first_block, int64_t last_block) {
    const int64_t end = std::min(last_block * block_elements, numel);
    for (int64_t i = first_block * block_elements; i < end; i += bits) f(i / bits, i, std::min(bits, end - i));
  });
}

// output[i ...] = f(i, lanes) for each vector of `count` elements; where there are 64 elements, `lanes` is a constant.
template <class L, class F>
C10_ALWAYS_INLINE void store_vectors(L* output, int64_t count, const F& f) {
  constexpr int64_t n = Vec<L>::size(), bits = 64;
  if (count == bits) {
    Vec<L> values[bits / n];
#pragma GCC unroll 16
    for (int64_t v = 0; v < bits / n; ++v) values[v] = f(v * n, n);
#pragma GCC unroll 16
    for (int64_t v = 0; v < bits / n; ++v) values[v].store(output + v * n);
  } else {
    for (int64_t i = 0; i < count; i += n) {
      const int64_t lanes = std::min(n, count - i);
      f(i, lanes).store(output + i, static_cast<int>(lanes));
    }
  }
}

template <class T>
void rectify_with_mask(int64_t numel, const Lane<T>* input, Lane<T>* output, uint64_t* mask) {
  using L = Lane<T>;
  for_each_word(numel, [=](int64_t word, int64_t first, int64_t count) {
    uint64_t bits = 0;
    store_vectors(output + first, count, [&](int64_t i, int64_t lanes) {
      const Vec<L> value = rectified<T>(Vec<L>::loadu(input + first + i, lanes));
      bits |= passing_bits<T>(value) << i;
      return value;
    });
    mask[word] = bits & ~uint64_t{0} >> (64 - count);
  });
}

template <class T>
void gate_by_mask(int64_t numel, const Lane<T>* grad_output, const uint64_t* mask, Lane<T>* grad_input) {
  using L = Lane<T>;
  for_each_word(numel, [=](int64_t word, int64_t first, int64_t count) {
    const uint64_t bits = mask[word];
    store_vectors(grad_input + first, count, [&](int64_t i, int64_t lanes) {
      return select_bits<T>(Vec<L>::loadu(grad_output + first + i, lanes), bits >> i);
    });
  });
}

}  // namespace

void relu(const ReluArgs& args) {
  count_run(args.mask ? parts::relu_with_mask.runs : parts::relu.runs);
  dispatch_real(args.dtype, [&](auto t) {
    using T = decltype(t);
    using L = Lane<T>;
    if constexpr (std::is_floating_point_v<T> || is_reduced<T>) {
      if (args.mask)
        return rectify_with_mask<T>(args.numel, static_cast<const L*>(args.input), static_cast<L*>(args.output),
                                    args.mask);
    }
    map<rectified<T>>(args.numel, static_cast<L*>(args.output), static_cast<const L*>(args.input));
  });
}

void relu_backward(const ReluBackwardArgs& args) {
  count_run(parts::relu_backward.runs);
  dispatch_real(args.dtype, [&](auto t) {
    using T = decltype(t);
    using L = Lane<T>;
    map<gated<T>>(args.numel, static_cast<L*>(args.grad_input), static_cast<const L*>(args.grad_output),
                  static_cast<const L*>(args.output));
  });
}

void relu_mask_backward(const ReluMaskBackwardArgs& args) {
  count_run(parts::relu_mask_backward.runs);
  dispatch_floating(args.dtype, [&](auto t) {
    using T = decltype(t);
    using L = Lane<T>;
    gate_by_mask<T>(args.numel, static_cast<const L*>(args.grad_output), args.mask, static_cast<L*>(args.grad_input));
  });
}

}  // namespace pyops::cpu
