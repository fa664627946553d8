// A convolution with the vectors along x: output [O, pixels] = filters [O, K] window [K, pixels]. A row of pixels
// begins a vector of its own; a filter's values are read where they lie and broadcast. Sums of the compute type go to a
// channels-first output at once. Guarantees: those of gemm.h.
#include "correlate.h"

namespace pyops::cpu {

template <class T>
void multiply_along_x(const Task<T>& t, int64_t p) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Correlation<T>& x = t.phases[p];
  const Window<C>& w = t.window;
  const int64_t K = x.depth(), width = x.source.out_width, row_vectors = ceil_div(width, lanes);
  const Axis pixels = x.out_pixels();
  const bool direct = std::is_same_v<T, C> && pixels.x_stride == 1;
  const int64_t group = t.band.g * x.out_channels;
  const Output<T> out{x.first_pixel() + group * x.out_channel_stride,
                      Axis::plain(x.out_channel_stride),
                      pixels,
                      x.bias ? x.bias + group : nullptr,
                      nullptr,
                      x.relu};

  const int64_t* patch = patch_offsets(Scratch::b_steps, w, x.source, x.source.channels);
  // The filters lie as they are: row o, step (channel, tap).
  const bool in_place = std::is_same_v<T, C>;
  const int64_t* filter_rows = multiples(Scratch::a_offsets, x.out_channels, in_place ? x.filters.out_stride : K);
  int64_t* filter_steps = scratch<int64_t>(Scratch::a_steps, K);
  for (int64_t k = 0; k < K; ++k) filter_steps[k] = in_place ? x.filter_step(k) : k;

  const int64_t band_rows = t.rows(p), lines = t.band.images * band_rows;
  constexpr int64_t vectors_at_once = NC / lanes;
  const int64_t lines_at_once = std::max(vectors_at_once / row_vectors, int64_t{1});
  for (int64_t line = 0; line < lines; line += lines_at_once) {
    const int64_t count = std::min(lines_at_once, lines - line), vectors = count * row_vectors;
    int64_t* offsets = scratch<int64_t>(Scratch::b_offsets, vectors);
    int64_t* targets = scratch<int64_t>(Scratch::target_vectors, vectors);
    int32_t* target_lanes = scratch<int32_t>(Scratch::target_lanes, vectors);
    for (int64_t i = 0, v = 0; i < count; ++i) {
      const int64_t n = (line + i) / band_rows, y = (line + i) % band_rows;
      for (int64_t j = 0; j < row_vectors; ++j, ++v) {
        offsets[v] = n * w.image_stride + y * w.y_step + j * lanes;
        targets[v] = (t.band.n + n) * pixels.image_stride + (t.band.y + y) * pixels.y_stride + j * lanes;
        target_lanes[v] = static_cast<int32_t>(std::min(lanes, width - j * lanes));
      }
    }
    const bool whole = width % lanes == 0;
    for (int64_t m = t.o; m < t.o + t.o_count; m += MC) {
      const int64_t mc = std::min(MC, t.o + t.o_count - m), stride = vectors * lanes;
      // Vectors [v, v + vc) of the lines.
      const auto product = [&](const Target<C>& target, int64_t v, int64_t vc, bool finish) {
        for_each_chunk(0, K, [&](int64_t k, int64_t kc, bool first, bool last) {
          multiply<C>(mc, vc, kc, {t.filters[p], filter_rows + m, filter_steps + k}, {w.data, offsets + v, patch + k},
                      target, !first, last && finish);
        });
      };
      if constexpr (std::is_same_v<T, C>) {
        if (direct) {
          for (int64_t v = 0; v < vectors; v += vectors_at_once) {
            const Target<C> target{out.data,
                                   multiples(Scratch::target_rows, x.out_channels, x.out_channel_stride) + m,
                                   targets + v,
                                   whole ? nullptr : target_lanes + v,
                                   out.row_bias ? out.row_bias + m : nullptr,
                                   nullptr,
                                   x.relu};
            product(target, v, std::min(vectors_at_once, vectors - v), /*finish=*/true);
          }
          continue;
        }
      }
      C* sums = scratch<C>(Scratch::sums, mc * stride);
      product({sums, multiples(Scratch::target_rows, mc, stride), multiples(Scratch::target_vectors, vectors, lanes)},
              0, vectors, /*finish=*/false);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = t.band.n + (line + i) / band_rows, y = t.band.y + (line + i) % band_rows;
        write(out, sums + i * row_vectors * lanes, stride, m, mc, n * pixels.pixels + y * width, width);
      }
    }
  }
}

#define INSTANTIATE(T) template void multiply_along_x(const Task<T>&, int64_t);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
