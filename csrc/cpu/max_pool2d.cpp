// output[n, c, y, x] = max over taps (i, j) of
//   input[n, c, y stride_h - padding_h + i dilation_h, x stride_w - padding_w + j dilation_w]
// and argmax = i kernel_w + j of the tap that won. All operands are NCHW, or all are NHWC.
//
// The obvious loop takes windows one by one and branches on every tap. Here a vector holds one tap of many windows, and
// the running maximum and its tap are updated by comparison and blend. The windows are those of adjacent channels or
// columns, or where there are too few columns, of adjacent rows and planes too.
//
// Every window is computed by itself, so the result does not depend on threads or on the lane of a window. A tap wins
// if (v > max) || isnan(v): of equal taps the first wins, of several NaNs the last. Taps out of bounds are read as -inf
// (or the lowest integer), which is also where max starts, so they never win. argmax starts at the first tap in bounds,
// which is right if all taps are -inf. (A window without taps in bounds, which dilation allows, gives -inf.)
#include "max_pool2d/channels.h"
#include "max_pool2d/columns.h"
#include "max_pool2d/forward_2x2_avx512.h"
#include "max_pool2d/windows.h"
#include "runtime/algorithms.h"

namespace pyops::cpu {
namespace {

#ifdef CPU_CAPABILITY_AVX512
void pool_2x2(const MaxPool2dShape& s, const float* input, float* output, uint8_t* argmax) {
  parallel_for(s.N * s.C * s.OH, items_per_fork(s.OW / 4 + 1),
               [&](int64_t begin, int64_t end) { Windows2x2(s).rows(begin, end, input, output, argmax); });
}
#endif

// ---- the table of algorithms ----

template <class T, class A>
constexpr bool is_common = std::is_floating_point_v<Compute<T>> && std::is_same_v<A, uint8_t>;

// Calls a function of the shape, the input, the output and the argmax.
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
  static bool profitable(const MaxPool2dArgs& x) { return has_vector_compares && x.shape.OW >= lanes_of<T> / 4; }
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
  static bool profitable(const MaxPool2dArgs&) { return has_vector_compares; }
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
    {"columns", "csrc/cpu/max_pool2d/columns.h", Columns<T, A>::supports, Columns<T, A>::profitable,
     Columns<T, A>::run},
    // With so few columns, most lanes of a vector of columns would be idle.
    {"gathered_windows", "csrc/cpu/max_pool2d/windows.h", GatheredWindows<T, A>::supports,
     GatheredWindows<T, A>::profitable, GatheredWindows<T, A>::run},
    {"windows", "csrc/cpu/max_pool2d/windows.h", [](const MaxPool2dArgs& x) { return !x.shape.channels_last; },
     always<MaxPool2dArgs>, [](const MaxPool2dArgs& x) { call<T, A>(x, pool_windows<T, A>); }},
    {"channels", "csrc/cpu/max_pool2d/channels.h", [](const MaxPool2dArgs& x) { return x.shape.channels_last; },
     always<MaxPool2dArgs>, [](const MaxPool2dArgs& x) { call<T, A>(x, pool_channels<T, A>); }},
};

[[maybe_unused]] const bool listed = choices::max_pool2d.list(algorithms<float, uint8_t>);

}  // namespace

void max_pool2d(const MaxPool2dArgs& args) {
  if (are_columns(args.shape)) {
    MaxPool2dArgs rows = args;
    make_row(rows.shape);
    return max_pool2d(rows);
  }
  dispatch_real(args.dtype, [&](auto t) {
    using T = decltype(t);
    const auto pool = [&](auto argmax) {
      choose(choices::max_pool2d, algorithms<T, decltype(argmax)>, args).run(args);
    };
    max_pool2d_argmax_is_u8(args.shape.taps()) ? pool(uint8_t{}) : pool(int64_t{});
  });
}

}  // namespace pyops::cpu
