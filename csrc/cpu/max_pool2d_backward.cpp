// grad_input[element of window v] += grad_output[v]     for every window v
//
// All operands are NCHW, or all are NHWC. The element of a window is the one that its argmax names. An argmax that
// names no tap in bounds names no element, and its gradient goes nowhere.
//
// The obvious backward zeroes grad_input and scatters into it. Where the lanes of
// vectors can be used, the elements gather instead: a vector of input elements asks each window over it, of which there
// are kernel / stride along an axis, whether the argmax is this very tap. Every element is then written once, and
// nothing is zeroed first. Otherwise gradients are scattered after all, into one image or plane at a time, so that it
// is still in cache.
//
// All algorithms add in window order, so the result does not depend on the threads, nor on the algorithm except for the
// sign of a zero: the AVX-512 algorithms for non-overlapping windows copy a gradient of -0.0 that the others add to 0.
// 16-bit types add in float32 and round once. No argmax is trusted: gathering only ever compares it, and scattering
// checks it.
#include <algorithm>
#include <optional>

#include "max_pool2d/backward_patterns_avx512.h"
#include "max_pool2d/backward_row_pairs_avx512.h"
#include "max_pool2d/backward_scatter.h"
#include "max_pool2d/elements.h"
#include "max_pool2d/lanes.h"
#include "runtime/algorithms.h"
#include "runtime/scratch.h"

namespace pyops::cpu {
namespace {

// The windows, as an array of gradients and one of taps.
template <class T>
struct Windows {
  using C = Compute<T>;

  Flat<T> grad;
  const uint8_t* argmax;

  // sum + the gradients of those windows, in the vector from `first` on, whose argmax is `tap`; only the windows in
  // `lanes` count. Reads whole vectors.
  Vec<C> add(Vec<C> sum, int64_t first, int64_t tap, LaneRange lanes = {0, kLanes<T>}) const {
    const auto gradients = load_lanes(grad.data + first);
#ifdef CPU_CAPABILITY_AVX512
    // One comparison of bytes gives a mask register, which Vectorized does not offer.
    if constexpr (std::is_same_v<C, float>) {
      const __m128i taps = _mm_loadu_si128(reinterpret_cast<const __m128i*>(argmax + first));
      const __mmask16 chosen = _mm_mask_cmpeq_epi8_mask(lanes.mask16(), taps, _mm_set1_epi8(static_cast<char>(tap)));
      return _mm512_mask_add_ps(sum, chosen, sum, gradients);
    }
#endif
    const Vec<C> chosen = gradients & (widen<C>(argmax + first) == Vec<C>(static_cast<C>(tap)));
    return sum + (lanes.end - lanes.begin < kLanes<T> ? lanes.select(chosen, C(0)) : chosen);
  }

  // add() for vectors that may reach beyond the tensor: reads only these lanes if the whole vector does not exist.
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

// The windows over a position that moves along an axis, and which tap of each the position is.
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

  // The windows that may cover the position are [begin(), end()).
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

  // The tap of `window` at the position, or -1 if dilation skips it.
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

  // Computes the rows [begin, end) of the input's N * H.
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
  // Computes kVectors vectors of channels from c on.
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

// NCHW with non-overlapping 2x2 windows: a vector of windows is four vectors of elements.
template <class T>
class TileBackward {
 public:
  TileBackward(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

  static int64_t row_pairs(const MaxPool2dShape& s) { return s.N * s.C * at::divup(s.H, 2); }

  // Computes the pairs of rows [begin, end) of row_pairs(); the last pair of a plane may be one row, or have no
  // windows.
  void rows(int64_t begin, int64_t end, T* grad_input) const {
    const int64_t pairs = at::divup(s_.H, 2);
    const auto first_element = [&](int64_t pair) { return (pair / pairs * s_.H + pair % pairs * 2) * s_.W; };
    T* const chunk_end = grad_input + first_element(end);
    grad_input += first_element(begin);
    int64_t y = begin % pairs, first = (begin / pairs * s_.OH + std::min(y, s_.OH)) * s_.OW;
    for (int64_t pair = begin; pair < end; ++pair) {
      const bool two = 2 * y + 1 < s_.H;
      const int64_t columns = y < s_.OH ? s_.OW : 0;
      // In descending order, so that surplus lanes fall on the start of a row that is yet to be written.
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

  // Computes the windows from `first` on, of which `columns` are left in their row. The surplus lanes are masked once,
  // and all four taps are compared before anything is stored, because as far as gcc knows a store may change an argmax.
  void tile(int64_t first, int64_t columns, T* upper, T* lower, T* chunk_end) const {
    using V = Vec<Compute<T>>;
    const LaneRange lanes{0, std::min(kLanes<T>, columns)};
    std::array<uint8_t, kLanes<T>> part;
    const uint8_t* argmax = windows_.argmax + first;
    V grad(0);
    if (columns > 0 && windows_.grad.holds(first, kLanes<T>)) {
      grad = load_lanes(windows_.grad.data + first);
      if (lanes.end < kLanes<T>) grad = lanes.select(grad, Compute<T>(0));
    } else {
      part.fill(0);
      for (int64_t l = 0; l < lanes.end; ++l) part[l] = argmax[l];
      grad = windows_.grad.load_part(first, 1, lanes, Compute<T>(0));
      argmax = part.data();
    }
    grad = V(0) + grad;  // -0.0 becomes 0.0, as if added to 0
    std::array<V, 4> won;
#pragma GCC unroll 4
    for (int64_t tap = 0; tap < 4; ++tap) won[tap] = won_by<Compute<T>>(tap, grad, argmax);
    const auto store_row = [&](T* row, const V& even, const V& odd) {
      const auto [low, high] = at::vec::interleave2(even, odd);
      store_lanes(row, low, chunk_end - row);
      store_lanes(row + kLanes<T>, high, chunk_end - row - kLanes<T>);
    };
    store_row(upper, won[0], won[1]);
    if (lower) store_row(lower, won[2], won[3]);
  }

  const MaxPool2dShape s_;
  const Windows<T> windows_;
};

// NHWC with non-overlapping windows and whole vectors of channels: every window writes the pixels that belong to it
// alone. Partial vectors, with their masks, are slower than scattering.
template <class T>
class ChannelTiles {
 public:
  ChannelTiles(const MaxPool2dShape& shape, Windows<T> windows) : s_(shape), windows_(windows) {}

  static bool take(const MaxPool2dShape& s) {
    return s.taps() <= kLanes<T> && s.C % kLanes<T> == 0 && s.kernel_h == s.stride_h && s.kernel_w == s.stride_w &&
           s.padding_h == 0 && s.padding_w == 0 && s.dilation_h == 1 && s.dilation_w == 1 && s.OH * s.kernel_h <= s.H &&
           s.OW * s.kernel_w <= s.W;
  }

  // Computes the rows of windows [begin, end) of N * OH; the last row of an image also writes the rows of pixels below
  // it that no window reaches.
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

// NHWC, or any layout with large windows: zeroes an image, then adds window by window; a 16-bit image is summed in
// float32 first.
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

// Calls kernel.rows() for `rows` rows of `vectors` vectors each. Every chunk uses its own copy of the kernel, because a
// store through grad_input might alias a shared one.
template <class T, class Kernel>
void run_rows(const MaxPool2dShape& s, int64_t rows, int64_t vectors, const Kernel& kernel, T* grad_input) {
  const int64_t windows_of_element = at::divup(s.taps(), s.stride_h * s.stride_w);
  at::parallel_for(0, rows, rows_per_fork(vectors * (1 + windows_of_element)), [&](int64_t begin, int64_t end) {
    const auto own = kernel;
    own.rows(begin, end, grad_input);
  });
}

// ---- the table of algorithms ----

// The problem, with the types of its elements and of its argmax.
template <class T, class A>
struct Problem {
  const MaxPool2dBackwardArgs& args;
#ifdef CPU_CAPABILITY_AVX512
  mutable std::optional<PatternBackward> patterns_ = std::nullopt;

  // The patterns of the shape, which are found when they are first asked for.
  const PatternBackward& patterns() const {
    if (!patterns_) patterns_.emplace(shape());
    return *patterns_;
  }
#endif

  static constexpr bool has_bytes = std::is_same_v<A, uint8_t>;

  const MaxPool2dShape& shape() const { return args.shape; }
  const T* grad_output() const { return static_cast<const T*>(args.grad_output); }
  const A* argmax() const { return static_cast<const A*>(args.argmax); }
  T* grad_input() const { return static_cast<T*>(args.grad_input); }
  int64_t channel_vectors() const { return at::divup(shape().C, kLanes<T>); }
  Windows<T> windows() const {
    const MaxPool2dShape& s = shape();
    return {{grad_output(), s.N * s.C * s.OH * s.OW}, argmax()};
  }
};

// Non-overlapping 2x2 windows of planes.
bool are_tiles_2x2(const MaxPool2dShape& s) {
  return !s.channels_last && is_square(s, 2, 2) && s.stride_h == 2 && s.padding_h == 0 && s.padding_w == 0;
}

#ifdef CPU_CAPABILITY_AVX512
template <class T, class A>
constexpr bool has_avx512_kernels = std::is_same_v<T, float> && std::is_same_v<A, uint8_t>;

template <class T, class A>
struct Patterns {
  static bool supports(const Problem<T, A>& x) {
    return has_avx512_kernels<T, A> && PatternBackward::takes(x.shape()) && x.patterns().exist();
  }
  static bool profitable(const Problem<T, A>& x) { return x.patterns().use_most_lanes(); }
  static void run(const Problem<T, A>& x) {
    if constexpr (has_avx512_kernels<T, A>) x.patterns().run(x.grad_output(), x.argmax(), x.grad_input());
  }
};

template <class T, class A>
struct RowPairs2x2 {
  static bool supports(const Problem<T, A>& x) { return has_avx512_kernels<T, A> && are_tiles_2x2(x.shape()); }
  static void run(const Problem<T, A>& x) {
    if constexpr (has_avx512_kernels<T, A>)
      backward_by_row_pairs<RowPair2x2>(x.shape(), x.grad_output(), x.argmax(), x.grad_input());
  }
};

template <class T, class A>
struct RowPairs3x3 {
  static bool supports(const Problem<T, A>& x) {
    const MaxPool2dShape& s = x.shape();
    return has_avx512_kernels<T, A> && !s.channels_last && is_square(s, 3, 2) && s.stride_h == 2 && s.padding_h == 1 &&
           s.padding_w == 1;
  }
  static bool profitable(const Problem<T, A>& x) { return x.shape().W > 16; }
  static void run(const Problem<T, A>& x) {
    if constexpr (has_avx512_kernels<T, A>)
      backward_by_row_pairs<RowPair3x3>(x.shape(), x.grad_output(), x.argmax(), x.grad_input());
  }
};
#endif

template <class T, class A>
struct RowPairs {
  static bool supports(const Problem<T, A>& x) { return x.has_bytes && are_tiles_2x2(x.shape()); }
  static void run(const Problem<T, A>& x) {
    const MaxPool2dShape& s = x.shape();
    if constexpr (x.has_bytes)
      run_rows(s, TileBackward<T>::row_pairs(s), 2 * at::divup(s.W, kLanes<T>), TileBackward<T>(s, x.windows()),
               x.grad_input());
  }
};

template <class T, class A>
struct ScatterOfPlanes {
  static bool supports(const Problem<T, A>& x) { return x.has_bytes && !x.shape().channels_last; }
  static void run(const Problem<T, A>& x) {
    if constexpr (x.has_bytes) PlaneScatter<T>(x.shape()).run(x.grad_output(), x.argmax(), x.grad_input());
  }
};

template <class T, class A>
struct TilesOfChannels {
  static bool supports(const Problem<T, A>& x) {
    return x.has_bytes && x.shape().channels_last && ChannelTiles<T>::take(x.shape());
  }
  static void run(const Problem<T, A>& x) {
    const MaxPool2dShape& s = x.shape();
    if constexpr (x.has_bytes)
      run_rows(s, s.N * s.OH, s.OW * s.taps() * x.channel_vectors(), ChannelTiles<T>(s, x.windows()), x.grad_input());
  }
};

template <class T, class A>
struct GatherOfChannels {
  static bool supports(const Problem<T, A>& x) { return x.has_bytes && x.shape().channels_last; }
  // Gathering an element costs about taps / kLanes of what scattering one costs.
  static bool profitable(const Problem<T, A>& x) {
    return x.shape().taps() <= kLanes<T> && x.shape().C >= ChannelGather<T>::kMany * kLanes<T>;
  }
  static void run(const Problem<T, A>& x) {
    const MaxPool2dShape& s = x.shape();
    if constexpr (x.has_bytes)
      run_rows(s, s.N * s.H, s.W * x.channel_vectors(), ChannelGather<T>(s, x.windows()), x.grad_input());
  }
};

template <class T, class A>
constexpr Algorithm<Problem<T, A>> algorithms[] = {
#ifdef CPU_CAPABILITY_AVX512
    // Short rows leave no idle lanes.
    {"patterns", "csrc/cpu/max_pool2d/backward_patterns_avx512.h", Patterns<T, A>::supports, Patterns<T, A>::profitable,
     Patterns<T, A>::run},
    // Masks handle the ends of rows, for which row_pairs needs partial vectors.
    {"row_pairs_2x2", "csrc/cpu/max_pool2d/backward_row_pairs_avx512.h", RowPairs2x2<T, A>::supports,
     always<Problem<T, A>>, RowPairs2x2<T, A>::run},
    // Each pair of rows is written once, from two rows of windows. Rows no longer than a vector are faster by
    // scattering.
    {"row_pairs_3x3", "csrc/cpu/max_pool2d/backward_row_pairs_avx512.h", RowPairs3x3<T, A>::supports,
     RowPairs3x3<T, A>::profitable, RowPairs3x3<T, A>::run},
#endif
    // A vector of windows gives whole vectors of elements, which is cheaper than scattering.
    {"row_pairs", "csrc/cpu/max_pool2d_backward.cpp", RowPairs<T, A>::supports, always<Problem<T, A>>,
     RowPairs<T, A>::run},
    // For other shapes, gathering vectors of columns is slower than scattering.
    {"plane_scatter", "csrc/cpu/max_pool2d/backward_scatter.h", ScatterOfPlanes<T, A>::supports, always<Problem<T, A>>,
     ScatterOfPlanes<T, A>::run},
    // Every window writes pixels of its own, so that there is no search for windows and nothing to add.
    {"channel_tiles", "csrc/cpu/max_pool2d_backward.cpp", TilesOfChannels<T, A>::supports, always<Problem<T, A>>,
     TilesOfChannels<T, A>::run},
    {"channel_gather", "csrc/cpu/max_pool2d_backward.cpp", GatherOfChannels<T, A>::supports,
     GatherOfChannels<T, A>::profitable, GatherOfChannels<T, A>::run},
    {"scatter", "csrc/cpu/max_pool2d_backward.cpp", always<Problem<T, A>>, always<Problem<T, A>>,
     [](const Problem<T, A>& x) { scatter(as_channels_last(x.shape()), x.grad_output(), x.argmax(), x.grad_input()); }},
};

[[maybe_unused]] const bool listed = choices::max_pool2d_backward.list(algorithms<float, uint8_t>);

}  // namespace

void max_pool2d_backward(const MaxPool2dBackwardArgs& args) {
  dispatch_floating(args.dtype, [&](auto t) {
    using T = decltype(t);
    const auto backward = [&](auto argmax) {
      using A = decltype(argmax);
      const Problem<T, A> problem{args};
      choose(choices::max_pool2d_backward, algorithms<T, A>, problem).run(problem);
    };
    max_pool2d_argmax_is_u8(args.shape.taps()) ? backward(uint8_t{}) : backward(int64_t{});
  });
}

}  // namespace pyops::cpu
