// The gradients of conv2d, each if asked for: of the input (which output pixels met this element, through which tap?),
// of the weight (a sum over all output pixels for each tap) and of the bias (a sum over all pixels of a channel).
// Images in either layout, weight contiguous.
//
// Generic, for any shape: one thread for each element of grad_input, one block for each part of each sum of grad_weight
// (sums.h). Only taps inside the image take part, so that an infinite factor over the border gives no NaN. Sums are
// taken in an order that depends on the shape only.
#include "conv2d.h"
#include "launchers.h"
#include "sums.h"

namespace pyops::cuda {
namespace {

template <class T, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    backward_input(Conv<Index> conv, const T* grad_output, const T* weight, T* grad_input) {
  using C = Compute<T>;
  const int64_t number = thread_number();
  if (number >= conv.input.count) return;
  const Position<Index> at = conv.input.position(static_cast<Index>(number));
  const auto outputs = static_cast<Index>(conv.out_per_group.divisor);
  Index group = at.c;
  const Index c = take_digit(group, conv.in_per_group), first_output = group * outputs;
  C sum = 0;
  for (Index i = 0; i < conv.kernel_h; ++i) {
    Index y = at.h + conv.padding_h - i * conv.dilation_h;
    if (y < 0 || take_digit(y, conv.stride_h) != 0 || y >= static_cast<Index>(conv.output.H.divisor)) continue;
    for (Index j = 0; j < conv.kernel_w; ++j) {
      Index x = at.w + conv.padding_w - j * conv.dilation_w;
      if (x < 0 || take_digit(x, conv.stride_w) != 0 || x >= static_cast<Index>(conv.output.W.divisor)) continue;
      C chain = 0;  // one for each tap, lest a long sum lose digits
      for (Index o = first_output; o < first_output + outputs; ++o)
        chain = multiply_add(widen(grad_output[conv.output.offset(at.n, o, y, x)]),
                             widen(weight[conv.weight_offset(o, c, i, j)]), chain);
      sum += chain;
    }
  }
  grad_input[number] = narrow<T>(sum);
}

// sum + the term of output pixel k, counted as n, y, x, for a weight.
template <class T, class Index>
struct WeightTerm {
  Conv<Index> conv;
  Divider<Index> kernel_h, kernel_w;
  const T *grad_output, *input;

  __device__ __forceinline__ Compute<T> operator()(Compute<T> sum, int64_t item, int64_t k) const {
    Index tap = static_cast<Index>(item), n = static_cast<Index>(k);
    const Index j = take_digit(tap, kernel_w), i = take_digit(tap, kernel_h);
    const Index c = take_digit(tap, conv.in_per_group), o = tap;
    const Index x = take_digit(n, conv.output.W), y = take_digit(n, conv.output.H);
    const Index h = y * static_cast<Index>(conv.stride_h.divisor) - conv.padding_h + i * conv.dilation_h;
    const Index w = x * static_cast<Index>(conv.stride_w.divisor) - conv.padding_w + j * conv.dilation_w;
    if (h < 0 || w < 0 || h >= static_cast<Index>(conv.input.H.divisor) ||
        w >= static_cast<Index>(conv.input.W.divisor))
      return sum;
    const Index channel = conv.out_per_group.quotient(o) * static_cast<Index>(conv.in_per_group.divisor) + c;
    return multiply_add(widen(grad_output[conv.output.offset(n, o, y, x)]),
                        widen(input[conv.input.offset(n, channel, h, w)]), sum);
  }
};

// The same for the bias of an output channel, of images whose planes are contiguous.
template <class T, class Index>
struct BiasTerm {
  Divider<Index> plane;
  Index n_stride;
  const T* grad_output;

  __device__ __forceinline__ Compute<T> operator()(Compute<T> sum, int64_t item, int64_t k) const {
    Index n = static_cast<Index>(k);
    const Index pixel = take_digit(n, plane);
    return sum +
           widen(grad_output[n * n_stride + static_cast<Index>(item) * static_cast<Index>(plane.divisor) + pixel]);
  }
};

}  // namespace

cudaError_t conv2d_backward(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    return dispatch_conv_index(x.shape, [&](auto index) {
      using T = decltype(t);
      using Index = decltype(index);
      const Conv2dShape& s = x.shape;
      const Conv<Index> conv(s);
      const auto* grad_output = static_cast<const T*>(x.grad_output);
      const int64_t plane = s.OH * s.OW;
      if (x.grad_input != nullptr)
        PYOPS_RETURN_ON_ERROR(launch_for(backward_input<T, Index>, conv.input.count, stream, conv, grad_output,
                                         static_cast<const T*>(x.weight), static_cast<T*>(x.grad_input)));
      if (x.grad_weight != nullptr) {
        const WeightTerm<T, Index> term{conv, Divider<Index>(s.kernel_h), Divider<Index>(s.kernel_w), grad_output,
                                        static_cast<const T*>(x.input)};
        const int64_t weights = s.O * (s.C / s.groups) * s.kernel_h * s.kernel_w;
        PYOPS_RETURN_ON_ERROR(sum(term, weights, s.N * plane, static_cast<T*>(x.grad_weight), workspace, stream));
      }
      if (x.grad_bias == nullptr) return cudaSuccess;
      auto* grad_bias = static_cast<T*>(x.grad_bias);
      if (s.channels_last) return sum_columns(grad_output, s.N * plane, s.O, grad_bias, workspace, stream);
      const BiasTerm<T, Index> term{Divider<Index>(plane), static_cast<Index>(s.O * plane), grad_output};
      return sum(term, s.O, s.N * plane, grad_bias, workspace, stream);
    });
  });
}

}  // namespace pyops::cuda
