// The weight gradient of a depthwise convolution (conv2d/depthwise.cpp). It is chosen for every one:
//
//   grad_weight[c, tap] = sum over pixels of grad_output[c, pixel] * input(c, pixel, tap)
//
// As in the forward, the images are read in blocks of channels (conv2d/channel_blocks.h), so that a vector holds one
// pixel of several channels. The taps of a row of the kernel are summed together, and share the loads of grad_output.
// Dense 3x3 kernels have code of their own (conv2d/depthwise_3x3.h).
//
// Guarantees: the sums run over bands of rows of each image, and then over the bands and the images in an order that
// depends on the shape alone.
#include <array>
#include <utility>

#include "../gemm/dot_tile.h"
#include "algorithms.h"
#include "channel_blocks.h"
#include "depthwise_3x3.h"
#include "nonfinite.h"

namespace pyops::cpu {
namespace {

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

// grad_weight = the sums of `parts` arrays of [taps, C], added in order.
template <class T>
void sum_depthwise_parts(const WeightGradient<T>& x, Compute<T>* sums, int64_t parts) {
  const Conv2dShape& s = x.shape;
  const int64_t taps = x.input.tap_count, kernel = s.kernel_h * s.kernel_w, size = taps * s.C;
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  if (taps < kernel) std::fill(x.grad_weight, x.grad_weight + s.C * kernel, T(0));
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < s.C; ++c)
      x.grad_weight[c * kernel + x.input.taps[t].index] = static_cast<T>(sums[t * s.C + c]);
}

// ---- kernels of any size, over blocks of channels ----

// The most taps of a row of the kernel that are summed together, and the chains of FMAs that the registers hold. Few
// taps have several chains each, for every other pixel, so that none waits for the one before.
constexpr int most_taps = by_capability(4, 8, 8), most_chains = by_capability(6, 12, 24);

// The pixels of a band of one block, and the taps of a row of the kernel that are summed over them.
template <class C>
struct BandOfBlock {
  ChannelBlocks<C> input, grad;  // the first block of each
  int64_t step_h, step_w, width;
  const int64_t* offsets;  // of the taps, in the input
};

// sums[t] = the sum over the rows `rows` of tap t, for `taps` taps.
template <class C, int taps>
void sum_taps(const BandOfBlock<C>& band, Range rows, Vec<C>* sums) {
  using V = Vec<C>;
  constexpr int chains = std::min(4, most_chains / taps);
  V sum[taps][chains];
#pragma GCC unroll 8
  for (int t = 0; t < taps; ++t)
#pragma GCC unroll 4
    for (int j = 0; j < chains; ++j) sum[t][j] = V(0);
  const int64_t step = band.step_w * band.input.x_stride, grad_step = band.grad.x_stride;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const C* input = band.input.data + y * band.step_h * band.input.y_stride;
    const C* grad = band.grad.data + y * band.grad.y_stride;
    const auto add = [&](int j) __attribute__((always_inline)) {
      const V g = V::loadu(grad);
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) sum[t][j] = at::vec::fmadd(V::loadu(input + band.offsets[t]), g, sum[t][j]);
      input += step, grad += grad_step;
    };
    int64_t x = 0;
    for (; x + chains <= band.width; x += chains) {
#pragma GCC unroll 4
      for (int j = 0; j < chains; ++j) add(j);
    }
    for (; x < band.width; ++x) add(0);
  }
#pragma GCC unroll 8
  for (int t = 0; t < taps; ++t) {
    sums[t] = sum[t][0];
#pragma GCC unroll 4
    for (int j = 1; j < chains; ++j) sums[t] = sums[t] + sum[t][j];
  }
}

template <class C, int... I>
constexpr auto kernels_of_taps(std::integer_sequence<int, I...>) {
  return std::array{sum_taps<C, I + 1>...};
}

// The sums of all taps over blocks of channels. The bands of rows of all images, in order, are cut into parts; a task
// sums one part of some blocks.
template <class T>
class BlockedDepthwiseWgrad {
 public:
  explicit BlockedDepthwiseWgrad(const WeightGradient<T>& x)
      : x_(x),
        grad_(grad_images(x)),
        field_(x.input),
        at_once_(channels_at_once<T>(x.shape.channels_last, x.shape.C, field_)),
        bands_(bands_of_rows(x.input, field_, at_once_)),
        band_(ceil_div(x.shape.OH, bands_)),
        parts_(std::min(ceil_div(enough_tasks, groups()), x.shape.N * bands_)) {}

  void run() const {
    const Conv2dShape& s = x_.shape;
    const int64_t taps = x_.input.tap_count, items = s.N * bands_;
    C* sums = scratch<C>(Scratch::partial_sums, parts_ * taps * s.C);
    for_each_task(parts_ * groups(), 2.0 * s.N * s.C * s.OH * s.OW * taps, [&](int64_t task) {
      const int64_t part = task / groups(), c = task % groups() * at_once_, first = part * items / parts_;
      for (int64_t i = first; i < (part + 1) * items / parts_; ++i) {
        const int64_t y = i % bands_ * band_;
        add_band(i / bands_, c, {y, std::min(y + band_, s.OH)}, sums + part * taps * s.C + c, i == first);
      }
    });
    sum_depthwise_parts(x_, sums, parts_);
  }

 private:
  using C = Compute<T>;
  static constexpr int64_t lanes = lanes_of<T>;

  // grad_output as images of its own.
  static ConvInput<T> grad_images(const WeightGradient<T>& x) {
    const Conv2dShape& s = x.shape;
    const Layout layout(s.O, s.OH, s.OW, s.channels_last);
    return {
        .images = x.grad_output,
        .image_stride = layout.image_stride,
        .channel_stride = layout.channel_stride,
        .y_stride = layout.y_stride,
        .x_stride = layout.x_stride,
        .count = s.N,
        .height = s.OH,
        .width = s.OW,
        .channels = 1,
        .step_h = 1,
        .step_w = 1,
        .out_height = s.OH,
        .out_width = s.OW,
        .taps = nullptr,
        .tap_count = 0,
        .end = s.N * layout.image_stride,
    };
  }

  // The groups of channels that are read together.
  int64_t groups() const { return ceil_div(x_.shape.C, at_once_); }

  // Adds the sums over the output rows `rows` of image n, for the channels from c on, to `target`; the first band is
  // stored instead.
  void add_band(int64_t n, int64_t c, Range rows, C* target, bool first) const {
    constexpr auto kernels = kernels_of_taps<C>(std::make_integer_sequence<int, most_taps>{});
    const ConvInput<T>& s = x_.input;
    const int64_t count = std::min(at_once_, x_.shape.C - c);
    ChannelBlocks<C> input =
        pack_blocks(Scratch::source_block, s, n, c, count, rows_met(s, rows), {field_.left, field_.right + 1});
    ChannelBlocks<C> grad = pack_blocks(Scratch::grad_block, grad_, n, c, count, rows, {0, s.out_width});
    for (int64_t v = 0; v < count; v += lanes, input.data += input.stride, grad.data += grad.stride) {
      const int64_t channels = std::min(lanes, count - v);
      for (int64_t t = 0, end; t < s.tap_count; t = end) {  // a row of the kernel
        const int64_t dy = s.taps[t].dy;
        for (end = t; end < s.tap_count && s.taps[end].dy == dy;) ++end;
        const Range met = range_inside(rows.begin * s.step_h + dy, s.step_h, rows.size(), s.height);
        for_each_even_part(end - t, most_taps, [&](int64_t begin, int64_t taps) {
          int64_t offsets[most_taps];
          for (int64_t i = 0; i < taps; ++i)
            offsets[i] = dy * input.y_stride + s.taps[t + begin + i].dx * input.x_stride;
          Vec<C> sums[most_taps];
          kernels[taps - 1]({input, grad, s.step_h, s.step_w, s.out_width, offsets},
                            {rows.begin + met.begin, rows.begin + met.end}, sums);
          for (int64_t i = 0; i < taps; ++i) {
            C* to = target + (t + begin + i) * x_.shape.C + v;
            store(to, first ? sums[i] : load(to, channels) + sums[i], channels);
          }
        });
      }
    }
  }

  const WeightGradient<T>& x_;
  const ConvInput<T> grad_;
  const ReceptiveField field_;
  const int64_t at_once_, bands_, band_, parts_;
};

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
  weight_gradient_exactly(x, [](const WeightGradient<T>& finite) {
    const int64_t images = finite.shape.N;
    Compute<T>* sums = scratch<Compute<T>>(Scratch::partial_sums, images * 9 * finite.shape.C);
    sums_3x3(finite, sums);
    sum_depthwise_parts(finite, sums, images);
  });
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
  weight_gradient_exactly(x, [](const WeightGradient<T>& finite) { BlockedDepthwiseWgrad<T>(finite).run(); });
}

#define INSTANTIATE(T)                  \
  template struct Depthwise3x3Wgrad<T>; \
  template struct DepthwiseWgrad<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
