// Images in blocks of as many channels as a vector has lanes: [rows][columns][lanes], the layout that oneDNN calls
// nChw8c or nChw16c. A vector then holds one pixel of all channels of a block, whatever the stride, the width and the
// layout of the images, and no lane is idle unless the channels are no multiple of the lanes.
#pragma once

#include <algorithm>

#include "problem.h"

namespace pyops::cpu {

// Some adjacent blocks: the vector of pixel (y, x) in block v begins at data + v * stride + y * y_stride + x *
// x_stride.
template <class C>
struct ChannelBlocks {
  const C* data;
  int64_t stride, y_stride, x_stride;
};

// The blocks that a band of output rows reads stay in the L2 cache if they have at most this many bytes.
constexpr int64_t band_bytes = 128 << 10;

template <class T>
int64_t bytes_of_row(const ReceptiveField& field, int64_t channels) {
  return (field.right - field.left + 1) * channels * int64_t{sizeof(Compute<T>)};
}

// How many channels are read together: of channels-last images as many as fit, because whole pixels are contiguous.
template <class T>
int64_t channels_at_once(bool channels_last, int64_t channels, const ReceptiveField& field) {
  constexpr int64_t lanes = lanes_of<T>, least = 64;
  if (!channels_last) return lanes;
  const int64_t most = std::max(2 * band_bytes / (field.span_h * bytes_of_row<T>(field, 1)), least);
  return ceil_div(ceil_div(channels, ceil_div(channels, most)), lanes) * lanes;
}

// Whether whole vectors of `count` channels can be read where they are.
template <class T>
bool are_blocks_in_place(const ConvInput<T>& s, int64_t count) {
  return std::is_same_v<T, Compute<T>> && s.channel_stride == 1 && count % lanes_of<T> == 0;
}

template <class T>
ChannelBlocks<Compute<T>> blocks_in_place(const ConvInput<T>& s, int64_t n, int64_t c) {
  if constexpr (std::is_same_v<T, Compute<T>>)
    return {s.images + n * s.image_stride + c, lanes_of<T>, s.y_stride, s.x_stride};
  return {};
}

// Copies the channels [c, c + count) of image n: the rows `rows` of the image, and the columns `columns`, which may
// reach beyond it and are zero there. Lanes without a channel are zero too.
template <class T>
ChannelBlocks<Compute<T>> pack_blocks(Scratch use, const ConvInput<T>& s, int64_t n, int64_t c, int64_t count,
                                      Range rows, Range columns) {
  using C = Compute<T>;
  constexpr int64_t lanes = lanes_of<T>;
  const int64_t y_stride = columns.size() * lanes, stride = rows.size() * y_stride, blocks = ceil_div(count, lanes);
  C* const packed = scratch<C>(use, blocks * stride);
  const Range inside{std::clamp(int64_t{0}, columns.begin, columns.end),
                     std::clamp(s.width, columns.begin, columns.end)};
  const int64_t begin = (inside.begin - columns.begin) * lanes, end = begin + inside.size() * lanes;
  const T* image = s.images + n * s.image_stride + c * s.channel_stride + inside.begin * s.x_stride;
  if (count % lanes != 0) std::fill_n(packed + (blocks - 1) * stride, stride, C(0));
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const T* row = image + y * s.y_stride;
    C* const target = packed + (y - rows.begin) * y_stride;
    for (int64_t v = 0; v < blocks; ++v) {
      std::fill(target + v * stride, target + v * stride + begin, C(0));
      std::fill(target + v * stride + end, target + v * stride + y_stride, C(0));
    }
    if (s.channel_stride == 1) {
      for (int64_t x = 0; x < inside.size(); ++x, row += s.x_stride) {
        C* pixel = target + begin + x * lanes;
        int64_t v = 0;
        for (; (v + 1) * lanes <= count; ++v) load_whole(row + v * lanes).store(pixel + v * stride);
        if (v < blocks) load(row + v * lanes, count - v * lanes).store(pixel + v * stride);
      }
    } else {
      for (int64_t v = 0; v < blocks; ++v)
        transpose(target + v * stride + begin, lanes, row + v * lanes * s.channel_stride, s.channel_stride,
                  std::min(lanes, count - v * lanes), inside.size());
    }
  }
  return {packed - rows.begin * y_stride - columns.begin * lanes, stride, y_stride, lanes};
}

// The input columns that the taps of all phases reach from the output columns `columns`.
template <class T>
Range columns_reached(const Phases<T>& phases, Range columns) {
  Range reached{0, 0};
  for (const ConvProblem<T>& x : phases) {
    for (int64_t t = 0; t < x.input.tap_count; ++t) {
      const int64_t begin = columns.begin * x.input.step_w + x.input.taps[t].dx;
      const int64_t end = (columns.end - 1) * x.input.step_w + x.input.taps[t].dx + 1;
      reached =
          reached.size() == 0 ? Range{begin, end} : Range{std::min(reached.begin, begin), std::max(reached.end, end)};
    }
  }
  return reached;
}

// The rows of the image that the taps of the output rows `rows` meet.
template <class T>
Range rows_met(const ConvInput<T>& s, Range rows) {
  Range met{s.height, 0};
  for (int64_t t = 0; t < s.tap_count; ++t) {
    met.begin = std::min(met.begin, rows.begin * s.step_h + s.taps[t].dy);
    met.end = std::max(met.end, (rows.end - 1) * s.step_h + s.taps[t].dy + 1);
  }
  return {std::clamp(met.begin, int64_t{0}, s.height), std::clamp(met.end, int64_t{0}, s.height)};
}

// The number of bands of output rows to compute one after another. A band has at least as many rows as a kernel spans,
// or most rows would be copied several times.
template <class T>
int64_t bands_of_rows(const ConvInput<T>& s, const ReceptiveField& field, int64_t channels) {
  const int64_t fitting = band_bytes / bytes_of_row<T>(field, channels);
  return ceil_div(s.out_height, std::max(fitting - field.span_h, field.span_h) / s.step_h + 1);
}

}  // namespace pyops::cpu
