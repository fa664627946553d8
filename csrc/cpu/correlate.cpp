// The convolution at the heart of conv2d's forward and input gradient, as products of tile.h over windows of window.h.
//
// Three ways to lay the vectors, chosen by vectors_along_images and vectors_along_x; with K = (channel, tap):
//
//   along x:             output [O, pixels] = filters [O, K]    window [K, pixels]    a filter's values are broadcast
//   along the channels:  output [pixels, O] = window [pixels, K] filters^T [K, O]     the window's values are
//   along the images:    conv2d_images.cpp, for batches of small images with few channels
//
// In the former two a task is a band of output rows (or several small images) of one group and, if there are few bands,
// a part of the output channels; along the channels, the filters are transposed once into panels. LeNet's first layer
// on 64 images, one core with AVX-512, along x: forward 0.13 ms and grad_input 0.39, stock torch 0.33 and 3.1. Patches
// gathered in cache (im2col) took 2 and 4 times as long. Guarantees: those of gemm.h.
#include "conv2d.h"
#include "nonfinite.h"

namespace pyops::cpu {
namespace {

// Which way the vectors run: along x, with a broadcast weight, or along the output channels, with a broadcast value of
// the source. Whichever leaves fewer lanes idle; the latter transposes an output that is channels-first.
template <class T>
bool vectors_along_x(const Correlation<T>& x) {
  const double pixels = lanes_used<Compute<T>>(x.source.out_width), channels = lanes_used<Compute<T>>(x.out_channels);
  if (x.channels_last) return channels < 0.25 * pixels;
  // Transposing the output costs as much as this many terms, and so does writing columns that are not neighbours.
  const double depth = static_cast<double>(x.depth()), transpose = x.x_phases == 1 ? 36 : 0;
  return channels * depth / (depth + transpose) < pixels;
}

// Whether the vectors should run along the images: where lanes would be idle or multiply the zeros around an image,
// more than what transposing a block of images into cache and back costs.
template <class T>
bool vectors_along_images(const Correlation<T>& x) {
  const Source<T>& s = x.source;
  constexpr int64_t lanes = Vec<Compute<T>>::size(), most_elements = (1 << 20) / sizeof(Compute<T>);
  const int64_t out = x.groups * x.out_channels * s.pixels();
  if (s.count < lanes || (s.image_stride + out) * lanes > most_elements) return false;
  const double inside = share_inside(s), products = inside * static_cast<double>(out * x.depth());
  const double transposes = 8.0 * static_cast<double>(s.image_stride + out);
  // Measured: a vector along x ends at every row, and a tile of one vector waits for its few chains of sums.
  const double along_x = 0.75 * lanes_used<Compute<T>>(s.out_width);
  const double channels = lanes_used<Compute<T>>(x.out_channels) * (x.out_channels <= lanes ? 0.6 : 1);
  const double others = std::max(along_x, channels);
  return lanes_used<Compute<T>>(s.count) * products / (products + transposes) > inside * others;
}

template <class T>
struct Task {
  const Correlation<T>* phases;
  const Compute<T>* const* filters;  // of each phase and this group: [O][K], or panels of [K][width], or null
  int64_t width;                     // of the panels
  Band band;
  const Window<Compute<T>>& window;
  int64_t o, o_count;  // output channels

  // The part of the band that phase p has.
  int64_t rows(int64_t p) const { return std::min(band.rows, phases[p].source.out_height - band.y); }
};

template <class T>
void multiply_along_x(const Task<T>& t, int64_t p) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Correlation<T>& x = t.phases[p];
  const Window<C>& w = t.window;
  const int64_t K = x.depth(), width = x.source.out_width, row_vectors = ceil_div(width, lanes);
  const Axis pixels = x.out_pixels();
  const bool direct = std::is_same_v<T, C> && pixels.x_stride == 1;
  const int64_t group = t.band.g * x.out_channels;
  const Output<T> out{x.first_pixel() + group * x.out_channel_stride,
                      Axis::plain(x.out_channel_stride),
                      pixels,
                      x.bias ? x.bias + group : nullptr,
                      nullptr,
                      x.relu};

  const int64_t* patch = patch_offsets(Scratch::b_steps, w, x.source, x.source.channels);
  // The filters lie as they are: row o, step (channel, tap).
  const bool in_place = std::is_same_v<T, C>;
  const int64_t* filter_rows = multiples(Scratch::a_offsets, x.out_channels, in_place ? x.filters.out_stride : K);
  int64_t* filter_steps = scratch<int64_t>(Scratch::a_steps, K);
  for (int64_t k = 0; k < K; ++k) filter_steps[k] = in_place ? x.filter_step(k) : k;

  const int64_t band_rows = t.rows(p), lines = t.band.images * band_rows;
  constexpr int64_t vectors_at_once = NC / lanes;
  const int64_t lines_at_once = std::max(vectors_at_once / row_vectors, int64_t{1});
  for (int64_t line = 0; line < lines; line += lines_at_once) {
    const int64_t count = std::min(lines_at_once, lines - line), vectors = count * row_vectors;
    int64_t* offsets = scratch<int64_t>(Scratch::b_offsets, vectors);
    int64_t* targets = scratch<int64_t>(Scratch::target_vectors, vectors);
    int32_t* target_lanes = scratch<int32_t>(Scratch::target_lanes, vectors);
    for (int64_t i = 0, v = 0; i < count; ++i) {
      const int64_t n = (line + i) / band_rows, y = (line + i) % band_rows;
      for (int64_t j = 0; j < row_vectors; ++j, ++v) {
        offsets[v] = n * w.image_stride + y * w.y_step + j * lanes;
        targets[v] = (t.band.n + n) * pixels.image_stride + (t.band.y + y) * pixels.y_stride + j * lanes;
        target_lanes[v] = static_cast<int32_t>(std::min(lanes, width - j * lanes));
      }
    }
    const bool whole = width % lanes == 0;
    for (int64_t m = t.o; m < t.o + t.o_count; m += MC) {
      const int64_t mc = std::min(MC, t.o + t.o_count - m), stride = vectors * lanes;
      // Vectors [v, v + vc) of the lines.
      const auto product = [&](const Target<C>& target, int64_t v, int64_t vc, bool finish) {
        for_each_chunk(0, K, [&](int64_t k, int64_t kc, bool first, bool last) {
          multiply<C>(mc, vc, kc, {t.filters[p], filter_rows + m, filter_steps + k}, {w.data, offsets + v, patch + k},
                      target, !first, last && finish);
        });
      };
      if constexpr (std::is_same_v<T, C>) {
        if (direct) {
          for (int64_t v = 0; v < vectors; v += vectors_at_once) {
            const Target<C> target{out.data,
                                   multiples(Scratch::target_rows, x.out_channels, x.out_channel_stride) + m,
                                   targets + v,
                                   whole ? nullptr : target_lanes + v,
                                   out.row_bias ? out.row_bias + m : nullptr,
                                   nullptr,
                                   x.relu};
            product(target, v, std::min(vectors_at_once, vectors - v), /*finish=*/true);
          }
          continue;
        }
      }
      C* sums = scratch<C>(Scratch::sums, mc * stride);
      product({sums, multiples(Scratch::target_rows, mc, stride), multiples(Scratch::target_vectors, vectors, lanes)},
              0, vectors, /*finish=*/false);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = t.band.n + (line + i) / band_rows, y = t.band.y + (line + i) % band_rows;
        write(out, sums + i * row_vectors * lanes, stride, m, mc, n * pixels.pixels + y * width, width);
      }
    }
  }
}

// Rows [k, k + kc) of the panel of filters [o, o + columns) of group g, with zeros up to `width`.
template <class T>
void pack_filters(Compute<T>* panel, const Correlation<T>& x, int64_t g, int64_t o, int64_t columns, int64_t width,
                  int64_t k, int64_t kc) {
  const Filters<T>& f = x.filters;
  const T* first = f.at(g, o);
  const int64_t taps = x.source.tap_count;
  const bool in_order = x.source.tap_by_tap ? f.channel_stride == 1 && f.tap_stride == x.source.channels
                                            : f.channel_stride == taps && f.tap_stride == 1;
  if (in_order && f.out_stride == x.depth())  // a filter lies in one piece
    return pack_panels(panel, Matrix<T>{first, 1, f.out_stride}, k, kc, 0, columns, width);
  // Of the input gradient, as many taps of one channel as follow one another, with those of the next filter behind
  // them.
  const bool in_runs = f.tap_stride == 1 && f.out_stride == taps;
  for (int64_t i = k; i < k + kc;) {
    const int64_t count = in_runs ? std::min(taps - i % taps, k + kc - i) : 1;
    const T* source = first + x.filter_step(i);
    if (count > 1) {
      transpose(panel + (i - k) * width, width, source, f.out_stride, columns, count);
    } else {
      copy_values(panel + (i - k) * width, source, columns, f.out_stride);
    }
    i += count;
  }
  for (int64_t i = 0; i < kc && columns < width; ++i)
    std::fill(panel + i * width + columns, panel + (i + 1) * width, Compute<T>(0));
}

// All phases of the same rows, from p on.
template <class T>
void multiply_along_channels(const Task<T>& t, int64_t p) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Correlation<T>& x = t.phases[p];
  const Window<C>& w = t.window;
  const Axis& pixels = x.out_lines;
  const bool direct = std::is_same_v<T, C> && x.out_channel_stride == 1;
  const int64_t group = t.band.g * x.out_channels, line_width = pixels.width;
  const Output<T> out{x.output + group * x.out_channel_stride, pixels, Axis::plain(x.out_channel_stride), nullptr,
                      x.bias ? x.bias + group : nullptr,       x.relu};

  const int64_t band_rows = t.rows(p), lines = t.band.images * band_rows;
  // Many pixels at once and few channels rather than the other way round: the filters come from further away.
  constexpr int64_t most_pixels = 3 * MC, most_sums = MC * NC;
  int64_t lines_at_once = std::clamp(most_pixels / line_width, int64_t{1}, lines);
  lines_at_once = ceil_div(lines, ceil_div(lines, lines_at_once));
  const int64_t nc =
      std::clamp(most_sums / (lines_at_once * line_width) / t.width * t.width, std::min(t.width, t.o_count), t.o_count);
  for (int64_t n = t.o; n < t.o + t.o_count; n += nc) {
    const int64_t columns = std::min(nc, t.o + t.o_count - n), vectors = ceil_div(columns, lanes);
    const int64_t stride = vectors * lanes;
    int32_t* target_lanes = scratch<int32_t>(Scratch::target_lanes, vectors);
    for (int64_t j = 0; j < vectors; ++j) target_lanes[j] = static_cast<int32_t>(std::min(lanes, columns - j * lanes));
    for (int64_t line = 0; line < lines; line += lines_at_once) {
      const int64_t count = std::min(lines_at_once, lines - line);
      C* sums = direct ? nullptr : scratch<C>(Scratch::sums, count * line_width * stride);
      for (int64_t q = p; q < p + x.x_phases; ++q) {
        const Correlation<T>& phase = t.phases[q];
        const int64_t width = phase.source.out_width, K = phase.depth();
        int64_t* offsets = scratch<int64_t>(Scratch::a_offsets, count * width);
        int64_t* targets = scratch<int64_t>(Scratch::target_rows, count * width);
        for (int64_t i = 0, pixel = 0; i < count; ++i) {
          const int64_t image = (line + i) / band_rows, y = (line + i) % band_rows;
          const int64_t from = image * w.image_stride + y * w.y_step;
          const int64_t to = direct ? (t.band.n + image) * pixels.image_stride + (t.band.y + y) * pixels.y_stride
                                    : i * line_width * stride;
          const int64_t step = direct ? pixels.x_stride : stride;
          for (int64_t column = 0; column < width; ++column, ++pixel) {
            offsets[pixel] = from + column * w.x_step;
            targets[pixel] = to + (column * phase.x_phases + phase.x_phase) * step;
          }
        }
        const int64_t* patch = patch_offsets(Scratch::a_steps, w, phase.source, phase.source.channels);
        const int64_t* panel_steps = multiples(Scratch::b_steps, K, t.width);
        const auto filters = [&](int64_t k, int64_t kc) -> Vectors<C> {
          if (t.filters == nullptr) {
            const int64_t panels = ceil_div(columns, t.width);
            C* packed = scratch<C>(Scratch::weight, panels * t.width * kc);
            for (int64_t i = 0; i < panels; ++i)
              pack_filters(packed + i * t.width * kc, phase, t.band.g, n + i * t.width,
                           std::min(t.width, columns - i * t.width), t.width, k, kc);
            return {packed, panel_offsets<C>(Scratch::b_offsets, vectors, kc, t.width), panel_steps};
          }
          const int64_t* panels = panel_offsets<C>(Scratch::b_offsets, ceil_div(x.out_channels, lanes), K, t.width);
          return {t.filters[q], panels + n / lanes, panel_steps + k};
        };
        Target<C> target{sums, targets, multiples(Scratch::target_vectors, vectors, lanes)};
        if constexpr (std::is_same_v<T, C>) {
          if (direct) {
            target.data = out.data + n;
            if (columns < stride) target.lanes = target_lanes;
            if (out.column_bias) target.column_bias = out.column_bias + n;
            target.relu = x.relu;
          }
        }
        for_each_chunk(0, K, [&](int64_t k, int64_t kc, bool first, bool last) {
          multiply<C>(count * width, vectors, kc, {w.data, offsets, patch + k}, filters(k, kc), target, !first,
                      last && direct);
        });
      }
      for (int64_t i = 0; i < count && !direct;) {  // the lines of one image follow one another
        const int64_t image = t.band.n + (line + i) / band_rows, y = (line + i) % band_rows;
        const int64_t here = std::min(count - i, band_rows - y);
        write(out, sums + i * line_width * stride, stride, image * pixels.pixels + (t.band.y + y) * line_width,
              here * line_width, n, columns);
        i += here;
      }
    }
  }
}

// The filters of all groups of all phases as the products read them: filters[g * count + p].
template <class T>
const Compute<T>** arrange_filters(const Correlation<T>* phases, int64_t count, bool along_x, int64_t width) {
  using C = Compute<T>;
  const Correlation<T>& x = phases[0];
  const int64_t O = x.out_channels, panels = ceil_div(O, width);
  const C** filters = scratch<const C*>(Scratch::phase_filters, count * x.groups);
  if constexpr (std::is_same_v<T, C>) {
    if (along_x) {  // they are read where they lie
      for (int64_t i = 0; i < count * x.groups; ++i) filters[i] = phases[i % count].filters.at(i / count, 0);
      return filters;
    }
  }
  const auto group_size = [&](int64_t p) { return (along_x ? O : panels * width) * phases[p].depth(); };
  int64_t size = 0;
  for (int64_t p = 0; p < count; ++p) size += x.groups * group_size(p);
  C* target = scratch<C>(Scratch::weight, size);
  for (int64_t i = 0; i < count * x.groups; ++i) filters[i] = target, target += group_size(i % count);
  for_each_task(count * x.groups * panels, 16.0 * size, [&](int64_t task) {
    const int64_t i = task / panels, o = task % panels * width, columns = std::min(width, O - o), g = i / count;
    const Correlation<T>& phase = phases[i % count];
    const int64_t K = phase.depth();
    C* target = const_cast<C*>(filters[i]) + o * K;
    if (!along_x) return pack_filters(target, phase, g, o, columns, width, 0, K);
    for (int64_t f = o; f < o + columns; ++f)
      for (int64_t k = 0; k < K; ++k) *target++ = static_cast<C>(phase.filters.at(g, f)[phase.filter_step(k)]);
  });
  return filters;
}

// Where each filter has one tap after the other: what correlate_depthwise reads.
template <class T>
const T* filters_of_taps(const Correlation<T>& x) {
  const int64_t taps = x.source.tap_count;
  T* selected = scratch<T>(Scratch::partial_sums, x.groups * taps);
  for (int64_t g = 0; g < x.groups; ++g)
    for (int64_t t = 0; t < taps; ++t) selected[g * taps + t] = x.filters.at(g, 0)[x.filter_step(t)];
  return selected;
}

template <class T>
bool is_depthwise(const Correlation<T>& x) {
  return x.groups > 1 && x.source.channels == 1 && x.out_channels == 1 &&
         (x.channels_last || x.out_pixels().x_stride == 1);
}

template <class T>
bool has_narrow_groups(const Correlation<T>& x) {
  return x.groups > 1 && lanes_used<Compute<T>>(x.out_channels) <= 0.5;
}

template <class T>
void correlate_finite(const Correlation<T>* phases, int64_t count) {
  if (is_depthwise(phases[0])) {
    for (int64_t p = 0; p < count; ++p) correlate_depthwise(phases[p], filters_of_taps(phases[p]));
    return;
  }
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const Correlation<T>& x = phases[0];
  const Source<T>& s = x.source;
  const bool along_x = vectors_along_x(x);
  const Extent extent(phases, count);
  const BandSize size(s, extent, s.channels);
  const int64_t image_bands = ceil_div(s.count, size.images), row_bands = ceil_div(s.out_height, size.rows);
  const int64_t O = x.out_channels, bands = x.groups * image_bands * row_bands, width = panel_width<C>(O);
  double flops = 0;
  for (int64_t p = 0; p < count; ++p)
    flops += 2.0 * s.count * phases[p].source.pixels() * x.groups * O * phases[p].depth();
  const int64_t o_unit = along_x ? lanes : width;
  const int64_t o_part = ceil_div(ceil_div(O, ceil_div(tasks_worth(flops), bands)), o_unit) * o_unit;
  const int64_t o_parts = ceil_div(O, o_part);

  // A single band packs its filters where it needs them, while they are in cache.
  const C** filters = along_x || bands > x.groups ? arrange_filters(phases, count, along_x, width) : nullptr;
  for_each_range(bands * o_parts, flops, [&](int64_t begin, int64_t end) {
    Window<C> window{};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task % o_parts * o_part, y = task / o_parts % row_bands * size.rows;
      const int64_t g = task / o_parts / row_bands % x.groups;
      const int64_t n = task / o_parts / row_bands / x.groups * size.images;
      const Band band{
          g, 0, s.channels, n, std::min(size.images, s.count - n), y, std::min(size.rows, s.out_height - y)};
      if (task == begin || o == 0) window = window_of(s, extent, band, x.channels_last, along_x);
      const Task<T> t{phases, filters ? filters + g * count : nullptr, width, band, window, o, std::min(o_part, O - o)};
      for (int64_t p = 0; p < count; p += along_x ? 1 : x.x_phases) {
        if (t.rows(p) <= 0) continue;
        along_x ? multiply_along_x(t, p) : multiply_along_channels(t, p);
      }
    }
  });
}

template <class T>
void add_nonfinite(const Correlation<T>& x) {
  const Source<T>& s = x.source;
  const Axis pixels = x.out_pixels();
  for_each_task(s.count, 2.0 * s.count * s.pixels() * x.groups * x.out_channels * x.depth(), [&](int64_t n) {
    for (int64_t o = 0; o < x.groups * x.out_channels; ++o) {
      const int64_t g = o / x.out_channels;
      T* image = x.first_pixel() + o * x.out_channel_stride + n * pixels.image_stride;
      for (int64_t k = 0; k < s.depth(); ++k) {
        const T weight = x.filters.at(g, o % x.out_channels)[x.filter_step(k)];
        if (is_finite(weight)) continue;
        for_each_inside(s, n, g * s.channels + s.channel(k), s.tap(k), [&](int64_t y, int64_t column, T value) {
          add_product(image[y * pixels.y_stride + column * pixels.x_stride], weight, value);
        });
      }
    }
  });
}

template <class T>
void rectify(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < T(0)) values[i] = T(0);
}

// Where every output pixel meets just the input pixel of its own place, an image is one long line, of which the vectors
// leave fewer lanes idle.
template <class T>
bool is_pointwise(const Correlation<T>& x) {
  const Source<T>& s = x.source;
  return s.tap_count == 1 && s.taps[0].dy == 0 && s.taps[0].dx == 0 && x.x_phases == 1 && s.out_height == s.height &&
         s.out_width == s.width;
}
template <class T>
Correlation<T> flattened(Correlation<T> x) {
  x.source.out_width = x.source.width *= x.source.height;
  x.source.out_height = x.source.height = 1;
  x.out_lines.width = x.source.width;
  return x;
}

}  // namespace

template <class T>
void correlate(const Correlation<T>* phases, int64_t count) {
  const Correlation<T>& x = phases[0];
  if (count == 1 && x.source.height > 1 && is_pointwise(x)) {
    const Correlation<T> line = flattened(x);
    return correlate(&line, 1);
  }
  if (x.channels_last && has_narrow_groups(x) && !is_depthwise(x)) return correlate_planes(phases, count);
  if (count == 1 && vectors_along_images(x)) return correlate_images(x);
  if (!leaves_image(x.source, Extent(phases, count)) || all_finite(x.filters.data, x.filters.count))
    return correlate_finite(phases, count);

  const std::vector<T> finite = finite_part(x.filters.data, x.filters.count);
  std::vector<Correlation<T>> finite_phases(phases, phases + count);
  for (Correlation<T>& phase : finite_phases) phase.filters.data = finite.data(), phase.relu = false;
  correlate_finite(finite_phases.data(), count);
  for (int64_t p = 0; p < count; ++p) add_nonfinite(phases[p]);
  if (x.relu) rectify(x.output, x.source.count * x.out_lines.image_stride);
}

template void correlate(const Correlation<float>*, int64_t);
template void correlate(const Correlation<double>*, int64_t);
template void correlate(const Correlation<c10::BFloat16>*, int64_t);
template void correlate(const Correlation<c10::Half>*, int64_t);

}  // namespace pyops::cpu
