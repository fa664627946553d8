// Convolutions of narrow groups over channels-last images:
//
//   output[pixel, (g, o)] = bias + sum over (tap, i) of input[pixel + tap, (g, i)] * weight[tap, i, (g, o)]
//
// They are chosen for groups no wider than a vector, if as many whole groups as fit fill at least half of its lanes, or
// all of them with AVX2. Vectors along the channels of one group would leave most lanes idle; here a vector holds the
// channels of all these groups. With 4 channels per group, 16 lanes hold four groups.
//
// With (g, o) along the lanes, only input[.., (g, i)] does not have its values where they are needed: channel i of each
// group belongs in all lanes of its group. A permutation of the loaded vector puts it there, one that is the same for
// every pixel. A permuted vector serves up to three neighbouring taps, which meet it at neighbouring output pixels. The
// sums of 16 pixels of a row stay in registers (8 with AVX2). Images are read in place, nothing is copied or
// transposed, and taps outside of the image are skipped.
//
// Guarantees: those of gemm.h. The terms of an output run over the taps row by row, with the taps that share their
// loads together, which is not the order of the filters in memory.
#include "grouped_lanes.h"

namespace pyops::cpu {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

namespace {

// The pixels of a row whose sums the registers hold.
constexpr int tile_pixels = by_capability(0, 8, 16);

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

}  // namespace

template <class T>
bool GroupedLanes<T>::supports(const Phases<T>& phases) {
  const ConvProblem<T>& x = phases.first();
  return x.channels_last && can_share_vectors<Compute<T>>(x.groups, x.input.channels, x.out_channels);
}

template <class T>
bool GroupedLanes<T>::profitable(const Phases<T>& phases) {
  const ConvProblem<T>& x = phases.first();
  return are_worth_sharing_vectors<Compute<T>>(x.groups, x.input.channels, x.out_channels);
}

template <class T>
bool GroupedLanes<T>::sums_in_order(const Phases<T>&) {
  return false;
}

template <class T>
void GroupedLanes<T>::run(const Phases<T>& phases) {
  const ConvProblem<T>& x = phases.first();
  const GroupLanes<Compute<T>> groups{x.groups, x.input.channels, x.out_channels};
  for (const ConvProblem<T>& phase : phases) convolve_phase(phase, groups);
}

#define INSTANTIATE(T) template struct GroupedLanes<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

#endif

}  // namespace pyops::cpu
