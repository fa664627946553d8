// output = relu(max_pool2d(conv2d(input, weight, bias))) and its gradients, a few images at a time: what the
// convolution writes is still in cache when the pooling reads it. All operands share one layout, NCHW or NHWC.
//
// The forward has three algorithms. The first two are for non-overlapping windows and work on CHWN blocks of images
// (conv2d/chwn.h), of which only the input and the pooled output are transposed. For 2x2 windows, if no tap leaves the
// image, the maximum is taken in registers (conv2d/fused_pool_2x2.h). Otherwise, with few channels, a block is
// convolved, and then the maxima of whole vectors are taken. In all other cases, convolution and pooling run one after
// the other on as many images as half an L2 cache holds. The backward works on CHWN blocks too, where the gradient of
// the convolution's output stays in cache.
//
// The maximum is taken before the rectification, with which it commutes. The gradient then needs nothing but the
// argmax, in which one extra number marks the windows that pass no gradient. The values, and the argmax of windows
// whose maximum is above 0, are bit-identical to those of the three separate ops; a window without gradient gives +0.
// The chunks depend on the shape only.
#include <algorithm>

#include "conv2d/batch_lanes.h"
#include "conv2d/fused_pool_2x2.h"

namespace pyops::cpu {
namespace {

// ---- CHWN blocks of images ----

// Whether the windows are tiles with an argmax that fits into a byte.
bool are_small_tiles(const MaxPool2dShape& s) {
  return s.is_tiled() && max_pool2d_argmax_is_u8(s.taps());
}

// Visits every window of some channels of an image: state = start(window), then f(state, pixel, tap) for every tap,
// then end(state, window). `window` is an element of the pooled image and `pixel` one of the image that is pooled.
template <class Start, class F, class End>
void for_each_window(const MaxPool2dShape& s, Range channels, const Start& start, const F& f, const End& end) {
  const Layout in(s.C, s.H, s.W, s.channels_last), out(s.C, s.OH, s.OW, s.channels_last);
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    for (int64_t y = 0; y < s.OH; ++y) {
      for (int64_t x = 0; x < s.OW; ++x) {
        const int64_t window = c * out.channel_stride + y * out.y_stride + x * out.x_stride;
        const int64_t first = c * in.channel_stride + y * s.stride_h * in.y_stride + x * s.stride_w * in.x_stride;
        auto state = start(window);
        for (int64_t i = 0; i < s.kernel_h; ++i)
          for (int64_t j = 0; j < s.kernel_w; ++j)
            f(state, first + i * in.y_stride + j * in.x_stride, i * s.kernel_w + j);
        end(state, window);
      }
    }
  }
}

// Computes the pooled block for non-overlapping windows of any size: first the convolution, then its maxima.
template <class T>
class PooledBlock {
  using C = Compute<T>;
  static constexpr int64_t lanes = lanes_of<T>;

 public:
  PooledBlock(const ConvProblem<T>& problem, const MaxPool2dShape& pool) : problem_(problem), pool_(pool) {}

  // Computes one block. A null argmax is not written.
  void operator()(const C* source, C* pooled, uint8_t* argmax, const Team& team) const {
    C* unpooled = scratch<C>(Scratch::output_block, problem_.output_size() * lanes);
    team.share([&](Share share) { problem_(source, unpooled, share); });
    team.share([&](Share share) {
      const Range channels = share.of(pool_.C);
      argmax ? pool<uint8_t>(unpooled, pooled, argmax, channels) : pool<void>(unpooled, pooled, argmax, channels);
    });
  }

 private:
  template <class A>
  void pool(const C* unpooled, C* pooled, uint8_t* argmax, Range channels) const {
    for_each_window(
        pool_, channels, [&](int64_t) { return rectified_max<C, A>(pool_.taps()); },
        [&](auto& best, int64_t pixel, int64_t tap) {
          best.update(rounded<T>(Vec<C>::loadu(unpooled + pixel * lanes)), tap);
        },
        [&](const auto& best, int64_t window) { store_max(best, pooled, argmax, window * lanes); });
  }

  const BatchLanesConvolution<T> problem_;
  const MaxPool2dShape& pool_;
};

template <class T, class Pooled>
void forward_of_blocks(const Conv2dReluMaxPool2dArgs& x, double flops, const Pooled& pooled_block) {
  using C = Compute<T>;
  constexpr int64_t lanes = lanes_of<T>;
  const Conv2dShape& s = x.conv.shape;
  const int64_t in = s.C * s.H * s.W, out = s.O * x.pool.OH * x.pool.OW;
  for_each_shared_task(ceil_div(s.N, lanes), flops, [&](int64_t task, const Team& team) {
    const int64_t first = task * lanes, count = std::min(lanes, s.N - first);
    C* source = scratch<C>(Scratch::source_block, in * lanes);
    C* pooled = scratch<C>(Scratch::pooled_block, out * lanes);
    uint8_t* argmax = x.argmax ? scratch<uint8_t>(Scratch::argmax_block, out * lanes) : nullptr;
    team.share(
        [&](Share share) { to_chwn(source, static_cast<const T*>(x.conv.input) + first * in, in, count, share); });
    pooled_block(source, pooled, argmax, team);
    team.share([&](Share share) {
      from_chwn(static_cast<T*>(x.output) + first * out, pooled, out, count, share);
      if (argmax) bytes_from_chwn(static_cast<uint8_t*>(x.argmax) + first * out, argmax, out, count, lanes, share);
    });
  });
}

template <class T>
void backward_of_pooled_blocks(const Conv2dReluMaxPool2dBackwardArgs& x) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int64_t lanes = V::size();
  const MaxPool2dShape& pool = x.pool;
  const int64_t out = pool.C * pool.OH * pool.OW, between = pool.C * pool.H * pool.W;
  const bool gaps = pool.OH * pool.kernel_h < pool.H || pool.OW * pool.kernel_w < pool.W;  // pixels of no window
  batch_lanes_backward<T>(x.conv, [&](int64_t first, int64_t count, C* block, const Team& team) {
    C* pooled = scratch<C>(Scratch::pooled_block, out * lanes);
    uint8_t* argmax = scratch<uint8_t>(Scratch::argmax_block, out * lanes);
    team.share([&](Share share) {
      to_chwn(pooled, static_cast<const T*>(x.grad_output) + first * out, out, count, share);
      bytes_to_chwn(argmax, static_cast<const uint8_t*>(x.argmax) + first * out, out, count, lanes, share);
      const Range elements = share.of(between);
      if (gaps) std::fill_n(block + elements.begin * lanes, elements.size() * lanes, C(0));
    });
    struct Window {
      V grad;
      const uint8_t* argmax;
    };
    team.share([&](Share share) {
      for_each_window(
          pool, share.of(pool.C),
          [&](int64_t window) { return Window{V::loadu(pooled + window * lanes), argmax + window * lanes}; },
          [&](const Window& window, int64_t pixel, int64_t tap) {
            won_by<C>(tap, window.grad, window.argmax).store(block + pixel * lanes);
          },
          [](const Window&, int64_t) {});
    });
  });
}

// ---- convolution, then pooling ----

template <class T, class A>
void rectify(T* values, A* argmax, int64_t count, A dead) {
  using C = Compute<T>;
  for (int64_t i = 0; i < count; ++i) {
    const bool is_dead = static_cast<C>(values[i]) <= C(0);
    values[i] = is_dead ? T(0) : values[i];
    argmax[i] = is_dead ? dead : argmax[i];
  }
}

// Computes images [n, n + count) of the batch. max_pool2d always writes an argmax; one that is not needed stays in
// scratch.
template <class T, class A>
void forward(const Conv2dReluMaxPool2dArgs& x, int64_t n, int64_t count, T* between) {
  const Conv2dShape& s = x.conv.shape;
  Conv2dArgs conv = x.conv;
  conv.shape.N = count;
  conv.input = static_cast<const T*>(x.conv.input) + n * s.C * s.H * s.W;
  conv.output = between;
  conv2d(conv);
  const int64_t pooled = s.O * x.pool.OH * x.pool.OW;
  T* output = static_cast<T*>(x.output) + n * pooled;
  A* argmax = x.argmax ? static_cast<A*>(x.argmax) + n * pooled : scratch<A>(Scratch::argmax_block, count * pooled);
  MaxPool2dShape pool = x.pool;
  pool.N = count;
  max_pool2d({conv.dtype, pool, between, output, argmax});
  rectify<T, A>(output, argmax, count * pooled, static_cast<A>(dead_window(pool.taps())));
}

// The problem, and the convolution in it.
template <class T>
struct FusedProblem {
  Conv2dReluMaxPool2dArgs args;
  ConvProblem<T> conv;

  const Conv2dShape& shape() const { return args.conv.shape; }
  int64_t in() const { return shape().C * shape().H * shape().W; }
  int64_t between() const { return shape().O * shape().OH * shape().OW; }
  int64_t out() const { return shape().O * args.pool.OH * args.pool.OW; }
  double flops() const { return 2.0 * static_cast<double>(shape().N * between() * conv.depth()); }
};

template <class T>
void forward_of_chunks(const FusedProblem<T>& problem) {
  const Conv2dReluMaxPool2dArgs& x = problem.args;
  // As many images as half an L2 cache of 1 MB holds. If that is at least a vector's lanes of images, it is rounded
  // down to a multiple of them, for convolutions with the batch in lanes (conv2d/batch_lanes.cpp).
  constexpr int64_t lanes = Vec<T>::size(), cached = (512 << 10) / sizeof(T);
  const Conv2dShape& s = problem.shape();
  const int64_t image = problem.between(), fitting = std::max(cached / image, int64_t{1});
  const int64_t count = std::min(fitting >= lanes ? fitting / lanes * lanes : fitting, s.N);
  for_each_task(ceil_div(s.N, count), problem.flops(), [&](int64_t task) {
    const int64_t n = task * count, images = std::min(count, s.N - n);
    T* between = scratch<T>(Scratch::between, count * image);
    max_pool2d_argmax_is_u8(x.pool.taps()) ? forward<T, uint8_t>(x, n, images, between)
                                           : forward<T, int64_t>(x, n, images, between);
  });
}

// Whether blocks of images in lanes give the bits of conv2d, which chooses its algorithm by itself.
template <class T>
bool supports_blocks(const FusedProblem<T>& x) {
  if (!are_small_tiles(x.args.pool)) return false;
  const Phases<T> conv{&x.conv, 1};
  const size_t row = chosen_row(choices::conv2d, convolution_algorithms<T>, conv);
  return agrees_with_batch_lanes(convolution_algorithms<T>[row].sums_in_order(conv), x.conv);
}

constexpr int64_t block_bytes = 1 << 20;  // of the blocks that are in use at a time

template <class T>
struct InRegisters2x2 {
  static bool supports(const FusedProblem<T>& x) {
    return supports_blocks(x) && Pooled2x2<T>::takes(x.conv, x.args.pool);
  }
  static bool profitable(const FusedProblem<T>& x) {
    const int64_t bytes = (x.in() + x.out()) * lanes_of<T> * int64_t{sizeof(Compute<T>)};
    return x.shape().N >= lanes_of<T> && bytes <= 2 * block_bytes;
  }
  static void run(const FusedProblem<T>& x) {
    forward_of_blocks<T>(x.args, x.flops(), Pooled2x2<T>(x.conv, x.args.pool));
  }
};

template <class T>
struct PooledBlocks {
  static bool supports(const FusedProblem<T>& x) { return supports_blocks(x); }
  static bool profitable(const FusedProblem<T>& x) {
    const int64_t bytes = (x.in() + x.between()) * lanes_of<T> * int64_t{sizeof(Compute<T>)};
    return x.shape().N >= lanes_of<T> && x.shape().O / x.shape().groups <= lanes_of<T> && bytes <= block_bytes;
  }
  static void run(const FusedProblem<T>& x) {
    forward_of_blocks<T>(x.args, x.flops(), PooledBlock<T>(x.conv, x.args.pool));
  }
};

template <class T>
constexpr Algorithm<FusedProblem<T>> forward_algorithms[] = {
    // The convolution is never stored.
    algorithm<InRegisters2x2<T>, FusedProblem<T>>("in_registers_2x2", "csrc/cpu/conv2d/fused_pool_2x2.h"),
    // The convolution of a block stays in cache, and is not transposed.
    algorithm<PooledBlocks<T>, FusedProblem<T>>("batch_lanes", "csrc/cpu/conv2d_relu_max_pool2d.cpp"),
    // With many channels, vectors along them are as good.
    {"chunks", "csrc/cpu/conv2d_relu_max_pool2d.cpp", always<FusedProblem<T>>, always<FusedProblem<T>>,
     forward_of_chunks<T>},
};

[[maybe_unused]] const bool listed_forward = choices::conv2d_relu_max_pool2d.list(forward_algorithms<float>);

// ---- backward ----

template <class T>
struct BackwardOfPooledBlocks {
  using Args = Conv2dReluMaxPool2dBackwardArgs;
  // The gradients have to be conv2d's to the last bit.
  static bool supports(const Args& x) { return are_small_tiles(x.pool) && uses_batch_lanes_backward<T>(x.conv); }
  static bool profitable(const Args&) { return true; }
  static void run(const Args& x) { backward_of_pooled_blocks<T>(x); }
};

// The last one leaves the gradients to the two backward ops.
template <class T>
constexpr Algorithm<Conv2dReluMaxPool2dBackwardArgs> backward_algorithms[] = {
    algorithm<BackwardOfPooledBlocks<T>, Conv2dReluMaxPool2dBackwardArgs>("batch_lanes",
                                                                          "csrc/cpu/conv2d_relu_max_pool2d.cpp"),
    {"two_ops", "csrc/conv2d_relu_max_pool2d.cpp", always<Conv2dReluMaxPool2dBackwardArgs>,
     always<Conv2dReluMaxPool2dBackwardArgs>, nullptr},
};

[[maybe_unused]] const bool listed_backward = choices::conv2d_relu_max_pool2d_backward.list(backward_algorithms<float>);

template <class Args>
Args with_rows(Args args) {
  make_row(args.conv.shape), make_row(args.pool);
  return args;
}

}  // namespace

void conv2d_relu_max_pool2d(const Conv2dReluMaxPool2dArgs& args) {
  if (are_columns(args.conv.shape, args.pool)) return conv2d_relu_max_pool2d(with_rows(args));
  dispatch_floating(args.conv.dtype, [&](auto zero) {
    using T = decltype(zero);
    Conv2dReluMaxPool2dArgs x = args;
    x.conv.relu = false;  // the pooling rectifies
    const FusedProblem<T> problem{x, forward_problem<T>(x.conv)};
    choose(choices::conv2d_relu_max_pool2d, forward_algorithms<T>, problem).run(problem);
  });
}

bool conv2d_relu_max_pool2d_backward(const Conv2dReluMaxPool2dBackwardArgs& x) {
  if (are_columns(x.conv.shape, x.pool)) return conv2d_relu_max_pool2d_backward(with_rows(x));
  bool computed = false;
  dispatch_floating(x.conv.dtype, [&](auto zero) {
    const auto run = choose(choices::conv2d_relu_max_pool2d_backward, backward_algorithms<decltype(zero)>, x).run;
    computed = run != nullptr;
    if (computed) run(x);
  });
  return computed;
}

}  // namespace pyops::cpu
