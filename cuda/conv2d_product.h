// conv2d and its gradients as products of matrices (gemm.h) that are never in memory: their elements are found where
// they lie in the images. Without groups:
//
//   output[pixel, o]       = sum over taps        windows(pixel, tap) weight(o, tap)
//   grad_input[element, c] = sum over o and tap   meetings(element, (o, tap)) weight(c, (o, tap))
//   grad_weight[o, tap]    = sum over pixels      grad_output(o, pixel) windows(pixel, tap)
//
// where a tap is c, i, j. What is summed over runs in the order in which images lie in memory, so that neighbouring
// threads read neighbours: channels outermost for N C H W, innermost for N H W C.
//
// Taps outside the image are read as 0. Times an infinity that is NaN, where a sum over the taps inside has no such
// term; so a NaN is summed again by the generic way, which asks for each tap.
// Registers (sm_90): 128 at most for float, 166 for double, 198 on tensor cores; shared memory as in gemm.h.
#pragma once

#include "conv2d_generic.h"
#include "gemm.h"

namespace pyops::cuda {

// What a sum runs over: a channel and the position of a tap.
template <class Index, bool channels_last>
struct Depth {
  Divider<Index> channels, kernel_h, kernel_w;
  struct Term {
    Index channel, i, j;
  };
  __device__ __forceinline__ Term operator()(Index k) const {
    Term term;
    if constexpr (channels_last) term.channel = take_digit(k, channels);
    term.j = take_digit(k, kernel_w);
    if constexpr (channels_last) {
      term.i = k;
    } else {
      term.i = take_digit(k, kernel_h);
      term.channel = k;
    }
    return term;
  }
};

// Element (output pixel, tap): the input that the tap meets.
template <class T, class Index, bool channels_last>
struct WindowMatrix {
  static constexpr bool along_k = channels_last, has_packs = channels_last;
  Conv<Index> conv;
  Depth<Index, channels_last> taps;
  const T* input;
  bool packs;
  __device__ __forceinline__ T operator()(Index row, Index k) const { return load<T>(row, k); }
  __device__ __forceinline__ Pack<T> pack(Index row, Index k) const { return load<Pack<T>>(row, k); }

 private:
  template <class Loaded>
  __device__ __forceinline__ Loaded load(Index row, Index k) const {
    const auto pixel = conv.output.pixel(row);
    const auto tap = taps(k);
    const Index h = conv.input_h(pixel.h, tap.i), w = conv.input_w(pixel.w, tap.j);
    if (h < 0 || w < 0 || h >= conv.input.height() || w >= conv.input.width()) return Loaded{};
    return *reinterpret_cast<const Loaded*>(input + conv.input.offset(pixel.n, tap.channel, h, w));
  }
};

// Element (input pixel, output channel and tap): the gradient of the output that met the input through the tap.
template <class T, class Index, bool channels_last>
struct MeetingMatrix {
  static constexpr bool along_k = channels_last, has_packs = channels_last;
  Conv<Index> conv;
  Depth<Index, channels_last> taps;
  const T* grad_output;
  bool packs;
  __device__ __forceinline__ T operator()(Index row, Index k) const { return load<T>(row, k); }
  __device__ __forceinline__ Pack<T> pack(Index row, Index k) const { return load<Pack<T>>(row, k); }

 private:
  template <class Loaded>
  __device__ __forceinline__ Loaded load(Index row, Index k) const {
    const auto pixel = conv.input.pixel(row);
    const auto tap = taps(k);
    Index y = pixel.h + conv.padding_h - tap.i * conv.dilation_h;
    Index x = pixel.w + conv.padding_w - tap.j * conv.dilation_w;
    if (y < 0 || x < 0 || take_digit(y, conv.stride_h) != 0 || take_digit(x, conv.stride_w) != 0) return Loaded{};
    if (y >= conv.output.height() || x >= conv.output.width()) return Loaded{};
    return *reinterpret_cast<const Loaded*>(grad_output + conv.output.offset(pixel.n, tap.channel, y, x));
  }
};

// The weight in the order of a product, [row][k]: rows are output channels and k goes over input channels and taps, or
// the other way round, by their strides in the weight.
template <class T, class Index, bool channels_last>
__global__ void __launch_bounds__(block_threads, 1)
    order_weight(Depth<Index, channels_last> taps, Divider<Index> depth, const T* weight, Index row_stride,
                 Index channel_stride, int64_t count, T* ordered) {
  const int64_t number = thread_number();
  if (number >= count) return;
  auto row = static_cast<Index>(number);
  const auto tap = taps(take_digit(row, depth));
  ordered[number] = weight[row * row_stride + tap.channel * channel_stride + tap.i * taps.kernel_w.value() + tap.j];
}

// Element (channel, pixel) of images N C H W.
template <class T, class Index>
struct ChannelMatrix {
  static constexpr bool along_k = true, has_packs = false;
  Images<Index> images;
  const T* data;
  __device__ __forceinline__ T operator()(Index row, Index k) const {
    const auto pixel = images.pixel(k);
    return data[images.offset(pixel.n, row, pixel.h, pixel.w)];
  }
};

// The same of images in either layout.
template <bool channels_last, class Index, class T>
auto channel_matrix(const Images<Index>& images, const T* data) {
  if constexpr (channels_last) {
    return Matrix<T, Index, false>(data, images.C.value());
  } else {
    return ChannelMatrix<T, Index>{images, data};
  }
}

template <class Matrix>
struct Transposed {
  static constexpr bool along_k = !Matrix::along_k, has_packs = Matrix::has_packs;
  Matrix matrix;
  bool packs = matrix.packs;
  template <class Index>
  __device__ __forceinline__ auto operator()(Index row, Index k) const {
    return matrix(k, row);
  }
  template <class Index>
  __device__ __forceinline__ auto pack(Index row, Index k) const {
    return matrix.pack(k, row);
  }
};

template <class T, class Index, bool channels_last>
struct StoreOutput {
  Conv<Index> conv;
  const T *input, *weight, *bias;
  T* output;
  bool relu, has_border;
  __device__ __forceinline__ void operator()(Index row, Index column, Compute<T> sum) const {
    const auto pixel = conv.output.pixel(channels_last ? row : column);
    const Position<Index> at{pixel.n, channels_last ? column : row, pixel.h, pixel.w};
    if (has_border && sum != sum) sum = convolve(conv, input, weight, at);
    const T value = finish_conv(sum, bias, at.c);
    output[conv.output.offset(at.n, at.c, at.h, at.w)] = relu ? narrow<T>(rectified(widen(value))) : value;
  }
};

template <class T, class Index, bool channels_last>
struct StoreGradInput {
  Conv<Index> conv;
  const T *grad_output, *weight;
  T* grad_input;
  __device__ __forceinline__ void operator()(Index row, Index column, Compute<T> sum) const {
    const auto pixel = conv.input.pixel(channels_last ? row : column);
    const Position<Index> at{pixel.n, channels_last ? column : row, pixel.h, pixel.w};
    if (sum != sum) sum = gradient_of_input(conv, grad_output, weight, at);
    grad_input[conv.input.offset(at.n, at.c, at.h, at.w)] = narrow<T>(sum);
  }
};

template <class T, class Index, bool channels_last>
struct StoreGradWeight {
  Conv<Index> conv;
  Depth<Index, channels_last> taps;
  const T *grad_output, *input;
  T* grad_weight;
  Index pixels;
  bool has_border;
  __device__ __forceinline__ void operator()(Index row, Index column, Compute<T> sum) const {
    const auto tap = taps(column);
    const Index offset = conv.weight_offset(row, tap.channel, tap.i, tap.j);
    if (has_border && sum != sum) sum = gradient_of_weight<T, Index>(conv, grad_output, input, offset, 0, 1, pixels);
    grad_weight[offset] = narrow<T>(sum);
  }
};

// f(std::bool_constant<channels_last>).
template <class F>
cudaError_t dispatch_layout(bool channels_last, F&& f) {
  return channels_last ? f(std::true_type()) : f(std::false_type());
}

// Whether some tap of some window lies outside the image.
inline bool has_border(const Conv2dShape& s) {
  return s.padding_top > 0 || s.padding_left > 0 || (s.OH - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h >= s.H ||
         (s.OW - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w >= s.W;
}

// The product of pixels by channels, stored in whichever orientation writes neighbours by neighbouring threads.
template <bool channels_last, class T, class Index, class Pixels, class Channels, class Store>
cudaError_t pixel_product(int64_t pixels, int64_t channels, int64_t depth, const Pixels& pixel_matrix,
                          const Channels& channel_matrix, const Store& store, Workspace& workspace,
                          cudaStream_t stream) {
  if constexpr (channels_last) {
    return gemm<T, Index>(pixels, channels, depth, pixel_matrix, channel_matrix, store, workspace, stream);
  } else {
    return gemm<T, Index>(channels, pixels, depth, channel_matrix, pixel_matrix, store, workspace, stream);
  }
}

// Whether the channels of a tap can be read by 16 bytes where they lie side by side.
template <class T>
bool reads_packs(int64_t channels, const T* images) {
  return channels % Pack<T>::size == 0 && aligned_to_packs(images);
}

// Makes `ordered` a copy of the weight in the order of a product, whose rows are output or input channels.
template <class T, bool channels_last>
cudaError_t ordered_weight(const Depth<int32_t, channels_last>& taps, bool row_is_output, const Conv2dShape& s,
                           const T* weight, const T*& ordered, Workspace& workspace, cudaStream_t stream) {
  const int64_t size = s.kernel_h * s.kernel_w, count = s.O * s.C * size;
  const auto of_output = static_cast<int32_t>(s.C * size), of_input = static_cast<int32_t>(size);
  T* copy = workspace.array<T>(count);
  ordered = copy;
  return launch_for(order_weight<T, int32_t, channels_last>, count, stream, taps,
                    Divider<int32_t>((row_is_output ? s.C : s.O) * size), weight, row_is_output ? of_output : of_input,
                    row_is_output ? of_input : of_output, count, copy);
}

template <class T>
cudaError_t product_forward(const Conv2dArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_layout(x.shape.channels_last, [&](auto layout) {
    constexpr bool channels_last = decltype(layout)::value;
    using Index = int32_t;
    const Conv2dShape& s = x.shape;
    const Conv<Index> conv(s);
    const Depth<Index, channels_last> taps{Divider<Index>(s.C), Divider<Index>(s.kernel_h), Divider<Index>(s.kernel_w)};
    const auto *input = static_cast<const T*>(x.input), *weight = static_cast<const T*>(x.weight);
    const WindowMatrix<T, Index, channels_last> windows{conv, taps, input, reads_packs<T>(s.C, input)};
    const T* ordered = weight;  // N C H W: as it is
    if (channels_last)
      PYOPS_RETURN_ON_ERROR((ordered_weight<T>(taps, /*row_is_output=*/true, s, weight, ordered, workspace, stream)));
    const Matrix<T, Index, true> weights(ordered, s.C * s.kernel_h * s.kernel_w);
    const StoreOutput<T, Index, channels_last> store{
        conv, input, weight, static_cast<const T*>(x.bias), static_cast<T*>(x.output), x.relu, has_border(s)};
    return pixel_product<channels_last, T, Index>(s.N * s.OH * s.OW, s.O, s.C * s.kernel_h * s.kernel_w, windows,
                                                  weights, store, workspace, stream);
  });
}

template <class T>
cudaError_t product_backward_input(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_layout(x.shape.channels_last, [&](auto layout) {
    constexpr bool channels_last = decltype(layout)::value;
    using Index = int32_t;
    const Conv2dShape& s = x.shape;
    const Conv<Index> conv(s);
    const Depth<Index, channels_last> taps{Divider<Index>(s.O), Divider<Index>(s.kernel_h), Divider<Index>(s.kernel_w)};
    const auto *grad_output = static_cast<const T*>(x.grad_output), *weight = static_cast<const T*>(x.weight);
    const MeetingMatrix<T, Index, channels_last> meetings{conv, taps, grad_output, reads_packs<T>(s.O, grad_output)};
    const T* ordered = nullptr;
    PYOPS_RETURN_ON_ERROR((ordered_weight<T>(taps, /*row_is_output=*/false, s, weight, ordered, workspace, stream)));
    const Matrix<T, Index, true> weights(ordered, s.O * s.kernel_h * s.kernel_w);
    const StoreGradInput<T, Index, channels_last> store{conv, grad_output, weight, static_cast<T*>(x.grad_input)};
    return pixel_product<channels_last, T, Index>(s.N * s.H * s.W, s.C, s.O * s.kernel_h * s.kernel_w, meetings,
                                                  weights, store, workspace, stream);
  });
}

template <class T>
cudaError_t product_backward_weight(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_layout(x.shape.channels_last, [&](auto layout) {
    constexpr bool channels_last = decltype(layout)::value;
    using Index = int32_t;
    const Conv2dShape& s = x.shape;
    const Conv<Index> conv(s);
    const Depth<Index, channels_last> taps{Divider<Index>(s.C), Divider<Index>(s.kernel_h), Divider<Index>(s.kernel_w)};
    const auto *grad_output = static_cast<const T*>(x.grad_output), *input = static_cast<const T*>(x.input);
    const int64_t pixels = s.N * s.OH * s.OW;
    const auto gradients = channel_matrix<channels_last, Index>(conv.output, grad_output);
    const Transposed<WindowMatrix<T, Index, channels_last>> windows{{conv, taps, input, reads_packs<T>(s.C, input)}};
    const StoreGradWeight<T, Index, channels_last> store{
        conv, taps, grad_output, input, static_cast<T*>(x.grad_weight), static_cast<Index>(pixels), has_border(s)};
    return gemm<T, Index>(s.O, s.C * s.kernel_h * s.kernel_w, pixels, gradients, windows, store, workspace, stream);
  });
}

}  // namespace pyops::cuda
