// conv2d, forward and backward, as products of gemm.h over the patches of patches.h (implicit GEMM, no im2col buffer).
//
// With g a group, K = (channel, tap), P = the output pixels of all images:
//
//   output      N C H W: [O/g, P] = weight [O/g, K] patches(input) [K, P]
//               N H W C: [P, O/g] = patches(input) [P, K] weight^T [K, O/g]
//   grad_input  the same product with the channels of the weight swapped, over patches of grad_output. The pixels whose
//               coordinates have the same remainders by the stride meet the same taps, so each of the stride_h x stride_w
//               remainders (a phase) is a convolution of stride 1 with its share of the taps: no zeros are multiplied
//               and every element is written once, where col2im would add into it.
//   grad_weight N C H W: [K, O/g] = patches(input) [K, P] grad_output^T [P, O/g]
//               N H W C: [O/g, K] = grad_output^T [O/g, P] patches(input) [P, K]
//
// Guarantees: those of gemm.h; a sample's output does not depend on the batch that it is in; the sums run over the taps
// inside of the image only, also where values are infinite (nonfinite.h).
#include "nonfinite.h"
#include "sums.h"

namespace pyops::cpu {
namespace {

// How a batch of images [N, channels, height, width] lies in memory.
struct Layout {
  int64_t image_stride, channel_stride, y_stride, x_stride;

  Layout(int64_t channels, int64_t height, int64_t width, bool channels_last)
      : image_stride(channels * height * width),
        channel_stride(channels_last ? 1 : height * width),
        y_stride(channels_last ? width * channels : width),
        x_stride(channels_last ? channels : 1) {}
};

// One convolution of `patches`, whose image pointer is that of group 0, with weights arranged as arrange() does.
template <class T>
struct Correlation {
  bool channels_last;
  int64_t images, groups;
  int64_t out_channels;  // of a group
  Patches<T> patches;
  const T* weight;
  T* output;  // of group 0, at the first pixel
  int64_t out_channel_stride;
  Axis out_pixels;
  const T* bias;
};

template <class T>
void correlate_finite(const Correlation<T>& x) {
  const int64_t M = x.out_channels, P = x.images * x.patches.pixels(), K = x.patches.channels * x.patches.tap_count;
  const auto patches_of = [&](int64_t g) {
    Patches<T> patches = x.patches;
    patches.image += g * patches.channels * patches.channel_stride;
    return patches;
  };
  const auto bias_of = [&](int64_t g) { return x.bias ? x.bias + g * M : nullptr; };
  const auto output_of = [&](int64_t g) { return x.output + g * M * x.out_channel_stride; };
  const auto weight_of = [&](int64_t g) { return x.weight + g * M * K; };
  if (x.channels_last) {
    gemm<T>(x.groups, P, M, K, [&](int64_t g) {
      return GemmOperands<T, PatchColumns<T>, DenseMatrix<T>>{
          {patches_of(g)},
          {weight_of(g), M, 1},
          {output_of(g), x.out_pixels, Axis::plain(1), nullptr, bias_of(g)},
          0,
          K};
    });
  } else {
    gemm<T>(x.groups, M, P, K, [&](int64_t g) {
      return GemmOperands<T, DenseMatrix<T>, PatchRows<T>>{
          {weight_of(g), K, 1},
          {patches_of(g)},
          {output_of(g), Axis::plain(x.out_channel_stride), x.out_pixels, bias_of(g), nullptr},
          0,
          K};
    });
  }
}

template <class T>
void correlate(const Correlation<T>& x) {
  const Patches<T>& p = x.patches;
  const int64_t in = p.channels, out = x.out_channels, per_group = out * in * p.tap_count, count = x.groups * per_group;
  if (!leaves_image(p) || all_finite(x.weight, count)) return correlate_finite(x);

  const std::vector<T> finite = finite_part(x.weight, count);
  Correlation<T> finite_x = x;
  finite_x.weight = finite.data();
  correlate_finite(finite_x);
  for_each_task(x.images, 2.0 * x.images * p.pixels() * count, [&](int64_t n) {
    for (int64_t i = 0; i < count; ++i) {
      if (is_finite(x.weight[i])) continue;
      const int64_t g = i / per_group, j = i % per_group;
      const int64_t o = x.channels_last ? j % out : j / (in * p.tap_count);
      const int64_t c = x.channels_last ? j / out % in : j / p.tap_count % in;
      const int64_t tap = x.channels_last ? j / (out * in) : j % p.tap_count;
      T* image = x.output + (g * out + o) * x.out_channel_stride + n * x.out_pixels.image_stride;
      for_each_inside(p, n, g * in + c, p.taps[tap], [&](int64_t y, int64_t column, T value) {
        add_product(image[y * x.out_pixels.y_stride + column * x.out_pixels.x_stride], x.weight[i], value);
      });
    }
  });
}

// A dimension of the weight as arrange() walks it.
struct Dim {
  int64_t size, stride;
};

// The weights of every group for correlate: [out][in][tap] or, for channels last, [tap][in][out], from the elements
// weight[g * group_stride + out * .. + in * .. + tap_index[tap]].
template <class T>
const T* arrange(const T* weight, int64_t groups, int64_t group_stride, Dim out, Dim in, const int64_t* tap_index,
                 int64_t tap_count, bool channels_last) {
  T* arranged = scratch<T>(Scratch::weight, groups * out.size * in.size * tap_count);
  const int64_t out_step = channels_last ? 1 : in.size * tap_count;
  const int64_t in_step = channels_last ? out.size : tap_count;
  const int64_t tap_step = channels_last ? in.size * out.size : 1;
  for_each_task(groups * in.size, 16.0 * groups * in.size * out.size * tap_count, [&](int64_t task) {
    const int64_t g = task / in.size, i = task % in.size;
    const T* source = weight + g * group_stride + i * in.stride;
    T* target = arranged + g * out.size * in.size * tap_count + i * in_step;
    for (int64_t o = 0; o < out.size; ++o)
      for (int64_t t = 0; t < tap_count; ++t)
        target[o * out_step + t * tap_step] = source[o * out.stride + tap_index[t]];
  });
  return arranged;
}

// The taps of the forward, in the order of the weight.
Tap* forward_taps(const Conv2dShape& s) {
  Tap* taps = scratch<Tap>(Scratch::taps, s.kernel_h * s.kernel_w);
  for (int64_t i = 0; i < s.kernel_h; ++i)
    for (int64_t j = 0; j < s.kernel_w; ++j)
      taps[i * s.kernel_w + j] = {i * s.dilation_h - s.padding_top, j * s.dilation_w - s.padding_left};
  return taps;
}

template <class T>
Patches<T> input_patches(const Conv2dShape& s, const T* input) {
  const Layout layout(s.C, s.H, s.W, s.channels_last);
  return {input,      layout.image_stride, layout.channel_stride, layout.y_stride, layout.x_stride,
          s.H,        s.W,                 s.C / s.groups,        s.stride_h,      s.stride_w,
          s.OH,       s.OW,                forward_taps(s),       s.kernel_h * s.kernel_w};
}

template <class T>
void forward(const Conv2dArgs& x) {
  const Conv2dShape& s = x.shape;
  const int64_t out = s.O / s.groups, in = s.C / s.groups, tap_count = s.kernel_h * s.kernel_w;
  const T* weight = static_cast<const T*>(x.weight);
  if (s.channels_last) {
    int64_t* all = scratch<int64_t>(Scratch::tap_index, tap_count);
    for (int64_t t = 0; t < tap_count; ++t) all[t] = t;
    weight = arrange(weight, s.groups, out * in * tap_count, {out, in * tap_count}, {in, tap_count}, all, tap_count,
                     true);
  }
  const Layout layout(s.O, s.OH, s.OW, s.channels_last);
  correlate<T>({s.channels_last, s.N, s.groups, out, input_patches(s, static_cast<const T*>(x.input)), weight,
                static_cast<T*>(x.output), layout.channel_stride,
                Axis{s.OW, s.OH * s.OW, layout.image_stride, layout.y_stride, layout.x_stride},
                static_cast<const T*>(x.bias)});
}

template <class T>
void input_gradient(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  const int64_t out = s.C / s.groups, in = s.O / s.groups, kernel = s.kernel_h * s.kernel_w;
  const Layout grad(s.O, s.OH, s.OW, s.channels_last), image(s.C, s.H, s.W, s.channels_last);
  Tap* taps = scratch<Tap>(Scratch::taps, kernel);
  int64_t* tap_index = scratch<int64_t>(Scratch::tap_index, kernel);
  for (int64_t phase_y = 0; phase_y < std::min(s.stride_h, s.H); ++phase_y) {
    for (int64_t phase_x = 0; phase_x < std::min(s.stride_w, s.W); ++phase_x) {
      // Pixel phase + stride * q of the input is under tap (i, j) of output pixel q + (phase + padding - i dilation) /
      // stride, where that is whole.
      int64_t tap_count = 0;
      for (int64_t i = 0; i < s.kernel_h; ++i) {
        for (int64_t j = 0; j < s.kernel_w; ++j) {
          const int64_t y = phase_y + s.padding_top - i * s.dilation_h, x = phase_x + s.padding_left - j * s.dilation_w;
          if (y % s.stride_h != 0 || x % s.stride_w != 0) continue;
          taps[tap_count] = {y / s.stride_h, x / s.stride_w};
          tap_index[tap_count++] = i * s.kernel_w + j;
        }
      }
      const int64_t height = ceil_div(s.H - phase_y, s.stride_h), width = ceil_div(s.W - phase_x, s.stride_w);
      const T* weight = arrange(static_cast<const T*>(x.weight), s.groups, out * in * kernel, {out, kernel},
                                {in, out * kernel}, tap_index, tap_count, s.channels_last);
      correlate<T>({s.channels_last, s.N, s.groups, out,
                    Patches<T>{static_cast<const T*>(x.grad_output), grad.image_stride, grad.channel_stride,
                               grad.y_stride, grad.x_stride, s.OH, s.OW, in, 1, 1, height, width, taps, tap_count},
                    weight,
                    static_cast<T*>(x.grad_input) + phase_y * image.y_stride + phase_x * image.x_stride,
                    image.channel_stride,
                    Axis{width, height * width, image.image_stride, s.stride_h * image.y_stride,
                         s.stride_w * image.x_stride},
                    nullptr});
    }
  }
}

template <class T>
void weight_gradient_finite(const Conv2dShape& s, const Patches<T>& patches, const T* grad_output, T* grad_weight) {
  using C = Compute<T>;
  const int64_t out = s.O / s.groups, in = s.C / s.groups, tap_count = s.kernel_h * s.kernel_w, K = in * tap_count;
  const int64_t P = s.N * s.OH * s.OW;
  const auto patches_of = [&](int64_t g) {
    Patches<T> p = patches;
    p.image += g * in * p.channel_stride;
    return p;
  };
  if (s.channels_last) {
    gemm_split_k<C>(
        s.groups, out, K, P,
        [&](int64_t g, const Output<C>& target, int64_t begin, int64_t end) {
          return GemmOperands<C, DenseMatrix<T>, PatchColumns<T>>{
              {grad_output + g * out, 1, s.O}, {patches_of(g)}, target, begin, end};
        },
        [&](int64_t g, int64_t o, int64_t k, C sum) {
          grad_weight[(g * out + o) * K + k % in * tap_count + k / in] = static_cast<T>(sum);
        });
  } else {
    static constexpr Tap centre{0, 0};
    const Layout layout(s.O, s.OH, s.OW, false);
    const Patches<T> grad{grad_output,     layout.image_stride, layout.channel_stride, layout.y_stride, layout.x_stride,
                          s.OH,            s.OW,                out,                   1,               1,
                          s.OH,            s.OW,                &centre,               1};
    gemm_split_k<C>(
        s.groups, K, out, P,
        [&](int64_t g, const Output<C>& target, int64_t begin, int64_t end) {
          Patches<T> grad_of_group = grad;
          grad_of_group.image += g * out * layout.channel_stride;
          return GemmOperands<C, PatchRows<T>, Transposed<PatchRows<T>>>{
              {patches_of(g)}, {{grad_of_group}}, target, begin, end};
        },
        [&](int64_t g, int64_t k, int64_t o, C sum) { grad_weight[(g * out + o) * K + k] = static_cast<T>(sum); });
  }
}

template <class T>
void weight_gradient(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  const Patches<T> patches = input_patches(s, static_cast<const T*>(x.input));
  const T* grad_output = static_cast<const T*>(x.grad_output);
  T* grad_weight = static_cast<T*>(x.grad_weight);
  const int64_t count = s.N * s.O * s.OH * s.OW;
  if (!leaves_image(patches) || all_finite(grad_output, count))
    return weight_gradient_finite(s, patches, grad_output, grad_weight);

  const std::vector<T> finite = finite_part(grad_output, count);
  weight_gradient_finite(s, patches, finite.data(), grad_weight);
  const Layout layout(s.O, s.OH, s.OW, s.channels_last);
  const int64_t in = s.C / s.groups;
  for_each_task(s.O * in, 2.0 * count * in * patches.tap_count, [&](int64_t task) {
    const int64_t o = task / in, channel = o / (s.O / s.groups) * in + task % in;
    for (int64_t n = 0; n < s.N; ++n) {
      const T* grad = grad_output + n * layout.image_stride + o * layout.channel_stride;
      for (int64_t t = 0; t < patches.tap_count; ++t) {
        for_each_inside(patches, n, channel, patches.taps[t], [&](int64_t y, int64_t column, T value) {
          const T g = grad[y * layout.y_stride + column * layout.x_stride];
          if (!is_finite(g)) add_product(grad_weight[task * patches.tap_count + t], g, value);
        });
      }
    }
  });
}

}  // namespace

void conv2d(const Conv2dArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) { forward<decltype(zero)>(x); });
}

void conv2d_backward(const Conv2dBackwardArgs& x) {
  dispatch_floating(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Conv2dShape& s = x.shape;
    if (x.grad_input) input_gradient<T>(x);
    if (x.grad_weight) weight_gradient<T>(x);
    if (x.grad_bias) {
      T* grad_bias = static_cast<T*>(x.grad_bias);
      const T* grad_output = static_cast<const T*>(x.grad_output);
      if (s.channels_last) {
        sum_rows(grad_bias, grad_output, s.N * s.OH * s.OW, s.O);
      } else {
        sum_planes(grad_bias, grad_output, s.N, s.O, s.OH * s.OW);
      }
    }
  });
}

}  // namespace pyops::cpu
