// grad_input[element of window v] += grad_output[v]     for every window v
// NCHW or NHWC, the same for all operands. The element of a window is the one its argmax names; an argmax that names no
// tap in bounds names no element, and its gradient goes nowhere.
//
// The obvious backward zeroes grad_input and scatters into it. Here, where windows are small, every input element
// gathers: it asks each window over it, of which there are kernel / stride along an axis, whether the argmax is this
// very tap, a vector of elements at a time. Every element is written once and nothing is zeroed first.
// 64x6x28x28, 2x2 windows, one core with AVX-512: 41 us, scattered 180, stock torch 85. Where windows are large or
// leave most lanes idle the elements are scattered after all, one image at a time, so that it is still in cache.
//
// Both ways add in window order, so the result depends neither on threads nor on the way taken; 16-bit types add in
// float32 and round once. No argmax is trusted: gathering only ever compares it, scattering checks it.
#include <algorithm>

#include "max_pool2d.h"
#include "max_pool2d_backward_avx512.h"
#include "max_pool2d_backward_patterns.h"
#include "max_pool2d_elements.h"
#include "scratch.h"

namespace pyops::cpu {
namespace {

// The windows, as an array of gradients and one of taps.
template <class T>
struct Windows {
  using C = Compute<T>;

  Flat<T> grad;
  const uint8_t* argmax;

  // sum + the gradients of those windows of a vector, from `first` on, whose argmax is `tap`; `lanes` are the windows
  // that count. Reads whole vectors.
  Vec<C> add(Vec<C> sum, int64_t first, int64_t tap, LaneRange lanes = {0, kLanes<T>}) const {
    const auto gradients = load_lanes(grad.data + first);
#ifdef CPU_CAPABILITY_AVX512
    // One comparison of bytes straight into a mask register, which Vectorized does not have.
    if constexpr (std::is_same_v<C, float>) {
      const __m128i taps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(argmax + first));
      const __mmask16 chosen = _mm_mask_cmpeq_epi8_mask(lanes.mask16(), taps, _mm_set1_epi8(static_cast<char>(tap)));
      return _mm512_mask_add_ps(sum, chosen, sum, gradients);
    }
#endif
    const Vec<C> chosen = gradients & (widen<C>(argmax + first) == Vec<C>(static_cast<C>(tap)));
    return sum + (lanes.end - lanes.begin < kLanes<T> ? lanes.select(chosen, C(0)) : chosen);
  }

  // The same, reading only these lanes.
  Vec<C> add_edge(Vec<C> sum, int64_t first, int64_t tap, LaneRange lanes) const {
    if (lanes.begin >= lanes.end) return sum;
    if (grad.holds(first, kLanes<T>)) return add(sum, first, tap, lanes);
    std::array<C, kLanes<T>> chosen{};
    for (int64_t l = lanes.begin; l < lanes.end; ++l) {
      if (argmax[first + l] == tap) chosen[l] = grad.data[first + l];
    }
    return sum + Vec<C>::loadu(chosen.data());
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
template <class T>
class ChannelGather {
 public:
  static constexpr int64_t kMany = 4;  // vectors that share the search for windows

  ChannelGather(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

  // Rows of the input, [begin, end) of N * H.
  void rows(int64_t begin, int64_t end, T* grad_input) const {
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
    for (int64_t v = 0; v < kVectors; ++v) store_lanes(grad_input + v * kLanes<T>, sums[v], room - v * kLanes<T>);
  }

  const MaxPool2dShape s_;
  const Windows<T> windows_;
};

// NCHW with stride_w = kStride, 1 or 2: strips of kStride vectors of columns, the even and the odd columns apart until
// they are stored, because they are different taps of the same run of windows. A kKernel other than 0 stands for a
// square kernel of that size, padding_w = kPadding and no dilation, so that the loops over taps disappear.
template <int64_t kStride, int64_t kKernel, int64_t kPadding, class T>
class ColumnGather {
 public:
  ColumnGather(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

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
        store_lanes(grad_input, even, room);
      } else {
        const auto [low, high] = at::vec::interleave2(even, odd);
        store_lanes(grad_input, low, room);
        store_lanes(grad_input + kLanes<T>, high, room - kLanes<T>);
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
  const Windows<T> windows_;
};

// NCHW with 2x2 windows side by side, the most common of all: a vector of windows is four vectors of elements.
template <class T>
class TileBackward {
 public:
  TileBackward(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

  static int64_t row_pairs(const MaxPool2dShape& s) { return s.N * s.C * at::divup(s.H, 2); }

  // Pairs of rows of the input, [begin, end) of row_pairs(); the last of a plane may be one row, or have no windows.
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
      const auto odd =
          whole ? windows_.add(zero, first, tap + 1, lanes) : windows_.add_edge(zero, first, tap + 1, lanes);
      const auto [low, high] = at::vec::interleave2(even, odd);
      store_lanes(row, low, chunk_end - row);
      store_lanes(row + kLanes<T>, high, chunk_end - row - kLanes<T>);
    };
    store_row(upper, 0);
    if (lower) store_row(lower, 2);
  }

  const MaxPool2dShape s_;
  const Windows<T> windows_;
};

// NHWC with windows side by side and whole vectors of channels: every window writes the pixels that are its own. (Parts
// of vectors, masked, take three times as long as scattering.)
template <class T>
class ChannelTiles {
 public:
  ChannelTiles(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

  static bool take(const MaxPool2dShape& s) {
    return s.channels_last && s.C % kLanes<T> == 0 && s.kernel_h == s.stride_h && s.kernel_w == s.stride_w &&
           s.padding_h == 0 && s.padding_w == 0 && s.dilation_h == 1 && s.dilation_w == 1 && s.OH * s.kernel_h <= s.H &&
           s.OW * s.kernel_w <= s.W;
  }

  // Rows of windows, [begin, end) of N * OH; the last one of an image has the rows below it that no window reaches.
  void rows(int64_t begin, int64_t end, T* grad_input) const {
    const int64_t line = s_.W * s_.C, reached = s_.OW * s_.kernel_w * s_.C;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / s_.OH, y = row % s_.OH;
      T* lines = grad_input + (n * s_.H + y * s_.kernel_h) * line;
      for (int64_t x = 0; x < s_.OW; ++x) window((row * s_.OW + x) * s_.C, lines + x * s_.kernel_w * s_.C, line);
      for (int64_t i = 0; i < s_.kernel_h && reached < line; ++i)
        std::fill(lines + i * line + reached, lines + (i + 1) * line, T(0));
      if (y == s_.OH - 1) std::fill(lines + s_.kernel_h * line, grad_input + (n + 1) * s_.H * line, T(0));
    }
  }

 private:
  void window(int64_t first, T* pixels, int64_t line) const {
    for (int64_t c = 0; c < s_.C; c += kLanes<T>)
      for (int64_t i = 0; i < s_.kernel_h; ++i)
        for (int64_t j = 0; j < s_.kernel_w; ++j)
          store_lanes(pixels + i * line + j * s_.C + c,
                      windows_.add(Vec<Compute<T>>(0), first + c, i * s_.kernel_w + j), kLanes<T>);
  }

  const MaxPool2dShape s_;
  const Windows<T> windows_;
};

// Zeroes an image, then adds window by window; a 16-bit image in float32 first.
template <class T, class A>
void scatter(const MaxPool2dShape& s, const T* grad_output, const A* argmax, T* grad_input) {
  using C = Compute<T>;
  at::parallel_for(0, s.N, rows_per_fork(s.OH * s.OW * s.C / 2), [&](int64_t begin, int64_t end) {
    const Elements<A> elements(s, argmax, s.C, 1);
    const int64_t image_size = s.H * s.W * s.C;
    for (int64_t n = begin; n < end; ++n) {
      T* const image = grad_input + n * image_size;
      C* sums;
      if constexpr (is_reduced<T>) {
        sums = scratch<C>(Scratch::image_sums, image_size);
      } else {
        sums = image;
      }
      std::fill_n(sums, image_size, C(0));
      for (int64_t y = 0; y < s.OH; ++y) {
        elements.for_row(n, y, [sums, grad_output](int64_t window, int64_t element) {
          if (element >= 0) sums[element] += static_cast<C>(grad_output[window]);
        });
      }
      if constexpr (is_reduced<T>) std::copy_n(sums, image_size, image);
    }
  });
}

template <class T>
void gather(const MaxPool2dShape& s, Windows<T> windows, T* grad_input) {
  const int64_t windows_of_element = at::divup(s.taps(), s.stride_h * s.stride_w);
  // kernel.rows() on a copy in every chunk, because a store through grad_input might otherwise alias the original.
  const auto run = [&](int64_t rows, int64_t vectors_of_row, const auto& kernel) {
    at::parallel_for(0, rows, rows_per_fork(vectors_of_row * (1 + windows_of_element)),
                     [&](int64_t begin, int64_t end) {
                       const auto own = kernel;
                       own.rows(begin, end, grad_input);
                     });
  };
  const auto run_columns = [&](const auto& kernel) { run(s.N * s.C * s.H, at::divup(s.W, kLanes<T>), kernel); };

  if (ChannelTiles<T>::take(s)) {
    run(s.N * s.OH, s.OW * s.taps() * at::divup(s.C, kLanes<T>), ChannelTiles<T>(s, windows));
  } else if (s.channels_last) {
    run(s.N * s.H, s.W * at::divup(s.C, kLanes<T>), ChannelGather<T>(s, windows));
  } else if (is_square(s, 2, 2) && s.stride_h == 2 && s.padding_h == 0 && s.padding_w == 0) {
    run(TileBackward<T>::row_pairs(s), 2 * at::divup(s.W, kLanes<T>), TileBackward<T>(s, windows));
  } else if (is_square(s, 3, 2) && s.padding_w == 1) {
    run_columns(ColumnGather<2, 3, 1, T>(s, windows));
  } else if (is_square(s, 3, 1) && s.padding_w == 1) {
    run_columns(ColumnGather<1, 3, 1, T>(s, windows));
  } else if (s.stride_w == 2) {
    run_columns(ColumnGather<2, 0, 0, T>(s, windows));
  } else {
    run_columns(ColumnGather<1, 0, 0, T>(s, windows));
  }
}

template <class T, class A>
void backward(const MaxPool2dBackwardArgs& args) {
  const MaxPool2dShape& s = args.shape;
  const auto* grad_output = static_cast<const T*>(args.grad_output);
  const auto* argmax = static_cast<const A*>(args.argmax);
  auto* grad_input = static_cast<T*>(args.grad_input);
  if constexpr (std::is_same_v<A, uint8_t>) {
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (std::is_same_v<T, float>) {
      if (PatternBackward::takes(s)) {
        const PatternBackward patterns(s);
        if (patterns.fits()) return patterns.run(grad_output, argmax, grad_input);
      }
      const bool by_pairs = !s.channels_last && s.stride_h == 2;
      if (by_pairs && is_square(s, 2, 2) && s.padding_h == 0 && s.padding_w == 0)
        return backward_by_row_pairs<RowPair2x2>(s, grad_output, argmax, grad_input);
      if (by_pairs && is_square(s, 3, 2) && s.padding_h == 1 && s.padding_w == 1)
        return backward_by_row_pairs<RowPair3x3>(s, grad_output, argmax, grad_input);
    }
#endif
    // To gather one element costs about taps / kLanes of what it costs to scatter one, and more with idle lanes.
    const bool lanes_busy =
        s.channels_last ? s.C >= ChannelGather<T>::kMany * kLanes<T> || ChannelTiles<T>::take(s) : s.stride_w <= 2;
    if (s.taps() <= kLanes<T> && lanes_busy) {
      return gather(s, Windows<T>{{grad_output, s.N * s.C * s.OH * s.OW}, argmax}, grad_input);
    }
  }
  scatter(as_channels_last(s), grad_output, argmax, grad_input);
}

}  // namespace

void max_pool2d_backward(const MaxPool2dBackwardArgs& args) {
  dispatch_floating(args.dtype, [&](auto t) {
    using T = decltype(t);
    max_pool2d_argmax_is_u8(args.shape.taps()) ? backward<T, uint8_t>(args) : backward<T, int64_t>(args);
  });
}

}  // namespace pyops::cpu
