// The convolution at the heart of conv2d's forward and input gradient, as products of tile.h over windows of window.h.
//
// A task is a band of output rows (or several small images) of one group and, if there are few bands, a part of the
// output channels. With K = (channel, tap):
//
//   vectors along x:         output [O, pixels] = weight [O, K] window [K, pixels]      vectors are read from the
//   window vectors along channels:  output [pixels, O] = window [pixels, K] weight^T [K, O]    values are broadcast
//   from it
//
// In the second case the weights are transposed once into panels. LeNet's first layer on 64 images, one core with
// AVX-512: forward 0.30 ms and grad_input 0.78, where the same tiles on gathered patches (im2col in cache) took 0.54
// and 2.99, and stock torch 0.61 and 5.05. Guarantees: those of gemm.h.
#include "conv2d.h"
#include "nonfinite.h"

namespace pyops::cpu {
namespace {

template <class T>
struct Task {
  const Correlation<T>& x;
  const Compute<T>* weight;  // of the group: [O][K], or panels of [K][width]
  int64_t width;             // of the panels
  Band band;
  int64_t o, o_count;  // output channels

  int64_t first_pixel() const { return band.n * x.source.pixels() + band.y * x.source.out_width; }
};

template <class T>
void multiply_along_pixels(const Task<T>& t, const Extent& extent) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Correlation<T>& x = t.x;
  const int64_t K = x.depth(), width = x.source.out_width, row_vectors = ceil_div(width, lanes);
  const Window<C> w = window_of(x.source, extent, t.band, /*channels_last=*/false, /*overread=*/true);
  const int64_t* patch = patch_offsets(Scratch::b_steps, w, x.source, x.source.channels);
  const int64_t* rows = multiples(Scratch::a_offsets, t.o_count, K);
  const int64_t* row_steps = multiples(Scratch::a_steps, K, 1);
  const Output<T> out{x.output + (t.band.g * x.out_channels) * x.out_channel_stride, Axis::plain(x.out_channel_stride),
                      x.out_pixels, x.bias ? x.bias + t.band.g * x.out_channels : nullptr};

  const int64_t lines = t.band.images * t.band.rows, lines_at_once = std::max(NC / (row_vectors * lanes), int64_t{1});
  for (int64_t line = 0; line < lines; line += lines_at_once) {
    const int64_t count = std::min(lines_at_once, lines - line), vectors = count * row_vectors;
    int64_t* offsets = scratch<int64_t>(Scratch::b_offsets, vectors);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = (line + i) / t.band.rows, y = (line + i) % t.band.rows;
      for (int64_t j = 0; j < row_vectors; ++j)
        offsets[i * row_vectors + j] = n * w.image_stride + y * w.y_step + j * lanes;
    }
    for (int64_t m = 0; m < t.o_count; m += MC) {
      const int64_t mc = std::min(MC, t.o_count - m), stride = vectors * lanes;
      C* sums = scratch<C>(Scratch::sums, mc * stride);
      for_each_chunk(0, K, [&](int64_t k, int64_t kc, bool first, bool) {
        multiply<C>(mc, vectors, kc, {t.weight + t.o * K, rows + m, row_steps + k}, {w.data, offsets, patch + k}, sums,
                    stride, !first);
      });
      for (int64_t i = 0; i < count; ++i)
        write(out, sums + i * row_vectors * lanes, stride, t.o + m, mc, t.first_pixel() + (line + i) * width, width);
    }
  }
}

template <class T>
void multiply_along_channels(const Task<T>& t, const Extent& extent) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Correlation<T>& x = t.x;
  const int64_t K = x.depth(), width = t.width;
  const Window<C> w = window_of(x.source, extent, t.band, x.channels_last, /*overread=*/false);
  const int64_t* pixels = pixel_offsets(Scratch::a_offsets, w, t.band, x.source.out_width);
  const int64_t* patch = patch_offsets(Scratch::a_steps, w, x.source, x.source.channels);
  const int64_t* vectors = panel_offsets<C>(Scratch::b_offsets, ceil_div(x.out_channels, lanes), K, width);
  const int64_t* vector_steps = multiples(Scratch::b_steps, K, width);
  const Output<T> out{x.output + (t.band.g * x.out_channels) * x.out_channel_stride, x.out_pixels,
                      Axis::plain(x.out_channel_stride), nullptr,
                      x.bias ? x.bias + t.band.g * x.out_channels : nullptr};

  const int64_t pixel_count = t.band.images * t.band.rows * x.source.out_width;
  for (int64_t n = 0; n < t.o_count; n += NC) {
    const int64_t nc = std::min(NC, t.o_count - n), vector_count = ceil_div(nc, lanes), stride = vector_count * lanes;
    for (int64_t m = 0; m < pixel_count; m += MC) {
      const int64_t mc = std::min(MC, pixel_count - m);
      C* sums = scratch<C>(Scratch::sums, mc * stride);
      for_each_chunk(0, K, [&](int64_t k, int64_t kc, bool first, bool) {
        multiply<C>(mc, vector_count, kc, {w.data, pixels + m, patch + k},
                    {t.weight, vectors + (t.o + n) / lanes, vector_steps + k}, sums, stride, !first);
      });
      write(out, sums, stride, t.first_pixel() + m, mc, t.o + n, nc);
    }
  }
}

template <class T>
void correlate_finite(const Correlation<T>& x, const T* weight) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const int64_t O = x.out_channels, K = x.depth();
  const bool pixel_vectors = x.pixel_vectors();
  const int64_t width = panel_width<C>(O), group_size = pixel_vectors ? O * K : ceil_div(O, width) * width * K;
  const C* arranged;
  if (std::is_same_v<T, C> && pixel_vectors) {
    arranged = reinterpret_cast<const C*>(weight);
  } else {
    C* target = scratch<C>(Scratch::weight, x.groups * group_size);
    if (pixel_vectors) {
      copy_values(target, weight, x.groups * O * K, 1);
    } else {
      const int64_t panels = ceil_div(O, width);
      for_each_task(x.groups * panels, 16.0 * x.groups * O * K, [&](int64_t i) {
        const int64_t g = i / panels, o = i % panels * width;
        pack_panels(target + g * group_size + o * K, Matrix<T>{weight + g * O * K, 1, K}, 0, K, o,
                    std::min(width, O - o), width);
      });
    }
    arranged = target;
  }

  const Source<T>& s = x.source;
  const Extent extent(s);
  const BandSize size(s, extent, s.channels);
  const int64_t image_bands = ceil_div(s.count, size.images), row_bands = ceil_div(s.out_height, size.rows);
  const int64_t bands = x.groups * image_bands * row_bands;
  const double flops = 2.0 * s.count * s.pixels() * x.weights();
  const int64_t o_part = ceil_div(ceil_div(O, ceil_div(tasks_worth(flops), bands)), lanes) * lanes;
  const int64_t o_parts = ceil_div(O, o_part);
  for_each_task(bands * o_parts, flops, [&](int64_t task) {
    const int64_t o = task % o_parts * o_part, y = task / o_parts % row_bands * size.rows;
    const int64_t n = task / o_parts / row_bands % image_bands * size.images;
    const int64_t g = task / o_parts / row_bands / image_bands;
    const Band band{g, 0, s.channels, n, std::min(size.images, s.count - n), y, std::min(size.rows, s.out_height - y)};
    const Task<T> t{x, arranged + g * group_size, width, band, o, std::min(o_part, O - o)};
    pixel_vectors ? multiply_along_pixels(t, extent) : multiply_along_channels(t, extent);
  });
}

}  // namespace

template <class T>
void correlate(const Correlation<T>& x, const T* weight) {
  const Source<T>& s = x.source;
  if (x.channels_last && s.channels == 1 && x.out_channels == 1) return correlate_depthwise(x, weight);
  if (!leaves_image(s) || all_finite(weight, x.weights())) return correlate_finite(x, weight);

  correlate_finite(x, finite_part(weight, x.weights()).data());
  for_each_task(s.count, 2.0 * s.count * s.pixels() * x.weights(), [&](int64_t n) {
    for (int64_t i = 0; i < x.weights(); ++i) {
      if (is_finite(weight[i])) continue;
      const int64_t o = i / x.depth(), g = o / x.out_channels;  // o counts through all groups
      const int64_t channel = g * s.channels + i / s.tap_count % s.channels;
      T* image = x.output + o * x.out_channel_stride + n * x.out_pixels.image_stride;
      for_each_inside(s, n, channel, s.taps[i % s.tap_count], [&](int64_t y, int64_t column, T value) {
        add_product(image[y * x.out_pixels.y_stride + column * x.out_pixels.x_stride], weight[i], value);
      });
    }
  });
}

template void correlate(const Correlation<float>&, const float*);
template void correlate(const Correlation<double>&, const double*);
template void correlate(const Correlation<c10::BFloat16>&, const c10::BFloat16*);
template void correlate(const Correlation<c10::Half>&, const c10::Half*);

}  // namespace pyops::cpu
