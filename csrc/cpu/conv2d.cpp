// conv2d: the forward is one correlation of the input with the weight.
#include "conv2d.h"

namespace pyops::cpu {

void conv2d(const Conv2dArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Conv2dShape& s = x.shape;
    const Layout out(s.O, s.OH, s.OW, s.channels_last);
    correlate<T>({input_source<T>(s, x.input),
                  s.channels_last,
                  s.groups,
                  s.O / s.groups,
                  static_cast<T*>(x.output),
                  out.channel_stride,
                  {s.OW, s.OH * s.OW, out.image_stride, out.y_stride, out.x_stride},
                  static_cast<const T*>(x.bias)},
                 static_cast<const T*>(x.weight));
  });
}

}  // namespace pyops::cpu
