// The input tile of a convolution task: the part of a batch of images that the task reads, halo included, laid out so
// that every tap of every output pixel is an offset:
//
//   value(pixel, channel, tap) = data[pixel_offset + channel_offset + tap_offset]
//
// This makes a convolution an implicit GEMM with the indirect operands of gemm/microkernel.h: no patches are gathered
// (no im2col), the inner loop does not test for borders, and any stride, dilation and layout is supported.
//
// Where no tap that is multiplied leaves the image, the tensor itself is read. Otherwise the tile is copied into cache,
// each value once, converted to the operands that are multiplied and padded with zeros. If its readers take vectors
// along the width, its columns are sorted by their remainder modulo the horizontal stride, so that the values that
// neighbouring output pixels read through one tap are neighbours too.
#pragma once

#include "../gemm/gemm.h"

namespace pyops::cpu {

struct Tap {
  int64_t dy, dx;
  int64_t index;  // of the tap in the kernel, row by row
};

// A convolution's view of its input images, which for the input gradient are grad_output's. Through tap t, output pixel
// (y, x) reads the input pixel (y * step_h + t.dy, x * step_w + t.dx).
template <class In>
struct ConvInput {
  const In* images;  // the first image, at the first channel of the first group
  int64_t image_stride, channel_stride, y_stride, x_stride;
  int64_t count, height, width;
  int64_t channels;  // of one group
  int64_t step_h, step_w;
  int64_t out_height, out_width;
  const Tap* taps;
  int64_t tap_count;
  int64_t end;  // the number of elements of the tensor from `images` on
  // Sums run over k = (channel, tap) in the order of the filters in memory: tap by tap, or else channel by channel.
  bool tap_by_tap = false;
  // Values may be multiplied in pairs (gemm/operand.h) of channels or of images. Then `channels` or `count` counts
  // pairs, and `second` is the distance from the first value of a pair to the second.
  int64_t second = 0;

  int64_t pixels() const { return out_height * out_width; }
  int64_t depth() const { return channels * tap_count; }  // K
  int64_t channel(int64_t k) const { return tap_by_tap ? k % channels : k / tap_count; }
  const Tap& tap(int64_t k) const { return taps[tap_by_tap ? k / channels : k % tap_count]; }
};

// Views the input as pairs of channels, whose number must be even.
template <class In>
ConvInput<In> paired(ConvInput<In> s) {
  s.second = s.channel_stride, s.channel_stride *= 2, s.channels /= 2;
  return s;
}

// Views the input as pairs of images, whose number must be even.
template <class In>
ConvInput<In> paired_images(ConvInput<In> s) {
  s.second = s.image_stride, s.image_stride *= 2, s.count /= 2;
  return s;
}

// Reads the elements themselves as pairs, given a view of pairs of channels that lie next to each other in memory.
template <class In>
ConvInput<Bf16Pair> of_pairs(const ConvInput<In>& s) {
  return {
      .images = reinterpret_cast<const Bf16Pair*>(s.images),
      .image_stride = s.image_stride / 2,
      .channel_stride = s.channel_stride / 2,
      .y_stride = s.y_stride / 2,
      .x_stride = s.x_stride / 2,
      .count = s.count,
      .height = s.height,
      .width = s.width,
      .channels = s.channels,
      .step_h = s.step_h,
      .step_w = s.step_w,
      .out_height = s.out_height,
      .out_width = s.out_width,
      .taps = s.taps,
      .tap_count = s.tap_count,
      .end = s.end / 2,
      .tap_by_tap = s.tap_by_tap,
  };
}

// Whether some output pixel meets the image at this tap. Taps for which none does are left out from the start: with a
// large dilation or padding they may be most of the kernel.
template <class In>
bool meets_image(const ConvInput<In>& s, int64_t dy, int64_t dx) {
  const auto met = [](int64_t offset, int64_t step, int64_t out_size, int64_t size) {
    const int64_t first = offset < 0 ? ceil_div(-offset, step) : 0;  // first output pixel that is not before the image
    return first < out_size && first * step + offset < size;
  };
  return met(dy, s.step_h, s.out_height, s.height) && met(dx, s.step_w, s.out_width, s.width);
}

// The smallest and largest input coordinates that the taps of output rows [0, out_height) reach, for one input or for
// several phases that share their images.
struct ReceptiveField {
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  int64_t span_h, span_w;  // the extent of one pixel's taps
  int64_t out_height = 0, out_width = 0;

  template <class In>
  explicit ReceptiveField(const ConvInput<In>& s) {
    bool first = true;
    add(s, first);
    close(s);
  }
  // Covers phases[0 .. count).input; the first phase has the most output pixels.
  template <class Phase>
  ReceptiveField(const Phase* phases, int64_t count) {
    bool first = true;
    for (int64_t i = 0; i < count; ++i) add(phases[i].input, first);
    close(phases[0].input);
  }

 private:
  template <class In>
  void add(const ConvInput<In>& s, bool& first) {
    for (int64_t t = 0; t < s.tap_count; ++t, first = false) {
      const int64_t dy = s.taps[t].dy, dx = s.taps[t].dx;
      top = first ? dy : std::min(top, dy), bottom = first ? dy : std::max(bottom, dy);
      left = first ? dx : std::min(left, dx), right = first ? dx : std::max(right, dx);
    }
  }
  template <class In>
  void close(const ConvInput<In>& s) {
    span_h = bottom - top + 1, span_w = right - left + 1;
    out_height = s.out_height, out_width = s.out_width;
    bottom += (out_height - 1) * s.step_h;
    right += (out_width - 1) * s.step_w;
  }
};

template <class In>
bool reaches_outside(const ConvInput<In>& s, const ReceptiveField& e) {
  return e.top < 0 || e.left < 0 || e.bottom >= s.height || e.right >= s.width;
}

// Output rows [y, y + rows) of images [n, n + images), which read the input channels [c, c + channels) of group g.
struct OutputTile {
  int64_t g, c, channels, n, images, y, rows;
};

template <class F>
struct InputTile {
  const F* data;
  int64_t image_stride, channel_stride;
  int64_t y_step, x_step;  // from one output pixel to the next
  // Tap (dy, dx) has the offset (dy - top) * row_stride + d % step_w * remainder_stride + d / step_w * column_stride,
  // where d = dx - left.
  int64_t top, left, row_stride, step_w, remainder_stride, column_stride;

  int64_t tap_offset(Tap tap) const {
    const int64_t d = tap.dx - left;
    return (tap.dy - top) * row_stride + d % step_w * remainder_stride + d / step_w * column_stride;
  }
};

// One dimension of a copied input tile. Where the stride is larger than the span of the taps, the gaps between the
// receptive fields are not copied: element i of the copy is element i / step * source_step + i % step of the source.
struct CopiedAxis {
  int64_t source_step, step, size;

  CopiedAxis(int64_t pixels, int64_t source_step, int64_t span)
      : source_step(source_step), step(std::min(source_step, span)), size((pixels - 1) * step + span) {}
  int64_t source(int64_t i) const { return step == source_step ? i : i / step * source_step + i % step; }
};

// Copies the `count` elements x, x + step, ... of a row of `width` elements, with zeros for those outside of the row.
// May write up to a vector past `count`.
template <class F, class In>
void copy_row(F* target, const In* row, int64_t x, int64_t step, int64_t count, int64_t width, int64_t x_stride,
              int64_t second) {
  const auto [begin, end] = range_inside(x, step, count, width);
  const In* source = row + (x + begin * step) * x_stride;
  if constexpr (std::is_same_v<In, F>) {
    if (step * x_stride == 1) {
      using V = OperandVec<F>;
      constexpr int64_t lanes = V::size();
      for (int64_t i = 0; i < begin; i += lanes) V(0).store(target + i);
      int64_t i = begin;
      for (; i + lanes <= end; i += lanes, source += lanes) V::loadu(source).store(target + i);
      if (i < end) V::loadu(source, end - i).store(target + i), i += lanes;
      for (; i < count; i += lanes) V(0).store(target + i);
      return;
    }
  }
  std::fill(target, target + begin, F{});
  copy_operand(target + begin, source, end - begin, step * x_stride, second, k_per_step<F>);
  std::fill(target + end, target + count, F{});
}

// Copies the `count` pixels x, x + step, ... of a channels-last row of `width` pixels into planes that are `plane`
// elements apart, with zeros for pixels outside of the row. Pairs are moved as if they were floats.
template <class F, class In>
void copy_channels(F* target, int64_t plane, const In* row, int64_t x, int64_t step, int64_t count, int64_t width,
                   int64_t x_stride, int64_t channels) {
  using To = std::conditional_t<is_pair<F>, float, F>;
  using From = std::conditional_t<is_pair<In>, float, In>;
  const auto [begin, end] = range_inside(x, step, count, width);
  transpose(reinterpret_cast<To*>(target + begin), plane,
            reinterpret_cast<const From*>(row + (x + begin * step) * x_stride), step * x_stride, end - begin, channels);
  for (int64_t c = 0; c < channels; ++c, target += plane)
    std::fill(target, target + begin, F{}), std::fill(target + end, target + count, F{});
}

// Copies `count` neighbouring pixels from x on of a channels-first row of `width` pixels, whose planes are `plane`
// elements apart, into channels-last pixels, with zeros for pixels outside of the row.
template <class F, class In>
void copy_planes(F* target, const In* row, int64_t plane, int64_t x, int64_t count, int64_t width, int64_t channels,
                 int64_t second) {
  const auto [begin, end] = range_inside(x, 1, count, width);
  std::fill(target, target + begin * channels, F{});
  transpose_operand(target + begin * channels, channels, row + x + begin, plane, second, channels, end - begin);
  std::fill(target + end * channels, target + count * channels, F{});
}

// The input tile of output tile b, read in the tensor itself.
template <class In>
InputTile<In> input_tile_in_place(const ConvInput<In>& s, const OutputTile& b) {
  const In* first = s.images + (b.g * s.channels + b.c) * s.channel_stride + b.n * s.image_stride;
  const int64_t y_step = s.step_h * s.y_stride, x_step = s.step_w * s.x_stride;
  return {first + b.y * y_step, s.image_stride, s.channel_stride, y_step, x_step, 0, 0,
          s.y_stride,           s.step_w,       s.x_stride,       x_step};
}

// Row y of image n. A row outside of the image has a width of 0.
template <class In>
struct InputRow {
  const In* data;
  int64_t width;

  InputRow(const ConvInput<In>& s, const In* images, int64_t n, int64_t y) {
    const bool inside = y >= 0 && y < s.height;
    data = images + n * s.image_stride + (inside ? y : 0) * s.y_stride, width = inside ? s.width : 0;
  }
};

// The input tile of output tile b, copied pixel by pixel (channels-last) from images of either layout.
template <class F, class In>
InputTile<F> copied_channels_last(const ConvInput<In>& s, const In* images, const ReceptiveField& e,
                                  const OutputTile& b) {
  const CopiedAxis vertical(b.rows, s.step_h, e.span_h), horizontal(e.out_width, s.step_w, e.span_w);
  const int64_t channels = b.channels, line = horizontal.size * channels, image = vertical.size * line;
  const bool whole_lines = channels == s.x_stride && horizontal.step == s.step_w;
  const bool planes = s.x_stride == 1 && horizontal.step == s.step_w;
  F* copy = scratch<F>(Scratch::b, b.images * image + OperandVec<F>::size());
  // Rows are written in the order of the copy, because copy_row may write past the end of a row.
  for (int64_t n = 0; n < b.images; ++n) {
    for (int64_t i = 0; i < vertical.size; ++i) {
      const InputRow<In> row(s, images, b.n + n, b.y * s.step_h + e.top + vertical.source(i));
      F* target = copy + n * image + i * line;
      if (whole_lines) {
        copy_row(target, row.data, e.left * channels, 1, line, row.width * channels, 1, s.second);
        continue;
      }
      if constexpr (!is_pair<In>) {
        if (planes) {
          copy_planes(target, row.data, s.channel_stride, e.left, horizontal.size, row.width, channels, s.second);
          continue;
        }
      }
      for (int64_t j = 0; j < horizontal.size; ++j) {
        const int64_t x = e.left + horizontal.source(j);
        const bool there = x >= 0 && x < row.width;
        copy_row(target + j * channels, row.data + (there ? x : 0) * s.x_stride, 0, 1, channels, there ? channels : 0,
                 s.channel_stride, s.second);
      }
    }
  }
  return {copy, image, 1, vertical.step * line, horizontal.step * channels, e.top, e.left, line, 1, 0, channels};
}

// The input tile of output tile b, copied plane by plane (channels-first) from images of either layout. `sorted`: the
// columns are sorted by their remainder modulo the stride.
template <class F, class In>
InputTile<F> copied_channels_first(const ConvInput<In>& s, const In* images, const ReceptiveField& e,
                                   const OutputTile& b, bool channels_last, bool sorted) {
  const CopiedAxis vertical(b.rows, s.step_h, e.span_h), horizontal(e.out_width, s.step_w, e.span_w);
  const int64_t remainders = sorted ? horizontal.step : 1, step = sorted ? s.step_w : 1;
  const int64_t per_remainder = ceil_div(horizontal.size, remainders), line = per_remainder * remainders;
  const int64_t plane = vertical.size * line, image = b.channels * plane;
  F* copy = scratch<F>(Scratch::b, b.images * image + OperandVec<F>::size());
  // Adjacent whole rows are copied as a single row.
  const bool joined =
      s.step_h == 1 && s.step_w * s.x_stride == 1 && line == s.width && line == s.y_stride && !reaches_outside(s, e);
  const bool transposed = is_pair<F> == is_pair<In> && channels_last;
  const int64_t row_count = joined ? 1 : vertical.size, row_length = joined ? plane : per_remainder;
  // Rows are written in the order of the copy, because copy_row may write past the end of a row.
  for (int64_t n = 0; n < b.images; ++n) {
    for (int64_t c = 0; c < (transposed ? 1 : b.channels); ++c) {
      for (int64_t i = 0; i < row_count; ++i) {
        const InputRow<In> row(s, images + c * s.channel_stride, b.n + n, b.y * s.step_h + e.top + vertical.source(i));
        const int64_t width = joined ? plane : row.width;
        // Prefetch the next plane's row: such short pieces are not followed by the hardware prefetcher.
        prefetch(row.data + s.channel_stride, row_length * int64_t{sizeof(In)});
        F* target = copy + n * image + c * plane + i * line;
        for (int64_t r = 0; r < remainders; ++r, target += per_remainder) {
          if constexpr (is_pair<F> == is_pair<In>)
            if (transposed)
              copy_channels(target, plane, row.data, e.left + r, step, row_length, width, s.x_stride, b.channels);
          if (!transposed) copy_row(target, row.data, e.left + r, step, row_length, width, s.x_stride, s.second);
        }
      }
    }
  }
  return {copy,       image,         plane, vertical.step * line, sorted ? 1 : horizontal.step, e.top, e.left, line,
          remainders, per_remainder, 1};
}

// The input tile of output tile b. It is the tensor itself if its elements are the operands and no tap leaves the
// images, or if `in_place` says that the reader skips the taps outside; otherwise it is a copy with zeros around the
// images. `by_width`: the reader loads whole vectors of neighbouring pixels, up to a vector past the last one. The copy
// of channels-last images is channels-last too, unless it is read by width.
template <class F, class In>
InputTile<F> input_tile(const ConvInput<In>& s, const ReceptiveField& e, const OutputTile& b, bool channels_last,
                        bool by_width, bool in_place = false) {
  if constexpr (is_pair<F> && !is_pair<In>) {
    if (s.second == 1) return input_tile<F>(of_pairs(s), e, b, channels_last, by_width, in_place);
  }
  if constexpr (std::is_same_v<In, F>) {
    const int64_t last = (b.g * s.channels + b.c + b.channels - 1) * s.channel_stride +
                         (b.n + b.images - 1) * s.image_stride +
                         (e.bottom - (e.out_height - b.y - b.rows) * s.step_h) * s.y_stride + e.right * s.x_stride;
    const bool whole_vectors = s.step_w * s.x_stride == 1 && last + OperandVec<F>::size() < s.end;
    if (in_place || (!reaches_outside(s, e) && (!by_width || whole_vectors))) return input_tile_in_place(s, b);
  }
  const In* images = s.images + (b.g * s.channels + b.c) * s.channel_stride;
  if (channels_last && !by_width) return copied_channels_last<F>(s, images, e, b);
  // Columns are sorted by remainder only for vectors along the width and where gaps between the pixels are left out.
  return copied_channels_first<F>(s, images, e, b, channels_last, by_width || e.span_w < s.step_w);
}

// The input tile of output tile b in channels-last order, for a reader that loads whole vectors of a pixel's channels,
// up to a vector past the last one.
template <class F, class In>
InputTile<F> channels_last_input_tile(const ConvInput<In>& s, const ReceptiveField& e, const OutputTile& b) {
  if constexpr (std::is_same_v<In, F>) {
    if (b.channels == s.x_stride && b.channels % OperandVec<F>::size() == 0 && !reaches_outside(s, e))
      return input_tile_in_place(s, b);
  }
  return copied_channels_last<F>(s, s.images + (b.g * s.channels + b.c) * s.channel_stride, e, b);
}

// Chooses how many output rows of how many images form an output tile, so that its input tile fits into cache (256 KB)
// but has enough pixels to amortize the weights or sums that are read along with it.
struct OutputTileSize {
  int64_t rows, images;

  template <class In>
  OutputTileSize(const ConvInput<In>& s, const ReceptiveField& e, int64_t channels) {
    constexpr int64_t cached = (256 << 10) / sizeof(Compute<In>), enough_pixels = 384;
    const CopiedAxis vertical(e.out_height, s.step_h, e.span_h);
    const CopiedAxis horizontal(e.out_width, s.step_w, e.span_w);
    const int64_t row = channels * horizontal.size, enough_rows = ceil_div(enough_pixels, e.out_width);
    rows = std::clamp((cached / row - e.span_h) / vertical.step + 1, std::min(enough_rows, e.out_height), e.out_height);
    // Tiles of about equal size; small images share one.
    rows = ceil_div(e.out_height, ceil_div(e.out_height, rows));
    images = rows < e.out_height ? 1 : std::min(ceil_div(enough_rows, e.out_height), s.count);
    images = ceil_div(s.count, ceil_div(s.count, images));
  }
};

// The offsets in an input tile of the output pixels, row by row.
template <class F>
const int64_t* pixel_offsets(Scratch use, const InputTile<F>& w, const OutputTile& b, int64_t out_width) {
  int64_t* offsets = scratch<int64_t>(use, b.images * b.rows * out_width);
  int64_t i = 0;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t y = 0; y < b.rows; ++y)
      for (int64_t x = 0; x < out_width; ++x) offsets[i++] = n * w.image_stride + y * w.y_step + x * w.x_step;
  return offsets;
}

// The offsets in an input tile of (channel, tap) for the first `channels` channels, in the order of k.
template <class F, class In>
const int64_t* patch_offsets(Scratch use, const InputTile<F>& w, const ConvInput<In>& s, int64_t channels) {
  int64_t* offsets = scratch<int64_t>(use, channels * s.tap_count);
  for (int64_t t = 0; t < s.tap_count; ++t) {
    const int64_t tap = w.tap_offset(s.taps[t]);
    for (int64_t c = 0; c < channels; ++c)
      offsets[s.tap_by_tap ? t * channels + c : c * s.tap_count + t] = c * w.channel_stride + tap;
  }
  return offsets;
}

}  // namespace pyops::cpu
