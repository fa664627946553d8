// A direct convolution for kernels whose taps form rows of three neighbours, with at most a vector of output channels:
//
//   output[pixel, o] = bias[o] + sum over (row of taps, channel, tap) of input(pixel, channel, tap) * filter(o, ...)
//
// It is chosen for channels-last images of the compute type, with a horizontal stride of 1, where vectors along the
// width would not be faster. A register tile of gemm/microkernel.h that is one vector wide takes a load for each FMA.
// Here a broadcast input value serves three FMAs, with the filter vectors of neighbouring taps for neighbouring pixels,
// so that 16 pixels take 21 loads for 48 FMAs.
//
// The images are read in place, and taps outside of them are skipped. Sums run over (row of taps, channel, tap from
// left to right), which is not the order of the filters in memory. Otherwise the guarantees are those of gemm.h.
#include "implicit_gemm.h"

namespace pyops::cpu {
namespace {

// The most pixels of a register tile: what the registers hold beside three filter vectors and an input value.
constexpr int most_pixels = by_capability(4, 12, 16);

// `count` neighbouring channels of a row of taps.
template <class C>
struct Terms {
  const C* source;   // the input of the line's first pixel at the middle tap
  const C* filters;  // the filter vectors of the left tap
  int64_t count;
};

template <class C>
struct Direct3WideArgs {
  const Terms<C>* terms;
  int64_t term_count;
  int64_t x_stride;                      // of the input
  int64_t filter_step, filter_tap_step;  // from one channel to the next, and from one tap to the next
  C* sums;                               // a vector for each pixel of the line, kept from chunk to chunk of K
  C* target;
  int64_t target_step;
  int lanes;
  const C* bias;
  bool relu, first, last;
};

// Computes output pixels [x, x + pixels) of a line. left: whether the left tap of the first pixel lies inside of the
// image; right: whether the right tap of the last one does.
template <class C, int pixels>
void tile(const Direct3WideArgs<C>& args, int64_t x, bool left, bool right) {
  using V = Vec<C>;
  V sum[pixels];
#pragma GCC unroll 32
  for (int i = 0; i < pixels; ++i) sum[i] = V(0);
  const int64_t x_stride = args.x_stride;
  for (int64_t s = 0; s < args.term_count; ++s) {
    const Terms<C>& terms = args.terms[s];
    const C* source = terms.source + x * x_stride;
    const C* filter = terms.filters;
    for (int64_t c = 0; c < terms.count; ++c, ++source, filter += args.filter_step) {
      const V first = V::loadu(filter), second = V::loadu(filter + args.filter_tap_step),
              third = V::loadu(filter + 2 * args.filter_tap_step);
      if (left) sum[0] = at::vec::fmadd(V(source[-x_stride]), first, sum[0]);
      const C* value = source;
#pragma GCC unroll 32
      for (int i = 0; i < pixels; ++i, value += x_stride) {
        const V here(*value);
        if (i > 0) sum[i - 1] = at::vec::fmadd(here, third, sum[i - 1]);
        sum[i] = at::vec::fmadd(here, second, sum[i]);
        if (i + 1 < pixels) sum[i + 1] = at::vec::fmadd(here, first, sum[i + 1]);
      }
      if (right) sum[pixels - 1] = at::vec::fmadd(V(*value), third, sum[pixels - 1]);
    }
  }
  C* sums = args.sums + x * V::size();
#pragma GCC unroll 32
  for (int i = 0; i < pixels; ++i) {
    if (!args.first) sum[i] = V::loadu(sums + i * V::size()) + sum[i];
    if (!args.last) sum[i].store(sums + i * V::size());
  }
  if (!args.last) return;
  C* target = args.target + x * args.target_step;
  const V bias = args.bias ? V::loadu(args.bias, args.lanes) : V(0);
#pragma GCC unroll 32
  for (int i = 0; i < pixels; ++i, target += args.target_step) {
    if (args.bias) sum[i] = sum[i] + bias;
    if (args.relu) sum[i] = at::vec::clamp_min(sum[i], V(0));
    sum[i].store(target, args.lanes);
  }
}

template <class C, int... I>
constexpr auto tiles_of(std::integer_sequence<int, I...>) {
  using Tile = void (*)(const Direct3WideArgs<C>&, int64_t, bool, bool);
  return std::array<Tile, sizeof...(I)>{tile<C, I + 1>...};
}
template <class C>
constexpr auto tiles = tiles_of<C>(std::make_integer_sequence<int, most_pixels>{});

// The index of the left tap within its row: in an input gradient it is the last one.
template <class T>
int64_t left_tap(const ConvInput<T>& s) {
  return s.taps[0].dx < s.taps[1].dx ? 0 : 2;
}

// Adds the terms (row of taps, channel) [k, k + kc) to the sums of line y of image n and group g. The sums of chunks
// are added up in whole vectors in scratch, because in the output a pixel's channels may be only part of a vector,
// which is slower to load and store.
template <class T>
void multiply_line(const ConvProblem<T>& x, const T* filters, int64_t g, int64_t n, int64_t y, int64_t k, int64_t kc,
                   T* sums, bool first, bool last) {
  constexpr int64_t lanes = Vec<T>::size();
  const ConvInput<T>& s = x.input;
  const int64_t filter_step = (s.tap_by_tap ? 1 : s.tap_count) * lanes;
  const int64_t filter_tap_step = (s.tap_by_tap ? s.channels : 1) * lanes;
  const int64_t left = left_tap(s);
  Terms<T> terms[KC / 3];
  int64_t term_count = 0;
  for (int64_t i = k, count; i < k + kc; i += count) {
    const int64_t row = i / s.channels, c = i % s.channels;
    const Tap& middle = s.taps[3 * row + 1];
    const int64_t source_y = y * s.step_h + middle.dy;
    count = std::min(s.channels - c, k + kc - i);
    if (source_y < 0 || source_y >= s.height) continue;
    terms[term_count++] = {
        s.images + n * s.image_stride + source_y * s.y_stride + middle.dx * s.x_stride + g * s.channels + c,
        filters + c * filter_step + (3 * row + left) * filter_tap_step, count};
  }
  T* target = x.output + n * x.out_lines.image_stride + y * x.out_lines.y_stride + g * x.out_channels;
  const Direct3WideArgs<T> args{terms,
                                term_count,
                                s.x_stride,
                                filter_step,
                                left == 0 ? filter_tap_step : -filter_tap_step,
                                sums,
                                target,
                                x.out_lines.x_stride,
                                static_cast<int>(x.out_channels),
                                x.bias ? x.bias + g * x.out_channels : nullptr,
                                x.relu,
                                first,
                                last};
  const int64_t parts = ceil_div(s.out_width, int64_t{most_pixels});
  for (int64_t part = 0, at = 0, pixels; part < parts; ++part, at += pixels) {
    pixels = s.out_width / parts + (part < s.out_width % parts);
    tiles<T>[pixels - 1](args, at, at + s.taps[left].dx >= 0, at + pixels - 1 + s.taps[2 - left].dx < s.width);
  }
}

// Whether the taps form rows of three neighbours, with a horizontal stride of 1, whose middle tap never leaves the
// image to the left or right.
template <class T>
bool has_rows_of_three_taps(const ConvInput<T>& s) {
  if (s.step_w != 1 || s.tap_count == 0 || s.tap_count % 3 != 0) return false;
  const int64_t left = left_tap(s), first = s.taps[left].dx;
  for (int64_t t = 0; t < s.tap_count; ++t)
    if (s.taps[t].dx != first + std::abs(t % 3 - left) || s.taps[t].dy != s.taps[t / 3 * 3].dy) return false;
  return first >= -1 && s.out_width + first < s.width;
}

template <class T>
void convolve_direct_3wide(const ConvProblem<T>& x) {
  constexpr int64_t lanes = Vec<T>::size(), enough_pixels = 384;
  const ConvInput<T>& s = x.input;
  const int64_t K = x.depth();
  T* filters = scratch<T>(Scratch::weight, x.groups * K * lanes);
  for (int64_t g = 0; g < x.groups; ++g) pack_filters(filters + g * K * lanes, x, g, 0, x.out_channels, lanes, 0, K);
  const int64_t lines = std::min(ceil_div(enough_pixels, s.out_width), s.out_height);
  const int64_t blocks = ceil_div(s.out_height, lines);
  const double flops = 2.0 * s.count * s.pixels() * x.groups * x.out_channels * K;
  for_each_task(s.count * x.groups * blocks, flops, [&](int64_t task) {
    const int64_t begin = task % blocks * lines, end = std::min(begin + lines, s.out_height);
    const int64_t g = task / blocks % x.groups, n = task / blocks / x.groups, line = s.out_width * lanes;
    T* sums = scratch<T>(Scratch::sums, lines * line);
    for_each_chunk<KC / 3>(0, s.channels * s.tap_count / 3, [&](int64_t k, int64_t kc, bool first, bool last) {
      for (int64_t y = begin; y < end; ++y)
        multiply_line(x, filters + g * K * lanes, g, n, y, k, kc, sums + (y - begin) * line, first, last);
    });
  });
}

}  // namespace

template <class T>
bool Direct3Wide<T>::supports(const Phases<T>& phases) {
  const ConvProblem<T>& x = phases.first();
  return std::is_same_v<T, Compute<T>> && phases.count == 1 && x.channels_last &&
         x.out_channels <= Vec<Compute<T>>::size() && has_rows_of_three_taps(x.input);
}

template <class T>
bool Direct3Wide<T>::profitable(const Phases<T>& x) {
  return !is_worth_batch_lanes(x.first(), Vec<Compute<T>>::size());  // which would sum in another order
}

template <class T>
bool Direct3Wide<T>::sums_in_order(const Phases<T>&) {
  return false;
}

template <class T>
void Direct3Wide<T>::run(const Phases<T>& x) {
  if constexpr (std::is_same_v<T, Compute<T>>) convolve_direct_3wide(x.first());
}

#define INSTANTIATE(T) template struct Direct3Wide<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
