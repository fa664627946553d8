// output = max(input, 0), and grad_input = grad_output where the output, or the bit that the forward kept of it, lets
// the gradient pass, else 0. The kernels work element by element on any dense layout.
//
// A thread reads and writes 16 bytes at once if the tensors are aligned to that, which slices often are not. The mask
// has one bit for each element and so costs 1/32 of the traffic of float: shuffles gather the bits of a warp's
// elements, which are written as 32-bit words.
//
// NaN and -0.0 are kept, and a NaN output passes its gradient. The bits past the last element are 0. The kernels take
// at most 40 registers on sm_80 and sm_90, so that an SM holds six blocks of 256 threads, and no shared memory.
#include "common.h"

namespace pyops::cuda {
namespace {

template <class T>
constexpr int pack = Pack<T>::size;

// Elements [first, first + pack) of p; those past the end are zeros.
template <class T>
__device__ Pack<T> load(const T* p, int64_t first, int64_t count, bool aligned) {
  if (aligned && first + pack<T> <= count) return *reinterpret_cast<const Pack<T>*>(p + first);
  Pack<T> result;
  for (int i = 0; i < pack<T>; ++i) result.values[i] = first + i < count ? p[first + i] : narrow<T>(Compute<T>(0));
  return result;
}

template <class T>
__device__ void store(T* p, const Pack<T>& values, int64_t first, int64_t count, bool aligned) {
  if (aligned && first + pack<T> <= count) {
    *reinterpret_cast<Pack<T>*>(p + first) = values;
  } else {
    for (int i = 0; i < pack<T> && first + i < count; ++i) p[first + i] = values.values[i];
  }
}

template <class T>
__global__ void __launch_bounds__(block_threads, 1) forward(const T* input, T* output, int64_t count, bool aligned) {
  const int64_t first = thread_number() * pack<T>;
  if (first >= count) return;
  Pack<T> values = load(input, first, count, aligned);
  for (T& value : values.values) value = narrow<T>(rectified(widen(value)));
  store(output, values, first, count, aligned);
}

// The word of the mask in which bit i is that of element first + i, for i < pack.
template <class T>
__device__ unsigned mask_bits(const uint32_t* mask, int64_t first) {
  return mask[first / 32] >> (first % 32);
}

template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    forward_with_mask(const T* input, T* output, uint32_t* mask, int64_t count, int64_t words, bool aligned) {
  constexpr int lanes = 32 / pack<T>;  // lanes that share a word
  const int64_t first = thread_number() * pack<T>;
  Pack<T> values = load(input, first, count, aligned);  // zeros past the end, which pass nothing
  unsigned bits = 0;
  for (int i = 0; i < pack<T>; ++i) {
    T& value = values.values[i];
    value = narrow<T>(rectified(widen(value)));
    bits |= static_cast<unsigned>(!(widen(value) <= 0)) << i;
  }
  bits <<= first % 32;
  for (int distance = 1; distance < lanes; distance *= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, distance);
  if (first % 32 == 0 && first / 32 < words) mask[first / 32] = bits;
  if (first < count) store(output, values, first, count, aligned);
}

template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    backward(const T* grad_output, const T* output, T* grad_input, int64_t count, bool aligned) {
  const int64_t first = thread_number() * pack<T>;
  if (first >= count) return;
  Pack<T> grads = load(grad_output, first, count, aligned);
  const Pack<T> outputs = load(output, first, count, aligned);
  for (int i = 0; i < pack<T>; ++i)
    if (widen(outputs.values[i]) <= 0) grads.values[i] = narrow<T>(Compute<T>(0));
  store(grad_input, grads, first, count, aligned);
}

template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    mask_backward(const T* grad_output, const uint32_t* mask, T* grad_input, int64_t count, bool aligned) {
  const int64_t first = thread_number() * pack<T>;
  if (first >= count) return;
  Pack<T> grads = load(grad_output, first, count, aligned);
  const unsigned bits = mask_bits<T>(mask, first);
  for (int i = 0; i < pack<T>; ++i)
    if ((bits >> i & 1) == 0) grads.values[i] = narrow<T>(Compute<T>(0));
  store(grad_input, grads, first, count, aligned);
}

}  // namespace

cudaError_t relu(const ReluArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch_real(x.dtype, [&](auto t) {
    using T = decltype(t);
    const auto* input = static_cast<const T*>(x.input);
    auto* output = static_cast<T*>(x.output);
    const bool aligned = aligned_to_packs(input, output);
    if constexpr (std::is_same_v<Compute<T>, float> || std::is_same_v<T, double>) {
      if (x.mask != nullptr) {
        const int64_t words = ceil_div(x.numel, 64) * 2;  // 32-bit halves of the mask's words, low ones first
        return launch_for(forward_with_mask<T>, words * (32 / pack<T>), stream, input, output,
                          reinterpret_cast<uint32_t*>(x.mask), x.numel, words, aligned);
      }
    }
    return launch_for(forward<T>, ceil_div(x.numel, pack<T>), stream, input, output, x.numel, aligned);
  });
}

cudaError_t relu_backward(const ReluBackwardArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch_real(x.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = aligned_to_packs(x.grad_output, x.output, x.grad_input);
    return launch_for(backward<T>, ceil_div(x.numel, pack<T>), stream, static_cast<const T*>(x.grad_output),
                      static_cast<const T*>(x.output), static_cast<T*>(x.grad_input), x.numel, aligned);
  });
}

cudaError_t relu_mask_backward(const ReluMaskBackwardArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = aligned_to_packs(x.grad_output, x.grad_input);
    return launch_for(mask_backward<T>, ceil_div(x.numel, pack<T>), stream, static_cast<const T*>(x.grad_output),
                      reinterpret_cast<const uint32_t*>(x.mask), static_cast<T*>(x.grad_input), x.numel, aligned);
  });
}

}  // namespace pyops::cuda
