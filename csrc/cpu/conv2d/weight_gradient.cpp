// The weight gradient of conv2d as an implicit GEMM over input tiles (conv2d/input_tile.h). With K = (channel, tap),
// summed over the pixels of all images:
//
//   grad_weight [O, K] = grad_output [O, pixels] input tile [pixels, K]
//
// It supports every convolution. The vectors can run along three dimensions, and the one that leaves the fewest lanes
// idle is chosen. Along the output channels (conv2d/weight_gradient_outputs.h), values of the input tile are broadcast;
// along the inputs, for few output channels (conv2d/weight_gradient_inputs.h), the gradients. Along the width, where
// either would leave most lanes idle, conv2d/weight_gradient_width.h computes dot products. If a bfloat16 batch is
// even, pairs of images are multiplied where the CPU supports it (gemm/operand.h).
//
// The batch is cut into parts whose number depends on the shape only, and their sums are added in order. The sums run
// over the taps inside of the image only, even where values are infinite or NaN (conv2d/nonfinite.h).
#include "../gemm/sum_parts.h"
#include "algorithms.h"
#include "costs.h"
#include "nonfinite.h"
#include "weight_gradient_inputs.h"
#include "weight_gradient_outputs.h"
#include "weight_gradient_width.h"

namespace pyops::cpu {
namespace {

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

// The size of the blocks, if `count` channels are cut into as few even blocks as possible, of at most `most` each.
int64_t even_block(int64_t count, int64_t most) {
  return ceil_div(count, ceil_div(count, std::clamp(most, int64_t{1}, count)));
}

// Whether pairs of images are multiplied, unless the vectors run along the width.
template <class T>
bool multiplies_pairs(const WeightGradient<T>& x) {
  return has_pairs<T>() && x.shape.N % 2 == 0;
}

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
  // Only the other two multiply pairs of images, with about four times the speed on a tile unit (reasoned, not
  // measured; conv2d/batch_lanes.cpp).
  const double width = (multiplies_pairs(x) && uses_tiles<Bf16Pair>() ? 0.09 : 0.35) * lane_utilization<C>(x.shape.OW);
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

// The sums of a problem. If pairs of images are multiplied (gemm/operand.h), `shape` and `input` count pairs.
template <class F, class T>
Parts<Compute<T>> add_up_operands(const WeightGradient<T>& x, WgradLanes lanes_along) {
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
Parts<Compute<T>> add_up(WeightGradient<T> x, WgradLanes lanes_along) {
  const bool pairs = multiplies_pairs(x) && lanes_along != WgradLanes::width;
  if (pairs) x.shape.N /= 2, x.input = paired_images(x.input);
  Parts<Compute<T>> parts;
  dispatch_operand<T>([&](auto operand) { parts = add_up_operands<decltype(operand)>(x, lanes_along); }, pairs);
  return parts;
}

template <class T>
void implicit_gemm(const WeightGradient<T>& x, WgradLanes lanes_along) {
  weight_gradient_exactly(x, [&](const WeightGradient<T>& finite) {
    const Parts<Compute<T>> parts = add_up(finite, lanes_along);
    sum_weight_parts(finite, parts.sums, parts.count, parts.stride);
  });
}

// Narrow groups of channels-last images that cannot share a vector: each image is transposed into planes and treated as
// a channels-first one, as in conv2d/grouped_planes.cpp.
template <class T>
void implicit_gemm_of_planes(const WeightGradient<T>& x) {
  using C = Compute<T>;
  const Conv2dShape& s = x.shape;
  const int64_t in_pixels = s.H * s.W, out_pixels = s.OH * s.OW, size = s.O * x.depth();
  const int64_t parts = std::min(s.N, enough_tasks);
  C* sums = scratch<C>(Scratch::block_sums, parts * size);
  for_each_task(parts, 2.0 * s.N * out_pixels * size, [&](int64_t part) {
    T* planes = scratch<T>(Scratch::planes, s.C * in_pixels);
    T* grad_planes = scratch<T>(Scratch::result_planes, s.O * out_pixels);
    WeightGradient<T> of_image{s, x.input, grad_planes, nullptr};
    of_image.shape.N = 1, of_image.shape.channels_last = false;
    ConvInput<T>& image = of_image.input;
    image.images = planes, image.count = 1, image.end = s.C * in_pixels;
    image.channel_stride = in_pixels, image.y_stride = s.W, image.x_stride = 1;
    C* total = sums + part * size;
    std::fill_n(total, size, C(0));
    for (int64_t n = part * s.N / parts; n < (part + 1) * s.N / parts; ++n) {
      transpose(planes, in_pixels, x.input.images + n * x.input.image_stride, s.C, in_pixels, s.C);
      transpose(grad_planes, out_pixels, x.grad_output + n * s.O * out_pixels, s.O, out_pixels, s.O);
      const Parts<C> sums_of_image = add_up(of_image, choose_lanes(of_image));
      for (int64_t p = 0; p < sums_of_image.count; ++p)
        for (int64_t i = 0; i < size; ++i) total[i] += sums_of_image.sums[p * sums_of_image.stride + i];
    }
  });
  sum_weight_parts(x, sums, parts, size);
}

}  // namespace

template <class T>
void sum_weight_parts(const WeightGradient<T>& x, Compute<T>* sums, int64_t parts, int64_t part_stride) {
  const Conv2dShape& s = x.shape;
  const ConvInput<T>& source = x.input;
  const int64_t out = x.out(), K = x.depth();
  if (x.meets_all_taps()) {
    // The rows of sums are in the order of the weight's elements.
    for (int64_t g = 0; g < s.groups; ++g)
      sum_parts(Output<T>{x.grad_weight + g * out * K, Axis::plain(1), Axis::plain(K)}, sums + g * K * out, parts,
                part_stride, K, out);
    return;
  }
  count_run(parts::partial_kernel.runs);
  std::fill_n(x.grad_weight, s.O * x.in() * s.kernel_h * s.kernel_w, T(0));
  const WeightLayout weight(s);
  for (int64_t o = 0; o < s.O; ++o) {
    for (int64_t row = 0; row < K; ++row) {
      const Compute<T>* first = sums + (o / out * K + row) * out + o % out;
      Compute<T> total = first[0];
      for (int64_t part = 1; part < parts; ++part) total = total + first[part * part_stride];
      x.grad_weight[o * weight.out_stride + source.channel(row) * weight.channel_stride +
                    source.tap(row).index * weight.tap_stride] = static_cast<T>(total);
    }
  }
}

template <class T>
bool GroupedPlanesWgrad<T>::supports(const WeightGradient<T>& x) {
  return x.shape.channels_last;
}

template <class T>
bool GroupedPlanesWgrad<T>::profitable(const WeightGradient<T>& x) {
  return x.shape.groups > 1 && lane_utilization<Compute<T>>(x.out()) <= 0.5;
}

template <class T>
void GroupedPlanesWgrad<T>::run(const WeightGradient<T>& x) {
  weight_gradient_exactly(x, implicit_gemm_of_planes<T>);
}

template <class T>
bool DotProductsWidthWgrad<T>::supports(const WeightGradient<T>&) {
  return true;
}

template <class T>
bool DotProductsWidthWgrad<T>::profitable(const WeightGradient<T>& x) {
  if (!x.lanes) x.lanes = choose_lanes(x);
  return x.lanes == WgradLanes::width;
}

template <class T>
void DotProductsWidthWgrad<T>::run(const WeightGradient<T>& x) {
  implicit_gemm(x, WgradLanes::width);
}

template <class T>
bool ImplicitGemmInputsWgrad<T>::supports(const WeightGradient<T>&) {
  return true;
}

template <class T>
bool ImplicitGemmInputsWgrad<T>::profitable(const WeightGradient<T>& x) {
  if (!x.lanes) x.lanes = choose_lanes(x);
  return x.lanes == WgradLanes::inputs;
}

template <class T>
void ImplicitGemmInputsWgrad<T>::run(const WeightGradient<T>& x) {
  implicit_gemm(x, WgradLanes::inputs);
}

template <class T>
bool ImplicitGemmOutputsWgrad<T>::supports(const WeightGradient<T>&) {
  return true;
}

template <class T>
bool ImplicitGemmOutputsWgrad<T>::profitable(const WeightGradient<T>&) {
  return true;
}

template <class T>
void ImplicitGemmOutputsWgrad<T>::run(const WeightGradient<T>& x) {
  implicit_gemm(x, WgradLanes::outputs);
}

[[maybe_unused]] static const bool listed = choices::conv2d_weight_gradient.list(weight_gradient_algorithms<float>);

template <class T>
void weight_gradient(const Conv2dBackwardArgs& args) {
  const Conv2dShape& s = args.shape;
  const WeightGradient<T> x{s, conv_input<T>(s, args.input), static_cast<const T*>(args.grad_output),
                            static_cast<T*>(args.grad_weight)};
  if (x.input.tap_count == 0) {
    std::fill_n(x.grad_weight, s.O * x.in() * s.kernel_h * s.kernel_w, T(0));
    return;
  }
  choose(choices::conv2d_weight_gradient, weight_gradient_algorithms<T>, x).run(x);
}

#define INSTANTIATE(T)                                                                                       \
  template void sum_weight_parts(const WeightGradient<T>&, Compute<T>*, int64_t parts, int64_t part_stride); \
  template struct GroupedPlanesWgrad<T>;                                                                     \
  template struct DotProductsWidthWgrad<T>;                                                                  \
  template struct ImplicitGemmInputsWgrad<T>;                                                                \
  template struct ImplicitGemmOutputsWgrad<T>;                                                               \
  template void weight_gradient<T>(const Conv2dBackwardArgs&);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
