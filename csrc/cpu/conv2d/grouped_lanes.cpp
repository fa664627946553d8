// Convolutions of narrow groups over channels-last images, and their weight gradients:
//
//   output[pixel, (g, o)]       = bias + sum over (tap, i) of input[pixel + tap, (g, i)] * weight[tap, i, (g, o)]
//   grad_weight[tap, i, (g, o)] = sum over pixels of input[pixel + tap, (g, i)] * grad_output[pixel, (g, o)]
//
// They are chosen for groups no wider than a vector, if as many whole groups as fit fill at least half of its lanes, or
// all of them with AVX2 (should_use_grouped_lanes). Vectors along the channels of one group would leave most lanes
// idle; here a vector holds the channels of all these groups. With 4 channels per group, 16 lanes hold four groups.
//
// With (g, o) along the lanes, only input[.., (g, i)] does not have its values where they are needed: channel i of each
// group belongs in all lanes of its group. A permutation of the loaded vector puts it there, one that is the same for
// every pixel. A permuted vector serves up to three neighbouring taps, which meet it at neighbouring output pixels. The
// sums of 16 pixels of a row, or those of three taps and up to 8 channels, stay in registers (8 pixels or 4 channels
// with AVX2). Images are read in place, nothing is copied or transposed, and taps outside of the image are skipped.
//
// Guarantees: those of gemm.h. The terms of an output run over the taps row by row, with the taps that share their
// loads together, which is not the order of the filters in memory. A weight gradient sums over the pixels of a band of
// rows, then over the bands, then over at most enough_tasks parts of the batch.
#include "grouped_lanes.h"

namespace pyops::cpu {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

namespace {

// ---- lanes ----

// What the registers hold: the sums of tile_pixels pixels of a row, or those of three taps and most_channels channels
// of a group.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int tile_pixels = 16, most_channels = 8;
#else
constexpr int tile_pixels = 8, most_channels = 4;
#endif

// Word i (of 32 bits) of the result is word words[i] of the value.
#if defined(CPU_CAPABILITY_AVX512)
using Permutation = __m512i;
inline Vec<float> permute(const Vec<float>& value, Permutation words) {
  return _mm512_permutexvar_ps(words, value);
}
inline Vec<double> permute(const Vec<double>& value, Permutation words) {
  return _mm512_castps_pd(_mm512_permutexvar_ps(words, _mm512_castpd_ps(value)));
}
#else
using Permutation = __m256i;
inline Vec<float> permute(const Vec<float>& value, Permutation words) {
  return _mm256_permutevar8x32_ps(value, words);
}
inline Vec<double> permute(const Vec<double>& value, Permutation words) {
  return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(value), words));
}
#endif

// The bare register of a vector. An array of Vec would be constructed in a loop, for which gcc keeps it in memory.
template <class C>
using Register [[gnu::vector_size(sizeof(Vec<C>))]] = C;

// How groups share vectors. A group has `in` input channels and `out` output channels.
template <class C>
struct GroupLanes {
  static constexpr int64_t lanes = Vec<C>::size();

  int64_t groups, in, out;
  int64_t groups_at_once = lanes / std::max(in, out);

  int64_t vectors() const { return ceil_div(groups, groups_at_once); }
  int64_t first_group(int64_t vector) const { return vector * groups_at_once; }
  int64_t groups_of(int64_t vector) const { return std::min(groups_at_once, groups - first_group(vector)); }
  bool is_full(int64_t vector) const { return groups_of(vector) * in == lanes && in == out; }

  // For each channel of a group, the permutation that puts it into all output lanes of its group.
  const Permutation* permutations() const {
    constexpr int64_t words_of_lane = sizeof(C) / sizeof(int32_t), words = lanes * words_of_lane;
    int32_t* from = scratch<int32_t>(Scratch::permutations, in * words);
    for (int64_t i = 0; i < in * words; ++i) {
      const int64_t channel = i / words, lane = i % words / words_of_lane;
      from[i] = static_cast<int32_t>((lane / out * in + channel) * words_of_lane % words + i % words_of_lane);
    }
    return reinterpret_cast<const Permutation*>(from);
  }
};

// ---- taps ----

// A run of up to three taps of one row, each the horizontal stride right of the one before. Through tap t of the run,
// output pixel x reads the input column (x + t) * step_w + dx, which is called position x + t.
struct TapRun {
  static constexpr int64_t longest = 3;

  int64_t dy, dx;
  int64_t begin, end;  // the positions inside of the image
  bool begins_chunk;
  int64_t taps[longest];  // their indices in ConvInput::taps
  int64_t length;
};

// All taps of an input, row by row, and the chunks that sums over them are cut into.
struct TapRuns {
  TapRun* data;
  int64_t count = 0;

  template <class T>
  explicit TapRuns(const ConvInput<T>& s) : data(scratch<TapRun>(Scratch::tap_runs, s.tap_count)) {
    int64_t* order = scratch<int64_t>(Scratch::taps_of_terms, s.tap_count);
    for (int64_t t = 0; t < s.tap_count; ++t) order[t] = t;
    const auto key = [&](int64_t t) {
      const Tap& tap = s.taps[t];
      return std::array{tap.dy, (tap.dx % s.step_w + s.step_w) % s.step_w, tap.dx};
    };
    std::sort(order, order + s.tap_count, [&](int64_t a, int64_t b) { return key(a) < key(b); });
    int64_t terms = 0;
    for (int64_t i = 0; i < s.tap_count; ++i, terms += s.channels) {
      if (!continues(s, s.taps[order[i]])) begin_run(s, s.taps[order[i]], terms);
      TapRun& run = data[count - 1];
      run.taps[run.length++] = order[i];
    }
  }

  const TapRun* begin() const { return data; }
  const TapRun* end() const { return data + count; }
  int64_t bottom() const { return data[count - 1].dy; }

 private:
  template <class T>
  bool continues(const ConvInput<T>& s, const Tap& tap) const {
    if (count == 0) return false;
    const TapRun& run = data[count - 1];
    return run.length < TapRun::longest && tap.dy == run.dy && tap.dx == run.dx + run.length * s.step_w;
  }
  template <class T>
  void begin_run(const ConvInput<T>& s, const Tap& tap, int64_t& terms) {
    const auto first_from = [&](int64_t column) {  // the first position at or after the column
      return column > 0 ? ceil_div(column, s.step_w) : -(-column / s.step_w);
    };
    const bool begins_chunk = terms + TapRun::longest * s.channels > KC;
    if (begins_chunk) terms = 0;
    data[count++] = {tap.dy, tap.dx, first_from(-tap.dx), first_from(s.width - tap.dx), begins_chunk, {}, 0};
  }
};

// Calls f.operator()<value>(), where value is one of `values`.
template <int... values, class F>
C10_ALWAYS_INLINE void dispatch(int64_t value, const F& f) {
  static_cast<void>(((value == values && (f.template operator()<values>(), true)) || ...));
}

// ---- convolution ----

// One row of the output, with the channels of one vector.
template <class T>
struct LanesOfRow {
  const ConvProblem<T>& x;
  const TapRuns& runs;
  const Permutation* permutations;
  const Compute<T>* weights;
  const T* image;
  T* output;
  const T* bias;
  int64_t y;
  int64_t in, out;  // the channels of the vector
};

// The weights in the order in which they are read: [vectors][runs][channels of a group][taps of the run][lanes].
template <class T>
const Compute<T>* pack_weights(const ConvProblem<T>& x, const GroupLanes<Compute<T>>& groups, const TapRuns& runs) {
  using C = Compute<T>;
  const int64_t K = x.depth(), size = K * groups.lanes;
  int64_t* steps = scratch<int64_t>(Scratch::filter_steps, K);
  int64_t* step = steps;
  for (const TapRun& run : runs)
    for (int64_t i = 0; i < groups.in; ++i)
      for (int64_t t = 0; t < run.length; ++t) *step++ = x.filters.step(i, x.input.taps[run.taps[t]]);
  C* weights = scratch<C>(Scratch::weight, groups.vectors() * size);
  for_each_task(groups.vectors(), 16.0 * groups.vectors() * size, [&](int64_t v) {
    C* target = weights + v * size;
    if (!groups.is_full(v)) std::fill_n(target, size, C(0));
    for (int64_t lane = 0; lane < groups.groups_of(v) * groups.out; ++lane) {
      const T* filter = x.filters.at(groups.first_group(v) + lane / groups.out, lane % groups.out);
      for (int64_t k = 0; k < K; ++k) target[k * groups.lanes + lane] = static_cast<C>(filter[steps[k]]);
    }
  });
  return weights;
}

// Adds the taps of a run to a tile's sums. Bit i of `inside` says whether position i of the tile is in the image.
template <int length, class T>
C10_ALWAYS_INLINE void add_run(Register<Compute<T>> (&sum)[tile_pixels], const T* source, int64_t step, int64_t lanes,
                               uint32_t inside, const Permutation* permutations, int64_t channels,
                               const Compute<T>* weights) {
  using V = Vec<Compute<T>>;
  for (int64_t i = 0; i < channels; ++i, weights += length * V::size()) {
    // This keeps gcc from hoisting 18 addresses and tests out of the loop, for which there are no registers.
    asm("" : "+r"(source), "+r"(step), "+r"(inside));
    const Permutation permutation = permutations[i];
    Register<Compute<T>> weight[length];
#pragma GCC unroll 3
    for (int t = 0; t < length; ++t) weight[t] = V::loadu(weights + t * V::size());
    const T* from = source;
#pragma GCC unroll 18
    for (int position = 0; position < tile_pixels + length - 1; ++position, from += step) {
      if ((inside >> position & 1) == 0) continue;
      const V value = permute(load(from, lanes), permutation);
#pragma GCC unroll 3
      for (int t = 0; t < length; ++t) {
        const int p = position - t;
        if (0 <= p && p < tile_pixels) sum[p] = at::vec::fmadd(value, V(weight[t]), V(sum[p]));
      }
    }
  }
}

// Computes pixels [x, x + pixels) of a row.
template <bool full, class T>
void convolve_tile(const LanesOfRow<T>& row, int64_t x, int64_t pixels) {
  using V = Vec<Compute<T>>;
  const ConvInput<T>& s = row.x.input;
  const int64_t in = full ? V::size() : row.in, out = full ? V::size() : row.out, step = s.step_w * s.x_stride;
  const Compute<T>* weights = row.weights;
  Register<Compute<T>> sum[tile_pixels], total[tile_pixels];
#pragma GCC unroll 16
  for (int p = 0; p < tile_pixels; ++p) sum[p] = total[p] = V(0);
  for (const TapRun& run : row.runs) {
    if (run.begins_chunk) {
#pragma GCC unroll 16
      for (int p = 0; p < tile_pixels; ++p) total[p] = V(total[p]) + V(sum[p]), sum[p] = V(0);
    }
    const Compute<T>* weights_of_run = weights;
    weights += run.length * s.channels * V::size();
    const int64_t source_y = row.y * s.step_h + run.dy;
    if (source_y < 0 || source_y >= s.height) continue;
    const T* source = row.image + source_y * s.y_stride + run.dx * s.x_stride + x * step;
    const int64_t positions = pixels + run.length - 1;
    // Prefetch the input row that the next output row is the first to read: the hardware prefetcher does not follow
    // pixels that lie far apart.
    if (run.dy == row.runs.bottom())
      for (int64_t i = 0; i < positions; ++i) __builtin_prefetch(source + s.step_h * s.y_stride + i * step, 0, 2);
    const int64_t begin = std::clamp(run.begin - x, int64_t{0}, positions);
    const int64_t end = std::clamp(run.end - x, begin, positions);
    const uint32_t inside = (1u << end) - (1u << begin);
    dispatch<1, 2, 3>(run.length, [&]<int length>() {
      add_run<length>(sum, source, step, in, inside, row.permutations, s.channels, weights_of_run);
    });
  }
  const V bias = row.bias ? load(row.bias, out) : V(0);
  const int64_t x_stride = row.x.out_pixels().x_stride;
  T* output = row.output + x * x_stride;
#pragma GCC unroll 16
  for (int p = 0; p < tile_pixels; ++p) {
    if (p >= pixels) break;
    V value = V(total[p]) + V(sum[p]);
    if (row.bias) value = value + bias;
    if (row.x.relu) value = at::vec::clamp_min(value, V(0));
    store(output + p * x_stride, value, out);
  }
}

template <class T>
void convolve_phase(const ConvProblem<T>& x, const GroupLanes<Compute<T>>& groups) {
  const ConvInput<T>& s = x.input;
  const TapRuns runs(s);
  const Permutation* permutations = groups.permutations();
  const Compute<T>* weights = pack_weights(x, groups, runs);
  const Axis pixels = x.out_pixels();
  const int64_t lines = s.count * s.out_height, tiles = ceil_div(s.out_width, tile_pixels);
  const double flops = 2.0 * lines * s.out_width * x.groups * x.out_channels * x.depth();
  for_each_task(lines, flops, [&](int64_t line) {
    const int64_t n = line / s.out_height, y = line % s.out_height;
    const T* image = s.images + n * s.image_stride;
    T* output = x.first_pixel() + n * pixels.image_stride + y * pixels.y_stride;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = tile * s.out_width / tiles, end = (tile + 1) * s.out_width / tiles;
      for (int64_t v = 0; v < groups.vectors(); ++v) {
        const int64_t in = groups.first_group(v) * groups.in, out = groups.first_group(v) * groups.out;
        const LanesOfRow<T> row{x,
                                runs,
                                permutations,
                                weights + v * x.depth() * groups.lanes,
                                image + in,
                                output + out,
                                x.bias ? x.bias + out : nullptr,
                                y,
                                groups.groups_of(v) * groups.in,
                                groups.groups_of(v) * groups.out};
        groups.is_full(v) ? convolve_tile<true>(row, begin, end - begin)
                          : convolve_tile<false>(row, begin, end - begin);
      }
    }
  });
}

// ---- weight gradient ----

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

// grad_weight of the channels of vector v = the sum, in order, of the parts of sums[k, lanes].
template <class T>
void write_sums(const GroupLanes<Compute<T>>& groups, int64_t v, int64_t K, Compute<T>* sums, int64_t parts,
                int64_t part_stride, T* grad_weight) {
  using V = Vec<Compute<T>>;
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < K * V::size(); i += V::size())
      (V::loadu(sums + i) + V::loadu(sums + part * part_stride + i)).store(sums + i);
  const Output<T> out{grad_weight + groups.first_group(v) * groups.out * K, Axis::plain(1), Axis::plain(K)};
  write(out, sums, V::size(), 0, K, 0, groups.groups_of(v) * groups.out);
}

}  // namespace

template <class T>
void convolve_grouped_lanes(const ConvProblem<T>* phases, int64_t count) {
  count_run(Algorithm::conv2d_grouped_lanes);
  const ConvProblem<T>& x = phases[0];
  const GroupLanes<Compute<T>> groups{x.groups, x.input.channels, x.out_channels};
  for (int64_t p = 0; p < count; ++p) convolve_phase(phases[p], groups);
}

template <class T>
void weight_gradient_grouped_lanes(const Conv2dShape& s, const ConvInput<T>& source, const T* grad_output,
                                   T* grad_weight) {
  using C = Compute<T>;
  count_run(Algorithm::weight_gradient_grouped_lanes);
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
      for_each_chunk(0, s.OW, [&](int64_t x, int64_t columns, bool, bool) {
        for (int64_t v = 0; v < groups.vectors(); ++v) {
          const int64_t in = groups.first_group(v) * groups.in, out = groups.first_group(v) * groups.out;
          const LanesOfBand<T> lanes{source,
                                     source.images + n * source.image_stride + in,
                                     grad_output + n * s.OH * s.OW * s.O + out,
                                     s.O,
                                     groups.groups_of(v) * groups.in,
                                     groups.groups_of(v) * groups.out,
                                     y,
                                     std::min(band_rows, s.OH - y),
                                     x,
                                     x + columns};
          C* target = sums + part * part_size + v * size;
          groups.is_full(v) ? add_band<true>(lanes, runs, permutations, target)
                            : add_band<false>(lanes, runs, permutations, target);
        }
      });
    }
  });
  for_each_task(groups.vectors(), 4.0 * parts * part_size,
                [&](int64_t v) { write_sums(groups, v, K, sums + v * size, parts, part_size, grad_weight); });
}

#define INSTANTIATE(T)                                                  \
  template void convolve_grouped_lanes(const ConvProblem<T>*, int64_t); \
  template void weight_gradient_grouped_lanes(const Conv2dShape&, const ConvInput<T>&, const T*, T*);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

#endif

}  // namespace pyops::cpu
