// The linear maps that an argmax defines, and the argmax as torch's indices:
//   backward  grad_input[element of window v] += grad_output[v]     for every window v
//   gather    output[v] = input[element of window v]                its adjoint
//   indices   indices[v] = element of window v, as h W + w
// NCHW or NHWC, the same for all operands. The element of a window is the one its argmax names; an argmax that names no
// tap in bounds names no element.
//
// The obvious backward zeroes grad_input and scatters into it. Here, where windows are small, every input element
// gathers: it asks each window over it, of which there are kernel / stride along an axis, whether the argmax is this
// very tap, a vector of elements at a time. Every element is written once and nothing is zeroed first.
// 64x6x28x28, 2x2 windows, one core: @@@ us against 66. Large or far-spaced windows are still scattered (see backward()).
//
// Both ways add in window order, so the result does not depend on threads or on the way taken; 16-bit types add in
// float32 and round once. No argmax is trusted: gathering only ever compares it, the rest checks it.
#include <limits>

#include "max_pool2d.h"

namespace pyops::cpu {
namespace {

// The windows, as an array of gradients and one of taps.
template <class T, class A>
class Windows {
 public:
  using C = Compute<T>;

  const Flat<T> grad;
  const A* const argmax;

  Windows(Flat<T> grad_output, const A* taps) : grad(grad_output), argmax(taps) {}

  // sum + the gradients of those windows of a vector, from `first` on, whose argmax is `tap`; `lanes` are the windows that
  // count. Reads whole vectors.
  Vec<C> add(Vec<C> sum, int64_t first, int64_t tap, LaneRange lanes = {0, kLanes<T>}) const {
#ifdef CPU_CAPABILITY_AVX512
    // One comparison of bytes straight into a mask register, which Vectorized does not have.
    if constexpr (std::is_same_v<C, float> && std::is_same_v<A, uint8_t>) {
      const __m128i taps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(argmax + first));
      const __mmask16 chosen = _mm_mask_cmpeq_epi8_mask(lanes.mask16(), taps, _mm_set1_epi8(static_cast<char>(tap)));
      return _mm512_mask_add_ps(sum, chosen, sum, load_lanes(grad.data + first));
    }
#endif
    std::array<C, kLanes<T>> chosen;
    for (int64_t l = 0; l < kLanes<T>; ++l) chosen[l] = argmax[first + l] == static_cast<A>(tap) ? C(1) : C(0);
    const Vec<C> picked =
        Vec<C>::blendv(Vec<C>(0), load_lanes(grad.data + first), Vec<C>::loadu(chosen.data()) == Vec<C>(1));
    return sum + (lanes.end - lanes.begin < kLanes<T> ? lanes.select(picked, C(0)) : picked);
  }

  // The same without reading beyond the arrays.
  Vec<C> add_edge(Vec<C> sum, int64_t first, int64_t tap, LaneRange lanes) const {
    if (lanes.begin >= lanes.end) return sum;
    if (grad.holds(first, kLanes<T>)) return add(sum, first, tap, lanes);
    std::array<C, kLanes<T>> picked{};
    for (int64_t l = lanes.begin; l < lanes.end; ++l) {
      if (argmax[first + l] == static_cast<A>(tap)) picked[l] = grad.data[first + l];
    }
    return sum + Vec<C>::loadu(picked.data());
  }
};

// The windows over a position that moves along an axis, and the tap the position is of each.
class Cover {
 public:
  Cover(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t windows)
      : stride_(stride), padding_(padding), dilation_(dilation), reach_((kernel - 1) * dilation), windows_(windows) {}

  void restart() { begin_ = end_ = 0; }

  // Positions must not decrease before the next restart.
  C10_ALWAYS_INLINE void move_to(int64_t position) {
    at_ = position + padding_;
    while (end_ < windows_ && end_ * stride_ <= at_) ++end_;
    while (begin_ < end_ && begin_ * stride_ + reach_ < at_) ++begin_;
  }

  // The windows that may reach over the position are [begin(), end()).
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

  // The tap of `window` that the position is, or -1 if dilation leaves it out.
  int64_t tap(int64_t window) const {
    const int64_t distance = at_ - window * stride_;
    if (dilation_ == 1) return distance;
    return distance % dilation_ == 0 ? distance / dilation_ : -1;
  }

 private:
  int64_t stride_, padding_, dilation_, reach_, windows_;
  int64_t at_ = 0, begin_ = 0, end_ = 0;
};

// NHWC: every input pixel gathers vectors of channels.
template <class T, class A>
class ChannelGather {
 public:
  ChannelGather(const MaxPool2dShape& shape, Windows<T, A> windows) : s_(shape), windows_(windows) {}

  // Rows of the input, [begin, end) of N * H.
  void rows(int64_t begin, int64_t end, T* grad_input) const {
    constexpr int64_t kMany = 4;  // vectors that share the search for windows
    int64_t h = begin % s_.H, image = begin / s_.H * s_.OH;
    int64_t room = (end - begin) * s_.W * s_.C;
    grad_input += begin * s_.W * s_.C;
    Cover rows(s_.kernel_h, s_.stride_h, s_.padding_h, s_.dilation_h, s_.OH);
    Cover columns(s_.kernel_w, s_.stride_w, s_.padding_w, s_.dilation_w, s_.OW);
    for (int64_t row = begin; row < end; ++row) {
      rows.move_to(h);
      columns.restart();
      for (int64_t w = 0; w < s_.W; ++w) {
        columns.move_to(w);
        int64_t c = 0;
        for (; c + kMany * kLanes<T> <= s_.C; c += kMany * kLanes<T>) {
          pixel<kMany>(rows, columns, image, c, grad_input + c, room - c);
        }
        for (; c < s_.C; c += kLanes<T>) pixel<1>(rows, columns, image, c, grad_input + c, room - c);
        grad_input += s_.C;
        room -= s_.C;
      }
      if (++h == s_.H) {
        h = 0;
        image += s_.OH;
        rows.restart();
      }
    }
  }

 private:
  // kVectors vectors of channels from c on.
  template <int64_t kVectors>
  void pixel(const Cover& rows, const Cover& columns, int64_t image, int64_t c, T* grad_input, int64_t room) const {
    const int64_t live = std::min(kLanes<T>, s_.C - c);
    std::array<Vec<Compute<T>>, kVectors> sums{};
    for (int64_t y = rows.begin(); y < rows.end(); ++y) {
      const int64_t i = rows.tap(y);
      if (i < 0) continue;
      for (int64_t x = columns.begin(); x < columns.end(); ++x) {
        const int64_t j = columns.tap(x);
        if (j < 0) continue;
        const int64_t first = ((image + y) * s_.OW + x) * s_.C + c, tap = i * s_.kernel_w + j;
        if (windows_.grad.holds(first, kVectors * kLanes<T>)) {
#pragma GCC unroll 4
          for (int64_t v = 0; v < kVectors; ++v) sums[v] = windows_.add(sums[v], first + v * kLanes<T>, tap);
        } else {
#pragma GCC unroll 4
          for (int64_t v = 0; v < kVectors; ++v) {
            sums[v] = windows_.add_edge(sums[v], first + v * kLanes<T>, tap, LaneRange{0, live});
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) store(grad_input + v * kLanes<T>, sums[v], room - v * kLanes<T>);
  }

  const MaxPool2dShape s_;
  const Windows<T, A> windows_;
};

// NCHW with stride_w = kStride, 1 or 2: strips of kStride vectors of columns, the even and the odd columns apart until
// they are stored, because they are different taps of the same run of windows. A kKernel other than 0 stands for a
// square kernel of that size, padding_w = kPadding and no dilation, so that the loops over taps disappear.
template <int64_t kStride, int64_t kKernel, int64_t kPadding, class T>
class ColumnGather {
 public:
  ColumnGather(const MaxPool2dShape& shape, Windows<T, uint8_t> windows) : s_(shape), windows_(windows) {}

  // Rows of the input, [begin, end) of N * C * H.
  void rows(int64_t begin, int64_t end, T* grad_input) const {
    while (begin < end) {
      const int64_t plane = begin / s_.H, h = begin % s_.H, plane_end = std::min(end, (plane + 1) * s_.H);
      // The last strip comes first, so that its surplus lanes fall on a row's start that is yet to be written.
      for (int64_t w = (s_.W - 1) / kStrip * kStrip; w >= 0; w -= kStrip) {
        strip(plane, h, h + plane_end - begin, w, grad_input + begin * s_.W + w, (end - begin) * s_.W - w);
      }
      begin = plane_end;
    }
  }

 private:
  static constexpr int64_t kStrip = kStride * kLanes<T>;

  // Columns from w on of the rows [h, h_end) of a plane.
  void strip(int64_t plane, int64_t h, int64_t h_end, int64_t w, T* grad_input, int64_t room) const {
    Cover rows(kernel(s_.kernel_h), s_.stride_h, s_.padding_h, dilation(s_.dilation_h), s_.OH);
    const int64_t x = w / kStride, live = std::min(kLanes<T>, (s_.W - w + kStride - 1) / kStride);
    const int64_t reach_begin = x + (padding() - (kernel(s_.kernel_w) - 1) * dilation(s_.dilation_w)) / kStride;
    const int64_t reach_end = x + (kStride - 1 + padding()) / kStride + 1;  // of the first windows of all vectors
    const bool inside = reach_begin >= 0 && reach_end - 1 + live <= s_.OW;
    for (; h < h_end; ++h) {
      rows.move_to(h);
      Vec<Compute<T>> even(0), odd(0);
      for (int64_t y = rows.begin(); y < rows.end(); ++y) {
        const int64_t i = rows.tap(y);
        if (i < 0) continue;
        const int64_t first = (plane * s_.OH + y) * s_.OW, tap = i * kernel(s_.kernel_w);
        if (inside && windows_.grad.holds(first, reach_end - 1 + kLanes<T>)) {
          even = add_row<0>(even, first, x, tap);
          if (kStride == 2) odd = add_row<1>(odd, first, x, tap);
        } else {
          even = add_row_edge<0>(even, first, x, live, tap);
          if (kStride == 2) odd = add_row_edge<1>(odd, first, x, live, tap);
        }
      }
      if constexpr (kStride == 1) {
        store(grad_input, even, room);
      } else {
        const auto [low, high] = at::vec::interleave2(even, odd);
        store(grad_input, low, room);
        store(grad_input + kLanes<T>, high, room - kLanes<T>);
      }
      grad_input += s_.W;
      room -= s_.W;
    }
  }

  // Adds what one row of windows gives to the columns of one phase. Descending taps are ascending windows.
  template <int64_t kPhase>
  C10_ALWAYS_INLINE Vec<Compute<T>> add_row(Vec<Compute<T>> sum, int64_t first, int64_t x, int64_t tap) const {
#pragma GCC unroll 3
    for (int64_t j = kernel(s_.kernel_w) - 1; j >= 0; --j) {
      const int64_t distance = kPhase + padding() - j * dilation(s_.dilation_w);
      if (distance % kStride == 0) sum = windows_.add(sum, first + x + distance / kStride, tap + j);
    }
    return sum;
  }

  template <int64_t kPhase>
  Vec<Compute<T>> add_row_edge(Vec<Compute<T>> sum, int64_t first, int64_t x, int64_t live, int64_t tap) const {
#pragma GCC unroll 3
    for (int64_t j = kernel(s_.kernel_w) - 1; j >= 0; --j) {
      const int64_t distance = kPhase + padding() - j * dilation(s_.dilation_w);
      if (distance % kStride != 0) continue;
      const int64_t window = x + distance / kStride;
      const LaneRange lanes{std::max<int64_t>(-window, 0), std::min(live, s_.OW - window)};
      sum = windows_.add_edge(sum, first + window, tap + j, lanes);
    }
    return sum;
  }

  static int64_t kernel(int64_t size) { return kKernel ? kKernel : size; }
  static int64_t dilation(int64_t size) { return kKernel ? 1 : size; }
  int64_t padding() const { return kKernel ? kPadding : s_.padding_w; }

  const MaxPool2dShape s_;
  const Windows<T, uint8_t> windows_;
};

// NCHW with 2x2 windows side by side, the most common of all: a vector of windows is four vectors of elements.
template <class T>
class TileBackward {
 public:
  TileBackward(const MaxPool2dShape& shape, Windows<T, uint8_t> windows) : s_(shape), windows_(windows) {}

  static int64_t row_pairs(const MaxPool2dShape& s) { return s.N * s.C * at::divup(s.H, 2); }

  // Pairs of rows of the input, [begin, end) of row_pairs(); the last of a plane may be a single one, or have no windows.
  void rows(int64_t begin, int64_t end, T* grad_input) const {
    const int64_t pairs = at::divup(s_.H, 2);
    const auto first_element = [&](int64_t pair) { return (pair / pairs * s_.H + pair % pairs * 2) * s_.W; };
    T* const chunk_end = grad_input + first_element(end);
    grad_input += first_element(begin);
    int64_t y = begin % pairs, first = (begin / pairs * s_.OH + std::min(y, s_.OH)) * s_.OW;
    for (int64_t pair = begin; pair < end; ++pair) {
      const bool two = 2 * y + 1 < s_.H;
      const int64_t columns = y < s_.OH ? s_.OW : 0;
      // Descending, so that surplus lanes fall on a row's start that is yet to be written.
      for (int64_t w = (s_.W - 1) / kStrip * kStrip; w >= 0; w -= kStrip) {
        tile(first + w / 2, columns - w / 2, grad_input + w, two ? grad_input + s_.W + w : nullptr, chunk_end);
      }
      grad_input += two ? 2 * s_.W : s_.W;
      first += columns;
      if (++y == pairs) y = 0;
    }
  }

 private:
  static constexpr int64_t kStrip = 2 * kLanes<T>;

  // The windows from `first` on, of which `columns` are left in their row.
  void tile(int64_t first, int64_t columns, T* upper, T* lower, T* chunk_end) const {
    const LaneRange lanes{0, std::min(kLanes<T>, columns)};
    const bool whole = columns > 0 && windows_.grad.holds(first, kLanes<T>);
    const auto store_row = [&](T* row, int64_t tap) {
      const Vec<Compute<T>> zero(0);
      const auto even = whole ? windows_.add(zero, first, tap, lanes) : windows_.add_edge(zero, first, tap, lanes);
      const auto odd = whole ? windows_.add(zero, first, tap + 1, lanes) : windows_.add_edge(zero, first, tap + 1, lanes);
      const auto [low, high] = at::vec::interleave2(even, odd);
      store(row, low, chunk_end - row);
      store(row + kLanes<T>, high, chunk_end - row - kLanes<T>);
    };
    store_row(upper, 0);
    if (lower) store_row(lower, 2);
  }

  const MaxPool2dShape s_;
  const Windows<T, uint8_t> windows_;
};

// Finds the elements that argmaxes name, in an image whose element (h, w) of channel c is number
// (h W + w) pitch + c channel_step.
template <class A>
class Elements {
 public:
  Elements(const MaxPool2dShape& shape, const A* argmax, int64_t pitch, int64_t channel_step)
      : s_(shape), argmax_(argmax), pitch_(pitch), channel_step_(channel_step) {
    for (int64_t tap = 0; kTable && tap < s_.taps(); ++tap) table_[tap] = divide(tap);
    const int64_t last_w = s_.W - 1 - (s_.kernel_w - 1) * s_.dilation_w + s_.padding_w;
    inside_begin_ = std::min(s_.OW, at::divup(s_.padding_w, s_.stride_w));
    inside_end_ = last_w < 0 ? inside_begin_ : std::max(inside_begin_, std::min(s_.OW, last_w / s_.stride_w + 1));
  }

  // f(window, element) for the windows of row y of image n, in order; the element is -1 if there is none.
  template <class F>
  void for_row(int64_t n, int64_t y, const F& f) const {
    s_.C == 1 ? for_row<true>(n, y, f) : for_row<false>(n, y, f);
  }

 private:
  struct Tap {
    int64_t h, w, offset;
  };

  template <bool kOneChannel, class F>
  void for_row(int64_t n, int64_t y, const F& f) const {
    const int64_t h0 = y * s_.stride_h - s_.padding_h;
    const bool inside = h0 >= 0 && h0 + (s_.kernel_h - 1) * s_.dilation_h < s_.H;
    const int64_t begin = inside ? inside_begin_ : s_.OW, end = inside ? inside_end_ : s_.OW;
    if (begin > 0) for_columns<false, kOneChannel>(n, y, 0, begin, f);
    if (end > begin) for_columns<true, kOneChannel>(n, y, begin, end, f);
    if (s_.OW > end) for_columns<false, kOneChannel>(n, y, end, s_.OW, f);
  }

  // Not inlined, because the loop needs all the registers there are: half the time.
  template <bool kInside, bool kOneChannel, class F>
  C10_NOINLINE void for_columns(int64_t n, int64_t y, int64_t x, int64_t end, const F f) const {
    const uint64_t H = s_.H, W = s_.W, taps = s_.taps();
    const int64_t C = kOneChannel ? 1 : s_.C, pitch = pitch_, channel_step = channel_step_, stride_w = s_.stride_w;
    const int64_t h0 = y * s_.stride_h - s_.padding_h;
    int64_t w0 = x * stride_w - s_.padding_w, first = (h0 * s_.W + w0) * pitch;
    int64_t window = ((n * s_.OH + y) * s_.OW + x) * C;
    for (; x < end; ++x, w0 += stride_w, first += stride_w * pitch) {
      for (int64_t c = 0; c < C; ++c, ++window) {
        const A argmax = argmax_[window];
        int64_t element = -1;
        if (static_cast<uint64_t>(argmax) < taps) {
          const Tap tap = find(argmax);
          if (kInside || (static_cast<uint64_t>(h0 + tap.h) < H && static_cast<uint64_t>(w0 + tap.w) < W)) {
            element = first + tap.offset + c * channel_step;
          }
        }
        f(window, element);
      }
    }
  }

  Tap find(A argmax) const {
    if constexpr (kTable) {
      return table_[argmax];
    } else {
      return divide(argmax);
    }
  }

  Tap divide(int64_t tap) const {
    const int64_t h = tap / s_.kernel_w * s_.dilation_h, w = tap % s_.kernel_w * s_.dilation_w;
    return {h, w, (h * s_.W + w) * pitch_};
  }

  static constexpr bool kTable = std::is_same_v<A, uint8_t>;  // spares the division
  const MaxPool2dShape s_;
  const A* const argmax_;
  const int64_t pitch_, channel_step_;
  int64_t inside_begin_, inside_end_;  // the columns of windows whose taps are all in bounds
  std::array<Tap, kTable ? 255 : 1> table_;
};

// Zeroes an image, then adds window by window. T must be able to hold partial sums.
template <class T, class A>
void scatter(const MaxPool2dShape& s, const T* grad_output, const A* argmax, T* grad_input) {
  at::parallel_for(0, s.N, rows_per_fork(s.OH * s.OW * s.C / 2), [&](int64_t begin, int64_t end) {
    const Elements<A> elements(s, argmax, s.C, 1);
    const int64_t image_size = s.H * s.W * s.C;
    for (int64_t n = begin; n < end; ++n) {
      T* const image = grad_input + n * image_size;
      std::fill_n(image, image_size, T(0));
      for (int64_t y = 0; y < s.OH; ++y) {
        elements.for_row(n, y, [image, grad_output](int64_t window, int64_t element) {
          if (element >= 0) image[element] += grad_output[window];
        });
      }
    }
  });
}

template <class T, class A>
void backward(const MaxPool2dBackwardArgs& args) {
  const MaxPool2dShape& s = args.shape;
  const auto* grad_output = static_cast<const T*>(args.grad_output);
  const auto* argmax = static_cast<const A*>(args.argmax);
  auto* grad_input = static_cast<T*>(args.grad_input);
  const Windows<T, A> windows{{grad_output, s.N * s.C * s.OH * s.OW}, argmax};

  // Gathering costs about taps / kLanes of a scattered element, more where many lanes lie idle. It is also the way of a
  // 16-bit type whose partial sums need float32.
  const bool columns = !s.channels_last && s.stride_w <= 2 && std::is_same_v<A, uint8_t>;
  const bool overlap = s.stride_h <= (s.kernel_h - 1) * s.dilation_h || s.stride_w <= (s.kernel_w - 1) * s.dilation_w;
  const bool full_lanes = columns || (s.channels_last && s.C >= 2 * kLanes<T>);
  if ((s.taps() > kLanes<T> || !full_lanes) && !(is_reduced<T> && overlap)) {
    return scatter(as_channels_last(s), grad_output, argmax, grad_input);
  }
  const int64_t covering = at::divup(s.taps(), s.stride_h * s.stride_w) + 1;
  if constexpr (std::is_same_v<A, uint8_t>) {
    const auto gather = [&](auto kernel) {
      at::parallel_for(0, s.N * s.C * s.H, rows_per_fork(at::divup(s.W, kLanes<T>) * covering),
                       [&](int64_t begin, int64_t end) { decltype(kernel)(kernel).rows(begin, end, grad_input); });
    };
    if (!s.channels_last && is_square(s, 2, 2) && s.stride_h == 2 && s.padding_h == 0 && s.padding_w == 0) {
      return at::parallel_for(0, TileBackward<T>::row_pairs(s), rows_per_fork(4 * at::divup(s.OW, kLanes<T>)), 
                              [&](int64_t begin, int64_t end) { TileBackward<T>(s, windows).rows(begin, end, grad_input); });
    }
    if (columns) {
      if (is_square(s, 3, 2) && s.padding_w == 1) return gather(ColumnGather<2, 3, 1, T>(s, windows));
      if (is_square(s, 3, 1) && s.padding_w == 1) return gather(ColumnGather<1, 3, 1, T>(s, windows));
      if (s.stride_w == 2) return gather(ColumnGather<2, 0, 0, T>(s, windows));
      return gather(ColumnGather<1, 0, 0, T>(s, windows));
    }
  }
  const MaxPool2dShape images = as_channels_last(s);
  at::parallel_for(0, images.N * images.H, rows_per_fork(images.W * at::divup(images.C, kLanes<T>) * covering),
                   [&](int64_t begin, int64_t end) {
                     ChannelGather<T, A>(images, windows).rows(begin, end, grad_input);
                   });
}

}  // namespace

void max_pool2d_backward(const MaxPool2dBackwardArgs& args) {
  dispatch_floating(args.dtype, [&](auto t) {
    using T = decltype(t);
    max_pool2d_argmax_is_u8(args.shape.taps()) ? backward<T, uint8_t>(args) : backward<T, int64_t>(args);
  });
}

namespace {

// f(window, element, image) for all windows, in parallel; elements are numbered as in Elements.
template <class F>
void for_all_windows(const MaxPool2dShape& s, const void* argmax, int64_t pitch, int64_t channel_step, const F& f) {
  const auto run = [&](const auto* taps) {
    at::parallel_for(0, s.N * s.OH, rows_per_fork(s.OW * s.C), [&](int64_t begin, int64_t end) {
      const Elements elements(s, taps, pitch, channel_step);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / s.OH;
        elements.for_row(n, row % s.OH, [n, f](int64_t window, int64_t element) { f(window, element, n); });
      }
    });
  };
  max_pool2d_argmax_is_u8(s.taps()) ? run(static_cast<const uint8_t*>(argmax)) : run(static_cast<const int64_t*>(argmax));
}

}  // namespace

void max_pool2d_gather(const MaxPool2dGatherArgs& args) {
  dispatch_real(args.dtype, [&](auto t) {
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
  // No element becomes element 0, so that every index may be used.
  for_all_windows(
      as_channels_last(args.shape), args.argmax, 1, 0,
      [indices = args.indices](int64_t window, int64_t element, int64_t) { indices[window] = std::max<int64_t>(element, 0); });
}

}  // namespace pyops::cpu
