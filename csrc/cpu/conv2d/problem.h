// What the forward and the gradients of conv2d share: the memory layout of images and weights, and ConvProblem, the
// convolution that is both the forward and the input gradient:
//
//   output[g, o, pixel] = bias + sum over (channel, tap) of filter(g, o, channel, tap) * input(pixel, channel, tap)
//
// forward_problem (conv2d.cpp) and input_gradient_phases (conv2d_backward.cpp) set up such problems; the algorithms
// that solve them, and those of the weight gradient, are listed in conv2d/algorithms.h.
#pragma once

#include <optional>

#include "input_tile.h"

namespace pyops::cpu {

// The memory layout of a batch of images [N, channels, height, width].
struct Layout {
  int64_t image_stride, channel_stride, y_stride, x_stride;

  Layout(int64_t channels, int64_t height, int64_t width, bool channels_last)
      : image_stride(channels * height * width),
        channel_stride(channels_last ? 1 : height * width),
        y_stride(channels_last ? width * channels : width),
        x_stride(channels_last ? channels : 1) {}
};

// The input of the forward and of the weight gradient, without the taps that meet no pixel of the image.
template <class T>
ConvInput<T> conv_input(const Conv2dShape& s, const void* input) {
  const Layout in(s.C, s.H, s.W, s.channels_last);
  Tap* taps = scratch<Tap>(Scratch::taps, s.kernel_h * s.kernel_w);
  ConvInput<T> source{
      .images = static_cast<const T*>(input),
      .image_stride = in.image_stride,
      .channel_stride = in.channel_stride,
      .y_stride = in.y_stride,
      .x_stride = in.x_stride,
      .count = s.N,
      .height = s.H,
      .width = s.W,
      .channels = s.C / s.groups,
      .step_h = s.stride_h,
      .step_w = s.stride_w,
      .out_height = s.OH,
      .out_width = s.OW,
      .taps = taps,
      .tap_count = 0,
      .end = s.N * in.image_stride,
      .tap_by_tap = s.weight_channels_last,
  };
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      const int64_t dy = i * s.dilation_h - s.padding_top, dx = j * s.dilation_w - s.padding_left;
      if (meets_image(source, dy, dx)) taps[source.tap_count++] = {dy, dx, i * s.kernel_w + j};
    }
  }
  return source;
}

// The memory layout of a weight: the strides of (o, channel within its group, tap), where o counts the output channels
// of all groups.
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
  int64_t count;       // elements of the whole weight
  int64_t second = 0;  // from the first channel of a pair to the second, as in ConvInput

  int64_t step(int64_t channel, const Tap& tap) const { return channel * channel_stride + tap.index * tap_stride; }
  const T* at(int64_t g, int64_t o) const { return data + g * group_stride + o * out_stride; }
};

// output[g, o, pixel] = bias + sum over (channel, tap) of filter(g, o, channel, tap) * input(pixel, channel, tap)
//
// Several problems may share an output: they are the phases of a polyphase decomposition (conv2d_backward.cpp). Each
// phase has its own taps and writes the columns x * x_phases + x_phase of its own rows of the output. Phases that write
// the same rows are adjacent in an array of phases.
template <class T>
struct ConvProblem {
  ConvInput<T> input;
  Filters<T> filters;
  bool channels_last;            // the layout of both input and output
  int64_t groups, out_channels;  // out_channels: of one group
  T* output;                     // group 0, at the first row of this phase
  int64_t out_channel_stride;
  Axis out_lines;  // the rows of this phase with the columns of all phases
  const T* bias;   // may be null
  bool relu = false;
  int64_t x_phase = 0, x_phases = 1;

  int64_t depth() const { return input.depth(); }
  // The offset of element k of a filter.
  int64_t filter_step(int64_t k) const { return filters.step(input.channel(k), input.tap(k)); }
  // The pixels of this phase.
  Axis out_pixels() const {
    return {input.out_width, input.pixels(), out_lines.image_stride, out_lines.y_stride, out_lines.x_stride * x_phases};
  }
  T* first_pixel() const { return output + x_phase * out_lines.x_stride; }
};

// The phases of one output, of which there is one unless a stride divides the output of an input gradient into several.
// They share everything but their taps, rows, columns and output size, and the first is the largest.
template <class T>
struct Phases {
  const ConvProblem<T>* data;
  int64_t count;

  const ConvProblem<T>& first() const { return data[0]; }
  const ConvProblem<T>& operator[](int64_t p) const { return data[p]; }
  const ConvProblem<T>* begin() const { return data; }
  const ConvProblem<T>* end() const { return data + count; }
};

// The convolution that is the forward of conv2d.
template <class T>
ConvProblem<T> forward_problem(const Conv2dArgs& x);

// grad_input of conv2d_backward as a convolution of grad_output with the weight. There are stride_h x stride_w phases,
// or fewer if the image is smaller; they lie in this thread's scratch.
template <class T>
Phases<T> input_gradient_phases(const Conv2dBackwardArgs& x);

// What the vectors of an implicit GEMM run along.
enum class WgradLanes { outputs, inputs, width };

// The weight gradient of conv2d: `input` is that of the forward.
template <class T>
struct WeightGradient {
  Conv2dShape shape;
  ConvInput<T> input;
  const T* grad_output;
  T* grad_weight;
  mutable std::optional<WgradLanes> lanes = std::nullopt;  // those that leave the fewest idle, once they are known

  int64_t in() const { return shape.C / shape.groups; }
  int64_t out() const { return shape.O / shape.groups; }
  int64_t depth() const { return input.depth(); }
  bool meets_all_taps() const { return input.tap_count == shape.kernel_h * shape.kernel_w; }
};

// grad_weight = the sum, in order, of `parts` arrays of sums, each [groups, K, O / groups] and part_stride elements
// after the one before, where K runs over (channel, tap) of the input. The sum of a tap is written to the element that
// Tap::index names, and the weights of taps that meet no pixel become zero.
template <class T>
void sum_weight_parts(const WeightGradient<T>& x, Compute<T>* sums, int64_t parts, int64_t part_stride);

}  // namespace pyops::cpu
