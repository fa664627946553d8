// The gradients of conv2d:
//
//   grad_input  = the convolution of grad_output with the weight, whose input and output channels are exchanged
//   grad_weight = the convolution of the input with grad_output, summed over the images (conv2d/weight_gradient.cpp)
//   grad_bias   = the sum of grad_output over everything but the channels
//
// With few channels and no tap outside of the image, all gradients are computed together with the batch in lanes
// (conv2d/batch_lanes.cpp). Otherwise choose_algorithm picks the algorithm of grad_input, which in general is a
// polyphase decomposition: pixels whose coordinates have the same remainders modulo the stride meet the same taps, so
// each of the stride_h x stride_w phases is a convolution of stride 1 with its share of the taps. The stride causes no
// multiplications by zero, and every element is written once, where col2im would add to it repeatedly.
//
// Guarantees: those of gemm.h. The sums run over the taps inside of the image only, even where values are infinite.
#include "conv2d/batch_lanes.h"
#include "conv2d/border_taps.h"
#include "gemm/bias_sums.h"

namespace pyops::cpu {

template <class T>
std::pair<const ConvProblem<T>*, int64_t> input_gradient_phases(const Conv2dBackwardArgs& x) {
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
      ConvInput<T> source{static_cast<const T*>(x.grad_output),
                          grad.image_stride,
                          grad.channel_stride,
                          grad.y_stride,
                          grad.x_stride,
                          s.N,
                          s.OH,
                          s.OW,
                          out,
                          1,
                          1,
                          height,
                          width,
                          taps,
                          0,
                          s.N * grad.image_stride,
                          s.weight_channels_last};
      for (int64_t i = 0; i < s.kernel_h; ++i) {
        for (int64_t j = 0; j < s.kernel_w; ++j) {
          const int64_t y = phase_y + s.padding_top - i * s.dilation_h, x = phase_x + s.padding_left - j * s.dilation_w;
          if (y % s.stride_h != 0 || x % s.stride_w != 0) continue;
          const int64_t dy = y / s.stride_h, dx = x / s.stride_w;
          if (meets_image(source, dy, dx)) *taps++ = {dy, dx, i * s.kernel_w + j}, ++source.tap_count;
        }
      }
      phases[phase_y * x_phases + phase_x] = {
          source,
          {static_cast<const T*>(x.weight), out * w.out_stride, w.channel_stride, w.out_stride, w.tap_stride,
           s.O * w.out_stride},
          s.channels_last,
          s.groups,
          in,
          static_cast<T*>(x.grad_input) + phase_y * image.y_stride,
          image.channel_stride,
          {s.W, height * s.W, image.image_stride, s.stride_h * image.y_stride, image.x_stride},
          nullptr,
          /*relu=*/false,
          phase_x,
          x_phases};
    }
  }
  return {phases, y_phases * x_phases};
}

#define INSTANTIATE(T) \
  template std::pair<const ConvProblem<T>*, int64_t> input_gradient_phases<T>(const Conv2dBackwardArgs&);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

namespace {

// Whether the kernel covers the whole image, so that the convolution is a linear layer of all elements of the image.
bool is_linear(const Conv2dShape& s) {
  return s.groups == 1 && s.OH == 1 && s.OW == 1 && s.kernel_h == s.H && s.kernel_w == s.W && s.padding_top == 0 &&
         s.padding_left == 0 && (s.channels_last == s.weight_channels_last || s.C == 1 || s.H * s.W == 1);
}

// Whether the input gradient should be added up tap by tap (kn2row) rather than gathered pixel by pixel. Compares the
// share of useful products of both, with factors fitted to measurements.
template <class T>
bool should_use_kn2row(const Conv2dShape& s) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    constexpr int64_t least_terms = 32;  // more channels than batch lanes take (conv2d/batch_lanes.cpp)
    if (s.groups > 1 || s.O < least_terms || s.kernel_h * s.kernel_w == 1) return false;
    const double gathered = static_cast<double>(s.H * s.W) / static_cast<double>(s.stride_h * s.stride_w);
    const double met = fraction_inside(conv_input<T>(s, nullptr)) * static_cast<double>(s.OH * s.OW);
    // Gathering copies channels-first images.
    const double gathering = (s.channels_last ? 1.1 : 0.87) * met / gathered;
    // The sums of a tap are loaded and stored, which takes about as long as 16 terms.
    const double terms = static_cast<double>(s.O) / static_cast<double>(s.O + 16);
    const double kn2row = terms * lane_utilization<T>(s.C) * (s.C > Vec<T>::size() ? 1 : 0.7);
    return gathering < kn2row;
  } else {
    return false;
  }
}

enum class InputGradientAlgorithm { linear, kn2row, convolution };

// The algorithms in order of preference; the first that applies is chosen.
template <class T>
InputGradientAlgorithm choose_algorithm(const Conv2dShape& s) {
  // A single product without offsets and borders.
  if (is_linear(s)) return InputGradientAlgorithm::linear;
  // For kernels that are large compared with grad_output, gathering would multiply many zeros.
  if (should_use_kn2row<T>(s)) return InputGradientAlgorithm::kn2row;
  // Elsewhere gathering wins, because it writes each element only once.
  return InputGradientAlgorithm::convolution;
}

template <class T>
void input_gradient(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  const InputGradientAlgorithm algorithm = choose_algorithm<T>(s);
  if (algorithm == InputGradientAlgorithm::linear) {
    count_run(Algorithm::input_gradient_linear);
    return linear_backward(
        {x.dtype, s.N, s.O, s.C * s.H * s.W, x.grad_output, nullptr, x.weight, x.grad_input, nullptr, nullptr, x.tf32});
  }
  if constexpr (std::is_same_v<T, Compute<T>>)
    if (algorithm == InputGradientAlgorithm::kn2row) return input_gradient_kn2row<T>(x);
  const auto [phases, count] = input_gradient_phases<T>(x);
  convolve(phases, count);
}

}  // namespace

void conv2d_backward(const Conv2dBackwardArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Conv2dShape& s = x.shape;
    if (should_use_batch_lanes_backward<T>(x)) {
      const int64_t image = s.O * s.OH * s.OW;
      return batch_lanes_backward<T>(x, [&](int64_t first, int64_t count, Compute<T>* block, const Team& team) {
        const T* images = static_cast<const T*>(x.grad_output) + first * image;
        team.share([&](Share share) { to_chwn(block, images, image, count, share); });
      });
    }
    if (x.grad_input) input_gradient<T>(x);
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
  });
}

}  // namespace pyops::cpu
