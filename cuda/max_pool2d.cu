// output = the largest tap of each window, argmax = its number; and what is done by the argmax: grad_input = the sum of
// grad_output over the windows that an element won, the gather that is its transpose, and torch's indices.
// [N, C, H, W] in either layout, the same for all operands; argmax is a byte where 255 taps suffice, else int64.
//
// One thread for each element that is written. The backward gathers: an element looks at the argmax of the few windows
// that it lies in, so there is nothing to clear, nothing atomic, and one rounding. Windows side by side that cover the
// image need no search: a thread for each writes all its elements. Against stock's int64 indices the argmax saves 2.1
// to 2.4 of the traffic of the backward.
//
// A tap wins if (v > max) || isnan(v): ties keep the first, of several NaNs the last one wins, a window of -inf gives
// its first tap in bounds. Taps out of bounds never win; an argmax that names no tap in bounds is of no element.
// Registers (sm_90): at most 56, and 94 with offsets of 64 bits; no shared memory.
#include "images.h"

namespace pyops::cuda {
namespace {

template <class Index>
struct Pool {
  Images<Index> input, output;
  Index kernel_h, kernel_w, padding_h, padding_w;
  Divider<Index> stride_h, stride_w, dilation_h, dilation_w;

  explicit Pool(const MaxPool2dShape& s)
      : input(s.N, s.C, s.H, s.W, s.channels_last),
        output(s.N, s.C, s.OH, s.OW, s.channels_last),
        kernel_h(static_cast<Index>(s.kernel_h)),
        kernel_w(static_cast<Index>(s.kernel_w)),
        padding_h(static_cast<Index>(s.padding_h)),
        padding_w(static_cast<Index>(s.padding_w)),
        stride_h(s.stride_h),
        stride_w(s.stride_w),
        dilation_h(s.dilation_h),
        dilation_w(s.dilation_w) {}
};

template <class T, class A, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    forward(Pool<Index> pool, const T* input, T* output, A* argmax, bool rectify, A dead) {
  const int64_t number = thread_number();
  if (number >= pool.output.count) return;
  const Position<Index> at = pool.output.position(static_cast<Index>(number));
  const Index h0 = at.h * pool.stride_h.value() - pool.padding_h;
  const Index w0 = at.w * pool.stride_w.value() - pool.padding_w;
  const auto dilation_h = pool.dilation_h.value();
  const auto dilation_w = pool.dilation_w.value();
  const Taps<Index> rows(h0, pool.kernel_h, dilation_h, pool.input.height());
  const Taps<Index> columns(w0, pool.kernel_w, dilation_w, pool.input.width());
  Compute<T> max = lowest<T>;
  Index winner = rows.begin * pool.kernel_w + columns.begin;
  for (Index i = rows.begin; i < rows.end; ++i) {
    for (Index j = columns.begin; j < columns.end; ++j) {
      const Compute<T> value = widen(input[pool.input.offset(at.n, at.c, h0 + i * dilation_h, w0 + j * dilation_w)]);
      if (value > max || value != value) {
        max = value;
        winner = i * pool.kernel_w + j;
      }
    }
  }
  const bool is_dead = rectify && max <= 0;
  output[number] = narrow<T>(is_dead ? Compute<T>(0) : max);
  argmax[number] = is_dead ? dead : static_cast<A>(winner);
}

// The windows [begin, end) along one dimension that can hold the element at `position`, counted from the padding's.
template <class Index>
struct Windows {
  Index begin, end;
  __device__ Windows(Index position, Index reach, const Divider<Index>& stride, Index count) {
    begin = position < reach ? 0 : stride.quotient(position - reach) + 1;
    end = stride.quotient(position) + 1;
    if (end > count) end = count;
  }
};

template <class T, class A, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    backward(Pool<Index> pool, const T* grad_output, const A* argmax, T* grad_input) {
  const int64_t number = thread_number();
  if (number >= pool.input.count) return;
  const Position<Index> at = pool.input.position(static_cast<Index>(number));
  const Index h = at.h + pool.padding_h, w = at.w + pool.padding_w;
  const auto dilation_h = pool.dilation_h.value();
  const auto dilation_w = pool.dilation_w.value();
  const Windows<Index> rows(h, (pool.kernel_h - 1) * dilation_h + 1, pool.stride_h, pool.output.height());
  const Windows<Index> columns(w, (pool.kernel_w - 1) * dilation_w + 1, pool.stride_w, pool.output.width());
  Compute<T> sum = 0;
  for (Index y = rows.begin; y < rows.end; ++y) {
    Index i = h - y * pool.stride_h.value();
    if (dilation_h > 1 && take_digit(i, pool.dilation_h) != 0) continue;
    for (Index x = columns.begin; x < columns.end; ++x) {
      Index j = w - x * pool.stride_w.value();
      if (dilation_w > 1 && take_digit(j, pool.dilation_w) != 0) continue;
      const Index window = pool.output.offset(at.n, at.c, y, x);
      if (argmax[window] == static_cast<A>(i * pool.kernel_w + j)) sum += widen(grad_output[window]);
    }
  }
  grad_input[number] = narrow<T>(sum);
}

// The backward of windows side by side that cover the image: one thread for each window, which writes all its elements.
// Two neighbours along w are written at once where they lie so, in `pairs`.
template <class T, class A, class Index, bool pairs>
__global__ void __launch_bounds__(block_threads, 1)
    backward_side_by_side(Pool<Index> pool, const T* grad_output, const A* argmax, T* grad_input) {
  struct alignas(2 * sizeof(T)) Pair {
    T values[2];
  };
  const int64_t number = thread_number();
  if (number >= pool.output.count) return;
  const Position<Index> at = pool.output.position(static_cast<Index>(number));
  const T grad = grad_output[number], none = narrow<T>(Compute<T>(0));
  const auto winner = static_cast<int64_t>(argmax[number]);
  int64_t tap = 0;
  for (Index i = 0; i < pool.kernel_h; ++i) {
    T* row = grad_input + pool.input.offset(at.n, at.c, at.h * pool.kernel_h + i, at.w * pool.kernel_w);
    for (Index j = 0; j < pool.kernel_w; j += pairs ? 2 : 1) {
      const T first = tap == winner ? grad : none;
      if constexpr (pairs) {
        *reinterpret_cast<Pair*>(row + j) = {{first, tap + 1 == winner ? grad : none}};
      } else {
        row[j * pool.input.w_stride] = first;
      }
      tap += pairs ? 2 : 1;
    }
  }
}

// The element of a window, h W + w in its plane; -1 if the argmax names no tap in bounds.
template <class A, class Index>
__device__ int64_t plane_index(const Pool<Index>& pool, const Position<Index>& window, A argmax) {
  const auto tap = static_cast<int64_t>(argmax);
  if (tap < 0 || tap >= static_cast<int64_t>(pool.kernel_h) * pool.kernel_w) return -1;
  const auto i = static_cast<Index>(tap / pool.kernel_w), j = static_cast<Index>(tap % pool.kernel_w);
  const Index h = window.h * pool.stride_h.value() - pool.padding_h + i * pool.dilation_h.value();
  const Index w = window.w * pool.stride_w.value() - pool.padding_w + j * pool.dilation_w.value();
  const auto height = pool.input.height(), width = pool.input.width();
  return h >= 0 && h < height && w >= 0 && w < width ? static_cast<int64_t>(h) * width + w : -1;
}

template <class T, class A, class Index>
__global__ void __launch_bounds__(block_threads, 1)
    gather(Pool<Index> pool, const T* input, const A* argmax, T* output) {
  const int64_t number = thread_number();
  if (number >= pool.output.count) return;
  const Position<Index> at = pool.output.position(static_cast<Index>(number));
  const int64_t element = plane_index(pool, at, argmax[number]);
  const Index offset = pool.input.offset(at.n, at.c, 0, 0) + static_cast<Index>(element) * pool.input.w_stride;
  output[number] = element < 0 ? narrow<T>(Compute<T>(0)) : input[offset];
}

template <class A, class Index>
__global__ void __launch_bounds__(block_threads, 1) indices(Pool<Index> pool, const A* argmax, int64_t* result) {
  const int64_t number = thread_number();
  if (number >= pool.output.count) return;
  const int64_t element = plane_index(pool, pool.output.position(static_cast<Index>(number)), argmax[number]);
  result[number] = element < 0 ? 0 : element;  // one that may be used
}

bool side_by_side(const MaxPool2dShape& s) {
  return s.stride_h == s.kernel_h && s.stride_w == s.kernel_w && s.dilation_h == 1 && s.dilation_w == 1 &&
         s.padding_h == 0 && s.padding_w == 0 && s.OH * s.kernel_h == s.H && s.OW * s.kernel_w == s.W;
}

// f(A{}, Index{}) for the type of the argmax and that of offsets. A window may begin and end outside of its image.
template <class F>
cudaError_t dispatch(const MaxPool2dShape& s, F&& f) {
  const int64_t window = (s.kernel_h - 1) * s.dilation_h + s.stride_h + (s.kernel_w - 1) * s.dilation_w + s.stride_w;
  const int64_t largest = s.N * s.C * (s.H * s.W + s.OH * s.OW) + window + s.taps() + s.H + s.W;
  return dispatch_index(largest, [&](auto index) {
    return max_pool2d_argmax_is_u8(s.taps()) ? f(uint8_t{}, index) : f(int64_t{}, index);
  });
}

template <class T>
cudaError_t launch_forward(const MaxPool2dArgs& x, bool rectify, cudaStream_t stream) {
  return dispatch(x.shape, [&](auto a, auto index) {
    using A = decltype(a);
    using Index = decltype(index);
    const Pool<Index> pool(x.shape);
    return launch_for(forward<T, A, Index>, pool.output.count, stream, pool, static_cast<const T*>(x.input),
                      static_cast<T*>(x.output), static_cast<A*>(x.argmax), rectify,
                      static_cast<A>(dead_window(x.shape.taps())));
  });
}

}  // namespace

cudaError_t max_pool2d(const MaxPool2dArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch_real(x.dtype, [&](auto t) { return launch_forward<decltype(t)>(x, false, stream); });
}

cudaError_t max_pool2d_rectified(const MaxPool2dArgs& x, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) { return launch_forward<decltype(t)>(x, true, stream); });
}

cudaError_t max_pool2d_backward(const MaxPool2dBackwardArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    return dispatch(x.shape, [&](auto a, auto index) {
      using A = decltype(a);
      using Index = decltype(index);
      const Pool<Index> pool(x.shape);
      const auto run = [&](auto kernel, int64_t count) {
        return launch_for(kernel, count, stream, pool, static_cast<const T*>(x.grad_output),
                          static_cast<const A*>(x.argmax), static_cast<T*>(x.grad_input));
      };
      if (!side_by_side(x.shape)) return run(backward<T, A, Index>, pool.input.count);
      const bool pairs = !x.shape.channels_last && x.shape.kernel_w % 2 == 0 && aligned_to_packs(x.grad_input);
      return pairs ? run(backward_side_by_side<T, A, Index, true>, pool.output.count)
                   : run(backward_side_by_side<T, A, Index, false>, pool.output.count);
    });
  });
}

cudaError_t max_pool2d_gather(const MaxPool2dGatherArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    return dispatch(x.shape, [&](auto a, auto index) {
      using A = decltype(a);
      using Index = decltype(index);
      const Pool<Index> pool(x.shape);
      return launch_for(gather<T, A, Index>, pool.output.count, stream, pool, static_cast<const T*>(x.input),
                        static_cast<const A*>(x.argmax), static_cast<T*>(x.output));
    });
  });
}

cudaError_t max_pool2d_indices(const MaxPool2dIndicesArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch(x.shape, [&](auto a, auto index) {
    using A = decltype(a);
    using Index = decltype(index);
    const Pool<Index> pool(x.shape);
    return launch_for(indices<A, Index>, pool.output.count, stream, pool, static_cast<const A*>(x.argmax), x.indices);
  });
}

}  // namespace pyops::cuda
