// output = the largest tap of each window, and argmax = its number. Three more kernels use the argmax: the backward
// (grad_input = the sum of grad_output over the windows that an element won), the gather that is its transpose, and
// torch's indices. Images are [N, C, H, W] in either layout, which is the same for all operands. The argmax is a byte
// where 255 taps suffice, else int64.
//
// A thread writes one element or, where sizes and pointers allow it (neighbours() decides), up to 16 bytes of
// contiguous ones: channels in N H W C, and the columns of 2x2 windows in N C H W. The backward gathers: a thread looks
// at the argmax of the few windows that contain its element, so nothing is cleared, nothing is atomic, and each sum is
// rounded once. Non-overlapping windows that cover the image need no search: each has a thread that writes all its
// elements. Compared with stock's int64 indices, a byte argmax reduces the traffic of the backward by a factor of 2.1
// to 2.4. It is written even if no gradient is needed, because the op returns it; it is one of the 21 bytes that a 2x2
// window of float moves.
//
// A tap wins if (v > max) || isnan(v): ties keep the first tap, the last of several NaNs wins, and a window of -inf
// gives its first tap in bounds. Taps out of bounds never win, and an argmax that names no tap in bounds belongs to no
// element. With a byte argmax and 32-bit offsets, the kernels take at most 64 registers on sm_80 and sm_90, so that an
// SM holds four blocks of 256 threads; for integers 96, two blocks; in other cases at most 134. They take no shared
// memory.
#include "algorithms.h"
#include "max_pool2d/running_max.h"

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

template <class T, class A, class Index, int count>
__device__ __forceinline__ void store_winners(const RunningMax<T, Index> (&winners)[count], int64_t number, T* output,
                                              A* argmax, bool rectify, A dead) {
  Vector<T, count> values;
  Vector<A, count> taps;
#pragma unroll
  for (int e = 0; e < count; ++e) {
    values.values[e] = winners[e].value(rectify);
    taps.values[e] = winners[e].argmax(rectify, dead);
  }
  *reinterpret_cast<Vector<T, count>*>(output + number) = values;
  if (argmax != nullptr) *reinterpret_cast<Vector<A, count>*>(argmax + number) = taps;
}

// A thread takes `pack` contiguous channels of a window. `pack` divides C; if it is 1, any layout will do.
template <class T, class A, class Index, int pack>
__global__ void __launch_bounds__(block_threads, 1)
    forward(Pool<Index> pool, const T* input, T* output, A* argmax, bool rectify, A dead) {
  const int64_t number = thread_number() * pack;
  if (number >= pool.output.count) return;
  const Position<Index> at = pool.output.position(static_cast<Index>(number));
  const Index h0 = at.h * pool.stride_h.value() - pool.padding_h;
  const Index w0 = at.w * pool.stride_w.value() - pool.padding_w;
  const auto dilation_h = pool.dilation_h.value();
  const auto dilation_w = pool.dilation_w.value();
  const Taps<Index> rows(h0, pool.kernel_h, dilation_h, pool.input.height());
  const Taps<Index> columns(w0, pool.kernel_w, dilation_w, pool.input.width());
  RunningMax<T, Index> winners[pack];
#pragma unroll
  for (auto& winner : winners) winner.tap = rows.begin * pool.kernel_w + columns.begin;
  for (Index i = rows.begin; i < rows.end; ++i) {
    for (Index j = columns.begin; j < columns.end; ++j) {
      const T* taps = input + pool.input.offset(at.n, at.c, h0 + i * dilation_h, w0 + j * dilation_w);
      const auto values = *reinterpret_cast<const Vector<T, pack>*>(taps);
#pragma unroll
      for (int e = 0; e < pack; ++e) winners[e].update(widen(values.values[e]), i * pool.kernel_w + j);
    }
  }
  store_winners(winners, number, output, argmax, rectify, dead);
}

// Non-overlapping 2x2 windows in N C H W: a thread takes `pack` columns of two rows, where `pack` divides W.
template <class T, int pack>
__global__ void __launch_bounds__(block_threads, 1)
    forward_2x2(Pool<int32_t> pool, const T* input, T* output, uint8_t* argmax, bool rectify, uint8_t dead) {
  const int64_t number = thread_number() * (pack / 2);
  if (number >= pool.output.count) return;
  const Position<int32_t> at = pool.output.position(static_cast<int32_t>(number));
  RunningMax<T, int32_t> winners[pack / 2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t h = at.h * 2 + i;
    if (h >= pool.input.height()) break;
    const auto values = *reinterpret_cast<const Vector<T, pack>*>(input + pool.input.offset(at.n, at.c, h, at.w * 2));
#pragma unroll
    for (int e = 0; e < pack; ++e) winners[e / 2].update(widen(values.values[e]), i * 2 + e % 2);
  }
  store_winners(winners, number, output, argmax, rectify, dead);
}

// Along one dimension, the windows [begin, end) that can contain the element at `position`, counted from the padding
// on.
template <class Index>
struct Windows {
  Index begin, end;
  __device__ Windows(Index position, Index reach, const Divider<Index>& stride, Index count) {
    begin = position < reach ? 0 : stride.quotient(position - reach) + 1;
    end = stride.quotient(position) + 1;
    if (end > count) end = count;
  }
};

// A thread takes `pack` contiguous channels of an element. `pack` divides C; if it is 1, any layout will do.
template <class T, class A, class Index, int pack>
__global__ void __launch_bounds__(block_threads, 1)
    backward(Pool<Index> pool, const T* grad_output, const A* argmax, T* grad_input) {
  const int64_t number = thread_number() * pack;
  if (number >= pool.input.count) return;
  const Position<Index> at = pool.input.position(static_cast<Index>(number));
  const Index h = at.h + pool.padding_h, w = at.w + pool.padding_w;
  const auto dilation_h = pool.dilation_h.value();
  const auto dilation_w = pool.dilation_w.value();
  const Windows<Index> rows(h, (pool.kernel_h - 1) * dilation_h + 1, pool.stride_h, pool.output.height());
  const Windows<Index> columns(w, (pool.kernel_w - 1) * dilation_w + 1, pool.stride_w, pool.output.width());
  Compute<T> sums[pack] = {};
  for (Index y = rows.begin; y < rows.end; ++y) {
    Index i = h - y * pool.stride_h.value();
    if (dilation_h > 1 && take_digit(i, pool.dilation_h) != 0) continue;
    for (Index x = columns.begin; x < columns.end; ++x) {
      Index j = w - x * pool.stride_w.value();
      if (dilation_w > 1 && take_digit(j, pool.dilation_w) != 0) continue;
      const Index window = pool.output.offset(at.n, at.c, y, x);
      const auto winners = *reinterpret_cast<const Vector<A, pack>*>(argmax + window);
      const auto grads = *reinterpret_cast<const Vector<T, pack>*>(grad_output + window);
#pragma unroll
      for (int e = 0; e < pack; ++e)
        if (winners.values[e] == static_cast<A>(i * pool.kernel_w + j)) sums[e] += widen(grads.values[e]);
    }
  }
  Vector<T, pack> results;
#pragma unroll
  for (int e = 0; e < pack; ++e) results.values[e] = narrow<T>(sums[e]);
  *reinterpret_cast<Vector<T, pack>*>(grad_input + number) = results;
}

// A sum of one term. Like the longer ones it begins with zero, so that -0.0 becomes 0.0.
template <class T>
__device__ __forceinline__ T sum_of_one(T term) {
  return narrow<T>(widen(term) + Compute<T>(0));
}

// The backward of non-overlapping windows that cover the image: a thread takes a window, or `pack` channels of it, and
// writes all its elements.
template <class T, class A, class Index, int pack>
__global__ void __launch_bounds__(block_threads, 1)
    backward_of_tiles(Pool<Index> pool, const T* grad_output, const A* argmax, T* grad_input) {
  const int64_t number = thread_number() * pack;
  if (number >= pool.output.count) return;
  const Position<Index> at = pool.output.position(static_cast<Index>(number));
  const auto grads = *reinterpret_cast<const Vector<T, pack>*>(grad_output + number);
  const auto winners = *reinterpret_cast<const Vector<A, pack>*>(argmax + number);
  const T none = narrow<T>(Compute<T>(0));
  int64_t tap = 0;
  for (Index i = 0; i < pool.kernel_h; ++i) {
    T* row = grad_input + pool.input.offset(at.n, at.c, at.h * pool.kernel_h + i, at.w * pool.kernel_w);
    for (Index j = 0; j < pool.kernel_w; ++j, ++tap) {
      Vector<T, pack> values;
#pragma unroll
      for (int e = 0; e < pack; ++e)
        values.values[e] = static_cast<int64_t>(winners.values[e]) == tap ? sum_of_one(grads.values[e]) : none;
      *reinterpret_cast<Vector<T, pack>*>(row + j * pool.input.w_stride) = values;
    }
  }
}

// The backward of non-overlapping 2x2 windows in N C H W that cover the image: a thread writes `pack` columns of two
// rows.
template <class T, int pack>
__global__ void __launch_bounds__(block_threads, 1)
    backward_2x2(Pool<int32_t> pool, const T* grad_output, const uint8_t* argmax, T* grad_input) {
  const int64_t number = thread_number() * (pack / 2);
  if (number >= pool.output.count) return;
  const Position<int32_t> at = pool.output.position(static_cast<int32_t>(number));
  const auto grads = *reinterpret_cast<const Vector<T, pack / 2>*>(grad_output + number);
  const auto winners = *reinterpret_cast<const Vector<uint8_t, pack / 2>*>(argmax + number);
  const T none = narrow<T>(Compute<T>(0));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Vector<T, pack> values;
#pragma unroll
    for (int e = 0; e < pack; ++e)
      values.values[e] = winners.values[e / 2] == i * 2 + e % 2 ? sum_of_one(grads.values[e / 2]) : none;
    T* row = grad_input + pool.input.offset(at.n, at.c, at.h * 2 + i, at.w * 2);
    *reinterpret_cast<Vector<T, pack>*>(row) = values;
  }
}

// The element that the argmax of a window names, h W + w in its plane; -1 if it names no tap in bounds.
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
  result[number] = element < 0 ? 0 : element;  // 0 is a valid index
}

// Whether the windows are tiles that cover the image.
bool tile_images(const MaxPool2dShape& s) {
  return s.is_tiled() && s.OH * s.kernel_h == s.H && s.OW * s.kernel_w == s.W;
}

template <class A, class Index>
constexpr bool is_narrow = std::is_same_v<A, uint8_t> && std::is_same_v<Index, int32_t>;

// Calls f(A{}, Index{}) for the type of the argmax and the type of offsets. Windows may begin and end outside their
// image, and offsets have room for that.
template <class F>
cudaError_t dispatch(const MaxPool2dShape& s, F&& f) {
  const int64_t window = (s.kernel_h - 1) * s.dilation_h + s.stride_h + (s.kernel_w - 1) * s.dilation_w + s.stride_w;
  const int64_t largest = s.N * s.C * (s.H * s.W + s.OH * s.OW) + window + s.taps() + s.H + s.W;
  return dispatch_index(largest, [&](auto index) {
    return max_pool2d_argmax_is_u8(s.taps()) ? f(uint8_t{}, index) : f(int64_t{}, index);
  });
}

// The contiguous elements that a thread takes together. They need a byte argmax and 32-bit offsets.
struct Neighbours {
  enum Along { none, channels, columns } along;
  int count;
};

// Chooses 16 bytes of channels in N H W C, and 16 bytes of columns or two columns of 2x2 windows in N C H W. Other
// shapes and pointers are taken element by element.
template <class T>
Neighbours neighbours(const MaxPool2dShape& s, const void* images, const void* pooled, const void* argmax) {
  constexpr int pack = Pack<T>::size;
  if (s.channels_last) {
    const bool packs = s.C % pack == 0 && aligned_to_packs(images, pooled) && aligned_to(pack, argmax);
    return {packs ? Neighbours::channels : Neighbours::none, pack};
  }
  const bool two_by_two = s.kernel_h == 2 && s.kernel_w == 2 && s.stride_h == 2 && s.stride_w == 2 &&
                          s.padding_h == 0 && s.padding_w == 0 && s.dilation_h == 1 && s.dilation_w == 1;
  for (const int count : {pack, 2}) {
    const bool aligned = aligned_to(count * sizeof(T), images) && aligned_to(count / 2 * sizeof(T), pooled) &&
                         aligned_to(count / 2, argmax);
    if (two_by_two && s.W % count == 0 && aligned) return {Neighbours::columns, count};
  }
  return {Neighbours::none, 1};
}

template <class T>
cudaError_t launch_forward(const MaxPool2dArgs& x, bool rectify, cudaStream_t stream) {
  const auto* input = static_cast<const T*>(x.input);
  auto* output = static_cast<T*>(x.output);
  return dispatch(x.shape, [&](auto a, auto index) {
    using A = decltype(a);
    using Index = decltype(index);
    const Pool<Index> pool(x.shape);
    const auto run = [&](auto kernel, int64_t windows) {
      return launch_for(kernel, pool.output.count / windows, stream, pool, input, output, static_cast<A*>(x.argmax),
                        rectify, static_cast<A>(dead_window(x.shape.taps())));
    };
    if constexpr (is_narrow<A, Index>) {
      const auto [along, count] = neighbours<T>(x.shape, input, output, x.argmax);
      if (along == Neighbours::channels) return run(forward<T, A, Index, Pack<T>::size>, count);
      if (along == Neighbours::columns)
        return count == 2 ? run(forward_2x2<T, 2>, 1) : run(forward_2x2<T, Pack<T>::size>, count / 2);
    }
    return run(forward<T, A, Index, 1>, 1);
  });
}

using BackwardProblem = Launch<MaxPool2dBackwardArgs>;

// `tiles`: every window writes its own elements, which cover the image.
template <class T>
cudaError_t launch_backward(const MaxPool2dBackwardArgs& x, bool tiles, cudaStream_t stream) {
  const auto* grad_output = static_cast<const T*>(x.grad_output);
  auto* grad_input = static_cast<T*>(x.grad_input);
  return dispatch(x.shape, [&](auto a, auto index) {
    using A = decltype(a);
    using Index = decltype(index);
    const Pool<Index> pool(x.shape);
    const auto run = [&](auto kernel, int64_t count) {
      return launch_for(kernel, count, stream, pool, grad_output, static_cast<const A*>(x.argmax), grad_input);
    };
    const int64_t elements = pool.input.count, windows = pool.output.count;
    if constexpr (is_narrow<A, Index>) {
      constexpr int pack = Pack<T>::size;
      const auto [along, count] = neighbours<T>(x.shape, grad_input, grad_output, x.argmax);
      if (along == Neighbours::channels)
        return tiles ? run(backward_of_tiles<T, A, Index, pack>, windows / count)
                     : run(backward<T, A, Index, pack>, elements / count);
      if (along == Neighbours::columns && tiles)
        return count == 2 ? run(backward_2x2<T, 2>, windows) : run(backward_2x2<T, pack>, windows / (count / 2));
    }
    return tiles ? run(backward_of_tiles<T, A, Index, 1>, windows) : run(backward<T, A, Index, 1>, elements);
  });
}

template <bool tiles>
cudaError_t run_backward(const BackwardProblem& x) {
  return dispatch_floating(x.args.dtype, [&](auto t) { return launch_backward<decltype(t)>(x.args, tiles, x.stream); });
}

constexpr Algorithm<BackwardProblem> backward_algorithms[] = {
    // No search for the windows of an element.
    {"tiles", "cuda/max_pool2d.cu", [](const BackwardProblem& x) { return tile_images(x.args.shape); },
     always<BackwardProblem>, run_backward<true>},
    {"gather", "cuda/max_pool2d.cu", always<BackwardProblem>, always<BackwardProblem>, run_backward<false>},
};

[[maybe_unused]] const bool listed = choices::max_pool2d_backward.list(backward_algorithms);

}  // namespace

cudaError_t max_pool2d(const MaxPool2dArgs& x, Workspace&, cudaStream_t stream) {
  return dispatch_real(x.dtype, [&](auto t) { return launch_forward<decltype(t)>(x, false, stream); });
}

cudaError_t max_pool2d_rectified(const MaxPool2dArgs& x, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) { return launch_forward<decltype(t)>(x, true, stream); });
}

cudaError_t max_pool2d_backward(const MaxPool2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  const BackwardProblem problem{x, workspace, stream};
  return choose(choices::max_pool2d_backward, backward_algorithms, problem).run(problem);
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
