// output[n, c, y, x] = max over taps (i, j) of
//   input[n, c, y stride_h - padding_h + i dilation_h, x stride_w - padding_w + j dilation_w]
// and argmax = i kernel_w + j of the tap that won. NCHW or NHWC, the same for all operands.
//
// The obvious loop takes windows one by one and branches on every tap: 5 ns a tap in stock torch. Here a vector holds
// one tap of many windows, and the running maximum and its tap are updated by comparison and blend:
//   - NHWC: the windows of neighbouring channels; every load is contiguous whatever the stride.
//   - NCHW: the windows of neighbouring columns; with stride 2 one pair of loads, de-interleaved, is two taps.
// 64x6x28x28, 2x2 windows, one core: @@@ us against 1600.
//
// Every window is computed by itself, so neither threads nor the lane it falls into show in the result. A tap wins if
// (v > max) || isnan(v): of equal taps the first wins, of several NaNs the last; -inf never beats the start value, which
// is why the start tap must be the first one in bounds. Taps out of bounds take part as the start value and never win.
#include <limits>

#include "max_pool2d.h"

namespace pyops::cpu {
namespace {

template <class C>
constexpr C kLowest = std::numeric_limits<C>::has_infinity ? -std::numeric_limits<C>::infinity()
                                                           : std::numeric_limits<C>::lowest();

// The running maximum of a vector of windows, and the tap it came from.
// This general form keeps taps of any size and leaves the vectors to the compiler.
template <class C, class A>
class Best {
 public:
  // All lanes start at tap `first`, or lane l at first[l].
  explicit Best(A first) {
    max_.fill(kLowest<C>);
    tap_.fill(first);
  }
  explicit Best(const std::array<A, kLanes<C>>& first) : tap_(first) { max_.fill(kLowest<C>); }

  void update(const Vec<C>& values, int64_t tap) {
    std::array<C, kLanes<C>> v;
    values.store(v.data());
    for (int64_t l = 0; l < kLanes<C>; ++l) {
      const bool wins = v[l] > max_[l] || v[l] != v[l];
      max_[l] = wins ? v[l] : max_[l];
      tap_[l] = wins ? tap : tap_[l];
    }
  }

  Vec<C> max() const { return Vec<C>::loadu(max_.data()); }
  std::array<A, kLanes<C>> tap() const { return tap_; }

 private:
  std::array<C, kLanes<C>> max_;
  std::array<A, kLanes<C>> tap_;
};

// Taps that fit a byte are blended along with the values, as numbers of the same type: any type holds them, int8 as
// their negative twins.
template <class C>
class Best<C, uint8_t> {
 public:
  explicit Best(uint8_t first) : tap_(static_cast<C>(first)) {}
  explicit Best(const std::array<uint8_t, kLanes<C>>& first) {
    std::array<C, kLanes<C>> tap;
    for (int64_t l = 0; l < kLanes<C>; ++l) tap[l] = static_cast<C>(first[l]);
    tap_ = Vec<C>::loadu(tap.data());
  }

  void update(const Vec<C>& values, int64_t tap) {
    Vec<C> wins = values > max_;
    if constexpr (std::is_floating_point_v<C>) wins = wins | values.isnan();
    max_ = Vec<C>::blendv(max_, values, wins);
    tap_ = Vec<C>::blendv(tap_, Vec<C>(static_cast<C>(tap)), wins);
  }

  Vec<C> max() const { return max_; }
  std::array<uint8_t, kLanes<C>> tap() const {
    std::array<C, kLanes<C>> tap;
    tap_.store(tap.data());
    std::array<uint8_t, kLanes<C>> bytes;
    for (int64_t l = 0; l < kLanes<C>; ++l) bytes[l] = static_cast<uint8_t>(tap[l]);
    return bytes;
  }

 private:
  Vec<C> max_ = Vec<C>(kLowest<C>);
  Vec<C> tap_;
};

#ifdef CPU_CAPABILITY_AVX512
// Vectorized has no mask registers: it turns every comparison into a vector of ones and back. Half the time of a window.
template <>
class Best<float, uint8_t> {
 public:
  explicit Best(uint8_t first) : tap_(_mm512_set1_epi32(first)) {}
  explicit Best(const std::array<uint8_t, 16>& first)
      : tap_(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first.data())))) {}

  void update(const Vec<float>& values, int64_t tap) {
    const __mmask16 wins = _mm512_cmp_ps_mask(values, max_, _CMP_GT_OQ) | _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    max_ = _mm512_mask_mov_ps(max_, wins, values);
    tap_ = _mm512_mask_set1_epi32(tap_, wins, static_cast<int>(tap));
  }

  Vec<float> max() const { return max_; }
  std::array<uint8_t, 16> tap() const {
    std::array<uint8_t, 16> bytes;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes.data()), _mm512_cvtepi32_epi8(tap_));
    return bytes;
  }

 private:
  __m512 max_ = _mm512_set1_ps(kLowest<float>);
  __m512i tap_;
};
#endif

// The taps of a window that lie inside the input, along one axis.
struct TapRange {
  int64_t begin, end;

  // `origin` is where tap 0 lies on an axis of `size` elements.
  TapRange(int64_t origin, int64_t kernel, int64_t dilation, int64_t size) : begin(0), end(kernel) {
    if (origin < 0) begin = at::divup(-origin, dilation);
    if (origin + (kernel - 1) * dilation >= size) end = at::divup(std::max<int64_t>(size - origin, 0), dilation);
    if (begin >= end) begin = end = 0;
  }
};

// Every stride-th element from p on. With kStride = 2 all of the 2 * kLanes elements are read.
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

// Writes a vector of windows; `room` is the number of elements this chunk has yet to write.
template <class T, class A>
void store_windows(const Best<Compute<T>, A>& best, T* output, A* argmax, int64_t room) {
  store(output, best.max(), room);
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

  // Rows of the output, [begin, end) of N * OH.
  void rows(int64_t begin, int64_t end, T* output, A* argmax) const {
    int64_t room = (end - begin) * s_.OW * s_.C;
    output += begin * s_.OW * s_.C;
    argmax += begin * s_.OW * s_.C;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h0 = row % s_.OH * s_.stride_h - s_.padding_h;
      const TapRange taps_h(h0, s_.kernel_h, s_.dilation_h, s_.H);
      const int64_t row_first = (row / s_.OH * s_.H + h0) * s_.W;
      for (int64_t w0 = -s_.padding_w, x = 0; x < s_.OW; ++x, w0 += s_.stride_w) {
        const TapRange taps_w(w0, s_.kernel_w, s_.dilation_w, s_.W);
        for (int64_t c = 0; c < s_.C; c += kLanes<T>) {
          store_windows(windows((row_first + w0) * s_.C + c, std::min(kLanes<T>, s_.C - c), taps_h, taps_w), output + c, argmax + c, room - c);
        }
        output += s_.C;
        argmax += s_.C;
        room -= s_.C;
      }
    }
  }

 private:
  using Windows = Best<Compute<T>, A>;

  // The windows of `live` channels, whose tap (0, 0) is at `first`.
  Windows windows(int64_t first, int64_t live, TapRange taps_h, TapRange taps_w) const {
    const int64_t row_step = s_.dilation_h * s_.W * s_.C, column_step = s_.dilation_w * s_.C;
    Windows best(static_cast<A>(taps_h.begin * s_.kernel_w + taps_w.begin));
    const bool whole = in_.holds(first + (taps_h.end - 1) * row_step + (taps_w.end - 1) * column_step, kLanes<T>);
    for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
      for (int64_t j = taps_w.begin; j < taps_w.end; ++j) {
        const int64_t at = first + i * row_step + j * column_step;
        best.update(whole ? load_lanes(in_.data + at) : in_.load_part(at, 1, LaneRange{0, live}, kLowest<Compute<T>>),
                    i * s_.kernel_w + j);
      }
    }
    return best;
  }

  const MaxPool2dShape s_;
  const Flat<T> in_;
};

template <class T, class A>
void pool_channels(const MaxPool2dShape& s, const T* input, T* output, A* argmax) {
  at::parallel_for(0, s.N * s.OH, rows_per_fork(s.OW * at::divup(s.C, kLanes<T>) * s.taps()), [&](int64_t begin, int64_t end) {
                     ChannelPool<T, A>(s, input).rows(begin, end, output, argmax);
                   });
}

// NCHW: vectors of columns. kStride is stride_w where that is 1 or 2, else 0.
template <int64_t kStride, int64_t kKernel, class T, class A>
class ColumnPool {
 public:
  ColumnPool(const MaxPool2dShape& shape, const T* input)
      : s_(shape),
        in_{input, shape.N * shape.C * shape.H * shape.W},
        row_step_(shape.dilation_h * shape.W) {}

  // Rows of the output, [begin, end) of N * C * OH.
  void rows(int64_t begin, int64_t end, T* output, A* argmax) const {
    int64_t y = begin % s_.OH, plane = begin / s_.OH * s_.H * s_.W;
    int64_t room = (end - begin) * s_.OW;
    output += begin * s_.OW;
    argmax += begin * s_.OW;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h0 = y * s_.stride_h - s_.padding_h;
      const TapRange taps_h(h0, s_.kernel_h, s_.dilation_h, s_.H);
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
  using Windows = Best<Compute<T>, A>;

  // Whether all taps of the windows are in bounds and may be read in whole vectors.
  bool reads_inside(int64_t row_first, int64_t w0, int64_t live, TapRange taps_h) const {
    const int64_t reach = (s_.kernel_w - 1) * s_.dilation_w;
    return w0 >= 0 && w0 + (live - 1) * stride() + reach < s_.W &&
           in_.holds(row_first + w0 + taps_h.begin * row_step_, (taps_h.end - 1 - taps_h.begin) * row_step_ + reach + span());
  }

  Windows inside(int64_t first, TapRange taps_h) const {
    Windows best(static_cast<A>(taps_h.begin * s_.kernel_w));
    const T* row = in_.data + first;
    if (kKernel && taps_h.begin == 0 && taps_h.end == kKernel) {
      // Counts known at compile time, so that the loops disappear and the taps are constants.
      for (int64_t i = 0; i < kKernel; ++i) update_row(best, row + i * s_.W, 1, kKernel, i * kKernel);
    } else {
      for (int64_t i = taps_h.begin; i < taps_h.end; ++i) {
        update_row(best, row + i * row_step_, s_.dilation_w, s_.kernel_w, i * s_.kernel_w);
      }
    }
    return best;
  }

  // One row of taps.
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

  // Windows at their first tap in bounds; `tap` is the first one of the row.
  Windows start(int64_t w0, int64_t live, int64_t tap) const {
    if (w0 >= 0) return Windows(static_cast<A>(tap));
    std::array<A, kLanes<T>> first;
    first.fill(static_cast<A>(tap));
    for (int64_t l = 0; l < live && w0 + l * stride() < 0; ++l) {
      for (int64_t w = w0 + l * stride(); w < 0; w += s_.dilation_w) ++first[l];
    }
    return Windows(first);
  }

  // The same where taps lie out of bounds, or a vector would reach beyond the tensor.
  Windows edge(int64_t row_first, int64_t w0, int64_t live, TapRange taps_h) const {
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

  // The elements a vector of windows reaches over, from the first it reads.
  int64_t span() const { return kStride ? kStride * kLanes<T> : stride() * (kLanes<T> - 1) + 1; }

  const MaxPool2dShape s_;
  const Flat<T> in_;
  const int64_t row_step_;
};

template <int64_t kStride, int64_t kKernel, class T, class A>
void pool_columns(const MaxPool2dShape& s, const T* input, T* output, A* argmax) {
  at::parallel_for(0, s.N * s.C * s.OH, rows_per_fork(at::divup(s.OW, kLanes<T>) * s.taps()),
                   [&](int64_t begin, int64_t end) {
                     // A copy of its own, because a byte stored through argmax may alias any object that is shared.
                     ColumnPool<kStride, kKernel, T, A>(s, input).rows(begin, end, output, argmax);
                   });
}

template <class T, class A>
void pool(const MaxPool2dArgs& args) {
  const auto* input = static_cast<const T*>(args.input);
  auto* output = static_cast<T*>(args.output);
  auto* argmax = static_cast<A*>(args.argmax);
  const MaxPool2dShape& s = args.shape;
  if constexpr (std::is_floating_point_v<Compute<T>> && std::is_same_v<A, uint8_t>) {
    if (!s.channels_last && s.OW >= kLanes<T> / 4) {
      if (is_square(s, 2, 2)) return pool_columns<2, 2>(s, input, output, argmax);
      if (is_square(s, 3, 2)) return pool_columns<2, 3>(s, input, output, argmax);
      if (is_square(s, 3, 1)) return pool_columns<1, 3>(s, input, output, argmax);
      if (s.stride_w == 2) return pool_columns<2, 0>(s, input, output, argmax);
      if (s.stride_w == 1) return pool_columns<1, 0>(s, input, output, argmax);
      return pool_columns<0, 0>(s, input, output, argmax);
    }
  }
  pool_channels(as_channels_last(s), input, output, argmax);
}

}  // namespace

void max_pool2d(const MaxPool2dArgs& args) {
  dispatch_real(args.dtype, [&](auto t) {
    using T = decltype(t);
    max_pool2d_argmax_is_u8(args.shape.taps()) ? pool<T, uint8_t>(args) : pool<T, int64_t>(args);
  });
}

}  // namespace pyops::cpu
