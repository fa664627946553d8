// The forward of conv2d: output = conv2d(input, weight) + bias, rectified if asked for. It is a single phase of
// convolve (conv2d/convolve.cpp), which chooses the algorithm and states the guarantees.
#include "conv2d/problem.h"

namespace pyops::cpu {

template <class T>
ConvProblem<T> forward_problem(const Conv2dArgs& x) {
  const Conv2dShape& s = x.shape;
  const Layout out(s.O, s.OH, s.OW, s.channels_last);
  const WeightLayout w(s);
  return {conv_input<T>(s, x.input),
          {static_cast<const T*>(x.weight), s.O / s.groups * w.out_stride, w.out_stride, w.channel_stride, w.tap_stride,
           s.O * w.out_stride},
          s.channels_last,
          s.groups,
          s.O / s.groups,
          static_cast<T*>(x.output),
          out.channel_stride,
          {s.OW, s.OH * s.OW, out.image_stride, out.y_stride, out.x_stride},
          static_cast<const T*>(x.bias),
          x.relu};
}

void conv2d(const Conv2dArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    const auto problem = forward_problem<decltype(zero)>(x);
    convolve(&problem, 1);
  });
}

template ConvProblem<float> forward_problem(const Conv2dArgs&);
template ConvProblem<double> forward_problem(const Conv2dArgs&);
template ConvProblem<c10::BFloat16> forward_problem(const Conv2dArgs&);
template ConvProblem<c10::Half> forward_problem(const Conv2dArgs&);

}  // namespace pyops::cpu
