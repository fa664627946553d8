// output = relu(max_pool2d(conv2d(input, weight, bias))), an image or a few at a time: what the convolution writes is
// still in cache when the pooling reads it, and never goes to memory. All operands in one layout, NCHW or NHWC.
//
// The maximum is taken before the rectification, with which it commutes: a quarter of the values to rectify for 2x2
// windows, and the argmax is all that the gradient needs, with one number more for the windows that pass none.
// Values, and the windows' winners where they are above 0, are those of the three ops one after the other; a window
// without gradient gives +0. The chunks depend on the shape only.
#include <algorithm>

#include "gemm.h"

namespace pyops::cpu {
namespace {

template <class T, class A>
void rectify(T* values, A* argmax, int64_t count, A dead) {
  using C = Compute<T>;
  for (int64_t i = 0; i < count; ++i) {
    const bool is_dead = static_cast<C>(values[i]) <= C(0);
    values[i] = is_dead ? T(0) : values[i];
    argmax[i] = is_dead ? dead : argmax[i];
  }
}

// The arguments for images [n, n + count) of the batch.
template <class T, class A>
void forward(const Conv2dReluMaxPool2dArgs& x, int64_t n, int64_t count, T* between) {
  const Conv2dShape& s = x.conv.shape;
  Conv2dArgs conv = x.conv;
  conv.shape.N = count;
  conv.input = static_cast<const T*>(x.conv.input) + n * s.C * s.H * s.W;
  conv.output = between;
  conv.relu = false;
  conv2d(conv);
  const int64_t pooled = s.O * x.pool.OH * x.pool.OW;
  T* output = static_cast<T*>(x.output) + n * pooled;
  A* argmax = static_cast<A*>(x.argmax) + n * pooled;
  MaxPool2dShape pool = x.pool;
  pool.N = count;
  max_pool2d({conv.dtype, pool, between, output, argmax});
  rectify<T, A>(output, argmax, count * pooled, static_cast<A>(dead_window(pool.taps())));
}

}  // namespace

void conv2d_relu_max_pool2d(const Conv2dReluMaxPool2dArgs& x) {
  dispatch_floating(x.conv.dtype, [&](auto zero) {
    using T = decltype(zero);
    // A vector's lanes of images (conv2d_images.cpp) at least, and as many as half an L2 cache holds.
    constexpr int64_t lanes = Vec<T>::size(), cached = (512 << 10) / sizeof(T);
    const Conv2dShape& s = x.conv.shape;
    const int64_t image = s.O * s.OH * s.OW, kernel = s.kernel_h * s.kernel_w;
    const int64_t fitting = std::max(cached / image, int64_t{1});
    const int64_t count = std::min(fitting >= lanes ? fitting / lanes * lanes : fitting, s.N);
    const double flops = 2.0 * s.N * image * (s.C / s.groups) * kernel;
    for_each_task(ceil_div(s.N, count), flops, [&](int64_t task) {
      const int64_t n = task * count, images = std::min(count, s.N - n);
      T* between = scratch<T>(Scratch::between, count * image);
      max_pool2d_argmax_is_u8(x.pool.taps()) ? forward<T, uint8_t>(x, n, images, between)
                                             : forward<T, int64_t>(x, n, images, between);
    });
  });
}

}  // namespace pyops::cpu
