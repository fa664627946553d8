// Convolutions with the batch in lanes, over CHWN blocks of images: the convolution itself, which serves the forward
// and the input gradient, and the gradients of weight and bias. Declarations and formulas are in conv2d/batch_lanes.h.
//
// The convolution is chosen where the lanes that it saves are worth two transposes (is_worth_batch_lanes). The combined
// backward is chosen for few channels, if every tap is inside of the image. A task is a block of images, or several for
// the gradients; threads that would otherwise have no work share a task.
//
// Only taps inside of the image are multiplied. A convolution's sums run over (channel, tap) in order, in the chunks of
// gemm.h. A weight gradient sums over the pixels of each image in a lane of its own, over the blocks of a part of the
// batch, over the lanes, and over the parts in order. The number of parts depends on the batch size only.
#include "batch_lanes.h"

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <optional>

#include "../gemm/dot_tile.h"
#include "../gemm/sum_parts.h"
#include "border_taps.h"
#include "costs.h"

namespace pyops::cpu {

// ---- convolution ----

template <class T>
BatchLanesConvolution<T>::BatchLanesConvolution(const ConvProblem<T>& x) : x_(x) {
  constexpr int64_t lanes = Vec<Compute<T>>::size(), bytes = sizeof(Compute<T>);
  const ConvInput<T>& s = x.input;
  const int64_t K = x.depth(), O = x.out_channels;
  Range* spans = scratch<Range>(Scratch::spans, s.out_height + s.out_width);
  const int64_t row_spans = cut_rows(spans, s);
  Range* column_spans = spans + row_spans;
  const int64_t column_count = cut_columns(column_spans, s);

  class_count_ = row_spans * column_count, chunks_ = std::max(ceil_div(K, KC), int64_t{1});
  int64_t* class_pixels = scratch<int64_t>(Scratch::class_pixels, class_count_);
  int64_t* filter_steps = scratch<int64_t>(Scratch::filter_steps, class_count_ * K);
  int64_t* source_steps = scratch<int64_t>(Scratch::source_steps, class_count_ * K);
  int64_t* begins = scratch<int64_t>(Scratch::chunk_begins, class_count_ * chunks_ + 1);
  int64_t* from = scratch<int64_t>(Scratch::source_pixels, s.pixels());
  int64_t* to = scratch<int64_t>(Scratch::output_pixels, s.pixels());
  int64_t term = 0, next_begin = 0, pixel = 0;
  int64_t* met = scratch<int64_t>(Scratch::met_taps, s.tap_count);  // the taps inside of a class
  for (int64_t i = 0; i < class_count_; ++i) {
    const Range rows = spans[i / column_count], columns = column_spans[i % column_count];
    class_pixels[i] = rows.size() * columns.size();
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      for (int64_t column = columns.begin; column < columns.end; ++column, ++pixel) {
        from[pixel] = (y * s.step_h * s.y_stride + column * s.step_w * s.x_stride) * lanes;
        to[pixel] = (y * x.out_lines.y_stride + column * x.out_lines.x_stride) * lanes;
      }
    }
    int64_t met_count = 0;
    for (int64_t t = 0; t < s.tap_count; ++t)
      if (is_inside(rows.begin, s.step_h, s.taps[t].dy, s.height) &&
          is_inside(columns.begin, s.step_w, s.taps[t].dx, s.width))
        met[met_count++] = t;
    // How many terms of the class precede element k of a filter. Without taps a filter has no elements, and k is 0.
    const auto terms_before = [&](int64_t k) -> int64_t {
      if (k == 0) return 0;
      const int64_t tap = &s.tap(k) - s.taps, channel = s.channel(k);
      const int64_t before = std::lower_bound(met, met + met_count, tap) - met;
      if (!s.tap_by_tap) return channel * met_count + before;
      const bool meets_image = before < met_count && met[before] == tap;
      return before * s.channels + (meets_image ? channel : 0);
    };
    for_each_chunk(0, K, [&](int64_t k, int64_t, bool, bool) { begins[next_begin++] = term + terms_before(k); });
    const int64_t outer = s.tap_by_tap ? met_count : s.channels, inner = s.tap_by_tap ? s.channels : met_count;
    for (int64_t j = 0; j < outer * inner; ++j) {
      const int64_t channel = s.tap_by_tap ? j % inner : j / inner;
      const Tap& tap = s.taps[met[s.tap_by_tap ? j / inner : j % inner]];
      filter_steps[term] = x.filters.step(channel, tap) * bytes;
      source_steps[term++] = (channel * s.channel_stride + tap.dy * s.y_stride + tap.dx * s.x_stride) * lanes * bytes;
    }
  }
  begins[next_begin] = term;

  class_pixels_ = class_pixels, chunk_begins_ = begins, from_ = from, to_ = to;
  filter_steps_ = filter_steps, source_steps_ = source_steps;
  filters_ = in_compute_type(Scratch::weight, x.filters.data, x.filters.count);
  bias_ = in_compute_type(Scratch::bias, x.bias, x.groups * O);
  filter_rows_ = multiples(Scratch::filter_rows, O, x.filters.out_stride);
  target_rows_ = multiples(Scratch::output_channels, O, x.out_channel_stride * lanes);
}

template <class T>
void BatchLanesConvolution<T>::operator()(const Compute<T>* source, Compute<T>* output, Share share) const {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const int64_t O = x_.out_channels;
  const Range mine = share.of(x_.input.pixels(), max_vectors);
  for (int64_t g = 0; g < x_.groups; ++g) {
    OperandC<C> target{output + g * O * x_.out_channel_stride * lanes, target_rows_, to_};
    if (bias_) target.row_bias = bias_ + g * O;
    target.relu = x_.relu;
    const C* images = source + g * x_.input.channels * x_.input.channel_stride * lanes;
    const int64_t* begin = chunk_begins_;
    for (int64_t i = 0, first = 0; i < class_count_; first += class_pixels_[i++]) {
      const Range pixels{std::max(mine.begin, first), std::min(mine.end, first + class_pixels_[i])};
      if (pixels.size() == 0) {
        begin += chunks_;
        continue;
      }
      target.vectors = to_ + pixels.begin;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk, ++begin) {
        const RowRun run{O, begin[1] - begin[0], filter_steps_ + begin[0], source_steps_ + begin[0]};
        macrokernel<C>(&run, 1, pixels.size(), {filters_ + g * x_.filters.group_stride, filter_rows_, nullptr},
                       {images, from_ + pixels.begin, nullptr}, target, chunk > 0, chunk == chunks_ - 1);
      }
    }
  }
}

template <class T>
bool is_worth_batch_lanes(const ConvProblem<T>& x, int64_t count) {
  const ConvInput<T>& s = x.input;
  constexpr int64_t lanes = Vec<Compute<T>>::size(), most_elements = (1 << 20) / sizeof(Compute<T>);
  const int64_t out = x.groups * x.out_channels * s.pixels();
  if (count < lanes || (s.image_stride + out) * lanes > most_elements || has_long_chains(x)) return false;
  const double inside = fraction_inside(s), products = inside * static_cast<double>(out * x.depth());
  const double transposes = 8.0 * static_cast<double>(s.image_stride + out);
  // The factors are fitted to measurements. Vectors along the width end at every row. Along the channels, a tile that
  // is one vector wide has too few chains of sums to hide the latency of an FMA; a wider one pays for the transpose of
  // a channels-first output, but bfloat16 pairs make up for that. A tile unit performs 512 multiply-adds per cycle,
  // sixteen times as many as float32 vectors; a quarter of that is left for copies and idle registers (reasoned, not
  // measured).
  const double by_width =
      are_rows_joined(x) ? lane_utilization<Compute<T>>(s.pixels()) : 0.75 * lane_utilization<Compute<T>>(s.out_width);
  const double chains = uses_tiles<Bf16Pair>() && could_multiply_pairs(x) ? 4
                        : x.out_channels <= lanes                         ? 0.6
                        : has_pairs<T>()                                  ? 1
                                                                          : 1 / (1 + transpose_cost(x));
  const double channels = lane_utilization<Compute<T>>(x.out_channels) * chains;
  const double others = std::max(by_width, channels);
  return lane_utilization<Compute<T>>(count) * products / (products + transposes) > inside * others;
}

template <class T>
bool BatchLanes<T>::supports(const Phases<T>& x) {
  return x.count == 1;
}

template <class T>
bool BatchLanes<T>::profitable(const Phases<T>& x) {
  return is_worth_batch_lanes(x.first(), x.first().input.count);
}

template <class T>
bool BatchLanes<T>::sums_in_order(const Phases<T>&) {
  return true;
}

template <class T>
void BatchLanes<T>::run(const Phases<T>& phases) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const ConvProblem<T>& x = phases.first();
  const ConvInput<T>& s = x.input;
  const BatchLanesConvolution<T> convolution(x);
  const int64_t in = convolution.source_size(), out = convolution.output_size();
  const double flops = static_cast<double>(s.count) * convolution.flops_of_image();
  for_each_shared_task(ceil_div(s.count, lanes), flops, [&](int64_t task, const Team& team) {
    const int64_t first = task * lanes, images = std::min(lanes, s.count - first);
    C *source = scratch<C>(Scratch::source_block, in * lanes), *output = scratch<C>(Scratch::output_block, out * lanes);
    team.share([&](Share share) { to_chwn(source, s.images + first * in, in, images, share); });
    team.share([&](Share share) { convolution(source, output, share); });
    team.share([&](Share share) { from_chwn(x.output + first * out, output, out, images, share); });
  });
}

// ---- gradients ----

namespace {

// sums[r, o] += the sum over the pixels of source(r, pixel) * grad(o, pixel), where each value is a vector.
template <class C>
struct PixelSums {
  const C* source;
  const int64_t* rows;
  const C* grad;
  int64_t grad_channel_stride;
  const int64_t *source_pixels, *grad_pixels;
  int64_t pixel_count;
  C* sums;
  int64_t sums_stride;

  template <int rows_here, int columns>
  void add(int64_t row, int64_t column) const {
    using V = Vec<C>;
    V sum[rows_here][columns];
    const C *from[rows_here], *of_column = grad + column * grad_channel_stride;
#pragma GCC unroll 8
    for (int r = 0; r < rows_here; ++r) {
      from[r] = source + rows[row + r];
#pragma GCC unroll 8
      for (int o = 0; o < columns; ++o) sum[r][o] = V(0);
    }
    for (int64_t p = 0; p < pixel_count; ++p) {
      const int64_t at = source_pixels[p];
      const C* pixel = of_column + grad_pixels[p];
      V g[columns];
#pragma GCC unroll 8
      for (int o = 0; o < columns; ++o) g[o] = V::loadu(pixel + o * grad_channel_stride);
#pragma GCC unroll 8
      for (int r = 0; r < rows_here; ++r) {
        const V value = V::loadu(from[r] + at);
#pragma GCC unroll 8
        for (int o = 0; o < columns; ++o) sum[r][o] = at::vec::fmadd(value, g[o], sum[r][o]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows_here; ++r) {
#pragma GCC unroll 8
      for (int o = 0; o < columns; ++o) {
        C* target = sums + ((row + r) * sums_stride + column + o) * V::size();
        (V::loadu(target) + sum[r][o]).store(target);
      }
    }
  }

  // bias[o] += the sum over the pixels of grad(o, pixel)
  template <int columns>
  void add_bias(C* bias, int64_t column) const {
    using V = Vec<C>;
    V sum[columns];
#pragma GCC unroll 8
    for (int o = 0; o < columns; ++o) sum[o] = V(0);
    for (int64_t p = 0; p < pixel_count; ++p) {
      const C* pixel = grad + column * grad_channel_stride + grad_pixels[p];
#pragma GCC unroll 8
      for (int o = 0; o < columns; ++o) sum[o] = sum[o] + V::loadu(pixel + o * grad_channel_stride);
    }
#pragma GCC unroll 8
    for (int o = 0; o < columns; ++o) {
      C* target = bias + (column + o) * V::size();
      (V::loadu(target) + sum[o]).store(target);
    }
  }
};

}  // namespace

template <class T>
BatchLanesWeightGradient<T>::BatchLanesWeightGradient(const Conv2dShape& s, const ConvInput<T>& source)
    : s_(s), source_(source) {
  constexpr int64_t lanes = Vec<Compute<T>>::size();
  const Layout grad(s.O, s.OH, s.OW, s.channels_last);
  int64_t* rows = scratch<int64_t>(Scratch::a_offsets, depth());
  for (int64_t row = 0; row < depth(); ++row) {
    const Tap& tap = source.tap(row);
    rows[row] =
        (source.channel(row) * source.channel_stride + tap.dy * source.y_stride + tap.dx * source.x_stride) * lanes;
  }
  int64_t* source_pixels = scratch<int64_t>(Scratch::a_steps, s.OH * s.OW);
  int64_t* grad_pixels = scratch<int64_t>(Scratch::b_steps, s.OH * s.OW);
  for (int64_t p = 0; p < s.OH * s.OW; ++p) {
    const int64_t y = p / s.OW, x = p % s.OW;
    source_pixels[p] = (y * s.stride_h * source.y_stride + x * s.stride_w * source.x_stride) * lanes;
    grad_pixels[p] = (y * grad.y_stride + x * grad.x_stride) * lanes;
  }
  rows_ = rows, source_pixels_ = source_pixels, grad_pixels_ = grad_pixels;
}

template <class T>
void BatchLanesWeightGradient<T>::operator()(const Compute<T>* source, const Compute<T>* grad, Compute<T>* sums,
                                             Compute<T>* bias, Share share) const {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size(), cached = (24 << 10) / sizeof(C);  // gradients that fill half an L1 cache
  const Layout layout(s_.O, s_.OH, s_.OW, s_.channels_last);
  const Range mine = share.of(depth(), dot_rows);
  const int64_t pixels = s_.OH * s_.OW, band = std::clamp(cached / (dot_columns * lanes), int64_t{1}, pixels);
  for (int64_t g = 0; g < s_.groups; ++g) {
    for (int64_t p = 0; p < pixels; p += band) {
      const PixelSums<C> products{source + g * source_.channels * source_.channel_stride * lanes,
                                  rows_,
                                  grad + g * out() * layout.channel_stride * lanes,
                                  layout.channel_stride * lanes,
                                  source_pixels_ + p,
                                  grad_pixels_ + p,
                                  std::min(band, pixels - p),
                                  sums + g * depth() * out() * lanes,
                                  out()};
      for_each_dot_tile(mine.size(), out(), [&](auto rows, auto columns, int64_t row, int64_t column) {
        products.template add<decltype(rows)::value, decltype(columns)::value>(mine.begin + row, column);
        if (mine.begin + row == 0 && bias)
          products.template add_bias<decltype(columns)::value>(bias + g * out() * lanes, column);
      });
    }
  }
}

// The most channels that a group may have. More channels than a vector has lanes are worth it only if both gradients
// are wanted, which then share the transposed blocks, and the images are channels-first, so that vectors along the
// channels would need transposes too. They are not worth it in double, nor with 1x1 kernels, where there is little to
// multiply.
template <class T>
int64_t most_channels(const Conv2dBackwardArgs& x) {
  constexpr int64_t lanes = Vec<Compute<T>>::size(), most = std::is_same_v<Compute<T>, float> ? 16 : lanes;
  const Conv2dShape& s = x.shape;
  const bool shared = x.grad_input && x.grad_weight && !s.channels_last && s.kernel_h * s.kernel_w > 1;
  return shared ? most : lanes;
}

template <class T>
bool BatchLanesBackward<T>::supports(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  if ((x.grad_bias && !x.grad_weight) || (x.grad_input && (s.stride_h > 1 || s.stride_w > 1))) return false;
  const ConvInput<T> source = conv_input<T>(s, x.input);
  return source.tap_count > 0 && !reaches_outside(source, ReceptiveField(source));
}

template <class T>
bool BatchLanesBackward<T>::profitable(const Conv2dBackwardArgs& x) {
  constexpr int64_t lanes = Vec<Compute<T>>::size(), most_elements = (1 << 20) / sizeof(Compute<T>);
  const Conv2dShape& s = x.shape;
  const bool depthwise = s.groups > 1 && s.groups == s.C;
  if (s.N < lanes || std::max(s.C, s.O) / s.groups > most_channels<T>(x) || depthwise ||
      (s.C * s.H * s.W + s.O * s.OH * s.OW) * lanes > most_elements)
    return false;
  // An algorithm that is forced for one of the gradients computes it by itself.
  if ((x.grad_input && choices::conv2d_input_gradient.forced() >= 0) ||
      (x.grad_weight && choices::conv2d_weight_gradient.forced() >= 0))
    return false;
  return !x.grad_input || input_gradient_agrees_with_batch_lanes<T>(x);
}

template <class T>
void batch_lanes_backward(const Conv2dBackwardArgs& x, GradBlock<T> grad_block) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int64_t lanes = V::size();
  const Conv2dShape& s = x.shape;
  std::optional<BatchLanesConvolution<T>> input_gradient;
  std::optional<BatchLanesWeightGradient<T>> weight_gradient;
  if (x.grad_input) input_gradient.emplace(input_gradient_phases<T>(x).first());
  const ConvInput<T> source = conv_input<T>(s, x.input);
  if (x.grad_weight) weight_gradient.emplace(s, source);
  const int64_t in = s.C * s.H * s.W, out = s.O * s.OH * s.OW, K = source.depth();
  const int64_t weights = s.O * K, sums = weights + s.O;  // the bias follows the weights

  const int64_t blocks = ceil_div(s.N, lanes), parts = std::min(blocks, enough_tasks);
  C* partial = scratch<C>(Scratch::partial_sums, parts * sums);
  const double flops = 2.0 * s.N * out * K * (int{x.grad_input != nullptr} + int{x.grad_weight != nullptr});
  for_each_shared_task(parts, flops, [&](int64_t part, const Team& team) {
    C *source_block = scratch<C>(Scratch::source_block, in * lanes),
      *grad = scratch<C>(Scratch::grad_block, out * lanes);
    C *result = scratch<C>(Scratch::output_block, in * lanes), *vectors = scratch<C>(Scratch::block_sums, sums * lanes);
    if (x.grad_weight) std::fill_n(vectors, sums * lanes, C(0));
    for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
      const int64_t first = block * lanes, count = std::min(lanes, s.N - first);
      grad_block(first, count, grad, team);
      if (x.grad_weight) {
        C* bias = x.grad_bias ? vectors + weights * lanes : nullptr;
        team.share([&](Share share) { to_chwn(source_block, source.images + first * in, in, count, share); });
        team.share([&](Share share) { (*weight_gradient)(source_block, grad, vectors, bias, share); });
      }
      if (x.grad_input) {
        T* images = static_cast<T*>(x.grad_input) + first * in;
        team.share([&](Share share) { (*input_gradient)(grad, result, share); });
        team.share([&](Share share) { from_chwn(images, result, in, count, share); });
      }
    }
    for (int64_t i = 0; i < sums && x.grad_weight; ++i)
      partial[part * sums + i] =
          at::vec::vec_reduce_all([](const V& a, const V& b) { return a + b; }, V::loadu(vectors + i * lanes));
  });
  if (x.grad_weight)
    sum_weight_parts(WeightGradient<T>{s, source, static_cast<const T*>(x.grad_output), static_cast<T*>(x.grad_weight)},
                     partial, parts, sums);
  if (x.grad_bias)
    sum_parts(Output<T>{static_cast<T*>(x.grad_bias), Axis::plain(s.O), Axis::plain(1)}, partial + weights, parts, sums,
              1, s.O);
}

#define INSTANTIATE(T)                                                \
  template class BatchLanesConvolution<T>;                            \
  template class BatchLanesWeightGradient<T>;                         \
  template bool is_worth_batch_lanes(const ConvProblem<T>&, int64_t); \
  template struct BatchLanes<T>;                                      \
  template struct BatchLanesBackward<T>;                              \
  template void batch_lanes_backward<T>(const Conv2dBackwardArgs&, GradBlock<T>);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
