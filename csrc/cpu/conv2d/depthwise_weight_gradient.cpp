// The weight gradient of a depthwise convolution (conv2d/depthwise.cpp). It is chosen for every one:
//
//   grad_weight[c, tap] = sum over pixels of grad_output[c, pixel] * input(c, pixel, tap)
//
// The vectors run along the channels of channels-last images and along the width of channels-first ones. Kernels of 3x3
// taps have code of their own (conv2d/depthwise_3x3.h).
//
// Guarantees: the sums run over each image, then over the images in order.
#include "algorithms.h"
#include "depthwise_3x3.h"
#include "nonfinite.h"

namespace pyops::cpu {
namespace {

// The sums over one image of one tap, for the channels [c, c + count).
template <class T>
Vec<Compute<T>> tap_of_channels(const ConvInput<T>& s, const T* image, const T* grad, int64_t grad_x_stride, Tap tap,
                                int64_t c, int64_t count) {
  using V = Vec<Compute<T>>;
  const Range rows = range_inside(tap.dy, s.step_h, s.out_height, s.height);
  const Range columns = range_inside(tap.dx, s.step_w, s.out_width, s.width);
  V sums[4] = {V(0), V(0), V(0), V(0)};  // four chains, because an FMA of a single one would wait for the one before
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const T* source = image + (y * s.step_h + tap.dy) * s.y_stride + tap.dx * s.x_stride + c;
    const T* g = grad + y * s.out_width * grad_x_stride + c;
    const int64_t step = s.step_w * s.x_stride;
    int64_t column = columns.begin;
    for (; column + 4 <= columns.end; column += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        sums[j] = at::vec::fmadd(load(source + (column + j) * step, count),
                                 load(g + (column + j) * grad_x_stride, count), sums[j]);
    }
    for (; column < columns.end; ++column)
      sums[0] = at::vec::fmadd(load(source + column * step, count), load(g + column * grad_x_stride, count), sums[0]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// sums[t * sums_stride] = the sum over a plane of tap t, for `taps` taps.
template <class C, int taps>
void taps_of_plane(const C* input, int64_t y_step, const int64_t* offsets, const C* grad, int64_t height, int64_t width,
                   C* sums, int64_t sums_stride) {
  using V = Vec<C>;
  constexpr int64_t lanes = V::size();
  V sum[taps];
#pragma GCC unroll 4
  for (int t = 0; t < taps; ++t) sum[t] = V(0);
  for (int64_t y = 0; y < height; ++y, input += y_step, grad += width) {
    for (int64_t x = 0; x < width; x += lanes) {
      const int64_t count = std::min(lanes, width - x);
      const V g = V::loadu(grad + x, count);
#pragma GCC unroll 4
      for (int t = 0; t < taps; ++t) sum[t] = at::vec::fmadd(V::loadu(input + offsets[t] + x, count), g, sum[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < taps; ++t)
    sums[t * sums_stride] = at::vec::vec_reduce_all([](const V& a, const V& b) { return a + b; }, sum[t]);
}

// Computes all sums [N, taps, C] of the weight gradient of a dense 3x3 kernel.
template <class T>
void sums_3x3(const WeightGradient<T>& x, Compute<T>* sums) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Conv2dShape& s = x.shape;
  const ConvInput<T>& source = x.input;
  const Taps3x3 taps(source);
  const int64_t plane = s.OH * s.OW;
  const double flops = 18.0 * s.N * s.C * plane;
  if (s.channels_last) {
    const int64_t vectors = ceil_div(s.C, lanes);
    for_each_task(s.N * vectors, flops, [&](int64_t task) {
      const int64_t n = task / vectors, c = task % vectors * lanes;
      const auto add = [&](int64_t count) {
        weight_sums_of_channels_3x3(source, taps, source.images + n * source.image_stride,
                                    x.grad_output + n * plane * s.C, s.C, c, count, sums + n * 9 * s.C);
      };
      c + lanes <= s.C ? add(lanes) : add(s.C - c);
    });
    return;
  }
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<C, float>) {
    for_each_task(s.N * s.C, flops, [&](int64_t task) {
      const int64_t n = task / s.C, c = task % s.C;
      weight_sums_of_plane_3x3(source, taps, source.images + n * source.image_stride + c * source.channel_stride,
                               x.grad_output + task * plane, sums + n * 9 * s.C + c, s.C);
    });
  }
#endif
}

// Computes all sums [N, taps, C] of the weight gradient of any kernel.
template <class T>
void sums_of_taps(const WeightGradient<T>& x, Compute<T>* sums) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Conv2dShape& s = x.shape;
  const ConvInput<T>& source = x.input;
  const int64_t taps = source.tap_count, plane = s.OH * s.OW;
  const double flops = 2.0 * s.N * s.C * plane * taps;
  if (s.channels_last) {
    for_each_task(s.N * taps, flops, [&](int64_t task) {
      const int64_t n = task / taps;
      for (int64_t c = 0; c < s.C; c += lanes) {
        const int64_t count = std::min(lanes, s.C - c);
        tap_of_channels(source, source.images + n * source.image_stride, x.grad_output + n * plane * s.C, s.C,
                        source.taps[task % taps], c, count)
            .store(sums + task * s.C + c, static_cast<int>(count));
      }
    });
    return;
  }
  const ReceptiveField field(source);
  for_each_task(s.N * s.C, flops, [&](int64_t task) {
    const int64_t n = task / s.C, c = task % s.C;
    const InputTile<C> w = input_tile<C>(source, field, OutputTile{c, 0, 1, n, 1, 0, s.OH}, false, /*by_width=*/true);
    const T* grad = x.grad_output + task * plane;
    const C* values;
    if constexpr (std::is_same_v<T, C>) {
      values = grad;
    } else {
      C* copy = scratch<C>(Scratch::grad_rows, plane);
      copy_values(copy, grad, plane, 1);
      values = copy;
    }
    const int64_t* offsets = patch_offsets(Scratch::a_offsets, w, source, 1);
    C* target = sums + n * taps * s.C + c;
    int64_t t = 0;
    for (; t + 4 <= taps; t += 4)
      taps_of_plane<C, 4>(w.data, w.y_step, offsets + t, values, s.OH, s.OW, target + t * s.C, s.C);
    for (; t < taps; ++t) taps_of_plane<C, 1>(w.data, w.y_step, offsets + t, values, s.OH, s.OW, target + t * s.C, s.C);
  });
}

// Computes the weight gradient, where add_up(problem, sums) computes the sums [N, taps, C].
template <class T, class AddUp>
void weight_gradient_of_sums(const WeightGradient<T>& x, const AddUp& add_up) {
  using C = Compute<T>;
  const Conv2dShape& s = x.shape;
  const int64_t taps = x.input.tap_count, kernel = s.kernel_h * s.kernel_w;
  C* sums = scratch<C>(Scratch::partial_sums, s.N * taps * s.C);
  add_up(x, sums);
  std::fill(x.grad_weight, x.grad_weight + s.C * kernel, T(0));
  for (int64_t c = 0; c < s.C; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      C total = 0;
      for (int64_t n = 0; n < s.N; ++n) total += sums[(n * taps + t) * s.C + c];
      x.grad_weight[c * kernel + x.input.taps[t].index] = static_cast<T>(total);
    }
  }
}

template <class T>
bool has_one_channel_groups(const WeightGradient<T>& x) {
  return x.in() == 1 && x.out() == 1;
}

}  // namespace

template <class T>
bool Depthwise3x3Wgrad<T>::supports(const WeightGradient<T>& x) {
  return has_one_channel_groups(x) && has_3x3_kernels<T>(x.shape.channels_last) && Taps3x3::fit(x.input);
}

template <class T>
bool Depthwise3x3Wgrad<T>::profitable(const WeightGradient<T>& x) {
  return x.shape.groups > 1;
}

template <class T>
void Depthwise3x3Wgrad<T>::run(const WeightGradient<T>& x) {
  weight_gradient_exactly(x, [](const WeightGradient<T>& finite) { weight_gradient_of_sums(finite, sums_3x3<T>); });
}

template <class T>
bool DepthwiseWgrad<T>::supports(const WeightGradient<T>& x) {
  return has_one_channel_groups(x);
}

template <class T>
bool DepthwiseWgrad<T>::profitable(const WeightGradient<T>& x) {
  return x.shape.groups > 1;
}

template <class T>
void DepthwiseWgrad<T>::run(const WeightGradient<T>& x) {
  weight_gradient_exactly(x, [](const WeightGradient<T>& finite) { weight_gradient_of_sums(finite, sums_of_taps<T>); });
}

#define INSTANTIATE(T)                  \
  template struct Depthwise3x3Wgrad<T>; \
  template struct DepthwiseWgrad<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
