// The weight gradient of conv2d. With K = (channel, tap), summed over the pixels of all images:
//
//   grad_weight [O, K] = grad_output [O, pixels] input tile [pixels, K]
//
// choose_algorithm picks an algorithm for groups. All other shapes are an implicit GEMM over input tiles
// (conv2d/input_tile.h), whose vectors choose_lanes lays where they leave the fewest lanes idle. Along the output
// channels, values of the input tile are broadcast and a tile of grad_output is transposed to [pixels, O], unless it is
// channels-last already. Along the inputs, for few output channels, conv2d/weight_gradient_inputs.h broadcasts the
// gradients instead. Along the width, where either would leave most lanes idle, conv2d/weight_gradient_width.h computes
// dot products. If a bfloat16 batch is even, pairs of images are multiplied where the CPU supports it (gemm/operand.h).
//
// The batch is cut into parts whose number depends on the shape only, and their sums are added in order. The sums run
// over the taps inside of the image only, even where values are infinite or NaN.
#include "border_taps.h"
#include "grouped_lanes.h"
#include "nonfinite.h"
#include "weight_gradient_inputs.h"
#include "weight_gradient_width.h"

namespace pyops::cpu {
namespace {

// The problem. If images are multiplied in pairs (gemm/operand.h), `shape` and `input` count pairs of images.
template <class T>
struct WeightGradient {
  Conv2dShape shape;
  ConvInput<T> input;
  const T* grad_output;

  int64_t out() const { return shape.O / shape.groups; }
  int64_t depth() const { return input.depth(); }
};

// The pixels of output tile b of grad_output as rows of operand B, over the output channels [o, o + count) of its
// group. They are read in place or copied into panels.
template <class F, class T>
OperandB<F> grad_rows(const Conv2dShape& s, const T* grad_output, const OutputTile& b, int64_t o, int64_t count) {
  constexpr int64_t lanes = OperandVec<F>::size();
  const Layout layout(s.O, s.OH, s.OW, s.channels_last);
  const int64_t width = panel_width<Accumulator<F>>(count), panels = ceil_div(count, width), row = b.rows * s.OW;
  const int64_t pixels = b.images * row, image = k_per_step<F> * layout.image_stride;
  const T* first =
      grad_output + b.n * image + b.y * layout.y_stride + (b.g * (s.O / s.groups) + o) * layout.channel_stride;
  if constexpr (std::is_same_v<T, F>)
    if (s.channels_last && count % lanes == 0)
      return {first, multiples(Scratch::b_offsets, count / lanes, lanes), multiples(Scratch::b_steps, pixels, s.O)};
  F* copy = scratch<F>(Scratch::grad_rows, panels * width * pixels);
  const int64_t piece = s.channels_last ? 1 : row;  // pixels copied at once, so that memory is read in order
  for (int64_t p = 0; p < pixels; p += piece) {
    const T* source = first + p / row * image + p % row * s.O;
    for (int64_t c = 0; c < count; c += width) {
      const int64_t columns = std::min(width, count - c);
      F* target = copy + c * pixels + p * width;
      if (s.channels_last) {
        copy_operand(target, source + c, columns, 1, layout.image_stride, k_per_step<F>);
      } else {
        transpose_operand(target, width, source + c * layout.channel_stride, layout.channel_stride, layout.image_stride,
                          columns, row);
      }
      for (int64_t i = 0; i < piece && columns < width; ++i)
        std::fill(target + i * width + columns, target + (i + 1) * width, F{});
    }
  }
  return {copy, panel_offsets<F>(Scratch::b_offsets, panels * width / lanes, pixels, width),
          multiples(Scratch::b_steps, pixels, width)};
}

// sums[row, vectors] (+)= the sum over the pixels of a tile of input tile(row, pixel) * grad(pixel), where row =
// (channel, tap). If that pays or the images are read in place, each tap sums only over the pixels for which it lies
// inside.
template <class F, class T>
void wgrad_gemm_outputs(const ConvInput<T>& s, const OutputTile& tile, const InputTile<F>& w, const OperandB<F>& grad,
                        int64_t vectors, Accumulator<F>* sums, const int64_t* sum_rows, bool accumulate,
                        bool in_place) {
  constexpr int64_t lanes = OperandVec<F>::size();
  // A tap has a row for each channel. With fewer rows than a register tile, too few chains of sums are in flight to
  // hide the latency of an FMA, and multiplying the zeros around the images is cheaper.
  const bool by_tap = in_place || (tile.channels >= tile_rows[0] && should_skip_border_taps(s));
  const int64_t rows = tile.channels * s.tap_count, run_count = by_tap ? s.tap_count : 1;
  const int64_t* patch = patch_offsets(Scratch::a_offsets, w, s, tile.channels);
  int64_t* offsets = scratch<int64_t>(Scratch::row_offsets, rows);
  int64_t* targets = scratch<int64_t>(Scratch::target_rows, rows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = by_tap && !s.tap_by_tap ? i % tile.channels * s.tap_count + i / tile.channels : i;
    offsets[i] = patch[row], targets[i] = sum_rows[row];
  }
  const int64_t pixel_count = tile.images * tile.rows * s.out_width;
  const OperandC<Accumulator<F>> target{sums, targets, multiples(Scratch::target_vectors, vectors, lanes)};
  const int64_t* pixels = pixel_offsets(Scratch::a_steps, w, tile, s.out_width);
  RowRun runs[64];
  int64_t* steps = scratch<int64_t>(Scratch::run_steps, run_count * 2 * KC);
  for_each_chunk(0, pixel_count, [&](int64_t k, int64_t kc, bool first, bool) {
    for (int64_t r = 0; r < run_count; ++r)
      runs[r] = run_of_pixels<F>(rows / run_count, s, tile, by_tap ? s.taps + r : nullptr, pixels, grad.steps, k,
                                 k + kc, steps + r * 2 * KC);
    macrokernel<F>(runs, run_count, vectors, {w.data, offsets, nullptr}, {grad.data, grad.offsets, nullptr}, target,
                   accumulate || !first, /*last=*/false);
  });
}

// The pixels of output tile b of grad_output as operand A, whose values are broadcast. They are read in place in either
// layout, unless they have to be converted.
template <class F, class T>
OperandA<F> grad_values(const Conv2dShape& s, const T* grad_output, const OutputTile& b, int64_t o, int64_t count) {
  constexpr int64_t lanes = OperandVec<F>::size();
  if constexpr (std::is_same_v<T, F>) {
    const Layout layout(s.O, s.OH, s.OW, s.channels_last);
    const int64_t row = b.rows * s.OW;
    int64_t* steps = scratch<int64_t>(Scratch::a_steps, b.images * row);
    for (int64_t n = 0; n < b.images; ++n)
      for (int64_t p = 0; p < row; ++p) steps[n * row + p] = n * layout.image_stride + p * layout.x_stride;
    return {grad_output + b.n * layout.image_stride + b.y * layout.y_stride +
                (b.g * (s.O / s.groups) + o) * layout.channel_stride,
            multiples(Scratch::a_offsets, count, layout.channel_stride), steps};
  } else {
    const OperandB<F> vectors = grad_rows<F>(s, grad_output, b, o, count);
    int64_t* offsets = scratch<int64_t>(Scratch::a_offsets, count);
    for (int64_t i = 0; i < count; ++i) offsets[i] = vectors.offsets[i / lanes] + i % lanes;
    return {vectors.data, offsets, vectors.steps};
  }
}

// Whether to read the images in place, with each tap summed over the pixels for which it lies inside. A register tile
// then covers channels of a single tap, and its pixels must lie at most 256 bytes apart: with larger strides they map
// to few sets of the L1 cache.
template <class T>
bool should_read_in_place(const ConvInput<T>& s, bool by_pixel, int64_t c_block) {
  return std::is_same_v<T, Compute<T>> && by_pixel && c_block == s.x_stride && c_block >= 16 &&
         c_block * int64_t{sizeof(T)} <= 256 && s.tap_count <= 64;
}

// The size of the blocks, if `count` channels are cut into as few even blocks as possible, of at most `most` each.
int64_t even_block(int64_t count, int64_t most) {
  return ceil_div(count, ceil_div(count, std::clamp(most, int64_t{1}, count)));
}

enum class WgradLanes { outputs, inputs, width };

// Chooses the vectors that use the largest share of their lanes, with factors fitted to measurements: a register tile
// that is one or two vectors wide needs more loads for each FMA.
template <class T>
WgradLanes choose_lanes(const WeightGradient<T>& x) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const bool channels_last = x.shape.channels_last;
  const auto share = [](int64_t used, int64_t vectors) {
    const double of_tiles = vectors == 1 ? 0.65 : vectors == 2 ? 0.95 : 1;
    return of_tiles * static_cast<double>(used) / static_cast<double>(vectors * lanes);
  };
  const int64_t taps = x.input.tap_count, row = tap_begins(x.input, x.input.channels)[taps];
  const double transpose = channels_last ? 0 : 11 / static_cast<double>(x.out() * taps);
  // Vectors along the inputs multiply the zeros around the images.
  const double inputs = share(x.depth(), row / lanes) * fraction_inside(x.input) / (1 + transpose);
  // Channels-first, both operands of vectors along the outputs are copied.
  const double outputs = share(x.out(), ceil_div(x.out(), lanes)) * (channels_last ? 1 : 0.9);
  const double width = 0.35 * lane_utilization<C>(x.shape.OW);
  if (width > std::max(inputs, outputs)) return WgradLanes::width;
  return inputs > outputs && x.out() <= 2 * lanes ? WgradLanes::inputs : WgradLanes::outputs;
}

// The sums of each part of the batch: [parts, groups, K, O / groups].
template <class C>
struct Parts {
  C* sums;
  int64_t count, stride;
};

// One block of the sums: the output channels [o, o + columns) x the input channels [c, c + channels) of group g.
template <class C>
struct Block {
  int64_t g, o, columns, c, channels;
  C* sums;  // in scratch, or in the part itself
  int64_t stride;
  const int64_t* rows;    // along the outputs: the offset of the sums of each (channel, tap)
  const int64_t* begins;  // along the inputs: the offset of each tap within the sums of an output channel
};

// Adds the products of a tile to a block's sums; those of the first tile overwrite them.
template <class F, class T>
void add_tile(const WeightGradient<T>& x, WgradLanes lanes_along, const ReceptiveField& field, bool in_place,
              const OutputTile& tile, const Block<Accumulator<F>>& block, bool first) {
  const Conv2dShape& s = x.shape;
  const ConvInput<T>& source = x.input;
  if (lanes_along == WgradLanes::inputs) {
    const InputTile<F> w = channels_last_input_tile<F>(source, field, tile);
    const OperandA<F> grad = grad_values<F>(s, x.grad_output, tile, block.o, block.columns);
    return wgrad_gemm_inputs(source, tile, w, grad, block.columns, block.begins, block.sums, !first);
  }
  const InputTile<F> w =
      input_tile<F>(source, field, tile, s.channels_last, lanes_along == WgradLanes::width, in_place);
  if constexpr (!is_pair<F>) {
    using C = Accumulator<F>;
    if (lanes_along == WgradLanes::width) {
      const int64_t* patch = patch_offsets(Scratch::a_offsets, w, source, block.channels);
      const Planes<C> planes = grad_planes(s, x.grad_output, tile, block.o, block.columns);
      const int64_t run_count = tile.images * tile.rows * ceil_div(s.OW, Vec<C>::size());
      return wgrad_dot_products_width<C>({w.data, patch, planes.data, planes.channel_stride,
                                          runs_of(w, planes, tile, s.OW), run_count, block.sums, block.stride, !first},
                                         block.channels * source.tap_count, block.columns);
    }
  }
  wgrad_gemm_outputs(source, tile, w, grad_rows<F>(s, x.grad_output, tile, block.o, block.columns),
                     ceil_div(block.columns, OperandVec<F>::size()), block.sums, block.rows, !first, in_place);
}

template <class F, class T>
Parts<Compute<T>> add_up(const WeightGradient<T>& x, WgradLanes lanes_along) {
  using C = Accumulator<F>;
  constexpr int64_t lanes = Vec<C>::size(), most_columns = 256;
  const Conv2dShape& s = x.shape;
  const ConvInput<T>& source = x.input;
  const bool by_pixel = s.channels_last && lanes_along == WgradLanes::outputs;
  // The sums of a block fill at most a quarter of an L2 cache of 1 MB. Channels-last, a block of fewer channels keeps
  // the pixels of the input tile closer together. Both sizes are fitted to measurements.
  const int64_t most_sums = by_pixel ? 36 << 10 : 64 << 10;
  const int64_t out = x.out(), taps = source.tap_count, K = x.depth();
  const int64_t o_block = even_block(out, most_columns);
  const int64_t c_block = even_block(source.channels, most_sums / o_block / taps);
  const int64_t c_blocks = ceil_div(source.channels, c_block), o_blocks = ceil_div(out, o_block);
  const ReceptiveField field(source);
  const OutputTileSize size(source, field, c_block);
  const int64_t row_tiles = ceil_div(s.OH, size.rows), tiles = ceil_div(s.N, size.images) * row_tiles;
  const double flops = 2.0 * k_per_step<F> * s.N * s.OH * s.OW * s.O * K;
  const int64_t blocks = s.groups * c_blocks * o_blocks;
  const int64_t parts = std::min(ceil_div(tasks_worth(flops), blocks), tiles);
  const bool in_place = should_read_in_place(source, by_pixel, c_block);
  const int64_t c_step = source.tap_by_tap ? 1 : taps, tap_step = source.tap_by_tap ? source.channels : 1;  // in K
  C* partial = scratch<C>(Scratch::partial_sums, parts * s.groups * K * out);
  for_each_task(blocks * parts, flops, [&](int64_t task) {
    const int64_t part = task % parts, o = task / parts % o_blocks * o_block;
    const int64_t c = task / parts / o_blocks % c_blocks * c_block, g = task / parts / o_blocks / c_blocks;
    const int64_t channels = std::min(c_block, source.channels - c), rows = channels * taps;
    const int64_t columns = std::min(o_block, out - o), padded = ceil_div(columns, lanes) * lanes;
    C* target = partial + (part * s.groups + g) * K * out + o;
    const auto row_of = [&](int64_t r) {
      const int64_t channel = source.tap_by_tap ? r % channels : r / taps;
      const int64_t tap = source.tap_by_tap ? r / channels : r % taps;
      return target + ((c + channel) * c_step + tap * tap_step) * out;
    };
    const int64_t* begins = tap_begins(source, channels);
    const bool along_inputs = lanes_along == WgradLanes::inputs,
               direct = lanes_along == WgradLanes::outputs && columns == padded;
    const int64_t stride = along_inputs ? begins[taps] : padded;
    C* sums = direct ? target : scratch<C>(Scratch::sums, (along_inputs ? columns : rows) * stride);
    int64_t* sum_rows = scratch<int64_t>(Scratch::sum_rows, rows);
    for (int64_t r = 0; r < rows; ++r) sum_rows[r] = direct ? row_of(r) - target : r * stride;
    const Block<C> block{g, o, columns, c, channels, sums, stride, sum_rows, begins};

    const int64_t begin = part * tiles / parts, end = (part + 1) * tiles / parts;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / row_tiles * size.images, y = i % row_tiles * size.rows;
      const OutputTile tile{g, c, channels, n, std::min(size.images, s.N - n), y, std::min(size.rows, s.OH - y)};
      add_tile<F>(x, lanes_along, field, in_place, tile, block, i == begin);
    }
    for (int64_t t = 0; t < taps && along_inputs; ++t)
      transpose(target + (c * c_step + t * tap_step) * out, c_step * out, sums + begins[t], stride, columns, channels);
    for (int64_t r = 0; r < rows && !along_inputs && !direct; ++r) std::copy_n(sums + r * stride, columns, row_of(r));
  });
  return {partial, parts, s.groups * K * out};
}

template <class T>
Parts<Compute<T>> add_up(WeightGradient<T> x) {
  const WgradLanes lanes_along = choose_lanes(x);
  count_run(lanes_along == WgradLanes::outputs  ? Algorithm::weight_gradient_outputs
            : lanes_along == WgradLanes::inputs ? Algorithm::weight_gradient_inputs
                                                : Algorithm::weight_gradient_width);
  const bool pairs = has_pairs<T>() && lanes_along != WgradLanes::width && x.shape.N % 2 == 0;
  if (pairs) x.shape.N /= 2, x.input = paired_images(x.input);
  Parts<Compute<T>> parts;
  dispatch_operand<T>([&](auto operand) { parts = add_up<decltype(operand)>(x, lanes_along); }, pairs);
  return parts;
}

// Computes the weight gradient of narrow groups of channels-last images that cannot share a vector. Each image is
// transposed into planes and treated as a channels-first one, like in conv2d/grouped_planes.cpp.
template <class T>
void weight_gradient_of_planes(const Conv2dShape& s, const ConvInput<T>& source, const T* grad_output, T* grad_weight) {
  using C = Compute<T>;
  count_run(Algorithm::weight_gradient_grouped_planes);
  const int64_t in_pixels = s.H * s.W, out_pixels = s.OH * s.OW, size = s.O * source.depth();
  const int64_t parts = std::min(s.N, enough_tasks);
  Conv2dShape shape = s;
  shape.N = 1, shape.channels_last = false;
  C* sums = scratch<C>(Scratch::block_sums, parts * size);
  for_each_task(parts, 2.0 * s.N * out_pixels * size, [&](int64_t part) {
    T* planes = scratch<T>(Scratch::planes, s.C * in_pixels);
    T* grad_planes = scratch<T>(Scratch::result_planes, s.O * out_pixels);
    ConvInput<T> image = source;
    image.images = planes, image.count = 1, image.end = s.C * in_pixels;
    image.channel_stride = in_pixels, image.y_stride = s.W, image.x_stride = 1;
    C* total = sums + part * size;
    std::fill_n(total, size, C(0));
    for (int64_t n = part * s.N / parts; n < (part + 1) * s.N / parts; ++n) {
      transpose(planes, in_pixels, source.images + n * source.image_stride, s.C, in_pixels, s.C);
      transpose(grad_planes, out_pixels, grad_output + n * s.O * out_pixels, s.O, out_pixels, s.O);
      const Parts<C> of_image = add_up<T>({shape, image, grad_planes});
      for (int64_t p = 0; p < of_image.count; ++p)
        for (int64_t i = 0; i < size; ++i) total[i] += of_image.sums[p * of_image.stride + i];
    }
  });
  sum_weight_parts(s, source, grad_weight, sums, parts, size);
}

enum class WgradAlgorithm { grouped_lanes, depthwise, grouped_planes, implicit_gemm };

// The algorithms in order of preference; the first that applies is chosen.
template <class T>
WgradAlgorithm choose_algorithm(const Conv2dShape& s, const ConvInput<T>& source) {
  using C = Compute<T>;
  const int64_t in = s.C / s.groups, out = s.O / s.groups;
  const bool all_met = source.tap_count == s.kernel_h * s.kernel_w;
  // Groups that are too narrow for a vector of their own share one, and nothing is copied or transposed.
  if (s.channels_last && all_met && should_use_grouped_lanes<C>(s.groups, in, out))
    return WgradAlgorithm::grouped_lanes;
  // A group has only one channel on either side, too little for a register tile.
  if (s.groups > 1 && in == 1 && out == 1) return WgradAlgorithm::depthwise;
  // Narrow groups that cannot share vectors are slow to read from channels-last images, group by group.
  if (s.channels_last && s.groups > 1 && lane_utilization<C>(out) <= 0.5) return WgradAlgorithm::grouped_planes;
  return WgradAlgorithm::implicit_gemm;
}

template <class T>
void weight_gradient_finite(WgradAlgorithm algorithm, const Conv2dShape& s, const ConvInput<T>& source,
                            const T* grad_output, T* grad_weight) {
  if (algorithm == WgradAlgorithm::depthwise) return weight_gradient_depthwise(s, source, grad_output, grad_weight);
  if (algorithm == WgradAlgorithm::grouped_planes)
    return weight_gradient_of_planes(s, source, grad_output, grad_weight);
  const Parts<Compute<T>> parts = add_up<T>({s, source, grad_output});
  sum_weight_parts(s, source, grad_weight, parts.sums, parts.count, parts.stride);
}

}  // namespace

template <class T>
void sum_weight_parts(const Conv2dShape& s, const ConvInput<T>& source, T* grad_weight, Compute<T>* sums, int64_t parts,
                      int64_t part_stride) {
  const int64_t out = s.O / s.groups, K = source.depth(), kernel = s.kernel_h * s.kernel_w;
  if (source.tap_count == kernel) {
    // Every tap meets the image, so the rows of sums are in the order of the weight's elements.
    for (int64_t g = 0; g < s.groups; ++g)
      sum_parts(Output<T>{grad_weight + g * out * K, Axis::plain(1), Axis::plain(K)}, sums + g * K * out, parts,
                part_stride, K, out);
    return;
  }
  count_run(Algorithm::weight_gradient_partial_kernel);
  std::fill_n(grad_weight, s.O * source.channels * kernel, T(0));
  const WeightLayout weight(s);
  for (int64_t o = 0; o < s.O; ++o) {
    for (int64_t row = 0; row < K; ++row) {
      const Compute<T>* first = sums + (o / out * K + row) * out + o % out;
      Compute<T> total = first[0];
      for (int64_t part = 1; part < parts; ++part) total = total + first[part * part_stride];
      grad_weight[o * weight.out_stride + source.channel(row) * weight.channel_stride +
                  source.tap(row).index * weight.tap_stride] = static_cast<T>(total);
    }
  }
}

template <class T>
void weight_gradient(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  const ConvInput<T> source = conv_input<T>(s, x.input);
  const T* grad_output = static_cast<const T*>(x.grad_output);
  T* grad_weight = static_cast<T*>(x.grad_weight);
  const int64_t count = s.N * s.O * s.OH * s.OW, size = s.O * source.channels * s.kernel_h * s.kernel_w;
  if (source.tap_count == 0) {
    std::fill_n(grad_weight, size, T(0));
    return;
  }
  const WgradAlgorithm algorithm = choose_algorithm(s, source);
  if constexpr (can_permute)
    if (algorithm == WgradAlgorithm::grouped_lanes)
      return weight_gradient_grouped_lanes(s, source, grad_output, grad_weight);
  // A gradient that is not finite makes its sums infinite or NaN too. Where there are fewer sums than gradients, the
  // sums are inspected instead, because a pass over all gradients takes a noticeable share of the time of their
  // products.
  const bool exact = !reaches_outside(source, ReceptiveField(source)), look_at_sums = size < count;
  if (exact || look_at_sums || all_finite(grad_output, count)) {
    weight_gradient_finite(algorithm, s, source, grad_output, grad_weight);
    if (exact || !look_at_sums || all_finite(grad_weight, size) || all_finite(grad_output, count)) return;
  }

  count_run(Algorithm::weight_gradient_nonfinite);
  weight_gradient_finite(algorithm, s, source, finite_part(grad_output, count).data(), grad_weight);
  const Layout grad(s.O, s.OH, s.OW, s.channels_last);
  const WeightLayout weight(s);
  const int64_t in = source.channels, taps = source.tap_count;
  for_each_task(s.O * in, 2.0 * count * in * taps, [&](int64_t task) {
    const int64_t o = task / in, channel = o / (s.O / s.groups) * in + task % in;
    T* target = grad_weight + o * weight.out_stride + task % in * weight.channel_stride;
    for (int64_t n = 0; n < s.N; ++n) {
      const T* image = grad_output + n * grad.image_stride + o * grad.channel_stride;
      for (int64_t t = 0; t < taps; ++t) {
        for_each_inside(source, n, channel, source.taps[t], [&](int64_t y, int64_t column, T value) {
          const T g = image[y * grad.y_stride + column * grad.x_stride];
          if (!is_finite(g)) add_product(target[source.taps[t].index * weight.tap_stride], g, value);
        });
      }
    }
  });
}

#define INSTANTIATE(T)                                                                                    \
  template void sum_weight_parts(const Conv2dShape&, const ConvInput<T>&, T*, Compute<T>*, int64_t parts, \
                                 int64_t part_stride);                                                    \
  template void weight_gradient<T>(const Conv2dBackwardArgs&);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
