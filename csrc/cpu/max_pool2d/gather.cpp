// gather    output[v] = input[element of window v]              the adjoint of max_pool2d's backward
// indices   indices[v] = element of window v, as h W + w         torch's return_indices
//
// All operands are NCHW, or all are NHWC. The element of a window is the one that its argmax names.
//
// The windows are processed one at a time. A table (elements.h) gives the element of a tap, so that the loads take most
// of the time.
//
// An argmax that names no tap in bounds is not trusted: gather gives 0 for it, and so does indices.
#include <algorithm>

#include "../runtime/algorithms.h"
#include "../runtime/parallel.h"
#include "elements.h"
#include "lanes.h"

namespace pyops::cpu {
namespace {

// f(window, element, image) for all windows, in parallel; elements are numbered as in Elements.
template <class F>
void for_all_windows(const MaxPool2dShape& s, const void* argmax, int64_t pitch, int64_t channel_step, const F& f) {
  const auto run = [&](const auto* taps) {
    parallel_for(s.N * s.OH, items_per_fork(s.OW * s.C), [&](int64_t begin, int64_t end) {
      const Elements elements(s, taps, pitch, channel_step);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / s.OH;
        elements.for_row(n, row % s.OH, [n, f](int64_t window, int64_t element) { f(window, element, n); });
      }
    });
  };
  max_pool2d_argmax_is_u8(s.taps()) ? run(static_cast<const uint8_t*>(argmax))
                                    : run(static_cast<const int64_t*>(argmax));
}

}  // namespace

void max_pool2d_gather(const MaxPool2dGatherArgs& args) {
  count_run(parts::max_pool2d_gather.runs);
  dispatch_floating(args.dtype, [&](auto t) {
    using T = decltype(t);
    const MaxPool2dShape s = as_channels_last(args.shape);
    const auto* input = static_cast<const T*>(args.input);
    auto* output = static_cast<T*>(args.output);
    const int64_t image_size = s.H * s.W * s.C;
    for_all_windows(s, args.argmax, s.C, 1, [=](int64_t window, int64_t element, int64_t n) {
      output[window] = element < 0 ? T(0) : input[n * image_size + element];
    });
  });
}

void max_pool2d_indices(const MaxPool2dIndicesArgs& args) {
  count_run(parts::max_pool2d_indices.runs);
  // A window without an element gets index 0, so that every index is safe to use.
  for_all_windows(as_channels_last(args.shape), args.argmax, 1, 0,
                  [indices = args.indices](int64_t window, int64_t element, int64_t) {
                    indices[window] = std::max<int64_t>(element, 0);
                  });
}

}  // namespace pyops::cpu
