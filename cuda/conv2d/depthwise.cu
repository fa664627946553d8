// Depthwise convolution, in which each channel has a kernel of its own, and its input gradient:
//
//   output[n, c, y, x]     = bias[c] + sum over i, j  weight[c, i, j] input[n, c, y stride + i dilation - padding, ..]
//   grad_input[n, c, h, w] = sum over i, j  weight[c, i, j] grad_output[n, c, (h + padding - i dilation) / stride, ..]
//
// Images are in either layout; the weight [C, 1, kernel_h, kernel_w] is contiguous. There are no matrices to multiply:
// a value takes part in only as many products as the kernel has taps, so reads are the bottleneck. Neighbouring threads
// read neighbouring elements (conv2d/lanes.h): in N H W C 16 bytes of channels each where the channels allow it, in N C
// H W adjacent columns. For square kernels of 3, 5 and 7 without dilation, at stride 1 (for 3, forward, also at stride
// 2), a thread reads each element that a strip of four pixels needs once: 18 reads for four 3x3 windows instead of 36.
// At stride 1 the gradient is the forward with the kernel rotated by 180 degrees. Other kernels look up the position of
// each tap.
//
// Sums run over j, i (in other kernels over i, j) in one chain, in float (in double for double), and are rounded once.
// Only taps inside the image count, even if a factor is infinite. On sm_80 and sm_90 the kernels take 96 to 128
// registers, so that an SM holds two blocks of 256 threads with 6 to 18 reads in flight each; for double at most 154.
// For 3x3 they take 36 bytes of shared memory in N C H W, 4.6 KB in N H W C, and 9.2 KB there for 16-bit types; at most
// 50 KB, for 7x7 in these types.
#include "lanes.h"

namespace pyops::cuda {
namespace {

struct Depthwise {
  LaneConvolution conv;
  Lanes lanes;
  Divider<int32_t> taps;
  int32_t padding_h, padding_w;  // before the first row and column of the source
  bool turned;                   // the kernel is rotated by 180 degrees
};

// Fills weights[tap][channel of the block].
template <class T>
__device__ __forceinline__ void load_weights(const Depthwise& d, const T* weight, int32_t first, int32_t width,
                                             Compute<T>* weights) {
  const int32_t taps = d.taps.value(), channels = min(width, d.conv.result.C.value() - first);
  for (int32_t k = threadIdx.x; k < channels * taps; k += blockDim.x) {
    int32_t channel = k;
    const int32_t tap = take_digit(channel, d.taps);
    weights[(d.turned ? taps - 1 - tap : tap) * width + channel] = widen(weight[first * taps + k]);
  }
}

template <class C, int pack>
__device__ __forceinline__ void add_products(C (&sums)[pack], const C (&values)[pack], const C* weights) {
  const auto factors = *reinterpret_cast<const Vector<C, pack>*>(weights);
#pragma unroll
  for (int e = 0; e < pack; ++e) sums[e] = multiply_add(values[e], factors.values[e], sums[e]);
}

template <class T, int pack>
__device__ __forceinline__ void load(const Depthwise& d, const T* source, bool inside, int32_t n, int32_t c, int32_t h,
                                     int32_t w, Compute<T> (&values)[pack]) {
  const auto loaded = load_or_zero<T, pack>(inside, source + (inside ? d.conv.source.offset(n, c, h, w) : 0));
#pragma unroll
  for (int e = 0; e < pack; ++e) values[e] = widen(loaded.values[e]);
}

// A square kernel without dilation.
template <class T, int pack, int kernel, int stride>
struct SquareWindow {
  static __device__ __forceinline__ void sum(const Depthwise& d, const T* source, const Strip& strip, int32_t c,
                                             const Compute<T>* weights, int32_t width,
                                             Compute<T> (&sums)[strip_rows][pack]) {
    // The columns are unrolled only where that does not take more registers than there are.
    [[maybe_unused]] constexpr int columns = kernel == 3 && stride * pack <= 4 ? kernel : 1;
    const int32_t h0 = strip.y * stride - d.padding_h, w0 = strip.x * stride - d.padding_w;
#pragma unroll columns
    for (int j = 0; j < kernel; ++j) {
      const int32_t w = w0 + j;
      const bool column = w >= 0 && w < d.conv.source.width();
#pragma unroll
      for (int row = 0; row < (strip_rows - 1) * stride + kernel; ++row) {
        const int32_t h = h0 + row;
        Compute<T> values[pack];
        load(d, source, column && h >= 0 && h < d.conv.source.height(), strip.n, c, h, w, values);
#pragma unroll
        for (int r = 0; r < strip_rows; ++r) {
          const int i = row - r * stride;
          if (i >= 0 && i < kernel) add_products(sums[r], values, weights + (i * kernel + j) * width);
        }
      }
    }
  }
};

template <class T, int pack>
struct AnyWindow {
  static __device__ __forceinline__ void sum(const Depthwise& d, const T* source, const Strip& strip, int32_t c,
                                             const Compute<T>* weights, int32_t width,
                                             Compute<T> (&sums)[strip_rows][pack]) {
    for (int32_t i = 0; i < d.conv.conv.kernel_h.value(); ++i) {
      int32_t rows[strip_rows];
#pragma unroll
      for (int r = 0; r < strip_rows; ++r) rows[r] = d.conv.source_row(strip.y + r, i);
      for (int32_t j = 0; j < d.conv.conv.kernel_w.value(); ++j, weights += width) {
        const int32_t column = d.conv.source_column(strip.x, j);
        if (column < 0) continue;
#pragma unroll
        for (int r = 0; r < strip_rows; ++r) {
          Compute<T> values[pack];
          load(d, source, rows[r] >= 0, strip.n, c, rows[r], column, values);
          add_products(sums[r], values, weights);
        }
      }
    }
  }
};

template <class T, int pack, class Window>
__global__ void __launch_bounds__(block_threads, blocks_at_least<T>)
    depthwise(const __grid_constant__ Depthwise d, const __grid_constant__ Operands<T> x) {
  using C = Compute<T>;
  C* weights = shared_memory<C>();
  int32_t lane, tile;
  const int32_t slot = d.lanes.slot(lane), first_lane = d.lanes.first_lane(tile);
  const int32_t width = d.lanes.lanes.value() * pack, c = (first_lane + lane) * pack;
  load_weights(d, x.weight, first_lane * pack, width, weights);
  __syncthreads();
  if (slot >= d.lanes.slots || first_lane + lane >= d.lanes.total) return;
  for (int32_t k = tile * d.lanes.slots + slot; k < d.lanes.strips; k += d.lanes.tiles * d.lanes.slots) {
    const Strip strip = d.lanes.strip(k);
    C sums[strip_rows][pack] = {};
    Window::sum(d, x.source, strip, c, weights + lane * pack, width, sums);
    bool any_nan = false;
#pragma unroll
    for (int r = 0; r < strip_rows; ++r) {
      const int32_t y = strip.y + r;
      if (y >= d.conv.result.height()) break;
      Vector<T, pack> values;
#pragma unroll
      for (int e = 0; e < pack; ++e) {
        values.values[e] = d.conv.finish(sums[r][e], x.bias, c + e);
        any_nan |= sums[r][e] != sums[r][e];
      }
      *reinterpret_cast<Vector<T, pack>*>(x.result + d.conv.result.offset(strip.n, c, y, strip.x)) = values;
    }
    if (any_nan) d.conv.mend(x, strip, c, pack);
  }
}

// Calls f(Window()) for the kernel of a convolution.
template <class T, int pack, class F>
cudaError_t dispatch_window(const Conv2dShape& s, bool gradient, F&& f) {
  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w && s.dilation_h == 1 && s.dilation_w == 1;
  if (square && s.stride_h == 1) {
    if (s.kernel_h == 3) return f(SquareWindow<T, pack, 3, 1>());
    if (s.kernel_h == 5) return f(SquareWindow<T, pack, 5, 1>());
    if (s.kernel_h == 7) return f(SquareWindow<T, pack, 7, 1>());
  }
  if (square && s.stride_h == 2 && s.kernel_h == 3 && !gradient) return f(SquareWindow<T, pack, 3, 2>());
  return f(AnyWindow<T, pack>());
}

template <class T, int pack>
cudaError_t launch_depthwise(const ConvolutionArgs& x, cudaStream_t stream) {
  const Conv2dShape& s = x.shape;
  return dispatch_window<T, pack>(s, x.gradient, [&](auto window) {
    using Window = decltype(window);
    // AnyWindow looks up positions and needs no rotation.
    const bool turned = x.gradient && !std::is_same_v<Window, AnyWindow<T, pack>>;
    const auto padding = [&](int64_t kernel, int64_t before) {
      return static_cast<int32_t>(turned ? kernel - 1 - before : before);
    };
    const Depthwise d{LaneConvolution(x),
                      Lanes(s.C / pack, s.channels_last ? 32 : 1, s.N, x.height(), x.width()),
                      Divider<int32_t>(s.kernel_h * s.kernel_w),
                      padding(s.kernel_h, s.padding_top),
                      padding(s.kernel_w, s.padding_left),
                      turned};
    const size_t shared_bytes = s.kernel_h * s.kernel_w * d.lanes.lanes.value() * pack * sizeof(Compute<T>);
    return launch(depthwise<T, pack, Window>, d.lanes.blocks(), d.lanes.threads, shared_bytes, stream, d,
                  Operands<T>(x));
  });
}

}  // namespace

cudaError_t depthwise_convolution(const ConvolutionArgs& x, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    const bool packs = x.shape.channels_last && x.shape.C % Pack<T>::size == 0 && aligned_to_packs(x.source, x.result);
    return packs ? launch_depthwise<T, Pack<T>::size>(x, stream) : launch_depthwise<T, 1>(x, stream);
  });
}

}  // namespace pyops::cuda
