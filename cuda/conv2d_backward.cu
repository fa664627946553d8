// The gradients of conv2d, each if it is requested: of the input (a sum over the taps through which output pixels have
// read an element), of the weight (a sum over all output pixels for each tap) and of the bias (a sum over all pixels of
// a channel). Images are in either layout, and the weight is contiguous.
//
// conv2d.h chooses the algorithms by the shape. The generic ones are in this file: they have one thread for each
// element of grad_input, and one block for each part of each sum of grad_weight (sums.h).
//
// Only taps inside the image take part, so that an infinite factor over the border gives no NaN. Sums are taken in an
// order that depends only on the shape. On sm_80 and sm_90 the generic kernel for the input takes 72 to 90 registers,
// for double at most 123, so that an SM holds two blocks of 256 threads, and no shared memory; for weight and bias,
// sums.h says what its kernels take.
#include "conv2d_generic.h"
#include "conv2d_product.h"
#include "sums.h"

namespace pyops::cuda {
namespace {

template <class T, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    backward_input(const __grid_constant__ Conv<Index> conv, const T* grad_output, const T* weight, T* grad_input) {
  const int64_t number = thread_number();
  if (number >= conv.input.count) return;
  const Position<Index> at = conv.input.position(static_cast<Index>(number));
  grad_input[number] = narrow<T>(gradient_of_input(conv, grad_output, weight, at));
}

template <class T, class Index>
struct WeightTerms {
  Conv<Index> conv;
  const T *grad_output, *input;

  __device__ __forceinline__ Compute<T> operator()(Index item, int64_t first, Index step, int64_t end) const {
    return gradient_of_weight(conv, grad_output, input, item, static_cast<Index>(first), step, static_cast<Index>(end));
  }
};

// The terms of the bias gradient of images whose planes are contiguous; an item is an output channel.
template <class T, class Index>
struct BiasTerms {
  Divider<Index> plane;
  Index n_stride;
  const T* grad_output;

  __device__ __forceinline__ Compute<T> operator()(Index item, int64_t first, Index step, int64_t end) const {
    Compute<T> sum = 0;
    for (auto k = static_cast<Index>(first); k < static_cast<Index>(end); k += step) {
      Index n = k;
      const Index pixel = take_digit(n, plane);
      sum += widen(grad_output[n * n_stride + item * plane.value() + pixel]);
    }
    return sum;
  }
};

template <class T, class Index>
cudaError_t generic_backward_input(const Conv2dBackwardArgs& x, cudaStream_t stream) {
  const Conv<Index> conv(x.shape);
  return launch_for(backward_input<T, Index>, conv.input.count, stream, conv, static_cast<const T*>(x.grad_output),
                    static_cast<const T*>(x.weight), static_cast<T*>(x.grad_input));
}

template <class T, class Index>
cudaError_t generic_backward_weight(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  const Conv2dShape& s = x.shape;
  const WeightTerms<T, Index> terms{Conv<Index>(s), static_cast<const T*>(x.grad_output),
                                    static_cast<const T*>(x.input)};
  return sum(terms, s.O * (s.C / s.groups) * s.kernel_h * s.kernel_w, s.N * s.OH * s.OW, static_cast<T*>(x.grad_weight),
             workspace, stream);
}

template <class T, class Index>
cudaError_t backward_bias(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  const Conv2dShape& s = x.shape;
  const int64_t plane = s.OH * s.OW;
  const auto* grad_output = static_cast<const T*>(x.grad_output);
  auto* grad_bias = static_cast<T*>(x.grad_bias);
  if (s.channels_last) return sum_columns(grad_output, s.N * plane, s.O, grad_bias, workspace, stream);
  const BiasTerms<T, Index> terms{Divider<Index>(plane), static_cast<Index>(s.O * plane), grad_output};
  return sum(terms, s.O, s.N * plane, grad_bias, workspace, stream);
}

}  // namespace

cudaError_t conv2d_backward(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    return dispatch_index(largest_conv_offset(x.shape), [&](auto index) {
      using T = decltype(t);
      using Index = decltype(index);
      if (x.grad_input != nullptr) {
        const ConvWay way = conv_backward_input_way(x.shape);
        PYOPS_RETURN_ON_ERROR((way == ConvWay::tiny        ? tiny_backward_input(x, stream)
                               : way == ConvWay::product   ? product_backward_input<T>(x, workspace, stream)
                               : way == ConvWay::depthwise ? depthwise_correlation(x, stream)
                               : way == ConvWay::grouped   ? grouped_correlation(x, stream)
                                                           : generic_backward_input<T, Index>(x, stream)));
      }
      if (x.grad_weight != nullptr) {
        const ConvWay way = conv_backward_weight_way(x.shape);
        PYOPS_RETURN_ON_ERROR((way == ConvWay::product   ? product_backward_weight<T>(x, workspace, stream)
                               : way == ConvWay::grouped ? grouped_backward_weight(x, workspace, stream)
                                                         : generic_backward_weight<T, Index>(x, workspace, stream)));
      }
      return x.grad_bias == nullptr ? cudaSuccess : backward_bias<T, Index>(x, workspace, stream);
    });
  });
}

}  // namespace pyops::cuda
