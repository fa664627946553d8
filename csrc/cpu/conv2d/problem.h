// What the forward and the gradients of conv2d share: the memory layout of images and weights, and ConvProblem, the
// convolution that is both the forward and the input gradient:
//
//   output[g, o, pixel] = bias + sum over (channel, tap) of filter(g, o, channel, tap) * input(pixel, channel, tap)
//
// Among the functions below, forward_problem (conv2d.cpp) and input_gradient_phases (conv2d_backward.cpp) set up
// such problems, and convolve (conv2d/convolve.cpp) and weight_gradient (conv2d/weight_gradient.cpp) choose between the
// algorithms, which are in other files of this folder.
#pragma once

#include <utility>

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

// Whether the channels, whose number is then even, are multiplied in bfloat16 pairs (gemm/operand.h). A problem that
// would use batch lanes at some batch size never multiplies pairs, because a sample's result must not depend on the
// batch it is in.
template <class T>
bool multiplies_pairs(const ConvProblem<T>& x);

// Whether the chosen algorithm sums over k in the order of the filters in memory, as most algorithms do.
template <class T>
bool sums_in_order(const ConvProblem<T>& x);

// The convolution that is the forward of conv2d.
template <class T>
ConvProblem<T> forward_problem(const Conv2dArgs& x);

// Computes the `count` phases of one output. They share everything but their taps, rows, columns and output size, and
// the first phase is the largest.
template <class T>
void convolve(const ConvProblem<T>* phases, int64_t count);

// Computes one phase of a depthwise convolution, where every group has one input and one output channel.
// weight: [groups, taps]. A channels-first output must have no gaps between its columns.
template <class T>
void convolve_depthwise(const ConvProblem<T>& x, const T* weight);

// Computes grad_weight of a depthwise convolution.
template <class T>
void weight_gradient_depthwise(const Conv2dShape& s, const ConvInput<T>& source, const T* grad_output, T* grad_weight);

// Computes a convolution of a single phase with the batch in lanes (conv2d/batch_lanes.h).
template <class T>
void convolve_batch_lanes(const ConvProblem<T>& x);

// Computes the phases of a convolution of narrow groups over channels-last images, which are transposed to planes and
// back (conv2d/grouped_planes.cpp).
template <class T>
void convolve_grouped_planes(const ConvProblem<T>* phases, int64_t count);

// grad_input of conv2d_backward as a convolution of grad_output with the weight. There are stride_h x stride_w phases,
// or fewer if the image is smaller; they lie in this thread's scratch.
template <class T>
std::pair<const ConvProblem<T>*, int64_t> input_gradient_phases(const Conv2dBackwardArgs& x);

// Computes grad_input of conv2d_backward of one group by kn2row (conv2d/input_gradient_kn2row.cpp). T: float or double.
template <class T>
void input_gradient_kn2row(const Conv2dBackwardArgs& x);

// grad_weight = the sum, in order, of `parts` arrays of sums, each [groups, K, O / groups] and part_stride elements
// after the one before, where K runs over (channel, tap) of `source`. The sum of a tap is written to the element that
// Tap::index names, and the weights of taps that meet no pixel become zero.
template <class T>
void sum_weight_parts(const Conv2dShape& s, const ConvInput<T>& source, T* grad_weight, Compute<T>* sums, int64_t parts,
                      int64_t part_stride);

// Computes grad_weight of conv2d_backward.
template <class T>
void weight_gradient(const Conv2dBackwardArgs& x);

}  // namespace pyops::cpu
