// The forward of conv2d, with relu if requested, for images in either layout:
//
//   output[n, o, y, x] = bias[o] + sum over c, i, j of
//     weight[o, c, i, j] input[n, c, y stride + i dilation - padding, ..]
//
// conv_way (conv2d.h) chooses the algorithm by the shape. The generic one, in this file, has one thread for each
// output.
//
// Sums are taken in float (in double for double) over the taps inside the image, in an order that depends only on the
// shape, and are rounded once. On sm_80 and sm_90 the generic kernel takes 56 to 114 registers, so that an SM holds two
// blocks of 256 threads; for double at most 148, one block. It takes no shared memory.
#include "conv2d_generic.h"
#include "conv2d_product.h"

namespace pyops::cuda {
namespace {

template <class T, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    generic_forward(const __grid_constant__ Conv<Index> conv, const T* input, const T* weight, const T* bias, T* output,
                    bool relu) {
  const int64_t number = thread_number();
  if (number >= conv.output.count) return;
  const Position<Index> at = conv.output.position(static_cast<Index>(number));
  const T value = finish_conv(convolve(conv, input, weight, at), bias, at.c);
  output[number] = relu ? narrow<T>(rectified(widen(value))) : value;
}

}  // namespace

cudaError_t conv2d(const Conv2dArgs& x, Workspace& workspace, cudaStream_t stream) {
  const ConvWay way = conv_way(x.shape);
  if (way == ConvWay::tiny) return tiny_forward(x, stream);
  if (way == ConvWay::depthwise) return depthwise_correlation(x, stream);
  if (way == ConvWay::grouped) return grouped_correlation(x, stream);
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    if (way == ConvWay::product) return product_forward<T>(x, workspace, stream);
    return dispatch_index(largest_conv_offset(x.shape), [&](auto index) {
      using Index = decltype(index);
      const Conv<Index> conv(x.shape);
      return launch_for(generic_forward<T, Index>, conv.output.count, stream, conv, static_cast<const T*>(x.input),
                        static_cast<const T*>(x.weight), static_cast<const T*>(x.bias), static_cast<T*>(x.output),
                        x.relu);
    });
  });
}

}  // namespace pyops::cuda
