// What the forward and the gradients of conv2d share: the layout of images, and `convolve`, the product of the patches
// of a source with weights, which is both the forward and the gradient of the input.
#pragma once

#include <utility>

#include "input_tile.h"

namespace pyops::cpu {

// How a batch of images [N, channels, height, width] lies in memory.
struct Layout {
  int64_t image_stride, channel_stride, y_stride, x_stride;

  Layout(int64_t channels, int64_t height, int64_t width, bool channels_last)
      : image_stride(channels * height * width),
        channel_stride(channels_last ? 1 : height * width),
        y_stride(channels_last ? width * channels : width),
        x_stride(channels_last ? channels : 1) {}
};

// The input as the forward and the gradient of the weight see it.
template <class T>
ConvInput<T> conv_input(const Conv2dShape& s, const void* input) {
  const Layout in(s.C, s.H, s.W, s.channels_last);
  Tap* taps = scratch<Tap>(Scratch::taps, s.kernel_h * s.kernel_w);
  ConvInput<T> source{static_cast<const T*>(input),
                      in.image_stride,
                      in.channel_stride,
                      in.y_stride,
                      in.x_stride,
                      s.N,
                      s.H,
                      s.W,
                      s.C / s.groups,
                      s.stride_h,
                      s.stride_w,
                      s.OH,
                      s.OW,
                      taps,
                      0,
                      s.N * in.image_stride,
                      s.weight_channels_last};
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      const int64_t dy = i * s.dilation_h - s.padding_top, dx = j * s.dilation_w - s.padding_left;
      if (meets_image(source, dy, dx)) taps[source.tap_count++] = {dy, dx, i * s.kernel_w + j};
    }
  }
  return source;
}

// How the weight of a convolution lies in memory: element (o, channel of a group, tap) of all output channels o.
struct WeightLayout {
  int64_t out_stride, channel_stride, tap_stride;

  explicit WeightLayout(const Conv2dShape& s)
      : out_stride(s.C / s.groups * s.kernel_h * s.kernel_w),
        channel_stride(s.weight_channels_last ? 1 : s.kernel_h * s.kernel_w),
        tap_stride(s.weight_channels_last ? s.C / s.groups : 1) {}
};

// filter(g, o, channel, tap) = data[g * group_stride + o * out_stride + step(channel, tap)]
template <class T>
struct Filters {
  const T* data;
  int64_t group_stride, out_stride, channel_stride, tap_stride;
  int64_t count;       // of all elements
  int64_t second = 0;  // of pairs of channels, as in Source

  int64_t step(int64_t channel, const Tap& tap) const { return channel * channel_stride + tap.index * tap_stride; }
  const T* at(int64_t g, int64_t o) const { return data + g * group_stride + o * out_stride; }
};

// output[g, o, pixel] = bias + sum over (channel, tap) of filter(g, o, channel, tap) * source(pixel, channel, tap)
//
// The output may be made by several correlations, its phases: each has taps of its own and writes the columns
// x * x_phases + x_phase of its own rows of the output. Phases of the same rows follow one another.
template <class T>
struct ConvProblem {
  ConvInput<T> input;
  Filters<T> filters;
  bool channels_last;            // source and output
  int64_t groups, out_channels;  // of a group
  T* output;                     // of group 0, at the first of the rows
  int64_t out_channel_stride;
  Axis out_lines;  // all columns of the rows
  const T* bias;   // null: none
  bool relu = false;
  int64_t x_phase = 0, x_phases = 1;

  int64_t depth() const { return input.depth(); }
  // Where element k of a filter is.
  int64_t filter_step(int64_t k) const { return filters.step(input.channel(k), input.tap(k)); }
  // The pixels of this phase.
  Axis out_pixels() const {
    return {input.out_width, input.pixels(), out_lines.image_stride, out_lines.y_stride, out_lines.x_stride * x_phases};
  }
  T* first_pixel() const { return output + x_phase * out_lines.x_stride; }
};

// Whether the channels are multiplied in pairs (gemm/operand.h), of which there is an even number. Never in a
// convolution that goes along the images for some batch size: a sample's result is the same in any batch.
template <class T>
bool multiplies_pairs(const ConvProblem<T>& x);

// Whether it sums over k in the order of the filters in memory, as most ways do.
template <class T>
bool sums_in_order(const ConvProblem<T>& x);

// conv2d.
template <class T>
ConvProblem<T> forward_problem(const Conv2dArgs& x);

// The sum of `count` phases, which share everything but their taps, rows, columns and output size; the first is the
// largest.
template <class T>
void convolve(const ConvProblem<T>* phases, int64_t count);

// The same for one channel in and one out in every group, of one phase; weight: [groups, taps]. A channels-first output
// has no gaps between its columns.
template <class T>
void convolve_depthwise(const ConvProblem<T>& x, const T* weight);

// grad_weight where every channel is a group of its own.
template <class T>
void weight_gradient_depthwise(const Conv2dShape& s, const ConvInput<T>& source, const T* grad_output, T* grad_weight);

// The same over blocks of images (conv2d/batch_lanes.h), for a single phase.
template <class T>
void convolve_batch_lanes(const ConvProblem<T>& x);

// The same for narrow groups of channels-last images, which are transposed to planes and back.
template <class T>
void convolve_grouped_planes(const ConvProblem<T>* phases, int64_t count);

// grad_input of conv2d_backward as a correlation of grad_output with the weight, by its phases: stride_h x stride_w of
// them, or fewer if the image is smaller. In the scratch of this thread.
template <class T>
std::pair<const ConvProblem<T>*, int64_t> input_gradient_phases(const Conv2dBackwardArgs& x);

// grad_input of conv2d_backward of one group, another way: conv2d/input_gradient_kn2row.cpp. T: float or double.
template <class T>
void input_gradient_kn2row(const Conv2dBackwardArgs& x);

// grad_weight = the sum, in order, of `parts` arrays at distance part_stride, each [groups, K, O / groups], where K
// runs over (channel, tap) of the source. This is the one place where sums of a source's taps become elements of the
// weight: each goes to the element that Tap::index names, and the weights of taps that meet no pixel get zeros.
template <class T>
void sum_weight_parts(const Conv2dShape& s, const ConvInput<T>& source, T* grad_weight, Compute<T>* sums, int64_t parts,
                      int64_t part_stride);

// grad_weight of conv2d_backward.
template <class T>
void weight_gradient(const Conv2dBackwardArgs& x);

}  // namespace pyops::cpu
