// Shared by the CPU kernels: the compute type, intervals, prefetching, dtype dispatch, and the list of kernels. These
// sources are compiled once per instruction set (CPU_CAPABILITY), each time into a module of its own, and
// pyops/_load.py chooses between the modules.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../kernels.h"

namespace pyops::cpu {

// The 16-bit types are computed in float32 and rounded once, when the result is stored.
template <class T>
constexpr bool is_reduced = std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>;
template <class T>
using Compute = std::conditional_t<is_reduced<T>, float, T>;

// The value for the instruction set that this file is compiled for. There are 16 vector registers with the baseline,
// where a Vectorized takes two of them, 16 with AVX2 and 32 with AVX-512.
template <class T>
constexpr T by_capability([[maybe_unused]] T baseline, [[maybe_unused]] T avx2, [[maybe_unused]] T avx512) {
#if defined(CPU_CAPABILITY_AVX512)
  return avx512;
#elif defined(CPU_CAPABILITY_AVX2)
  return avx2;
#else
  return baseline;
#endif
}

// Whether comparing and blending vectors are single instructions. The baseline emulates them lane by lane, which is
// slower than scalar code.
constexpr bool has_vector_compares = by_capability(false, true, true);

inline constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The integers i with begin <= i < end; there are none if end <= begin.
struct Range {
  int64_t begin, end;

  int64_t size() const { return std::max(end - begin, int64_t{0}); }
  bool has(int64_t i) const { return begin <= i && i < end; }
};

// The i in [0, count) for which first + i * step lies in [0, size): the part of a row of elements, or of the taps of a
// kernel, that is inside the image. It divides only if the row leaves the image and step is not 1, because a division
// takes as long as copying a short row.
inline Range range_inside(int64_t first, int64_t step, int64_t count, int64_t size) {
  const auto steps = [step](int64_t distance) { return step == 1 ? distance : ceil_div(distance, step); };
  const int64_t begin = first < 0 ? std::min(steps(-first), count) : 0;
  const int64_t end = first + (count - 1) * step < size ? count : std::clamp(steps(size - first), begin, count);
  return {begin, end};
}

// A column of pixels lies in memory as a row does. Where images, outputs and windows are columns, they are computed as
// rows, because that is what vectors run along. (Networks of audio and time series have such shapes.)
inline bool is_column(const Conv2dShape& s) {
  return s.W == 1 && s.OW == 1 && s.kernel_w == 1 && s.padding_left == 0;
}
inline bool is_column(const MaxPool2dShape& s) {
  return s.W == 1 && s.OW == 1 && s.kernel_w == 1 && s.padding_w == 0;
}
inline void make_row(Conv2dShape& s) {
  std::swap(s.H, s.W), std::swap(s.OH, s.OW), std::swap(s.kernel_h, s.kernel_w), std::swap(s.stride_h, s.stride_w);
  std::swap(s.padding_top, s.padding_left), std::swap(s.dilation_h, s.dilation_w);
}
inline void make_row(MaxPool2dShape& s) {
  std::swap(s.H, s.W), std::swap(s.OH, s.OW), std::swap(s.kernel_h, s.kernel_w), std::swap(s.stride_h, s.stride_w);
  std::swap(s.padding_h, s.padding_w), std::swap(s.dilation_h, s.dilation_w);
}
// Whether all shapes are columns, of more than one pixel.
template <class... Shape>
bool are_columns(const Shape&... shapes) {
  return (is_column(shapes) && ...) && ((shapes.H > 1) || ...);
}

constexpr int64_t cache_line = 64;  // bytes

// Prefetches memory that will be read or written soon; it need not exist.
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += cache_line) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// Prefetches memory a little ahead of what is read or written now, for loops of masked loads and stores, which do not
// trigger the hardware prefetcher.
inline void prefetch_ahead(const void* now, int64_t bytes) {
  prefetch(static_cast<const char*>(now) + 2048, bytes);
}

// F(T) for every floating type, to instantiate the templates that other sources call.
#define FOR_EACH_FLOATING(F) F(float) F(double) F(c10::BFloat16) F(c10::Half)

// f(T{}) for the floating type that dtype names: dispatch_floating(dtype, [&](auto t) { using T = decltype(t); ... }).
template <class F>
void dispatch_floating(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(c10::BFloat16{});
    case DType::f16:
      return f(c10::Half{});
    default:
      return f(float{});
  }
}

// f(T{}) for the floating or integer type that dtype names.
template <class F>
void dispatch_real(DType dtype, F&& f) {
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

void relu(const ReluArgs&);
void relu_backward(const ReluBackwardArgs&);
void relu_mask_backward(const ReluMaskBackwardArgs&);
void linear(const LinearArgs&);
void linear_backward(const LinearBackwardArgs&);
void conv2d(const Conv2dArgs&);
void conv2d_backward(const Conv2dBackwardArgs&);
void max_pool2d(const MaxPool2dArgs&);
void max_pool2d_backward(const MaxPool2dBackwardArgs&);
void max_pool2d_gather(const MaxPool2dGatherArgs&);
void max_pool2d_indices(const MaxPool2dIndicesArgs&);
void conv2d_relu_max_pool2d(const Conv2dReluMaxPool2dArgs&);
bool conv2d_relu_max_pool2d_backward(const Conv2dReluMaxPool2dBackwardArgs&);

}  // namespace pyops::cpu
