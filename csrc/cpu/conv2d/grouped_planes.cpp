// Convolutions of narrow groups over channels-last images (for the formula see conv2d/problem.h). They are chosen where
// vectors along the channels of one group would leave half of the lanes idle or more, and several groups cannot share a
// vector (conv2d/grouped_lanes.cpp).
//
// Each image is transposed into planes, which are convolved as a channels-first image by one of the other algorithms,
// and the result is transposed back. All of this stays in cache.
//
// Guarantees: those of gemm.h. Every image is computed separately.
#include "algorithms.h"
#include "costs.h"

namespace pyops::cpu {

template <class T>
bool GroupedPlanes<T>::supports(const Phases<T>& x) {
  return x.first().channels_last;
}

template <class T>
bool GroupedPlanes<T>::profitable(const Phases<T>& phases) {
  const ConvProblem<T>& x = phases.first();
  return x.groups > 1 && lane_utilization<Compute<T>>(x.out_channels) <= 0.5 && !has_one_channel_groups(x);
}

template <class T>
bool GroupedPlanes<T>::sums_in_order(const Phases<T>& x) {
  return !has_long_chains(x.first());
}

template <class T>
void GroupedPlanes<T>::run(const Phases<T>& phases) {
  const ConvProblem<T>& x = phases.first();
  const ConvInput<T>& s = x.input;
  const int64_t in = x.groups * s.channels, in_pixels = s.height * s.width;
  const int64_t out = x.groups * x.out_channels, out_pixels = x.out_lines.image_stride / out;
  double flops = 0;
  for (const ConvProblem<T>& phase : phases)
    flops += 2.0 * s.count * phase.input.pixels() * out * static_cast<double>(phase.depth());
  for_each_task(s.count, flops, [&](int64_t n) {
    T* planes = scratch<T>(Scratch::planes, in * in_pixels);
    T* result = scratch<T>(Scratch::result_planes, out * out_pixels);
    auto* of_planes = scratch<ConvProblem<T>>(Scratch::phases_of_planes, phases.count);
    transpose(planes, in_pixels, s.images + n * s.image_stride, in, in_pixels, in);
    for (int64_t p = 0; p < phases.count; ++p) {
      ConvProblem<T>& phase = of_planes[p] = phases[p];
      phase.input.images = planes;
      phase.input.count = 1;
      phase.input.channel_stride = in_pixels;
      phase.input.y_stride = s.width;
      phase.input.x_stride = 1;
      phase.input.end = in * in_pixels;
      phase.channels_last = false;
      phase.output = result + (phases[p].output - x.output) / out;
      phase.out_channel_stride = out_pixels;
      phase.out_lines.y_stride /= out;
      phase.out_lines.x_stride = 1;
    }
    convolve(choices::conv2d_planes, Phases<T>{of_planes, phases.count});
    transpose(x.output + n * x.out_lines.image_stride, out, result, out_pixels, out, out_pixels);
  });
}

#define INSTANTIATE(T) template struct GroupedPlanes<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
