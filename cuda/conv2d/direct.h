// One value of a convolution or of its gradients, summed by one thread: the direct algorithm, which supports every
// shape. The sums run over the taps inside the image only, so that an infinite factor over the border gives no NaN.
#pragma once

#include "problem.h"

namespace pyops::cuda {

// The most terms in one chain of additions; longer sums are taken in parts, so that they do not lose digits.
constexpr int longest_conv_chain = 512;

// The convolution at output position `at`, without bias. Its chains run over c, i, j in this order.
template <class T, class Index>
__device__ __noinline__ Compute<T> convolve(const Conv<Index>& conv, const T* input, const T* weight,
                                            const Position<Index>& at) {
  using C = Compute<T>;
  const Index h0 = conv.input_h(at.h, 0), w0 = conv.input_w(at.w, 0);
  const Taps<Index> rows(h0, conv.kernel_h.value(), conv.dilation_h, conv.input.height());
  const Taps<Index> columns(w0, conv.kernel_w.value(), conv.dilation_w, conv.input.width());
  const auto channels = conv.in_per_group.value();
  const Index first_channel = conv.out_per_group.quotient(at.c) * channels;
  C sum = 0, chain = 0;
  int length = 0;
  for (Index c = 0; c < channels; ++c) {
    for (Index i = rows.begin; i < rows.end; ++i) {
      for (Index j = columns.begin; j < columns.end; ++j) {
        const T value =
            input[conv.input.offset(at.n, first_channel + c, h0 + i * conv.dilation_h, w0 + j * conv.dilation_w)];
        chain = multiply_add(widen(value), widen(weight[conv.weight_offset(at.c, c, i, j)]), chain);
        if (++length == longest_conv_chain) {
          sum += chain;
          chain = 0;
          length = 0;
        }
      }
    }
  }
  return sum + chain;
}

// The input gradient at `at`: a sum over the taps through which output pixels have read this element.
template <class T, class Index>
__device__ __noinline__ Compute<T> gradient_of_input(const Conv<Index>& conv, const T* grad_output, const T* weight,
                                                     const Position<Index>& at) {
  using C = Compute<T>;
  const auto outputs = conv.out_per_group.value();
  Index group = at.c;
  const Index c = take_digit(group, conv.in_per_group), first_output = group * outputs;
  C sum = 0;
  for (Index i = 0; i < conv.kernel_h.value(); ++i) {
    Index y = at.h + conv.padding_h - i * conv.dilation_h;
    if (y < 0 || take_digit(y, conv.stride_h) != 0 || y >= conv.output.height()) continue;
    for (Index j = 0; j < conv.kernel_w.value(); ++j) {
      Index x = at.w + conv.padding_w - j * conv.dilation_w;
      if (x < 0 || take_digit(x, conv.stride_w) != 0 || x >= conv.output.width()) continue;
      C chain = 0;  // one for each tap, so that long sums do not lose digits
      for (Index o = first_output; o < first_output + outputs; ++o)
        chain = multiply_add(widen(grad_output[conv.output.offset(at.n, o, y, x)]),
                             widen(weight[conv.weight_offset(o, c, i, j)]), chain);
      sum += chain;
    }
  }
  return sum;
}

// The gradient of one weight, summed over the output pixels first, first + step, ..., numbered in the order n, y, x.
template <class T, class Index>
__device__ __noinline__ Compute<T> gradient_of_weight(const Conv<Index>& conv, const T* grad_output, const T* input,
                                                      Index weight, Index first, Index step, Index pixels) {
  const Index j = take_digit(weight, conv.kernel_w), i = take_digit(weight, conv.kernel_h);
  const Index c = take_digit(weight, conv.in_per_group), o = weight;
  const Index channel = conv.out_per_group.quotient(o) * conv.in_per_group.value() + c;
  Compute<T> sum = 0;
  for (; first < pixels; first += step) {
    const auto pixel = conv.output.pixel(first);
    const Index h = conv.input_h(pixel.h, i), w = conv.input_w(pixel.w, j);
    if (h < 0 || w < 0 || h >= conv.input.height() || w >= conv.input.width()) continue;
    sum = multiply_add(widen(grad_output[conv.output.offset(pixel.n, o, pixel.h, pixel.w)]),
                       widen(input[conv.input.offset(pixel.n, channel, h, w)]), sum);
  }
  return sum;
}

}  // namespace pyops::cuda
