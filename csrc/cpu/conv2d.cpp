// conv2d: the forward is one correlation of the input with the weight.
#include "conv2d.h"

namespace pyops::cpu {
namespace {

// The weight with the taps of the source only: itself, if those are all.
template <class T>
const T* weight_of_taps(const Source<T>& source, const T* weight, int64_t filters, int64_t kernel) {
  if (source.tap_count == kernel) return weight;
  T* selected = scratch<T>(Scratch::partial_sums, filters * source.tap_count);
  for (int64_t f = 0; f < filters; ++f)
    for (int64_t t = 0; t < source.tap_count; ++t)
      selected[f * source.tap_count + t] = weight[f * kernel + source.taps[t].index];
  return selected;
}

}  // namespace

void conv2d(const Conv2dArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Conv2dShape& s = x.shape;
    const Layout out(s.O, s.OH, s.OW, s.channels_last);
    const Source<T> source = input_source<T>(s, x.input);
    correlate<T>(
        {source,
         s.channels_last,
         s.groups,
         s.O / s.groups,
         static_cast<T*>(x.output),
         out.channel_stride,
         {s.OW, s.OH * s.OW, out.image_stride, out.y_stride, out.x_stride},
         static_cast<const T*>(x.bias)},
        weight_of_taps(source, static_cast<const T*>(x.weight), s.O * source.channels, s.kernel_h * s.kernel_w));
  });
}

}  // namespace pyops::cpu
