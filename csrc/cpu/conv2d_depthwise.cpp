// Depthwise convolution of channels-last images: every channel is a group of its own.
//
//   output[pixel, c] = bias[c] + sum over taps of weight[c, tap] * source(pixel, c, tap)
//
// The vectors run along the channels, as the memory does: four vectors of sums for one pixel, over the taps that lie
// inside of the image, with the weights transposed to [tap, c] once. As a product of gemm.h each group would gather its
// one channel with a stride, 30 times slower. Each sum runs over the taps in order; no tap outside is multiplied.
#include "conv2d.h"

namespace pyops::cpu {
namespace {

template <class C>
struct MetTap {
  int64_t offset;   // of the source pixel
  const C* weight;  // of all channels
};

// Channels [c, c + count) of one pixel; full: count is vectors * lanes.
template <class T, int vectors, bool full>
void pixel(const T* source, const MetTap<Compute<T>>* taps, int64_t tap_count, const T* bias, bool relu, T* output,
           int64_t c, int64_t count) {
  using V = Vec<Compute<T>>;
  constexpr int64_t lanes = V::size();
  V sum[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) sum[j] = V(0);
  for (int64_t t = 0; t < tap_count; ++t) {
    const T* from = source + taps[t].offset + c;
    const Compute<T>* weight = taps[t].weight + c;
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const int64_t n = full ? lanes : count;
      sum[j] = at::vec::fmadd(load(from + j * lanes, n), load(weight + j * lanes, n), sum[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) {
    const int64_t n = full ? lanes : count;
    if (bias) sum[j] = sum[j] + load(bias + c + j * lanes, n);
    if (relu) sum[j] = at::vec::clamp_min(sum[j], V(0));
    store(output + c + j * lanes, sum[j], n);
  }
}

}  // namespace

template <class T>
void correlate_depthwise(const Correlation<T>& x, const T* weight) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Source<T>& s = x.source;
  const int64_t channels = x.groups, lines = s.count * s.out_height;
  const Axis pixels = x.out_pixels();
  C* by_tap = scratch<C>(Scratch::weight, s.tap_count * channels);
  transpose(by_tap, channels, weight, s.tap_count, channels, s.tap_count);
  for_each_task(lines, 2.0 * lines * s.out_width * channels * s.tap_count, [&](int64_t line) {
    const int64_t n = line / s.out_height, y = line % s.out_height;
    auto* taps = scratch<MetTap<C>>(Scratch::a_offsets, s.tap_count);
    for (int64_t column = 0; column < s.out_width; ++column) {
      int64_t tap_count = 0;
      for (int64_t t = 0; t < s.tap_count; ++t) {
        const int64_t image_y = y * s.step_h + s.taps[t].dy, image_x = column * s.step_w + s.taps[t].dx;
        if (image_y >= 0 && image_y < s.height && image_x >= 0 && image_x < s.width)
          taps[tap_count++] = {image_y * s.y_stride + image_x * s.x_stride, by_tap + t * channels};
      }
      const T* source = s.images + n * s.image_stride;
      T* output = x.first_pixel() + n * pixels.image_stride + y * pixels.y_stride + column * pixels.x_stride;
      int64_t c = 0;
      for (; c + 4 * lanes <= channels; c += 4 * lanes)
        pixel<T, 4, true>(source, taps, tap_count, x.bias, x.relu, output, c, 4 * lanes);
      for (; c < channels; c += lanes)
        pixel<T, 1, false>(source, taps, tap_count, x.bias, x.relu, output, c, std::min(lanes, channels - c));
    }
  });
}

template void correlate_depthwise(const Correlation<float>&, const float*);
template void correlate_depthwise(const Correlation<double>&, const double*);
template void correlate_depthwise(const Correlation<c10::BFloat16>&, const c10::BFloat16*);
template void correlate_depthwise(const Correlation<c10::Half>&, const c10::Half*);

}  // namespace pyops::cpu
