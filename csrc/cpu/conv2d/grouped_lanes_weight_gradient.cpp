// The weight gradient of narrow groups over channels-last images, with the lanes and the permutations of
// conv2d/grouped_lanes.cpp. It is chosen under the same condition, if every tap also meets the image:
//
//   grad_weight[tap, i, (g, o)] = sum over pixels of input[pixel + tap, (g, i)] * grad_output[pixel, (g, o)]
//
// The sums of three taps and up to 8 channels stay in registers (4 with AVX2).
//
// Guarantees: those of gemm.h. The sums run over the pixels of a band of rows, then over the bands, then over at most
// enough_tasks parts of the batch.
#include "../gemm/sum_parts.h"
#include "grouped_lanes.h"

namespace pyops::cpu {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

namespace {

// The channels of a group whose sums, those of three taps for each, the registers hold.
constexpr int most_channels = by_capability(0, 4, 8);

// Some rows of an image and of its gradient, with the channels of one vector.
template <class T>
struct LanesOfBand {
  const ConvInput<T>& source;
  const T *image, *grad;
  int64_t grad_stride;      // from pixel to pixel
  int64_t in, out;          // the channels of the vector
  int64_t y, rows, x, end;  // rows [y, y + rows), columns [x, end)
};

// sums[k, lanes] += the sum over the band of input(k) * gradient, for the taps of a run and `channels` channels of each
// group, from `channel` on. k = (channel, tap) is in the order of the filters in memory. fetch_next: whether to
// prefetch the next band.
template <int channels, int length, bool full, class T>
void add_products(const LanesOfBand<T>& b, const TapRun& run, int64_t channel, const Permutation* permutations,
                  bool fetch_next, Compute<T>* sums) {
  using V = Vec<Compute<T>>;
  const ConvInput<T>& s = b.source;
  const int64_t in = full ? V::size() : b.in, out = full ? V::size() : b.out, step = s.step_w * s.x_stride;
  const int64_t next_source = fetch_next ? b.rows * s.step_h * s.y_stride : 0;
  const int64_t next_grad = fetch_next ? b.rows * s.out_width * b.grad_stride : 0;
  Register<Compute<T>> sum[length][channels];
#pragma GCC unroll 3
  for (int t = 0; t < length; ++t)
#pragma GCC unroll 8
    for (int c = 0; c < channels; ++c) sum[t][c] = V(0);
  for (int64_t y = b.y; y < b.y + b.rows; ++y) {
    const int64_t source_y = y * s.step_h + run.dy;
    if (source_y < 0 || source_y >= s.height) continue;
    const T* source = b.image + source_y * s.y_stride + run.dx * s.x_stride;
    const T* grad = b.grad + y * s.out_width * b.grad_stride;
    for (int64_t i = std::max(run.begin, b.x); i < std::min(run.end, b.end + length - 1); ++i) {
      // Prefetch the next band between the FMAs of this one.
      __builtin_prefetch(source + i * step + next_source, 0, 2);
      __builtin_prefetch(grad + i * b.grad_stride + next_grad, 0, 2);
      const V loaded = load(source + i * step, in);
      Register<Compute<T>> value[channels];
#pragma GCC unroll 8
      for (int c = 0; c < channels; ++c) value[c] = permute(loaded, permutations[channel + c]);
#pragma GCC unroll 3
      for (int t = 0; t < length; ++t) {
        if (i - t < b.x || i - t >= b.end) continue;
        const V g = load(grad + (i - t) * b.grad_stride, out);
#pragma GCC unroll 8
        for (int c = 0; c < channels; ++c) sum[t][c] = at::vec::fmadd(V(value[c]), g, V(sum[t][c]));
      }
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < length; ++t) {
#pragma GCC unroll 8
    for (int c = 0; c < channels; ++c) {
      const int64_t k =
          s.tap_by_tap ? run.taps[t] * s.channels + channel + c : (channel + c) * s.tap_count + run.taps[t];
      (V::loadu(sums + k * V::size()) + V(sum[t][c])).store(sums + k * V::size());
    }
  }
}

// Adds the products of a band for all taps and channels.
template <bool full, class T>
void add_band(const LanesOfBand<T>& b, const TapRuns& runs, const Permutation* permutations, Compute<T>* sums) {
  for (const TapRun& run : runs) {
    for (int64_t channel = 0, channels; channel < b.source.channels; channel += channels) {
      const int64_t left = b.source.channels - channel;
      channels = left >= most_channels ? most_channels : std::min(left, int64_t{4});
      dispatch<1, 2, 3, 4, most_channels>(channels, [&]<int at_once>() {
        dispatch<1, 2, 3>(run.length, [&]<int length>() {
          const bool fetch_next = channel == 0 && run.dy == runs.bottom();
          add_products<at_once, length, full>(b, run, channel, permutations, fetch_next, sums);
        });
      });
    }
  }
}

}  // namespace

template <class T>
bool GroupedLanesWgrad<T>::supports(const WeightGradient<T>& x) {
  return x.shape.channels_last && x.meets_all_taps() && can_share_vectors<Compute<T>>(x.shape.groups, x.in(), x.out());
}

template <class T>
bool GroupedLanesWgrad<T>::profitable(const WeightGradient<T>& x) {
  return are_worth_sharing_vectors<Compute<T>>(x.shape.groups, x.in(), x.out());
}

template <class T>
void GroupedLanesWgrad<T>::run(const WeightGradient<T>& x) {
  using C = Compute<T>;
  const Conv2dShape& s = x.shape;
  const ConvInput<T>& source = x.input;
  const GroupLanes<C> groups{s.groups, source.channels, s.O / s.groups};
  const TapRuns runs(source);
  const Permutation* permutations = groups.permutations();
  const int64_t band_rows = std::clamp(KC / s.OW, int64_t{1}, s.OH), bands_of_image = ceil_div(s.OH, band_rows);
  const int64_t bands = s.N * bands_of_image, parts = std::clamp(bands, int64_t{1}, enough_tasks);
  const int64_t K = source.depth(), size = K * groups.lanes, part_size = groups.vectors() * size;
  C* sums = scratch<C>(Scratch::partial_sums, parts * part_size);
  for_each_task(parts, 2.0 * s.N * s.OH * s.OW * s.O * K, [&](int64_t part) {
    std::fill_n(sums + part * part_size, part_size, C(0));
    for (int64_t band = part * bands / parts; band < (part + 1) * bands / parts; ++band) {
      const int64_t n = band / bands_of_image, y = band % bands_of_image * band_rows;
      for_each_chunk(0, s.OW, [&](int64_t column, int64_t columns, bool, bool) {
        for (int64_t v = 0; v < groups.vectors(); ++v) {
          const int64_t in = groups.first_group(v) * groups.in, out = groups.first_group(v) * groups.out;
          const LanesOfBand<T> lanes{source,
                                     source.images + n * source.image_stride + in,
                                     x.grad_output + n * s.OH * s.OW * s.O + out,
                                     s.O,
                                     groups.groups_of(v) * groups.in,
                                     groups.groups_of(v) * groups.out,
                                     y,
                                     std::min(band_rows, s.OH - y),
                                     column,
                                     column + columns};
          C* target = sums + part * part_size + v * size;
          groups.is_full(v) ? add_band<true>(lanes, runs, permutations, target)
                            : add_band<false>(lanes, runs, permutations, target);
        }
      });
    }
  });
  for_each_task(groups.vectors(), 4.0 * parts * part_size, [&](int64_t v) {
    const Output<T> out{x.grad_weight + groups.first_group(v) * groups.out * K, Axis::plain(1), Axis::plain(K)};
    sum_parts(out, sums + v * size, parts, part_size, K, groups.lanes, groups.groups_of(v) * groups.out);
  });
}

#define INSTANTIATE(T) template struct GroupedLanesWgrad<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

#endif

}  // namespace pyops::cpu
