// Depthwise convolution, where every channel is a group of its own with one input and one output channel:
//
//   output[c, pixel] = bias[c] + sum over taps of weight[c, tap] * input(c, pixel, tap)
//
// It is chosen for every such convolution. As products of gemm/microkernel.h each group would be a matrix of a single
// row, whose operands take longer to lay out than to multiply.
//
// Images are read in blocks of channels (conv2d/channel_blocks.h), so that a vector holds one pixel of several channels
// whatever the stride and the layout. The sums of several pixels of a row stay in registers and share the filters of a
// tap. All phases of an input gradient read the same block; a channels-first output is collected in a block too, which
// is transposed at last. Dense 3x3 kernels have code of their own (conv2d/depthwise_3x3.h).
//
// Each output is one sum over the taps in order, in a single chunk.
#include <array>
#include <utility>

#include "../gemm/dot_tile.h"
#include "algorithms.h"
#include "channel_blocks.h"
#include "depthwise_3x3.h"
#include "nonfinite.h"

namespace pyops::cpu {
namespace {

// The vectors of sums that the registers hold: enough chains of FMAs that none waits for the one before.
constexpr int most_sums = by_capability(4, 8, 8);
// The vectors of a channels-last pixel that are computed together: those of a cache line, so that it is read only once
// even where pixels lie so far apart that they evict one another.
constexpr int vectors_of_line = by_capability(1, 2, 1);

// The filters of some adjacent blocks of channels.
template <class T>
struct BlockFilters {
  const Compute<T>* filters;  // [blocks][tap_count][lanes]
  int64_t tap_count;
  const int64_t* offsets;  // of the taps, in the blocks of the input
  const T* bias;           // may be null
  bool relu;
};

// A row of pixels in some adjacent blocks: pixel x is read at input + x * input_step, in the next block input_stride
// further on, and written at output + x * output_step, in the next block a vector further on. It has `count` channels,
// of which whole vectors are written if `is_block` is set.
template <class C, class Out>
struct BlockRow {
  const C* input;
  int64_t input_stride, input_step;
  Out* output;
  int64_t output_step, count;
  bool is_block;
};

// Computes the channels [c, row.count) of the `pixels` pixels of a row from `first` on, over the taps `taps`, as far as
// they fill `vectors` vectors at a time. Returns the first channel that is left.
template <int pixels, int vectors, class T, class Out>
C10_ALWAYS_INLINE int64_t convolve_pixels(const BlockFilters<T>& x, Range taps, const BlockRow<Compute<T>, Out>& row,
                                          int64_t first, int64_t c) {
  using V = Vec<Compute<T>>;
  constexpr int64_t lanes = V::size();
  const int64_t step = row.input_step, input_stride = row.input_stride, filter_stride = x.tap_count * lanes;
  const Compute<T>*filters = x.filters + c * x.tap_count, *input = row.input + first * step + c / lanes * input_stride;
  for (; c + (vectors - 1) * lanes < row.count; c += vectors * lanes) {
    V sum[pixels][vectors];
#pragma GCC unroll 8
    for (int j = 0; j < pixels; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[j][v] = V(0);
    for (int64_t t = taps.begin; t < taps.end; ++t) {
      const Compute<T>* from = input + x.offsets[t];
      V filter[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) filter[v] = V::loadu(filters + t * lanes + v * filter_stride);
#pragma GCC unroll 8
      for (int j = 0; j < pixels; ++j)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sum[j][v] = at::vec::fmadd(V::loadu(from + j * step + v * input_stride), filter[v], sum[j][v]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const int64_t count = std::min(lanes, row.count - c - v * lanes);
      const V bias = x.bias ? load(x.bias + c + v * lanes, count) : V(0);
#pragma GCC unroll 8
      for (int j = 0; j < pixels; ++j) {
        if (x.bias) sum[j][v] = sum[j][v] + bias;
        if (x.relu) sum[j][v] = at::vec::clamp_min(sum[j][v], V(0));
        store(row.output + (first + j) * row.output_step + c + v * lanes, sum[j][v], row.is_block ? lanes : count);
      }
    }
    filters += vectors * filter_stride, input += vectors * input_stride;
  }
  return c;
}

template <class T, class Out, int pixels, int vectors>
void convolve_pixels(const BlockFilters<T>& x, Range taps, const BlockRow<Compute<T>, Out>& row, int64_t first) {
  const int64_t c = convolve_pixels<pixels, vectors>(x, taps, row, first, 0);
  if (vectors > 1) convolve_pixels<pixels, 1>(x, taps, row, first, c);
}

template <class T, class Out, int vectors, int... I>
constexpr auto kernels_of_pixels(std::integer_sequence<int, I...>) {
  return std::array{convolve_pixels<T, Out, I + 1, vectors>...};
}

// The taps that meet the image from an output row; they are adjacent, because taps are sorted by rows.
template <class T>
Range taps_in_row(const ConvInput<T>& s, int64_t y) {
  const auto meets = [&](int64_t t) {
    const int64_t image_y = y * s.step_h + s.taps[t].dy;
    return image_y >= 0 && image_y < s.height;
  };
  Range taps{0, s.tap_count};
  while (taps.begin < taps.end && !meets(taps.begin)) ++taps.begin;
  while (taps.begin < taps.end && !meets(taps.end - 1)) --taps.end;
  return taps;
}

// Copies the filters of a phase to [blocks][taps][lanes]. Lanes without a channel become zero.
template <class T>
void pack_filters(const ConvProblem<T>& x, Compute<T>* filters) {
  constexpr int64_t lanes = lanes_of<T>;
  const int64_t taps = x.input.tap_count, last = x.groups / lanes * lanes;
  std::fill_n(filters + last * taps, x.groups > last ? taps * lanes : 0, Compute<T>(0));
  for (int64_t g = 0; g < x.groups; ++g)
    for (int64_t t = 0; t < taps; ++t)
      filters[(g / lanes * taps + t) * lanes + g % lanes] =
          static_cast<Compute<T>>(x.filters.at(g, 0)[x.filter_step(t)]);
}

// A depthwise convolution over blocks of channels. A task computes a band of rows of some blocks, in all phases, whose
// taps read the same rows of the input.
template <class T>
class BlockedDepthwise {
 public:
  explicit BlockedDepthwise(const Phases<T>& phases)
      : phases_(phases),
        first_(phases.first()),
        at_once_(channels_at_once<T>(first_.channels_last, first_.groups, ReceptiveField(phases.data, phases.count))),
        bands_(bands_of_rows(first_.input, ReceptiveField(phases.data, phases.count), at_once_)),
        band_(ceil_div(first_.input.out_height, bands_)) {
    for (const ConvProblem<T>& x : phases) {
      taps_ += x.input.tap_count;
      if (x.x_phase == 0) out_height_ += x.input.out_height;
      for (int64_t t = 0; t < x.input.tap_count; ++t) {
        const Range met = range_inside(x.input.taps[t].dx, x.input.step_w, x.input.out_width, x.input.width);
        inner_ = {std::max(inner_.begin, met.begin), std::min(inner_.end, met.end)};
      }
    }
    C* filters = scratch<C>(Scratch::weight, taps_ * blocks() * lanes);
    filters_ = filters;
    for (const ConvProblem<T>& x : phases) {
      pack_filters(x, filters);
      filters += x.input.tap_count * blocks() * lanes;
    }
  }

  void run() const {
    const int64_t groups = ceil_div(first_.groups, at_once_), tasks = first_.input.count * bands_ * groups;
    const double flops = 2.0 * first_.input.count * first_.groups * out_height_ * first_.out_lines.width * taps_;
    for_each_task(tasks, flops / static_cast<double>(phases_.count), [&](int64_t task) {
      const int64_t c = task % groups * at_once_, y = task / groups % bands_ * band_;
      const Range rows{y, std::min(y + band_, first_.input.out_height)};
      first_.channels_last ? channels_last(task / groups / bands_, c, rows)
                           : channels_first(task / groups / bands_, c, rows);
    });
  }

 private:
  using C = Compute<T>;
  static constexpr int64_t lanes = lanes_of<T>;

  int64_t blocks() const { return ceil_div(first_.groups, lanes); }

  // The rows of the input that the rows `rows` of all phases read.
  Range input_rows(Range rows) const {
    Range met{first_.input.height, 0};
    for (const ConvProblem<T>& x : phases_) {
      const Range here = rows_met(x.input, rows);
      if (here.size() > 0) met = {std::min(met.begin, here.begin), std::max(met.end, here.end)};
    }
    return met;
  }

  // Copying an input costs more than it saves if few taps read each value.
  bool is_worth_copying() const { return taps_ > 8 * first_.input.step_h * first_.input.step_w; }

  // Computes the columns `columns` of the rows `rows` of every phase, for the `count` channels from c on. target(x, p,
  // y) gives the output of row y of phase p, which is x, and the step from one pixel to the next.
  template <class Out, int vectors, class Target>
  void convolve(const ChannelBlocks<C>& input, int64_t c, int64_t count, Range rows, Range columns,
                const Target& target) const {
    constexpr int pixels_at_once = most_sums / vectors;
    constexpr auto kernels = kernels_of_pixels<T, Out, vectors>(std::make_integer_sequence<int, pixels_at_once>{});
    const C* all_filters = filters_;
    for (int64_t p = 0; p < phases_.count; ++p) {
      const ConvProblem<T>& x = phases_[p];
      const ConvInput<T>& s = x.input;
      int64_t* offsets = scratch<int64_t>(Scratch::source_steps, s.tap_count);
      for (int64_t t = 0; t < s.tap_count; ++t)
        offsets[t] = s.taps[t].dy * input.y_stride + s.taps[t].dx * input.x_stride;
      const Range here{columns.begin, std::min(columns.end, s.out_width)};
      const BlockFilters<T> filters{all_filters + c * s.tap_count, s.tap_count, offsets, x.bias ? x.bias + c : nullptr,
                                    x.relu};
      for (int64_t y = rows.begin; y < std::min(rows.end, s.out_height); ++y) {
        const Range taps = taps_in_row(s, y);
        const auto [output, output_step] = target(x, p, y);
        const BlockRow<C, Out> row{input.data + y * s.step_h * input.y_stride,
                                   input.stride,
                                   s.step_w * input.x_stride,
                                   output,
                                   output_step,
                                   count,
                                   !first_.channels_last};
        for_each_even_part(here.size(), pixels_at_once, [&](int64_t first, int64_t pixels) {
          kernels[pixels - 1](filters, taps, row, here.begin + first);
        });
      }
      all_filters += s.tap_count * blocks() * lanes;
    }
  }

  // Computes the rows `rows` of every phase of channels-last images, for the channels from c on. Where the taps of all
  // phases meet the image, it may be read in place, and only the columns at both ends are copied.
  void channels_last(int64_t n, int64_t c, Range rows) const {
    const int64_t count = std::min(at_once_, first_.groups - c), width = first_.input.out_width;
    const auto target = [&](const ConvProblem<T>& x, int64_t, int64_t y) {
      const Axis pixels = x.out_pixels();
      return std::pair{x.first_pixel() + n * pixels.image_stride + y * pixels.y_stride + c, pixels.x_stride};
    };
    const auto convolve_copy = [&](Range columns) {
      if (columns.size() == 0) return;
      const ChannelBlocks<C> copy = pack_blocks(Scratch::source_block, first_.input, n, c, count, input_rows(rows),
                                                columns_reached(phases_, columns));
      convolve<T, vectors_of_line>(copy, c, count, rows, columns, target);
    };
    if (!are_blocks_in_place(first_.input, count) || 2 * inner_.size() < width ||
        (inner_.size() < width && is_worth_copying()))
      return convolve_copy({0, width});
    convolve<T, vectors_of_line>(blocks_in_place(first_.input, n, c), c, count, rows, inner_, target);
    convolve_copy({0, inner_.begin});
    convolve_copy({inner_.end, width});
  }

  // As channels_last. The output is collected in a block, in which the phases are interleaved.
  void channels_first(int64_t n, int64_t c, Range rows) const {
    const int64_t count = std::min(lanes, first_.groups - c), x_phases = first_.x_phases;
    const int64_t y_phases = phases_.count / x_phases, width = first_.out_lines.width;
    const int64_t top = rows.begin * y_phases, height = std::min(rows.end * y_phases, out_height_) - top;
    const Range columns{0, first_.input.out_width};
    const ChannelBlocks<C> input = pack_blocks(Scratch::source_block, first_.input, n, c, count, input_rows(rows),
                                               columns_reached(phases_, columns));
    C* sums = scratch<C>(Scratch::output_block, height * width * lanes);
    convolve<C, 1>(input, c, count, rows, columns, [&](const ConvProblem<T>& x, int64_t p, int64_t y) {
      return std::pair{sums + ((y * y_phases + p / x_phases - top) * width + x.x_phase) * lanes, x_phases * lanes};
    });
    T* planes = first_.output + n * first_.out_lines.image_stride + c * first_.out_channel_stride + top * width;
    transpose(planes, first_.out_channel_stride, sums, lanes, height * width, count);
  }

  const Phases<T> phases_;
  const ConvProblem<T>& first_;
  const int64_t at_once_;                   // channels of a task
  const int64_t bands_, band_;              // band_: the rows of a band in the first phase
  Range inner_{0, first_.input.out_width};  // the columns in which the taps of all phases meet the image
  int64_t taps_ = 0, out_height_ = 0;       // of all phases
  const C* filters_;                        // of all phases, one after another
};

template <bool reversed, class T>
void convolve_3x3(const ConvProblem<T>& x, const Taps3x3& taps, const T* weight) {
  if (x.channels_last) return depthwise_channels_3x3<reversed>(x, taps, weight);
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<Compute<T>, float>) depthwise_planes_3x3<reversed>(x, taps, weight);
#endif
}

template <class T>
void convolve_3x3(const ConvProblem<T>& x, const T* weight) {
  const Taps3x3 taps(x.input);
  taps.reversed() ? convolve_3x3<true>(x, taps, weight) : convolve_3x3<false>(x, taps, weight);
}

// The filters of a phase as the kernels read them: each with its taps contiguous.
template <class T>
const T* filters_of_taps(const ConvProblem<T>& x) {
  const int64_t taps = x.input.tap_count;
  T* selected = scratch<T>(Scratch::partial_sums, x.groups * taps);
  for (int64_t g = 0; g < x.groups; ++g)
    for (int64_t t = 0; t < taps; ++t) selected[g * taps + t] = x.filters.at(g, 0)[x.filter_step(t)];
  return selected;
}

}  // namespace

template <class T>
bool Depthwise3x3<T>::supports(const Phases<T>& phases) {
  const ConvProblem<T>& first = phases.first();
  return has_one_channel_groups(first) && has_3x3_kernels<T>(first.channels_last) &&
         (first.channels_last || first.x_phases == 1) &&
         std::all_of(phases.begin(), phases.end(), [](const ConvProblem<T>& x) { return Taps3x3::fit(x.input); });
}

template <class T>
bool Depthwise3x3<T>::profitable(const Phases<T>& x) {
  return x.first().groups > 1;
}

template <class T>
bool Depthwise3x3<T>::sums_in_order(const Phases<T>&) {
  return true;
}

template <class T>
void Depthwise3x3<T>::run(const Phases<T>& phases) {
  convolve_exactly(phases, [](const Phases<T>& finite) {
    for (const ConvProblem<T>& x : finite) convolve_3x3(x, filters_of_taps(x));
  });
}

template <class T>
bool Depthwise<T>::supports(const Phases<T>& x) {
  return has_one_channel_groups(x.first());
}

template <class T>
bool Depthwise<T>::profitable(const Phases<T>& x) {
  return x.first().groups > 1;
}

template <class T>
bool Depthwise<T>::sums_in_order(const Phases<T>& x) {
  return x.first().depth() <= KC;
}

template <class T>
void Depthwise<T>::run(const Phases<T>& phases) {
  convolve_exactly(phases, [](const Phases<T>& finite) { BlockedDepthwise<T>(finite).run(); });
}

#define INSTANTIATE(T)             \
  template struct Depthwise3x3<T>; \
  template struct Depthwise<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
