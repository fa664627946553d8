// A convolution with the vectors along the output channels: output [pixels, O] = window [pixels, K] filters^T [K, O].
// The filters are packed into panels, the window's values broadcast; the taps outside of the image are left out where
// they are many, and all of them of channels-last images, which are read where they lie (borders.h). Sums go to a
// channels-last output at once where they can (sum_to.h), others are transposed. Guarantees: those of gemm.h.
#include "correlate.h"
#include "sum_to.h"

namespace pyops::cpu {
namespace {

// Whether the numbers of a filter lie one after the other, in the order in which they are summed.
template <class F, class T>
bool is_in_one_piece(const Correlation<T>& x) {
  const Filters<T>& f = x.filters;
  const Source<T>& s = x.source;
  if (f.out_stride != x.depth() * terms<F> || (is_pair<F> && f.second != 1)) return false;
  if (s.tap_by_tap || s.tap_count == 1)
    return f.channel_stride == terms<F> && (s.tap_count == 1 || f.tap_stride == s.channels * terms<F>);
  return !is_pair<F> && f.channel_stride == s.tap_count && f.tap_stride == 1;
}

}  // namespace

template <class T, class F>
void pack_filters(F* panel, const Correlation<T>& x, int64_t g, int64_t o, int64_t columns, int64_t width, int64_t k,
                  int64_t kc) {
  const Filters<T>& f = x.filters;
  const Source<T>& s = x.source;
  const T* first = f.at(g, o);
  const int64_t taps = s.tap_count;
  if (is_in_one_piece<F>(x))
    return pack_panels(panel, Matrix<T>{first, 1, f.out_stride}, k * terms<F>, kc * terms<F>, 0, columns, width);
  // As many taps of one channel as follow one another.
  const bool in_runs =
      !s.tap_by_tap && taps > 0 && f.tap_stride == 1 && s.taps[taps - 1].index - s.taps[0].index == taps - 1;
  for (int64_t i = k; i < k + kc;) {
    const int64_t count = in_runs ? std::min(taps - i % taps, k + kc - i) : 1;
    const T* source = first + x.filter_step(i);
    if (count > 1) {
      transpose_factors(panel + (i - k) * width, width, source, f.out_stride, f.second, columns, count);
    } else {
      copy_factors(panel + (i - k) * width, source, columns, f.out_stride, f.second, terms<F>);
    }
    i += count;
  }
  for (int64_t i = 0; i < kc && columns < width; ++i)
    std::fill(panel + i * width + columns, panel + (i + 1) * width, F{});
}

namespace {

// Some of the lines of a band: line i is row(i) of image(i), both counted from the band's first.
struct Lines {
  int64_t first, count, rows_of_image;

  int64_t image(int64_t i) const { return (first + i) / rows_of_image; }
  int64_t row(int64_t i) const { return (first + i) % rows_of_image; }
};

// Where the sums of a block go: into the output at once, or one pixel after the other, `stride` apart.
template <class T>
struct Sums {
  const Output<T>& out;
  bool direct;
  int64_t stride;
  Compute<T>* data;  // where they do not go into the output

  int64_t line(const Band& band, const Lines& lines, int64_t i) const {
    if (!direct) return i * out.rows.width * stride;
    return (band.n + lines.image(i)) * out.rows.image_stride + (band.y + lines.row(i)) * out.rows.y_stride;
  }
  int64_t step() const { return direct ? out.rows.x_stride : stride; }
};

// The tap of each term, as a bit.
template <class T>
const TapSet* taps_of_terms(const Source<T>& s) {
  TapSet* taps = scratch<TapSet>(Scratch::taps_of_terms, s.depth());
  for (int64_t t = 0; t < s.tap_count; ++t)
    for (int64_t c = 0; c < s.channels; ++c)
      taps[s.tap_by_tap ? t * s.channels + c : c * s.tap_count + t] = TapSet{1} << t % 64;
  return taps;
}

// The products of phase q: of the lines with the filters of output channels [n, n + columns).
template <class T, class F>
void multiply_phase(const Task<T, F>& t, int64_t q, const Lines& lines, int64_t n, int64_t columns,
                    const Sums<T>& sums) {
  using C = Sum<F>;
  constexpr int64_t lanes = Vec<C>::size();
  const Correlation<T>& phase = t.phases[q];
  const Source<T>& s = phase.source;
  const Window<F>& w = t.window;
  const int64_t K = phase.depth(), vectors = ceil_div(columns, lanes);

  const Output<T>& out = sums.out;
  if (K == 0 && sums.direct && !out.column_bias) {  // no tap falls on these pixels of an input gradient
    for (int64_t i = 0; i < lines.count; ++i) {
      T* line = out.data + n + sums.line(t.band, lines, i) + phase.x_phase * sums.step();
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
      if (!pixels.rows.has(t.band.y + row)) continue;
      const int64_t from = lines.image(i) * w.image_stride + row * w.y_step, to = sums.line(t.band, lines, i);
      for (int64_t x = pixels.columns.begin; x < pixels.columns.end; ++x, ++pixel) {
        offsets[pixel] = from + x * w.x_step;
        targets[pixel] = to + (x * phase.x_phases + phase.x_phase) * sums.step();
      }
    }
    runs[c].rows = pixel - first;
  }

  const int64_t* patch = patch_offsets(Scratch::a_steps, w, s, s.channels);
  const int64_t* panel_steps = multiples(Scratch::b_steps, K, t.width);
  const auto filters = [&](int64_t k, int64_t kc) -> Vectors<F> {
    if (t.filters == nullptr) {
      const int64_t panels = ceil_div(columns, t.width);
      F* packed = scratch<F>(Scratch::weight, panels * t.width * kc);
      for (int64_t i = 0; i < panels; ++i)
        pack_filters(packed + i * t.width * kc, phase, t.band.g, n + i * t.width,
                     std::min(t.width, columns - i * t.width), t.width, k, kc);
      return {packed, panel_offsets<F>(Scratch::b_offsets, vectors, kc, t.width), panel_steps};
    }
    const int64_t* panels = panel_offsets<F>(Scratch::b_offsets, ceil_div(phase.out_channels, lanes), K, t.width);
    return {t.filters[q], panels + n / lanes, panel_steps + k};
  };
  // What the pixels of a tile meet first of the source lies in one piece, of a cache line or more for each.
  const int64_t bytes = w.x_step * int64_t{sizeof(F)};
  const bool in_one_piece = w.channel_stride == 1 && (s.tap_by_tap || w.x_step == K) && bytes >= cache_line &&
                            s.channels <= 4 * KC && n == t.o;
  const TapSet* taps = taps_of_terms(s);
  int64_t* steps = scratch<int64_t>(Scratch::run_steps, classes.count * 2 * KC);
  const auto product = [&](const Target<C>& target) {
    for_each_chunk(0, K, [&](int64_t k, int64_t kc, bool first, bool last) {
      const Vectors<F> b = filters(k, kc);
      for (int64_t c = 0; c < classes.count; ++c)
        if (runs[c].rows > 0)
          runs[c] =
              run_of_terms<F>(runs[c].rows, classes[c].taps, taps + k, patch + k, b.steps, kc, steps + c * 2 * KC);
      multiply<F>(runs, classes.count, vectors, {w.data, offsets, nullptr, in_one_piece && first ? bytes : 0},
                  {b.data, b.offsets, nullptr}, target, !first, last);
    });
  };
  const int64_t* target_vectors = multiples(Scratch::target_vectors, vectors, lanes);
  if constexpr (go_at_once<F, T>) {
    if (sums.direct) {
      const Target<T> target{out.data + n,   targets,
                             target_vectors, column_lanes<C>(columns),
                             nullptr,        out.column_bias ? out.column_bias + n : nullptr,
                             out.relu};
      sum_to<F>(target, pixel, columns, product);
      return;
    }
  }
  product({sums.data, targets, target_vectors});
}

}  // namespace

template <class T, class F>
void multiply_along_channels(const Task<T, F>& t, int64_t p) {
  using C = Sum<F>;
  constexpr int64_t lanes = Vec<C>::size();
  const Correlation<T>& x = t.phases[p];
  const Axis& pixels = x.out_lines;
  const bool direct = go_at_once<F, T> && x.out_channel_stride == 1;
  const int64_t group = t.band.g * x.out_channels, line_width = pixels.width;
  const Output<T> out{x.output + group * x.out_channel_stride, pixels, Axis::plain(x.out_channel_stride), nullptr,
                      x.bias ? x.bias + group : nullptr,       x.relu};

  const int64_t band_rows = t.rows(p), lines = t.band.images * band_rows;
  // Many pixels at once and few channels rather than the other way round: the filters come from further away.
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
      for (int64_t i = 0; i < here.count && !direct;) {  // the lines of one image follow one another
        const int64_t count = std::min(here.count - i, band_rows - here.row(i));
        write(out, sums.data + i * line_width * stride, stride,
              (t.band.n + here.image(i)) * pixels.pixels + (t.band.y + here.row(i)) * line_width, count * line_width, n,
              columns);
        i += count;
      }
    }
  }
}

#define INSTANTIATE(T, F)                                                                                      \
  template void pack_filters(F*, const Correlation<T>&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t); \
  template void multiply_along_channels(const Task<T, F>&, int64_t);
FOR_EACH_FACTOR(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
