// A convolution as an implicit GEMM with the vectors along the output channels, where K = (channel, tap):
//
//   output [pixels, O] = input tile [pixels, K] filters^T [K, O]
//
// It is the general algorithm, chosen where no other is profitable. The filters are packed into panels
// and the values of the input tile are broadcast. Taps outside of the image are skipped where there are many of them,
// and always where the images are read in place (conv2d/border_taps.h). A tile unit multiplies the zeros instead,
// unless every piece of K lies within one tap. The sums of a channels-last output are stored directly where that is
// possible (gemm/epilogue.h); others are written block by block, which transposes those of a channels-first output.
// Guarantees: those of gemm.h.
#include "../gemm/epilogue.h"
#include "implicit_gemm.h"
#include "nonfinite.h"

namespace pyops::cpu {
namespace {

// Whether the values of a filter are contiguous, in the order in which they are summed.
template <class F, class T>
bool is_in_one_piece(const ConvProblem<T>& x) {
  const Filters<T>& f = x.filters;
  const ConvInput<T>& s = x.input;
  if (f.out_stride != x.depth() * k_per_step<F> || (is_pair<F> && f.second != 1)) return false;
  if (s.tap_by_tap || s.tap_count == 1)
    return f.channel_stride == k_per_step<F> && (s.tap_count == 1 || f.tap_stride == s.channels * k_per_step<F>);
  return !is_pair<F> && f.channel_stride == s.tap_count && f.tap_stride == 1;
}

}  // namespace

template <class T, class F>
void pack_filters(F* panel, const ConvProblem<T>& x, int64_t g, int64_t o, int64_t columns, int64_t width, int64_t k,
                  int64_t kc) {
  const Filters<T>& f = x.filters;
  const ConvInput<T>& s = x.input;
  const T* first = f.at(g, o);
  const int64_t taps = s.tap_count;
  if (is_in_one_piece<F>(x))
    return pack_panels(panel, Matrix<T>{first, 1, f.out_stride}, k * k_per_step<F>, kc * k_per_step<F>, 0, columns,
                       width);
  // Contiguous taps of one channel are transposed together.
  const bool contiguous = taps > 0 && f.tap_stride == 1 && s.taps[taps - 1].index - s.taps[0].index == taps - 1;
  const bool in_runs = !s.tap_by_tap && contiguous, by_channel = s.tap_by_tap && contiguous && kc == x.depth();
  for (int64_t c = 0; c < s.channels && by_channel; ++c)
    transpose_operand(panel + c * width, s.channels * width, first + f.step(c, s.taps[0]), f.out_stride, f.second,
                      columns, taps);
  for (int64_t i = by_channel ? k + kc : k; i < k + kc;) {
    const int64_t count = in_runs ? std::min(taps - i % taps, k + kc - i) : 1;
    const T* source = first + x.filter_step(i);
    if (count > 1) {
      transpose_operand(panel + (i - k) * width, width, source, f.out_stride, f.second, columns, count);
    } else {
      copy_operand(panel + (i - k) * width, source, columns, f.out_stride, f.second, k_per_step<F>);
    }
    i += count;
  }
  for (int64_t i = 0; i < kc && columns < width; ++i)
    std::fill(panel + i * width + columns, panel + (i + 1) * width, F{});
}

namespace {

// Some of the lines of a tile: line i is row(i) of image(i), both counted from the beginning of the tile.
struct Lines {
  int64_t first, count, rows_of_image;

  int64_t image(int64_t i) const { return (first + i) / rows_of_image; }
  int64_t row(int64_t i) const { return (first + i) % rows_of_image; }
};

// Where the sums of a block are stored: directly in the output, or in scratch, with the pixels `stride` elements apart.
template <class T>
struct Sums {
  const Output<T>& out;
  bool direct;
  int64_t stride;
  Compute<T>* data;  // the sums in scratch; null if direct

  int64_t line(const OutputTile& tile, const Lines& lines, int64_t i) const {
    if (!direct) return i * out.rows.width * stride;
    return (tile.n + lines.image(i)) * out.rows.image_stride + (tile.y + lines.row(i)) * out.rows.y_stride;
  }
  int64_t step() const { return direct ? out.rows.x_stride : stride; }
};

// The tap of each term, as a bit.
template <class T>
const TapSet* taps_of_terms(const ConvInput<T>& s) {
  TapSet* taps = scratch<TapSet>(Scratch::taps_of_terms, s.depth());
  for (int64_t t = 0; t < s.tap_count; ++t)
    for (int64_t c = 0; c < s.channels; ++c)
      taps[s.tap_by_tap ? t * s.channels + c : c * s.tap_count + t] = TapSet{1} << t % 64;
  return taps;
}

// Multiplies the lines of phase q by the filters of the output channels [n, n + columns). The nest of loops over
// chunks, panels and register tiles stands in one function, because every level uses the bounds of those outside it.
template <class T, class F>
void multiply_phase(const GemmTask<T, F>& t, int64_t q, const Lines& lines, int64_t n, int64_t columns,
                    const Sums<T>& sums) {
  using C = Accumulator<F>;
  constexpr int64_t lanes = Vec<C>::size();
  const ConvProblem<T>& phase = t.phases[q];
  const ConvInput<T>& s = phase.input;
  const InputTile<F>& w = t.input;
  const int64_t K = phase.depth(), vectors = ceil_div(columns, lanes);

  const Output<T>& out = sums.out;
  if (K == 0 && sums.direct && !out.column_bias) {  // no tap meets these pixels of an input gradient
    for (int64_t i = 0; i < lines.count; ++i) {
      T* line = out.data + n + sums.line(t.tile, lines, i) + phase.x_phase * sums.step();
      for (int64_t x = 0; x < s.out_width; ++x) std::fill_n(line + x * phase.x_phases * sums.step(), columns, T(0));
    }
    return;
  }
  int64_t* offsets = scratch<int64_t>(Scratch::a_offsets, lines.count * s.out_width);
  int64_t* targets = scratch<int64_t>(Scratch::target_rows, lines.count * s.out_width);
  const PixelClasses& classes = t.classes[q];
  RowRun runs[PixelClasses::most] = {};
  int64_t pixel = 0;
  for (int64_t c = 0; c < classes.count; ++c) {
    const PixelClass& pixels = classes[c];
    const int64_t first = pixel;
    for (int64_t i = 0; i < lines.count; ++i) {
      const int64_t row = lines.row(i);
      if (!pixels.rows.has(t.tile.y + row)) continue;
      const int64_t from = lines.image(i) * w.image_stride + row * w.y_step, to = sums.line(t.tile, lines, i);
      for (int64_t x = pixels.columns.begin; x < pixels.columns.end; ++x, ++pixel) {
        offsets[pixel] = from + x * w.x_step;
        targets[pixel] = to + (x * phase.x_phases + phase.x_phase) * sums.step();
      }
    }
    runs[c].rows = pixel - first;
  }

  const int64_t* patch = patch_offsets(Scratch::a_steps, w, s, s.channels);
  const int64_t* panel_steps = multiples(Scratch::b_steps, K, t.width);
  const auto filters = [&](int64_t k, int64_t kc) -> OperandB<F> {
    if (t.filters == nullptr) {
      const int64_t panels = ceil_div(columns, t.width);
      F* packed = scratch<F>(Scratch::weight, panels * t.width * kc);
      for (int64_t i = 0; i < panels; ++i)
        pack_filters(packed + i * t.width * kc, phase, t.tile.g, n + i * t.width,
                     std::min(t.width, columns - i * t.width), t.width, k, kc);
      return {packed, panel_offsets<F>(Scratch::b_offsets, vectors, kc, t.width), panel_steps};
    }
    const int64_t* panels = panel_offsets<F>(Scratch::b_offsets, ceil_div(phase.out_channels, lanes), K, t.width);
    return {t.filters[q], panels + n / lanes, panel_steps + k};
  };
  // Whether each pixel first reads one contiguous piece of the input of at least a cache line, which the microkernel
  // then prefetches.
  const int64_t bytes = w.x_step * int64_t{sizeof(F)};
  const bool in_one_piece = w.channel_stride == 1 && (s.tap_by_tap || w.x_step == K) && bytes >= cache_line &&
                            s.channels <= 4 * KC && n == t.o;
  const TapSet* taps = taps_of_terms(s);
  int64_t* steps = scratch<int64_t>(Scratch::run_steps, classes.count * 2 * KC);
  const auto product = [&](const OperandC<C>& target) {
    for_each_chunk(0, K, [&](int64_t k, int64_t kc, bool first, bool last) {
      const OperandB<F> b = filters(k, kc);
      for (int64_t c = 0; c < classes.count; ++c)
        if (runs[c].rows > 0)
          runs[c] =
              run_of_terms<F>(runs[c].rows, classes[c].taps, taps + k, patch + k, b.steps, kc, steps + c * 2 * KC);
      macrokernel<F>(runs, classes.count, vectors, {w.data, offsets, nullptr, in_one_piece && first ? bytes : 0},
                     {b.data, b.offsets, nullptr}, target, !first, last);
    });
  };
  const int64_t* target_vectors = multiples(Scratch::target_vectors, vectors, lanes);
  if constexpr (stores_directly<F, T>) {
    if (sums.direct) {
      const OperandC<T> target{out.data + n,   targets,
                               target_vectors, column_lanes<C>(columns),
                               nullptr,        out.column_bias ? out.column_bias + n : nullptr,
                               out.relu};
      with_epilogue<F>(target, pixel, columns, product);
      return;
    }
  }
  product({sums.data, targets, target_vectors});
}

}  // namespace

template <class T, class F>
void implicit_gemm_channels(const GemmTask<T, F>& t, int64_t p) {
  using C = Accumulator<F>;
  constexpr int64_t lanes = Vec<C>::size();
  const ConvProblem<T>& x = t.phases[p];
  const Axis& pixels = x.out_lines;
  const bool direct = stores_directly<F, T> && x.out_channel_stride == 1;
  const int64_t group = t.tile.g * x.out_channels, line_width = pixels.width;
  const Output<T> out{x.output + group * x.out_channel_stride, pixels, Axis::plain(x.out_channel_stride), nullptr,
                      x.bias ? x.bias + group : nullptr,       x.relu};

  const int64_t band_rows = t.rows(p), lines = t.tile.images * band_rows;
  // Prefer many pixels and few channels per block to the reverse: the filters come from a more distant cache.
  constexpr int64_t most_pixels = 3 * MC, most_sums = 72 << 10, most_columns = 256;
  int64_t lines_at_once = std::clamp(most_pixels / line_width, int64_t{1}, lines);
  lines_at_once = ceil_div(lines, ceil_div(lines, lines_at_once));
  const int64_t columns_at_once =
      direct ? most_columns : std::max(most_sums / (lines_at_once * line_width) / t.width, int64_t{1}) * t.width;
  for (int64_t n = t.o; n < t.o + t.o_count; n += columns_at_once) {
    const int64_t columns = std::min(columns_at_once, t.o + t.o_count - n), vectors = ceil_div(columns, lanes);
    const int64_t stride = vectors * lanes;
    for (int64_t line = 0; line < lines; line += lines_at_once) {
      const Lines here{line, std::min(lines_at_once, lines - line), band_rows};
      const Sums<T> sums{out, direct, stride,
                         direct ? nullptr : scratch<C>(Scratch::sums, here.count * line_width * stride)};
      for (int64_t q = p; q < p + x.x_phases; ++q) multiply_phase(t, q, here, n, columns, sums);
      for (int64_t i = 0; i < here.count && !direct;) {  // the lines of one image at a time
        const int64_t count = std::min(here.count - i, band_rows - here.row(i));
        write(out, sums.data + i * line_width * stride, stride,
              (t.tile.n + here.image(i)) * pixels.pixels + (t.tile.y + here.row(i)) * line_width, count * line_width, n,
              columns);
        i += count;
      }
    }
  }
}

// ---- the algorithm ----

namespace {

// The pixel classes of each phase.
template <class T>
PhaseClasses classify_pixels(const Phases<T>& phases) {
  // Channels-first planes may be a page or more apart, too far to be read pixel by pixel: they are copied and padded
  // with zeros.
  const ConvProblem<T>& first = phases.first();
  const bool pairs = multiplies_pairs(first), on_tiles = pairs && uses_tiles<Bf16Pair>();
  bool in_place = first.channels_last && (std::is_same_v<T, Compute<T>> || pairs);
  // Where taps are skipped, the steps that remain are not a constant stride apart, so that their tiles are copied.
  if (on_tiles) in_place &= first.input.channels % 32 == 0;
  PixelClasses* classes = scratch<PixelClasses>(Scratch::classes, phases.count);
  for (int64_t p = 0; p < phases.count; ++p) {
    const ConvInput<T>& input = phases[p].input;
    classes[p] = PixelClasses(input, /*wanted=*/in_place || (!on_tiles && should_skip_border_taps(input)));
    in_place &= classes[p].exact;
  }
  return {classes, in_place};
}

}  // namespace

template <class T>
bool ImplicitGemmChannels<T>::supports(const Phases<T>&) {
  return true;
}

template <class T>
bool ImplicitGemmChannels<T>::profitable(const Phases<T>&) {
  return true;
}

template <class T>
bool ImplicitGemmChannels<T>::sums_in_order(const Phases<T>&) {
  return true;
}

template <class T>
void ImplicitGemmChannels<T>::run(const Phases<T>& x) {
  const PhaseClasses classes = classify_pixels(x);
  const auto gemm = [&](const Phases<T>& phases) { implicit_gemm(phases, /*by_width=*/false, classes); };
  classes.in_place ? gemm(x) : convolve_exactly(x, gemm);
}

#define INSTANTIATE(T) template struct ImplicitGemmChannels<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE
#define INSTANTIATE(T, F)                                                                                      \
  template void pack_filters(F*, const ConvProblem<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t); \
  template void implicit_gemm_channels(const GemmTask<T, F>&, int64_t);
FOR_EACH_OPERAND(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
