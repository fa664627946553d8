// The forward of conv2d: output = conv2d(input, weight) + bias, rectified if asked for. It is a single phase of the
// convolution whose algorithms are listed in conv2d/algorithms.h. The guarantees are those of gemm/gemm.h.
#include "conv2d/algorithms.h"

namespace pyops::cpu {

[[maybe_unused]] static const bool listed = choices::conv2d.list(convolution_algorithms<float>);

template <class T>
ConvProblem<T> forward_problem(const Conv2dArgs& x) {
  const Conv2dShape& s = x.shape;
  const Layout out(s.O, s.OH, s.OW, s.channels_last);
  const WeightLayout w(s);
  return {
      .input = conv_input<T>(s, x.input),
      .filters = {.data = static_cast<const T*>(x.weight),
                  .group_stride = s.O / s.groups * w.out_stride,
                  .out_stride = w.out_stride,
                  .channel_stride = w.channel_stride,
                  .tap_stride = w.tap_stride,
                  .count = s.O * w.out_stride},
      .channels_last = s.channels_last,
      .groups = s.groups,
      .out_channels = s.O / s.groups,
      .output = static_cast<T*>(x.output),
      .out_channel_stride = out.channel_stride,
      .out_lines = {s.OW, s.OH * s.OW, out.image_stride, out.y_stride, out.x_stride},
      .bias = static_cast<const T*>(x.bias),
      .relu = x.relu,
  };
}

void conv2d(const Conv2dArgs& x) {
  if (are_columns(x.shape)) {
    Conv2dArgs rows = x;
    make_row(rows.shape);
    return conv2d(rows);
  }
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const ConvProblem<T> problem = forward_problem<T>(x);
    convolve(choices::conv2d, Phases<T>{&problem, 1});
  });
}

#define INSTANTIATE(T) template ConvProblem<T> forward_problem(const Conv2dArgs&);
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
