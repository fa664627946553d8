// output[n, c, y, x] = max over taps (i, j) of
//   input[n, c, y stride_h - padding_h + i dilation_h, x stride_w - padding_w + j dilation_w]
// and argmax = i kernel_w + j of the tap that won. All operands are NCHW, or all are NHWC.
//
// The obvious loop takes windows one by one and branches on every tap. Here a vector holds
// one tap of many windows, and the running maximum and its tap are updated by comparison and blend:
//   - NHWC: the windows of adjacent channels; every load is contiguous whatever the stride.
//   - NCHW: the windows of adjacent columns; with stride 2 one pair of loads, de-interleaved, is two taps.
//
// Every window is computed by itself, so the result does not depend on threads or on the lane of a window. A tap wins
// if (v > max) || isnan(v): of equal taps the first wins, of several NaNs the last. Taps out of bounds are read as -inf
// (or the lowest integer), which is also where max starts, so they never win. argmax starts at the first tap in bounds,
// which is right if all taps are -inf. (A window without taps in bounds, which dilation allows, gives -inf.)
#include <algorithm>
#include <array>
#include <numeric>

#include "max_pool2d/forward_2x2_avx512.h"
#include "max_pool2d/lanes.h"
#include "max_pool2d/running_max.h"
#include "runtime/algorithms.h"
#include "runtime/scratch.h"

namespace pyops::cpu {
namespace {

// The taps of a window that lie inside the input, along one axis of `size` elements on which tap 0 is at `origin`.
Range taps_inside(int64_t origin, int64_t kernel, int64_t dilation, int64_t size) {
  const Range taps = range_inside(origin, dilation, kernel, size);
  return taps.size() > 0 ? taps : Range{0, 0};
}

// Loads every stride-th element from p on. With kStride = 2, all of the 2 * kLanes elements are read.
template <int64_t kStride, class T>
Vec<Compute<T>> load_strided(const T* p, int64_t stride) {
  if constexpr (kStride == 1) {
    return load_lanes(p);
  } else if constexpr (kStride == 2) {
    return at::vec::deinterleave2(load_lanes(p), load_lanes(p + kLanes<T>)).first;
  } else {
    std::array<Compute<T>, kLanes<T>> values;
    for (int64_t l = 0; l < kLanes<T>; ++l) values[l] = p[l * stride];
    return Vec<Compute<T>>::loadu(values.data());
  }
}

// Writes a vector of windows; `room` is the number of elements that this chunk has yet to write.
template <class T, class A>
void store_windows(const RunningMax<Compute<T>, A>& best, T* output, A* argmax, int64_t room) {
  store_lanes(output, best.max(), room);
  const auto tap = best.tap();
  if (room >= kLanes<T>) {
    std::copy_n(tap.begin(), kLanes<T>, argmax);
  } else {
    std::copy_n(tap.begin(), room, argmax);
  }
}

// NHWC: vectors of channels.
template <class T, class A>
class ChannelPool {
 public:
  ChannelPool(const MaxPool2dShape& shape, const T* input)
      : s_(shape), in_{input, shape.N * shape.H * shape.W * shape.C} {}

  // Computes the rows [begin, end) of the output's N * OH.
  void rows(int64_t begin, int64_t end, T* output, A* argmax) const {
    int64_t room = (end - begin) * s_.OW * s_.C;
    output += begin * s_.OW * s_.C;
    argmax += begin * s_.OW * s_.C;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h0 = row % s_.OH * s_.stride_h - s_.padding_h;
      const Range taps_h = taps_inside(h0, s_.kernel_h, s_.dilation_h, s_.H);
      const int64_t row_first = (row / s_.OH * s_.H + h0) * s_.W;
      for (int64_t w0 = -s_.padding_w, x = 0; x < s_.OW; ++x, w0 += s_.stride_w) {
        const Range taps_w = taps_inside(w0, s_.kernel_w, s_.dilation_w, s_.W);
        const Pixel pixel{(row_first + w0) * s_.C, taps_h, taps_w};
        int64_t c = 0;
        for (; c + kMany * kLanes<T> <= s_.C; c += kMany * kLanes<T>) {
          pool<kMany>(pixel, c, output + c, argmax + c, room - c);
        }
        for (; c < s_.C; c += kLanes<T>) pool<1>(pixel, c, output + c, argmax + c, room - c);
        output += s_.C;
        argmax += s_.C;
        room -= s_.C;
      }
    }
  }

 private:
  // Vectors that are computed together, so that one's comparison does not wait for another's blend.
  static constexpr int64_t kMany = std::is_floating_point_v<Compute<T>> && std::is_same_v<A, uint8_t> ? 4 : 1;

  // A pixel of the output: the position of tap (0, 0) in channel 0, and the taps in bounds.
  struct Pixel {
    int64_t first;
    Range taps_h, taps_w;
  };

  // Computes kVectors vectors of channels from c on.
  template <int64_t kVectors>
  void pool(const Pixel& pixel, int64_t c, T* output, A* argmax, int64_t room) const {
    const auto [first, taps_h, taps_w] = pixel;
    const int64_t row_step = s_.dilation_h * s_.W * s_.C, column_step = s_.dilation_w * s_.C;
    const int64_t last = first + c + (taps_h.end - 1) * row_step + (taps_w.end - 1) * column_step;
    const bool whole = in_.holds(last, kVectors * kLanes<T>);
    using Windows = RunningMax<Compute<T>, A>;
    const Windows start(static_cast<A>(taps_h.begin * s_.kernel_w + taps_w.begin));
    std::array<Windows, kVectors> best;
    best.fill(start);
    for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
      for (int64_t j = taps_w.begin; j < taps_w.end; ++j) {
        const int64_t at = first + c + i * row_step + j * column_step;
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) {
          best[v].update(whole ? load_lanes(in_.data + at + v * kLanes<T>)
                               : in_.load_part(at + v * kLanes<T>, 1, LaneRange{0, std::min(kLanes<T>, s_.C - c)},
                                               kLowest<Compute<T>>),
                         i * s_.kernel_w + j);
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      store_windows(best[v], output + v * kLanes<T>, argmax + v * kLanes<T>, room - v * kLanes<T>);
    }
  }

  const MaxPool2dShape s_;
  const Flat<T> in_;
};

template <class T, class A>
void pool_channels(const MaxPool2dShape& s, const T* input, T* output, A* argmax) {
  at::parallel_for(0, s.N * s.OH, rows_per_fork(s.OW * at::divup(s.C, kLanes<T>) * s.taps()),
                   [&](int64_t begin, int64_t end) { ChannelPool<T, A>(s, input).rows(begin, end, output, argmax); });
}

// NCHW: vectors of columns. kStride is stride_w if that is 1 or 2, otherwise 0. A kKernel other than 0 stands for a
// square kernel of that size without dilation, so that the loops over its taps disappear.
template <int64_t kStride, int64_t kKernel, class T, class A>
class ColumnPool {
 public:
  ColumnPool(const MaxPool2dShape& shape, const T* input)
      : s_(shape), in_{input, shape.N * shape.C * shape.H * shape.W}, row_step_(shape.dilation_h * shape.W) {}

  // Computes the rows [begin, end) of the output's N * C * OH.
  void rows(int64_t begin, int64_t end, T* output, A* argmax) const {
    int64_t y = begin % s_.OH, plane = begin / s_.OH * s_.H * s_.W;
    int64_t room = (end - begin) * s_.OW;
    output += begin * s_.OW;
    argmax += begin * s_.OW;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h0 = y * s_.stride_h - s_.padding_h;
      const Range taps_h = taps_inside(h0, s_.kernel_h, s_.dilation_h, s_.H);
      const int64_t row_first = plane + h0 * s_.W;  // of tap row 0, maybe out of bounds
      for (int64_t x = 0; x < s_.OW; x += kLanes<T>) {
        const int64_t w0 = x * stride() - s_.padding_w;
        const int64_t live = std::min(kLanes<T>, s_.OW - x);
        const auto best = reads_inside(row_first, w0, live, taps_h) ? inside(row_first + w0, taps_h)
                                                                    : edge(row_first, w0, live, taps_h);
        store_windows(best, output + x, argmax + x, room - x);
      }
      output += s_.OW;
      argmax += s_.OW;
      room -= s_.OW;
      if (++y == s_.OH) {
        y = 0;
        plane += s_.H * s_.W;
      }
    }
  }

 private:
  using Windows = RunningMax<Compute<T>, A>;

  // Whether all taps of these windows are in bounds along the width and may be read in whole vectors.
  bool reads_inside(int64_t row_first, int64_t w0, int64_t live, Range taps_h) const {
    const int64_t reach = (s_.kernel_w - 1) * s_.dilation_w;
    return w0 >= 0 && w0 + (live - 1) * stride() + reach < s_.W &&
           in_.holds(row_first + w0 + taps_h.begin * row_step_,
                     (taps_h.end - 1 - taps_h.begin) * row_step_ + reach + span());
  }

  Windows inside(int64_t first, Range taps_h) const {
    Windows best(static_cast<A>(taps_h.begin * s_.kernel_w));
    const T* row = in_.data + first;
    if (kKernel && taps_h.begin == 0 && taps_h.end == kKernel) {
      for (int64_t i = 0; i < kKernel; ++i) update_row(best, row + i * s_.W, 1, kKernel, i * kKernel);
    } else {
      for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
        update_row(best, row + i * row_step_, s_.dilation_w, s_.kernel_w, i * s_.kernel_w);
      }
    }
    return best;
  }

  // Updates the maximum with one row of taps.
  void update_row(Windows& best, const T* p, int64_t dilation, int64_t kernel, int64_t tap) const {
    int64_t j = 0;
    if constexpr (kStride == 2) {
      for (; dilation == 1 && j + 1 < kernel; j += 2) {
        const auto [even, odd] = at::vec::deinterleave2(load_lanes(p + j), load_lanes(p + j + kLanes<T>));
        best.update(even, tap + j);
        best.update(odd, tap + j + 1);
      }
    }
    for (; j < kernel; ++j) best.update(load_strided<kStride>(p + j * dilation, stride()), tap + j);
  }

  // Windows that start at their first tap in bounds; `tap` is the first tap of the row.
  Windows start(int64_t w0, int64_t live, int64_t tap) const {
    if (w0 >= 0) return Windows(static_cast<A>(tap));
    std::array<A, kLanes<T>> first;
    first.fill(static_cast<A>(tap));
    for (int64_t l = 0; l < live && w0 + l * stride() < 0; ++l) {
      for (int64_t w = w0 + l * stride(); w < 0; w += s_.dilation_w) ++first[l];
    }
    return Windows(first);
  }

  // Windows with taps out of bounds, or where a vector would reach beyond the tensor.
  Windows edge(int64_t row_first, int64_t w0, int64_t live, Range taps_h) const {
    Windows best = start(w0, live, taps_h.begin * s_.kernel_w);
    for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
      for (int64_t j = 0; j < s_.kernel_w; ++j) {
        const int64_t w = w0 + j * s_.dilation_w, first = row_first + i * row_step_ + w;
        const LaneRange lanes{w < 0 ? std::min(kLanes<T>, at::divup(-w, stride())) : 0,
                              w < s_.W ? std::min(live, at::divup(s_.W - w, stride())) : 0};
        if (lanes.begin >= lanes.end) continue;
        best.update(in_.holds(first, span())
                        ? lanes.select(load_strided<kStride>(in_.data + first, stride()), kLowest<Compute<T>>)
                        : in_.load_part(first, stride(), lanes, kLowest<Compute<T>>),
                    i * s_.kernel_w + j);
      }
    }
    return best;
  }

  int64_t stride() const { return kStride ? kStride : s_.stride_w; }

  // The number of elements that a vector of windows covers, from the first one it reads.
  int64_t span() const { return kStride ? kStride * kLanes<T> : stride() * (kLanes<T> - 1) + 1; }

  const MaxPool2dShape s_;
  const Flat<T> in_;
  const int64_t row_step_;
};

template <int64_t kStride, int64_t kKernel, class T, class A>
void pool_columns(const MaxPool2dShape& s, const T* input, T* output, A* argmax) {
  at::parallel_for(0, s.N * s.C * s.OH, rows_per_fork(at::divup(s.OW, kLanes<T>) * s.taps()),
                   [&](int64_t begin, int64_t end) {
                     // Every chunk has its own copy, because a byte stored through argmax may alias any object that is
                     // shared.
                     ColumnPool<kStride, kKernel, T, A>(s, input).rows(begin, end, output, argmax);
                   });
}

// NCHW with too few columns for a vector: one window at a time.
template <class T, class A>
void pool_windows(const MaxPool2dShape& s, const T* input, T* output, A* argmax) {
  using C = Compute<T>;
  at::parallel_for(0, s.N * s.C * s.OH, rows_per_fork(s.OW * s.taps()), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const plane = input + row / s.OH * s.H * s.W;
      const int64_t h0 = row % s.OH * s.stride_h - s.padding_h;
      const Range taps_h = taps_inside(h0, s.kernel_h, s.dilation_h, s.H);
      for (int64_t x = 0, w0 = -s.padding_w; x < s.OW; ++x, w0 += s.stride_w) {
        const Range taps_w = taps_inside(w0, s.kernel_w, s.dilation_w, s.W);
        C max = kLowest<C>;
        int64_t tap = taps_h.begin * s.kernel_w + taps_w.begin;
        for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
          for (int64_t j = taps_w.begin; j < taps_w.end; ++j) {
            const C v = plane[(h0 + i * s.dilation_h) * s.W + w0 + j * s.dilation_w];
            if (v > max || v != v) {
              max = v;
              tap = i * s.kernel_w + j;
            }
          }
        }
        output[row * s.OW + x] = static_cast<T>(max);
        argmax[row * s.OW + x] = static_cast<A>(tap);
      }
    }
  });
}

// Whether all taps are in bounds and offsets within a plane fit into the indices of gather_windows.
bool can_gather_windows(const MaxPool2dShape& s) {
  return s.padding_h == 0 && s.padding_w == 0 && (s.OH - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h < s.H &&
         (s.OW - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w < s.W && s.H * s.W < (1 << 20);
}

// NCHW with few columns where all taps are in bounds: vectors of windows, which continue across rows and planes, gather
// their taps.
template <class T>
void gather_windows(const MaxPool2dShape& s, const T* input, T* output, uint8_t* argmax) {
  using Index = at::vec::int_same_size_t<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t plane = s.H * s.W, windows = s.OH * s.OW, planes_at_once = lanes / std::gcd(windows, lanes);
  Index* firsts = scratch<Index>(Scratch::patterns, planes_at_once * windows);  // where windows begin
  for (int64_t i = 0; i < planes_at_once * windows; ++i)
    firsts[i] = i / windows * plane + i % windows / s.OW * s.stride_h * s.W + i % s.OW * s.stride_w;
  const int64_t groups = s.N * s.C / planes_at_once, vectors = planes_at_once * windows / lanes;
  at::parallel_for(0, groups, rows_per_fork(4 * vectors * s.taps()), [=](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const T* const planes = input + group * planes_at_once * plane;
      for (int64_t v = 0; v < vectors; ++v) {
        const auto first = Vec<Index>::loadu(firsts + v * lanes);
        RunningMax<T, uint8_t> best;
        for (int64_t i = 0; i < s.kernel_h; ++i)
          for (int64_t j = 0; j < s.kernel_w; ++j)
            best.update(at::vec::gather<sizeof(T)>(planes + i * s.dilation_h * s.W + j * s.dilation_w, first),
                        i * s.kernel_w + j);
        const int64_t window = (group * vectors + v) * lanes;
        store_windows<T>(best, output + window, argmax + window, lanes);
      }
    }
  });
  MaxPool2dShape rest = s;
  rest.C = 1, rest.N = s.N * s.C - groups * planes_at_once;
  const int64_t done = groups * planes_at_once * windows;
  pool_windows(rest, input + groups * planes_at_once * plane, output + done, argmax + done);
}

#ifdef CPU_CAPABILITY_AVX512
void pool_2x2(const MaxPool2dShape& s, const float* input, float* output, uint8_t* argmax) {
  at::parallel_for(0, s.N * s.C * s.OH, rows_per_fork(s.OW / 4 + 1),
                   [&](int64_t begin, int64_t end) { Windows2x2(s).rows(begin, end, input, output, argmax); });
}
#endif

// ---- the table of algorithms ----

template <class T, class A>
constexpr bool is_common = std::is_floating_point_v<Compute<T>> && std::is_same_v<A, uint8_t>;

// Calls one of the functions above, which has a shape, the input, the output and the argmax.
template <class T, class A, class F>
void call(const MaxPool2dArgs& x, const F& f) {
  f(x.shape, static_cast<const T*>(x.input), static_cast<T*>(x.output), static_cast<A*>(x.argmax));
}

#ifdef CPU_CAPABILITY_AVX512
template <class T, class A>
struct InRegisters2x2 {
  static bool supports(const MaxPool2dArgs& x) {
    return std::is_same_v<T, float> && std::is_same_v<A, uint8_t> && !x.shape.channels_last &&
           Windows2x2::takes(x.shape);
  }
  static void run(const MaxPool2dArgs& x) {
    if constexpr (std::is_same_v<T, float> && std::is_same_v<A, uint8_t>) call<T, A>(x, pool_2x2);
  }
};
#endif

template <class T, class A>
struct Columns {
  static bool supports(const MaxPool2dArgs& x) { return is_common<T, A> && !x.shape.channels_last; }
  static bool profitable(const MaxPool2dArgs& x) { return x.shape.OW >= kLanes<T> / 4; }
  // A constant stride makes the loads vectors, and a constant kernel size removes the loops over its taps.
  static void run(const MaxPool2dArgs& x) {
    if constexpr (is_common<T, A>) {
      const MaxPool2dShape& s = x.shape;
      if (is_square(s, 2, 2)) return call<T, A>(x, pool_columns<2, 2, T, A>);
      if (is_square(s, 3, 2)) return call<T, A>(x, pool_columns<2, 3, T, A>);
      if (is_square(s, 3, 1)) return call<T, A>(x, pool_columns<1, 3, T, A>);
      if (s.stride_w == 2) return call<T, A>(x, pool_columns<2, 0, T, A>);
      if (s.stride_w == 1) return call<T, A>(x, pool_columns<1, 0, T, A>);
      call<T, A>(x, pool_columns<0, 0, T, A>);
    }
  }
};

template <class T, class A>
struct GatheredWindows {
  static bool supports(const MaxPool2dArgs& x) {
    return is_common<T, A> && !is_reduced<T> && !x.shape.channels_last && can_gather_windows(x.shape);
  }
  static void run(const MaxPool2dArgs& x) {
    if constexpr (is_common<T, A> && !is_reduced<T>) call<T, A>(x, gather_windows<T>);
  }
};

template <class T, class A>
constexpr Algorithm<MaxPool2dArgs> algorithms[] = {
#ifdef CPU_CAPABILITY_AVX512
    // It takes fewer instructions than vectors of columns.
    {"2x2", "csrc/cpu/max_pool2d/forward_2x2_avx512.h", InRegisters2x2<T, A>::supports, always<MaxPool2dArgs>,
     InRegisters2x2<T, A>::run},
#endif
    {"columns", "csrc/cpu/max_pool2d.cpp", Columns<T, A>::supports, Columns<T, A>::profitable, Columns<T, A>::run},
    // With so few columns, most lanes of a vector of columns would be idle.
    {"gathered_windows", "csrc/cpu/max_pool2d.cpp", GatheredWindows<T, A>::supports, always<MaxPool2dArgs>,
     GatheredWindows<T, A>::run},
    {"windows", "csrc/cpu/max_pool2d.cpp", [](const MaxPool2dArgs& x) { return !x.shape.channels_last; },
     always<MaxPool2dArgs>, [](const MaxPool2dArgs& x) { call<T, A>(x, pool_windows<T, A>); }},
    {"channels", "csrc/cpu/max_pool2d.cpp", [](const MaxPool2dArgs& x) { return x.shape.channels_last; },
     always<MaxPool2dArgs>, [](const MaxPool2dArgs& x) { call<T, A>(x, pool_channels<T, A>); }},
};

[[maybe_unused]] const bool listed = choices::max_pool2d.list(algorithms<float, uint8_t>);

}  // namespace

void max_pool2d(const MaxPool2dArgs& args) {
  dispatch_real(args.dtype, [&](auto t) {
    using T = decltype(t);
    const auto pool = [&](auto argmax) {
      choose(choices::max_pool2d, algorithms<T, decltype(argmax)>, args).run(args);
    };
    max_pool2d_argmax_is_u8(args.shape.taps()) ? pool(uint8_t{}) : pool(int64_t{});
  });
}

}  // namespace pyops::cpu
