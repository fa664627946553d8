// The patches of a batch of images as a matrix: one dimension is the output pixels (n, y, x) of all images, the other
// the values that a convolution multiplies there, one for each channel and tap. It is never stored: as a source of
// gemm.h it lays out the block that is needed, in cache, straight from the image (no im2col buffer).
//
//   PatchRows     rows (channel, tap), columns pixels    for N C H W: runs along x are copied
//   PatchColumns  rows pixels, columns (tap, channel)    for N H W C: runs along the channels are copied
//
// Pixel (y, x) and tap t meet the image at (y * step_h + t.dy, x * step_w + t.dx); outside of the image there are zeros.
#pragma once

#include "gemm.h"

namespace pyops::cpu {

struct Tap {
  int64_t dy, dx;
};

template <class In>
struct Patches {
  const In* image;  // the first image, at the first channel of the group
  int64_t image_stride, channel_stride, y_stride, x_stride;
  int64_t height, width;      // of the image
  int64_t channels;           // of the group
  int64_t step_h, step_w;     // in the image, from one output pixel to the next
  int64_t out_height, out_width;
  const Tap* taps;
  int64_t tap_count;

  int64_t pixels() const { return out_height * out_width; }
};

template <class In>
struct PatchRows : Patches<In> {
  using T = Compute<In>;

  void fill(T* target, int64_t ld, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    // The columns as runs along x, found once for all rows.
    struct Run {
      int64_t begin, image_offset, y, x, count;
    };
    Run runs[KC];
    int run_count = 0;
    for (int64_t c = 0; c < columns;) {
      const int64_t n = (column + c) / this->pixels(), pixel = (column + c) % this->pixels();
      const int64_t y = pixel / this->out_width, x = pixel % this->out_width;
      const int64_t count = std::min(this->out_width - x, columns - c);
      runs[run_count++] = {c, n * this->image_stride, y * this->step_h, x * this->step_w, count};
      c += count;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Tap tap = this->taps[(row + r) % this->tap_count];
      const In* plane = this->image + (row + r) / this->tap_count * this->channel_stride;
      for (int i = 0; i < run_count; ++i)
        copy_run(target + r * ld + runs[i].begin, plane + runs[i].image_offset, runs[i].y + tap.dy, runs[i].x + tap.dx,
                 runs[i].count);
    }
  }

 private:
  void copy_run(T* target, const In* plane, int64_t y, int64_t x, int64_t count) const {
    int64_t begin = 0, end = 0;  // of the part inside the image
    if (y >= 0 && y < this->height && x < this->width) {
      begin = x < 0 ? std::min(ceil_div(-x, this->step_w), count) : 0;
      end = std::max(begin, std::min((this->width - 1 - x) / this->step_w + 1, count));
    }
    std::fill(target, target + begin, T(0));
    if (begin < end)
      copy_values(target + begin, plane + y * this->y_stride + (x + begin * this->step_w) * this->x_stride, end - begin,
                  this->step_w * this->x_stride);
    std::fill(target + end, target + count, T(0));
  }
};

template <class In>
struct PatchColumns : Patches<In> {
  using T = Compute<In>;

  void fill(T* target, int64_t ld, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    int64_t n = row / this->pixels(), y = row % this->pixels() / this->out_width, x = row % this->out_width;
    for (int64_t r = 0; r < rows; ++r, target += ld) {
      int64_t tap = column / this->channels, channel = column % this->channels;
      for (int64_t c = 0; c < columns; ++tap, channel = 0) {
        const int64_t count = std::min(this->channels - channel, columns - c);
        const int64_t image_y = y * this->step_h + this->taps[tap].dy, image_x = x * this->step_w + this->taps[tap].dx;
        if (image_y >= 0 && image_y < this->height && image_x >= 0 && image_x < this->width) {
          copy_values(target + c,
                      this->image + n * this->image_stride + image_y * this->y_stride + image_x * this->x_stride +
                          channel * this->channel_stride,
                      count, this->channel_stride);
        } else {
          std::fill(target + c, target + c + count, T(0));
        }
        c += count;
      }
      if (++x == this->out_width) {
        x = 0;
        if (++y == this->out_height) y = 0, ++n;
      }
    }
  }
};

// The transpose of a source that can only be filled row by row.
template <class Source>
struct Transposed {
  using T = typename Source::T;
  Source source;

  void fill(T* target, int64_t ld, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    T* upright = scratch<T>(Scratch::transposed, rows * columns);
    source.fill(upright, rows, column, columns, row, rows);
    DenseMatrix<T>{upright, 1, rows}.fill(target, ld, 0, rows, 0, columns);
  }
};

}  // namespace pyops::cpu
