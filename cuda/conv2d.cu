// output[n, o, y, x] = bias[o] + sum over c, i, j of weight[o, c, i, j] input[n, c, y stride + i dilation - padding,
// ..], rectified if asked for, of images in either layout. One thread for each output.
//
// Sums are taken in float (double for double) over the taps inside the image, in an order that depends on the shape
// only, and rounded once.
#include "conv2d.h"
#include "launchers.h"

namespace pyops::cuda {
namespace {

template <class T, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    forward(Conv<Index> conv, const T* input, const T* weight, const T* bias, T* output, bool relu) {
  const int64_t number = thread_number();
  if (number >= conv.output.count) return;
  const Position<Index> at = conv.output.position(static_cast<Index>(number));
  const T value = finish_conv(convolve(conv, input, weight, at), bias, at.c);
  output[number] = relu ? narrow<T>(rectified(widen(value))) : value;
}

}  // namespace

cudaError_t conv2d(const Conv2dArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    return dispatch_conv_index(x.shape, [&](auto index) {
      using T = decltype(t);
      using Index = decltype(index);
      const Conv<Index> conv(x.shape);
      return launch_for(forward<T, Index>, conv.output.count, stream, conv, static_cast<const T*>(x.input),
                        static_cast<const T*>(x.weight), static_cast<const T*>(x.bias), static_cast<T*>(x.output),
                        x.relu);
    });
  });
}

}  // namespace pyops::cuda
