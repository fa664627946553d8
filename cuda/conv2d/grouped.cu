// Convolutions with narrow groups, and their input gradients, in either layout; the weight is contiguous:
//
//   output[n, o, y, x] = bias[o] + sum over c of the group, i, j of weight[o, c, i, j] input[n, c, y stride + .., ..]
//
// The gradient has this form with input and output exchanged. As matrix products, groups of 4 to 32 channels would fill
// only a fraction of a tile, so they are convolved directly. A lane (conv2d/lanes.h) is a few channels of the result,
// all of one group. Each of the four values that a strip reads for a tap is used for all of these channels, and each
// weight, which is in shared memory, for the whole strip. In N C H W all threads of a warp read the same 8 weights for
// 32 multiply-adds and 4 reads of the images; in N H W C a warp reads contiguous channels, 4 at a time where the groups
// allow it.
//
// Sums run over i, j, c, in float (in double for double), in one chain or, if that had more than 144 terms, in one
// chain for each tap, and are rounded once. Only taps inside the image count, even if a factor is infinite. On sm_80
// and sm_90 the kernels take 96 to 116 registers, so that an SM holds two blocks of 256 threads; for double at most
// 168. For groups of 4 channels and 3x3 kernels they take 1.2 KB of shared memory in N C H W and 18 KB in N H W C; at
// most 32 KB, or 64 KB for double.
#include "lanes.h"

namespace pyops::cuda {
namespace {

// The most terms in one chain of additions: with 288 the error is 1.4 times that of stock's CPU kernels, which add up
// parts.
constexpr int64_t longest_grouped_chain = 144;

struct Grouped {
  LaneConvolution conv;
  Lanes lanes;
  Divider<int32_t> lanes_per_group, channels, taps;  // channels: those of a group of the source
  int32_t results;                                   // channels of a group of the result
  int32_t result_stride, source_stride;              // in the weight, between channels of a group
};

// The channels of the result that belong to a lane.
struct Channels {
  int32_t group, first, count;  // first: within the group
};

template <int outputs>
__device__ __forceinline__ Channels channels_of(const Grouped& g, int32_t lane) {
  Channels c;
  c.first = take_digit(lane, g.lanes_per_group) * outputs;
  c.group = lane;
  c.count = min(outputs, g.results - c.first);
  return c;
}

// The offset, for tap 0, of the weight between a channel of the result, counted within its group, and one of the
// source.
__device__ __forceinline__ int32_t weight_offset(const Grouped& g, int32_t group, int32_t result, int32_t source) {
  const int32_t of_group = group * g.results * g.channels.value() * g.taps.value();
  return of_group + result * g.result_stride + source * g.source_stride;
}

// Fills weights[tap][channel of the source][lane of the block][output], with zeros where there is no such lane or
// output.
template <class T, int outputs>
__device__ __forceinline__ void load_weights(const Grouped& g, const T* weight, int32_t first_lane,
                                             Compute<T>* weights) {
  const int32_t count = g.taps.value() * g.channels.value() * g.lanes.lanes.value() * outputs;
  for (int32_t k = threadIdx.x; k < count; k += blockDim.x) {
    int32_t rest = k / outputs;
    const int32_t o = k % outputs, lane = first_lane + take_digit(rest, g.lanes.lanes);
    const int32_t source = take_digit(rest, g.channels), tap = rest;
    Compute<T> value = 0;
    if (lane < g.lanes.total) {
      const Channels c = channels_of<outputs>(g, lane);
      if (o < c.count) value = widen(weight[weight_offset(g, c.group, c.first + o, source) + tap]);
    }
    weights[k] = value;
  }
}

template <class T, int outputs, int pack, bool long_sums>
__device__ __forceinline__ void sum_strip(const Grouped& g, const T* source, const Strip& strip, int32_t first_channel,
                                          const Compute<T>* weights, Compute<T> (&sums)[strip_rows][outputs]) {
  using C = Compute<T>;
  const Images<int32_t>& images = g.conv.source;
  const int32_t step = g.lanes.lanes.value() * outputs, channels = g.channels.value();
  for (int32_t i = 0; i < g.conv.conv.kernel_h.value(); ++i) {
    int32_t rows[strip_rows];
#pragma unroll
    for (int r = 0; r < strip_rows; ++r) rows[r] = g.conv.source_row(strip.y + r, i);
    for (int32_t j = 0; j < g.conv.conv.kernel_w.value(); ++j, weights += channels * step) {
      const int32_t column = g.conv.source_column(strip.x, j);
      if (column < 0) continue;
      C of_tap[strip_rows][outputs] = {};
      auto& chain = long_sums ? of_tap : sums;
      for (int32_t c = 0; c < channels; c += pack) {
        Vector<T, pack> values[strip_rows];
#pragma unroll
        for (int r = 0; r < strip_rows; ++r) {
          const bool inside = rows[r] >= 0;
          const int32_t offset = inside ? images.offset(strip.n, first_channel + c, rows[r], column) : 0;
          values[r] = load_or_zero<T, pack>(inside, source + offset);
        }
#pragma unroll
        for (int e = 0; e < pack; ++e) {
          const auto factors = *reinterpret_cast<const Vector<C, outputs>*>(weights + (c + e) * step);
#pragma unroll
          for (int r = 0; r < strip_rows; ++r)
#pragma unroll
            for (int o = 0; o < outputs; ++o)
              chain[r][o] = multiply_add(widen(values[r].values[e]), factors.values[o], chain[r][o]);
        }
      }
      if constexpr (long_sums) {
#pragma unroll
        for (int r = 0; r < strip_rows; ++r)
#pragma unroll
          for (int o = 0; o < outputs; ++o) sums[r][o] += of_tap[r][o];
      }
    }
  }
}

// If `pack` is above 1, it divides the channels of a group of the source, and `outputs` divides those of the result.
template <class T, int outputs, int pack, bool long_sums>
__global__ void __launch_bounds__(block_threads, blocks_at_least<T>)
    grouped(const __grid_constant__ Grouped g, const __grid_constant__ Operands<T> x) {
  using C = Compute<T>;
  C* weights = shared_memory<C>();
  int32_t lane, tile;
  const int32_t slot = g.lanes.slot(lane), first_lane = g.lanes.first_lane(tile);
  load_weights<T, outputs>(g, x.weight, first_lane, weights);
  __syncthreads();
  if (slot >= g.lanes.slots || first_lane + lane >= g.lanes.total) return;
  const Channels channels = channels_of<outputs>(g, first_lane + lane);
  const int32_t first = channels.group * g.results + channels.first;
  for (int32_t k = tile * g.lanes.slots + slot; k < g.lanes.strips; k += g.lanes.tiles * g.lanes.slots) {
    const Strip strip = g.lanes.strip(k);
    C sums[strip_rows][outputs] = {};
    sum_strip<T, outputs, pack, long_sums>(g, x.source, strip, channels.group * g.channels.value(),
                                           weights + lane * outputs, sums);
    bool any_nan = false;
#pragma unroll
    for (int r = 0; r < strip_rows; ++r) {
      const int32_t y = strip.y + r;
      if (y >= g.conv.result.height()) break;
      Vector<T, outputs> values;
#pragma unroll
      for (int o = 0; o < outputs; ++o) {
        if (o >= channels.count) break;
        values.values[o] = g.conv.finish(sums[r][o], x.bias, first + o);
        any_nan |= sums[r][o] != sums[r][o];
      }
      T* result = x.result + g.conv.result.offset(strip.n, first, y, strip.x);
      if constexpr (pack > 1) {
        *reinterpret_cast<Vector<T, outputs>*>(result) = values;
      } else {
#pragma unroll
        for (int o = 0; o < outputs; ++o)
          if (o < channels.count) result[o * g.conv.result.c_stride] = values.values[o];
      }
    }
    if (any_nan) g.conv.mend(x, strip, first, channels.count);
  }
}

template <class T, int outputs, int pack, bool long_sums>
cudaError_t launch_grouped(const ConvolutionArgs& x, cudaStream_t stream) {
  const Conv2dShape& s = x.shape;
  const int64_t taps = s.kernel_h * s.kernel_w, in = s.C / s.groups, out = s.O / s.groups;
  const int64_t channels = x.gradient ? out : in, results = x.gradient ? in : out;
  const int64_t lanes_per_group = ceil_div(results, outputs), of_output = in * taps;
  const int64_t lane_bytes = channels * taps * outputs * sizeof(Compute<T>), most_bytes = 32 << 10;
  const int64_t most_lanes = s.channels_last ? std::clamp<int64_t>(most_bytes / lane_bytes, 1, 32) : 1;
  const Grouped g{LaneConvolution(x),
                  Lanes(s.groups * lanes_per_group, most_lanes, s.N, x.height(), x.width()),
                  Divider<int32_t>(lanes_per_group),
                  Divider<int32_t>(channels),
                  Divider<int32_t>(taps),
                  static_cast<int32_t>(results),
                  static_cast<int32_t>(x.gradient ? taps : of_output),
                  static_cast<int32_t>(x.gradient ? of_output : taps)};
  return launch(grouped<T, outputs, pack, long_sums>, g.lanes.blocks(), g.lanes.threads,
                g.lanes.lanes.value() * lane_bytes, stream, g, Operands<T>(x));
}

}  // namespace

cudaError_t grouped_convolution(const ConvolutionArgs& x, cudaStream_t stream) {
  const Conv2dShape& s = x.shape;
  const int64_t in = s.C / s.groups, out = s.O / s.groups;
  const bool long_sums = (x.gradient ? out : in) * s.kernel_h * s.kernel_w > longest_grouped_chain;
  const bool packs = s.channels_last && in % 4 == 0 && out % 4 == 0 && aligned_to_packs(x.source, x.result);
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    if (packs) return long_sums ? launch_grouped<T, 4, 4, true>(x, stream) : launch_grouped<T, 4, 4, false>(x, stream);
    if (long_sums) return launch_grouped<T, 4, 1, true>(x, stream);
    return s.channels_last ? launch_grouped<T, 4, 1, false>(x, stream) : launch_grouped<T, 8, 1, false>(x, stream);
  });
}

}  // namespace pyops::cuda
