// The gradients of conv2d:
//
//   grad_input  = the convolution of grad_output with the weight, whose input and output channels are exchanged
//   grad_weight = the convolution of the input with grad_output, summed over the images (conv2d/weight_gradient.cpp)
//   grad_bias   = the sum of grad_output over everything but the channels
//
// With few channels and no tap outside of the image, all gradients are computed together with the batch in lanes
// (conv2d/batch_lanes.cpp). Otherwise each is computed by itself. grad_input is in general a convolution, by a
// polyphase decomposition: pixels whose coordinates have the same remainders modulo the stride meet the same taps, so
// each of the stride_h x stride_w phases is a convolution of stride 1 with its share of the taps. The stride causes no
// multiplications by zero, and every element is written once, where col2im would add to it repeatedly.
//
// Guarantees: those of gemm.h. The sums run over the taps inside of the image only, even where values are infinite.
#include <utility>

#include "conv2d/batch_lanes.h"
#include "gemm/bias_sums.h"

namespace pyops::cpu {

// The polyphase decomposition: one phase for each residue of the stride, with its share of the taps. Filling the
// problems by name makes this function long.
template <class T>
Phases<T> input_gradient_phases(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  const Layout grad(s.O, s.OH, s.OW, s.channels_last), image(s.C, s.H, s.W, s.channels_last);
  const WeightLayout w(s);
  const int64_t out = s.O / s.groups, in = s.C / s.groups;
  const int64_t y_phases = std::min(s.stride_h, s.H), x_phases = std::min(s.stride_w, s.W);
  Tap* taps = scratch<Tap>(Scratch::gradient_taps, s.kernel_h * s.kernel_w);
  auto* phases = scratch<ConvProblem<T>>(Scratch::phases, y_phases * x_phases);
  for (int64_t phase_y = 0; phase_y < y_phases; ++phase_y) {
    for (int64_t phase_x = 0; phase_x < x_phases; ++phase_x) {
      const int64_t height = ceil_div(s.H - phase_y, s.stride_h), width = ceil_div(s.W - phase_x, s.stride_w);
      ConvInput<T> source{
          .images = static_cast<const T*>(x.grad_output),
          .image_stride = grad.image_stride,
          .channel_stride = grad.channel_stride,
          .y_stride = grad.y_stride,
          .x_stride = grad.x_stride,
          .count = s.N,
          .height = s.OH,
          .width = s.OW,
          .channels = out,
          .step_h = 1,
          .step_w = 1,
          .out_height = height,
          .out_width = width,
          .taps = taps,
          .tap_count = 0,
          .end = s.N * grad.image_stride,
          .tap_by_tap = s.weight_channels_last,
      };
      for (int64_t i = 0; i < s.kernel_h; ++i) {
        for (int64_t j = 0; j < s.kernel_w; ++j) {
          const int64_t y = phase_y + s.padding_top - i * s.dilation_h, x = phase_x + s.padding_left - j * s.dilation_w;
          if (y % s.stride_h != 0 || x % s.stride_w != 0) continue;
          const int64_t dy = y / s.stride_h, dx = x / s.stride_w;
          if (meets_image(source, dy, dx)) *taps++ = {dy, dx, i * s.kernel_w + j}, ++source.tap_count;
        }
      }
      phases[phase_y * x_phases + phase_x] = {
          .input = source,
          .filters = {.data = static_cast<const T*>(x.weight),
                      .group_stride = out * w.out_stride,
                      .out_stride = w.channel_stride,
                      .channel_stride = w.out_stride,
                      .tap_stride = w.tap_stride,
                      .count = s.O * w.out_stride},
          .channels_last = s.channels_last,
          .groups = s.groups,
          .out_channels = in,
          .output = static_cast<T*>(x.grad_input) + phase_y * image.y_stride,
          .out_channel_stride = image.channel_stride,
          .out_lines = {s.W, height * s.W, image.image_stride, s.stride_h * image.y_stride, image.x_stride},
          .bias = nullptr,
          .relu = false,
          .x_phase = phase_x,
          .x_phases = x_phases,
      };
    }
  }
  return {phases, y_phases * x_phases};
}

// ---- the input gradient ----

namespace {

// Whether the kernel covers the whole image, so that the convolution is a linear layer of all elements of the image.
template <class T>
bool is_linear(const InputGradient<T>& x) {
  const Conv2dShape& s = x.args.shape;
  return s.groups == 1 && s.OH == 1 && s.OW == 1 && s.kernel_h == s.H && s.kernel_w == s.W && s.padding_top == 0 &&
         s.padding_left == 0 && (s.channels_last == s.weight_channels_last || s.C == 1 || s.H * s.W == 1);
}

template <class T>
void linear_input_gradient(const InputGradient<T>& problem) {
  const Conv2dBackwardArgs& x = problem.args;
  const Conv2dShape& s = x.shape;
  linear_backward(
      {x.dtype, s.N, s.O, s.C * s.H * s.W, x.grad_output, nullptr, x.weight, x.grad_input, nullptr, nullptr, x.tf32});
}

template <class T>
bool never_in_order(const InputGradient<T>&) {
  return false;
}

template <class T>
struct InputGradientAlgorithm {
  const char *name, *file;
  bool (*supports)(const InputGradient<T>&);
  bool (*profitable)(const InputGradient<T>&);
  bool (*sums_in_order)(const InputGradient<T>&);  // as in ConvolutionAlgorithm
  void (*run)(const InputGradient<T>&);
};

// Row i of the table of convolutions.
template <class T, size_t i>
constexpr InputGradientAlgorithm<T> as_convolution() {
  constexpr const ConvolutionAlgorithm<T>& row = convolution_algorithms<T>[i];
  return {row.name,
          row.file,
          [](const InputGradient<T>& x) { return convolution_algorithms<T>[i].supports(x.phases()); },
          [](const InputGradient<T>& x) { return convolution_algorithms<T>[i].profitable(x.phases()); },
          [](const InputGradient<T>& x) { return convolution_algorithms<T>[i].sums_in_order(x.phases()); },
          [](const InputGradient<T>& x) { convolution_algorithms<T>[i].run(x.phases()); }};
}

template <class T>
struct InputGradientTable {
  static constexpr size_t size = 2 + std::size(convolution_algorithms<T>);
  InputGradientAlgorithm<T> rows[size];
};

template <class T, size_t... i>
constexpr InputGradientTable<T> input_gradient_table(std::index_sequence<i...>) {
  return {{
      // A single product without offsets and borders.
      {"linear", "csrc/cpu/linear.cpp", is_linear<T>, always<InputGradient<T>>, always<InputGradient<T>>,
       linear_input_gradient<T>},
      // For kernels that are large compared with grad_output, gathering would multiply many zeros.
      {"kn2row", "csrc/cpu/conv2d/input_gradient_kn2row.cpp", Kn2row<T>::supports, Kn2row<T>::profitable,
       never_in_order<T>, Kn2row<T>::run},
      // Elsewhere gathering wins, because it writes each element only once.
      as_convolution<T, i>()...,
  }};
}

template <class T>
constexpr InputGradientTable<T> input_gradient_algorithms =
    input_gradient_table<T>(std::make_index_sequence<std::size(convolution_algorithms<T>)>());

[[maybe_unused]] const bool listed_input_gradient =
    choices::conv2d_input_gradient.list(input_gradient_algorithms<float>.rows);

}  // namespace

template <class T>
bool input_gradient_agrees_with_batch_lanes(const Conv2dBackwardArgs& args) {
  const InputGradient<T> x(args);
  const auto& rows = input_gradient_algorithms<T>.rows;
  const bool in_order = rows[chosen_row(choices::conv2d_input_gradient, rows, x)].sums_in_order(x);
  return agrees_with_batch_lanes(in_order, x.phases().first());
}

#define INSTANTIATE(T)                                                    \
  template Phases<T> input_gradient_phases<T>(const Conv2dBackwardArgs&); \
  template bool input_gradient_agrees_with_batch_lanes<T>(const Conv2dBackwardArgs&);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

// ---- all gradients ----

namespace {

template <class T>
void run_batch_lanes(const Conv2dBackwardArgs& x) {
  const int64_t image = x.shape.O * x.shape.OH * x.shape.OW;
  batch_lanes_backward<T>(x, [&](int64_t first, int64_t count, Compute<T>* block, const Team& team) {
    const T* images = static_cast<const T*>(x.grad_output) + first * image;
    team.share([&](Share share) { to_chwn(block, images, image, count, share); });
  });
}

template <class T>
void run_separately(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  if (x.grad_input) {
    const InputGradient<T> problem(x);
    choose(choices::conv2d_input_gradient, input_gradient_algorithms<T>.rows, problem).run(problem);
  }
  if (x.grad_weight) weight_gradient<T>(x);
  if (x.grad_bias) {
    T* grad_bias = static_cast<T*>(x.grad_bias);
    const T* grad_output = static_cast<const T*>(x.grad_output);
    if (s.channels_last) {
      sum_rows(grad_bias, grad_output, s.N * s.OH * s.OW, s.O);
    } else {
      sum_planes(grad_bias, grad_output, s.N, s.O, s.OH * s.OW);
    }
  }
}

template <class T>
constexpr Algorithm<Conv2dBackwardArgs> backward_algorithms[] = {
    // Both gradients share the blocks of images.
    {"batch_lanes", "csrc/cpu/conv2d/batch_lanes.cpp", BatchLanesBackward<T>::supports,
     BatchLanesBackward<T>::profitable, run_batch_lanes<T>},
    {"separate", "csrc/cpu/conv2d_backward.cpp", always<Conv2dBackwardArgs>, always<Conv2dBackwardArgs>,
     run_separately<T>},
};

[[maybe_unused]] const bool listed_backward = choices::conv2d_backward.list(backward_algorithms<float>);

}  // namespace

template <class T>
bool uses_batch_lanes_backward(const Conv2dBackwardArgs& x) {
  return chosen_row(choices::conv2d_backward, backward_algorithms<T>, x) == 0;
}

#define INSTANTIATE(T) template bool uses_batch_lanes_backward<T>(const Conv2dBackwardArgs&);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

void conv2d_backward(const Conv2dBackwardArgs& x) {
  if (are_columns(x.shape)) {
    Conv2dBackwardArgs rows = x;
    make_row(rows.shape);
    return conv2d_backward(rows);
  }
  dispatch_floating(
      x.dtype, [&](auto zero) { choose(choices::conv2d_backward, backward_algorithms<decltype(zero)>, x).run(x); });
}

}  // namespace pyops::cpu
