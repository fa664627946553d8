// grad_input[element of window v] += grad_output[v]     for every window v
//
// All operands are NCHW, or all are NHWC. The element of a window is the one that its argmax names. An argmax that
// names no tap in bounds names no element, and its gradient goes nowhere.
//
// The obvious backward zeroes grad_input and scatters into it, here one image or plane at a time, which stays in cache.
// Where that is faster, the elements gather instead: a vector of elements compares its tap with the argmax of every
// window that covers it. Every element is then written once, and nothing is zeroed first. If the windows do not
// overlap, there is one such window, and a vector of windows gives the vectors of their elements.
//
// All algorithms add in window order, so the result depends neither on the threads nor on the algorithm. 16-bit types
// add in float32 and round once. No argmax is trusted: gathering only ever compares it, and scattering checks it.
#include <algorithm>
#include <optional>

#include "max_pool2d/backward_channels.h"
#include "max_pool2d/backward_patterns_avx512.h"
#include "max_pool2d/backward_row_pairs.h"
#include "max_pool2d/backward_row_pairs_avx512.h"
#include "max_pool2d/backward_scatter.h"
#include "runtime/algorithms.h"
#include "runtime/parallel.h"

namespace pyops::cpu {
namespace {

// Calls kernel.rows() for `rows` rows of `vectors` vectors each. Every chunk uses its own copy of the kernel, because a
// store through grad_input might alias a shared one.
template <class T, class Kernel>
void run_rows(const MaxPool2dShape& s, int64_t rows, int64_t vectors, const Kernel& kernel, T* grad_input) {
  const int64_t windows_of_element = ceil_div(s.taps(), s.stride_h * s.stride_w);
  parallel_for(rows, items_per_fork(vectors * (1 + windows_of_element)), [&](int64_t begin, int64_t end) {
    const auto own = kernel;
    own.rows(begin, end, grad_input);
  });
}

// ---- the table of algorithms ----

template <class A>
constexpr bool has_bytes = std::is_same_v<A, uint8_t>;

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

  const MaxPool2dShape& shape() const { return args.shape; }
  const T* grad_output() const { return static_cast<const T*>(args.grad_output); }
  const A* argmax() const { return static_cast<const A*>(args.argmax); }
  T* grad_input() const { return static_cast<T*>(args.grad_input); }
  int64_t channel_vectors() const { return ceil_div(shape().C, lanes_of<T>); }
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
  static bool supports(const Problem<T, A>& x) { return has_bytes<A> && are_tiles_2x2(x.shape()); }
  // In shorter rows, too many lanes are idle (with AVX-512 this was not measured). bench/algorithms.py compares them.
  static bool profitable(const Problem<T, A>& x) {
    return has_vector_compares && x.shape().OW > by_capability<int64_t>(0, 12, 0);
  }
  static void run(const Problem<T, A>& x) {
    const MaxPool2dShape& s = x.shape();
    if constexpr (has_bytes<A>)
      run_rows(s, TileBackward<T>::row_pairs(s), 2 * ceil_div(s.W, lanes_of<T>), TileBackward<T>(s, x.windows()),
               x.grad_input());
  }
};

template <class T, class A>
struct ScatterOfPlanes {
  static bool supports(const Problem<T, A>& x) { return has_bytes<A> && !x.shape().channels_last; }
  static void run(const Problem<T, A>& x) {
    if constexpr (has_bytes<A>) PlaneScatter<T>(x.shape()).run(x.grad_output(), x.argmax(), x.grad_input());
  }
};

template <class T, class A>
struct TilesOfChannels {
  static bool supports(const Problem<T, A>& x) {
    return has_bytes<A> && x.shape().channels_last && ChannelTiles<T>::take(x.shape());
  }
  static bool profitable(const Problem<T, A>&) { return has_vector_compares; }
  static void run(const Problem<T, A>& x) {
    const MaxPool2dShape& s = x.shape();
    if constexpr (has_bytes<A>)
      run_rows(s, s.N * s.OH, s.OW * s.taps() * x.channel_vectors(), ChannelTiles<T>(s, x.windows()), x.grad_input());
  }
};

template <class T, class A>
struct GatherOfChannels {
  static bool supports(const Problem<T, A>& x) { return has_bytes<A> && x.shape().channels_last; }
  // Gathering an element costs about taps / lanes_of of what scattering one costs.
  static bool profitable(const Problem<T, A>& x) {
    return has_vector_compares && x.shape().taps() <= lanes_of<T> &&
           x.shape().C >= ChannelGather<T>::vectors_at_once * lanes_of<T>;
  }
  static void run(const Problem<T, A>& x) {
    const MaxPool2dShape& s = x.shape();
    if constexpr (has_bytes<A>)
      run_rows(s, s.N * s.H, s.W * x.channel_vectors(), ChannelGather<T>(s, x.windows()), x.grad_input());
  }
};

template <class T, class A>
constexpr Algorithm<Problem<T, A>> algorithms[] = {
#ifdef CPU_CAPABILITY_AVX512
    // Vectors continue across short rows, so that few lanes are idle.
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
    {"row_pairs", "csrc/cpu/max_pool2d/backward_row_pairs.h", RowPairs<T, A>::supports, RowPairs<T, A>::profitable,
     RowPairs<T, A>::run},
    // Overlapping windows of planes are scattered.
    {"plane_scatter", "csrc/cpu/max_pool2d/backward_scatter.h", ScatterOfPlanes<T, A>::supports, always<Problem<T, A>>,
     ScatterOfPlanes<T, A>::run},
    // Every window writes pixels of its own, so that there is no search for windows and nothing to add.
    {"channel_tiles", "csrc/cpu/max_pool2d/backward_channels.h", TilesOfChannels<T, A>::supports,
     TilesOfChannels<T, A>::profitable, TilesOfChannels<T, A>::run},
    {"channel_gather", "csrc/cpu/max_pool2d/backward_channels.h", GatherOfChannels<T, A>::supports,
     GatherOfChannels<T, A>::profitable, GatherOfChannels<T, A>::run},
    {"scatter", "csrc/cpu/max_pool2d/backward_scatter.h", always<Problem<T, A>>, always<Problem<T, A>>,
     [](const Problem<T, A>& x) { scatter(as_channels_last(x.shape()), x.grad_output(), x.argmax(), x.grad_input()); }},
};

[[maybe_unused]] const bool listed = choices::max_pool2d_backward.list(algorithms<float, uint8_t>);

}  // namespace

void max_pool2d_backward(const MaxPool2dBackwardArgs& args) {
  if (are_columns(args.shape)) {
    MaxPool2dBackwardArgs rows = args;
    make_row(rows.shape);
    return max_pool2d_backward(rows);
  }
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
