// conv2d without groups, and its gradients, as implicit GEMMs: matrix products (gemm/gemm.h) whose operands are never
// in memory, because their elements are found in the images (conv2d/operands.h):
//
//   output[pixel, o]           = sum over c, i, j  windows(pixel, (c, i, j)) weight(o, (c, i, j))
//   grad_input[pixel, c]       = sum over o, i, j  windows of grad_output(pixel, (o, i, j)) weight(c, (o, i, j))
//   grad_weight[o, (c, i, j)]  = sum over pixels   grad_output(o, pixel) windows(pixel, (c, i, j))
//
// The input gradient uses a polyphase decomposition. Pixels with equal coordinates modulo the stride were read through
// the same taps, every (stride / gcd(stride, dilation))-th one, and neighbouring pixels of such a phase were read by
// neighbouring outputs. So each phase is a stride-1 convolution of grad_output by a part of the kernel, and no product
// involves a tap through which no output has read. A phase without taps is zero.
//
// In images N H W C, all three products read 16 bytes of channels at a time if the number of channels allows it. In
// images N C H W, they read single elements, neighbouring threads neighbouring ones; where pixels are contiguous, that
// is with 1x1 kernels at stride 1 and for grad_output in the weight gradient, they read 16 bytes of pixels.
#pragma once

#include <numeric>
#include <optional>

#include "operands.h"

namespace pyops::cuda {

// Calls f(std::bool_constant<channels_last>()).
template <class F>
cudaError_t dispatch_layout(bool channels_last, F&& f) {
  return channels_last ? f(std::true_type()) : f(std::false_type());
}

// Whether some tap of some receptive field lies outside the image.
inline bool has_border(const Conv2dShape& s) {
  return s.padding_top > 0 || s.padding_left > 0 || (s.OH - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h >= s.H ||
         (s.OW - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w >= s.W;
}

// The product of pixels by channels, in the orientation in which neighbouring threads write neighbouring elements.
template <bool channels_last, class Mma, class Pixels, class Channels, class Store>
cudaError_t pixel_gemm(int64_t pixels, int64_t channels, int64_t depth, const Pixels& pixel_matrix,
                       const Channels& channel_matrix, const Store& store, Workspace& workspace, cudaStream_t stream) {
  if constexpr (channels_last) {
    return gemm<Mma>(pixels, channels, depth, pixel_matrix, channel_matrix, store, workspace, stream);
  } else {
    return gemm<Mma>(channels, pixels, depth, channel_matrix, pixel_matrix, store, workspace, stream);
  }
}

// The receptive fields of the output in the input.
template <class T, class Index, bool channels_last>
WindowMatrix<T, Index, channels_last> output_windows(const Conv<Index>& conv, const Conv2dShape& s, const T* input) {
  const Axis<Index> h{conv.stride_h.value(), -conv.padding_h, conv.dilation_h};
  const Axis<Index> w{conv.stride_w.value(), -conv.padding_w, conv.dilation_w};
  return {conv.input, s.OH, s.OW, h, w, {s.C, s.kernel_h, s.kernel_w}, input};
}

template <class T>
cudaError_t implicit_gemm_forward(const Conv2dArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_layout(x.shape.channels_last, [&](auto layout) {
    constexpr bool channels_last = decltype(layout)::value;
    using Index = int32_t;
    const Conv2dShape& s = x.shape;
    const Conv<Index> conv(s);
    const int64_t window = s.kernel_h * s.kernel_w, depth = s.C * window;
    const auto *input = static_cast<const T*>(x.input), *weight = static_cast<const T*>(x.weight);
    const auto windows = output_windows<T, Index, channels_last>(conv, s, input);
    std::optional<Matrix<T, true>> weights;
    if constexpr (channels_last) {
      const WeightOrder<Index, true> order{
          windows.taps, 0, 1, 0, 1, static_cast<Index>(depth), static_cast<Index>(window), conv.kernel_w.value()};
      PYOPS_RETURN_ON_ERROR(ordered_weight(order, s.O, depth, weight, weights, workspace, stream));
    } else {
      weights.emplace(weight, depth);
    }
    const StoreOutput<T, Index, channels_last> store{
        conv, input, weight, static_cast<const T*>(x.bias), static_cast<T*>(x.output), x.relu, has_border(s)};
    return dispatch_mma<T>(x.tf32, [&](auto mma) {
      return pixel_gemm<channels_last, decltype(mma)>(s.N * s.OH * s.OW, s.O, depth, windows, *weights, store,
                                                      workspace, stream);
    });
  });
}

// A phase in one dimension: the pixels number, number + stride, ... of the input, and the taps first_tap, first_tap +
// tap_step, ... through which outputs have read them. Through tap t of these, pixel p of the phase was read by output p
// + offset + t * step.
struct Phase {
  int64_t pixels, first_tap, tap_step, taps, offset, step;

  Phase(int64_t number, int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t padding)
      : pixels(ceil_div(size - number, stride)), first_tap(0) {
    const int64_t common = std::gcd(stride, dilation);
    tap_step = stride / common;
    step = -dilation / common;
    const auto is_met = [&](int64_t tap) { return (number + padding - tap * dilation) % stride == 0; };
    while (first_tap < std::min(kernel, tap_step) && !is_met(first_tap)) ++first_tap;
    taps = first_tap < std::min(kernel, tap_step) ? ceil_div(kernel - first_tap, tap_step) : 0;
    offset = (number + padding - first_tap * dilation) / stride;
  }
};

template <class T>
cudaError_t implicit_gemm_input_gradient(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_layout(x.shape.channels_last, [&](auto layout) {
    constexpr bool channels_last = decltype(layout)::value;
    using Index = int32_t;
    const Conv2dShape& s = x.shape;
    const Conv<Index> conv(s);
    const auto *grad_output = static_cast<const T*>(x.grad_output), *weight = static_cast<const T*>(x.weight);
    const auto one_phase = [&](int64_t first_h, const Phase& h, int64_t first_w, const Phase& w) {
      const auto index = [](int64_t number) { return static_cast<Index>(number); };
      const int64_t depth = s.O * h.taps * w.taps, window = s.kernel_h * s.kernel_w;
      const Depth<Index, channels_last> taps(s.O, std::max(h.taps, int64_t{1}), std::max(w.taps, int64_t{1}));
      const WindowMatrix<T, Index, channels_last> windows(conv.output, h.pixels, w.pixels,
                                                          {1, index(h.offset), index(h.step)},
                                                          {1, index(w.offset), index(w.step)}, taps, grad_output);
      const WeightOrder<Index, channels_last> order{
          taps,          index(h.first_tap),  index(h.tap_step), index(w.first_tap), index(w.tap_step),
          index(window), index(s.C * window), index(s.kernel_w)};
      std::optional<Matrix<T, true>> weights;
      PYOPS_RETURN_ON_ERROR(ordered_weight(order, s.C, depth, weight, weights, workspace, stream));
      const StoreGradInput<T, Index, channels_last> store{
          conv,   Divider<Index>(h.pixels),     Divider<Index>(w.pixels), index(first_h), index(first_w), grad_output,
          weight, static_cast<T*>(x.grad_input)};
      return dispatch_mma<T>(x.tf32, [&](auto mma) {
        return pixel_gemm<channels_last, decltype(mma)>(s.N * h.pixels * w.pixels, s.C, depth, windows, *weights, store,
                                                        workspace, stream);
      });
    };
    for (int64_t i = 0; i < std::min(s.stride_h, s.H); ++i) {
      const Phase h(i, s.H, s.kernel_h, s.stride_h, s.dilation_h, s.padding_top);
      for (int64_t j = 0; j < std::min(s.stride_w, s.W); ++j) {
        const Phase w(j, s.W, s.kernel_w, s.stride_w, s.dilation_w, s.padding_left);
        PYOPS_RETURN_ON_ERROR(one_phase(i, h, j, w));
      }
    }
    return cudaSuccess;
  });
}

template <class T>
cudaError_t implicit_gemm_weight_gradient(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_layout(x.shape.channels_last, [&](auto layout) {
    constexpr bool channels_last = decltype(layout)::value;
    using Index = int32_t;
    const Conv2dShape& s = x.shape;
    const Conv<Index> conv(s);
    const auto *grad_output = static_cast<const T*>(x.grad_output), *input = static_cast<const T*>(x.input);
    const int64_t pixels = s.N * s.OH * s.OW;
    using Windows = WindowMatrix<T, Index, channels_last>;
    const Transposed<Windows> windows{output_windows<T, Index, channels_last>(conv, s, input)};
    const auto gradients = [&] {
      if constexpr (channels_last) {
        return Matrix<T, false>(grad_output, s.O);
      } else {
        return ChannelMatrix<T, Index>{conv.output, grad_output};
      }
    }();
    const StoreGradWeight<T, Index, channels_last> store{conv,
                                                         windows.matrix.taps,
                                                         grad_output,
                                                         input,
                                                         static_cast<T*>(x.grad_weight),
                                                         static_cast<Index>(pixels),
                                                         has_border(s)};
    return dispatch_mma<T>(x.tf32, [&](auto mma) {
      return gemm<decltype(mma)>(s.O, s.C * s.kernel_h * s.kernel_w, pixels, gradients, windows, store, workspace,
                                 stream);
    });
  });
}

}  // namespace pyops::cuda
