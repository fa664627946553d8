// The gradients of conv2d.
//
// grad_input is a correlation of grad_output with the weight, its input and output channels exchanged. The pixels whose
// coordinates have the same remainders by the stride meet the same taps, so each of the stride_h x stride_w remainders
// (a phase) is a correlation of stride 1 with its share of the taps: no zeros are multiplied and every element is
// written once, where col2im would add into it.
//
// grad_weight [K, O] = window(input) [K, pixels] grad_output^T [pixels, O], with K = (channel, tap): both operands are
// read where they lie, in a window of the input and a transposed band of grad_output. The batch is cut into parts whose
// number depends on the shape only; their sums are added in order. With few output channels the vectors run along x
// instead, and each weight is a dot product of a window and a gradient: for LeNet's first layer and 64 images 0.46 ms
// on one core with AVX-512, the other way 0.99, stock torch 0.61.
//
// grad_bias: sums of grad_output over all but the channels.
//
// Guarantees: those of gemm.h; the sums run over the taps inside of the image only, also where values are infinite.
#include "conv2d.h"
#include "nonfinite.h"
#include "sums.h"

namespace pyops::cpu {
namespace {

// A phase is the pixels of the input whose coordinates have the same remainders by the stride.
template <class T>
void input_gradient(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  const Layout grad(s.O, s.OH, s.OW, s.channels_last), image(s.C, s.H, s.W, s.channels_last);
  const int64_t out = s.O / s.groups, in = s.C / s.groups, kernel = s.kernel_h * s.kernel_w;
  const int64_t y_phases = std::min(s.stride_h, s.H), x_phases = std::min(s.stride_w, s.W);
  Tap* taps = scratch<Tap>(Scratch::taps, kernel);
  auto* phases = scratch<Correlation<T>>(Scratch::phases, y_phases * x_phases);
  for (int64_t phase_y = 0; phase_y < y_phases; ++phase_y) {
    for (int64_t phase_x = 0; phase_x < x_phases; ++phase_x) {
      const int64_t height = ceil_div(s.H - phase_y, s.stride_h), width = ceil_div(s.W - phase_x, s.stride_w);
      Source<T> source{static_cast<const T*>(x.grad_output),
                       grad.image_stride,
                       grad.channel_stride,
                       grad.y_stride,
                       grad.x_stride,
                       s.N,
                       s.OH,
                       s.OW,
                       out,
                       1,
                       1,
                       height,
                       width,
                       taps,
                       0,
                       s.N * grad.image_stride};
      for (int64_t i = 0; i < s.kernel_h; ++i) {
        for (int64_t j = 0; j < s.kernel_w; ++j) {
          const int64_t y = phase_y + s.padding_top - i * s.dilation_h, x = phase_x + s.padding_left - j * s.dilation_w;
          if (y % s.stride_h != 0 || x % s.stride_w != 0) continue;
          const int64_t dy = y / s.stride_h, dx = x / s.stride_w;
          if (is_met(source, dy, dx)) *taps++ = {dy, dx, i * s.kernel_w + j}, ++source.tap_count;
        }
      }
      phases[phase_y * x_phases + phase_x] = {
          source,
          {static_cast<const T*>(x.weight), out * in * kernel, kernel, in * kernel, s.O * in * kernel},
          s.channels_last,
          s.groups,
          in,
          static_cast<T*>(x.grad_input) + phase_y * image.y_stride,
          image.channel_stride,
          {s.W, height * s.W, image.image_stride, s.stride_h * image.y_stride, image.x_stride},
          nullptr,
          phase_x,
          x_phases};
    }
  }
  correlate(phases, y_phases * x_phases);
}

// The pixels of a band of grad_output as rows of `vectors` vectors over the output channels [o, o + count) of group g.
template <class T>
Vectors<Compute<T>> grad_rows(const Conv2dShape& s, const T* grad_output, const Band& b, int64_t o, int64_t count) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size();
  const int64_t pixels = b.images * b.rows * s.OW, width = ceil_div(count, lanes) * lanes, plane = s.OH * s.OW;
  const int64_t channel = b.g * (s.O / s.groups) + o, first = b.n * plane + b.y * s.OW;
  const int64_t* offsets = multiples(Scratch::b_offsets, width / lanes, lanes);
  if constexpr (std::is_same_v<T, C>) {
    if (s.channels_last && count == width)
      return {grad_output + first * s.O + channel, offsets, multiples(Scratch::b_steps, pixels, s.O)};
  }
  C* copy = scratch<C>(Scratch::grad_rows, pixels * width);
  if (s.channels_last) {
    for (int64_t p = 0; p < pixels; ++p)
      copy_values(copy + p * width, grad_output + (first + p) * s.O + channel, count, 1);
  } else {
    const int64_t pixels_of_image = b.rows * s.OW;
    for (int64_t n = 0; n < b.images; ++n)
      transpose(copy + n * pixels_of_image * width, width,
                grad_output + ((b.n + n) * s.O + channel) * plane + b.y * s.OW, plane, count, pixels_of_image);
  }
  for (int64_t p = 0; p < pixels && count < width; ++p)
    std::fill(copy + p * width + count, copy + (p + 1) * width, C(0));
  return {copy, offsets, multiples(Scratch::b_steps, pixels, width)};
}

// The pixels of a band of grad_output, one output channel [o, o + count) of group g after the other.
template <class T>
const Compute<T>* grad_planes(const Conv2dShape& s, const T* grad_output, const Band& b, int64_t o, int64_t count) {
  using C = Compute<T>;
  const Layout layout(s.O, s.OH, s.OW, s.channels_last);
  const int64_t pixels = b.rows * s.OW;  // of one image: they lie x_stride apart
  C* planes = scratch<C>(Scratch::grad_rows, count * b.images * pixels);
  const T* source = grad_output + (b.g * (s.O / s.groups) + o) * layout.channel_stride + b.n * layout.image_stride +
                    b.y * layout.y_stride;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t n = 0; n < b.images; ++n)
      copy_values(planes + (c * b.images + n) * pixels, source + c * layout.channel_stride + n * layout.image_stride,
                  pixels, layout.x_stride);
  return planes;
}

// sums[i] (+)= the sum over the band's pixels of window(offsets[i], pixel) * grad(pixel), for i < count.
template <class C, int count>
void dot_products(const Window<C>& w, const int64_t* offsets, const Band& b, int64_t width, const C* grad, C* sums,
                  int64_t sums_stride, bool accumulate) {
  using V = Vec<C>;
  constexpr int64_t lanes = V::size();
  V sum[count];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) sum[i] = V(0);
  for (int64_t n = 0; n < b.images; ++n) {
    for (int64_t y = 0; y < b.rows; ++y, grad += width) {
      const C* line = w.data + n * w.image_stride + y * w.y_step;
      int64_t x = 0;
      for (; x + lanes <= width; x += lanes) {
        const V g = V::loadu(grad + x);
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) sum[i] = at::vec::fmadd(V::loadu(line + offsets[i] + x), g, sum[i]);
      }
      if (x < width) {
        const V g = V::loadu(grad + x, width - x);
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i) sum[i] = at::vec::fmadd(V::loadu(line + offsets[i] + x, width - x), g, sum[i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
    const C total = at::vec::vec_reduce_all([](const V& a, const V& c) { return a + c; }, sum[i]);
    sums[i * sums_stride] = accumulate ? sums[i * sums_stride] + total : total;
  }
}

// sums[r, o] (+)= the dot products of all rows (channel, tap) of the window with all planes of the gradient.
template <class C>
void multiply_along_x(const Window<C>& w, const int64_t* patch, int64_t rows, const Band& b, int64_t width,
                      const C* planes, int64_t columns, C* sums, int64_t sums_stride, bool accumulate) {
  constexpr std::array dots = {dot_products<C, 1>, dot_products<C, 2>, dot_products<C, 3>, dot_products<C, 4>,
                               dot_products<C, 5>, dot_products<C, 6>, dot_products<C, 7>, dot_products<C, 8>};
  constexpr int64_t most = dots.size();
  for (int64_t o = 0; o < columns; ++o) {
    for (int64_t r = 0; r < rows; r += most)
      dots[std::min(most, rows - r) - 1](w, patch + r, b, width, planes + o * b.images * b.rows * width,
                                         sums + r * sums_stride + o, sums_stride, accumulate);
  }
}

template <class T>
void weight_gradient_finite(const Conv2dShape& s, const Source<T>& source, const T* grad_output, T* grad_weight) {
  using C = Compute<T>;
  constexpr int64_t lanes = Vec<C>::size(), most_rows = 384, most_columns = 256;
  const int64_t out = s.O / s.groups, taps = source.tap_count, K = source.channels * taps;
  const int64_t kernel = s.kernel_h * s.kernel_w;
  if (taps < kernel) std::fill(grad_weight, grad_weight + s.O * source.channels * kernel, T(0));
  if (taps == 0) return;
  const int64_t c_block = std::clamp(most_rows / taps, int64_t{1}, source.channels),
                o_block = std::min(out, most_columns);
  const int64_t c_blocks = ceil_div(source.channels, c_block), o_blocks = ceil_div(out, o_block);
  const Extent extent(source);
  const BandSize size(source, extent, c_block);
  const int64_t row_bands = ceil_div(s.OH, size.rows), bands = ceil_div(s.N, size.images) * row_bands;
  const double flops = 2.0 * s.N * s.OH * s.OW * s.O * K;
  const int64_t blocks = s.groups * c_blocks * o_blocks;
  // A dot product takes two loads for each multiply-add: worth it where the other way leaves most lanes idle.
  const bool along_x = lanes_used<C>(out) < 0.5 * lanes_used<C>(s.OW);
  const int64_t parts = std::min(ceil_div(tasks_worth(flops), blocks), bands);

  C* partial = scratch<C>(Scratch::partial_sums, parts * s.groups * K * out);
  for_each_task(blocks * parts, flops, [&](int64_t task) {
    const int64_t part = task % parts, o = task / parts % o_blocks * o_block;
    const int64_t c = task / parts / o_blocks % c_blocks * c_block, g = task / parts / o_blocks / c_blocks;
    const int64_t channels = std::min(c_block, source.channels - c), rows = channels * taps;
    const int64_t columns = std::min(o_block, out - o), vectors = ceil_div(columns, lanes), stride = vectors * lanes;
    C* sums = scratch<C>(Scratch::sums, rows * stride);
    const int64_t begin = part * bands / parts, end = (part + 1) * bands / parts;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / row_bands * size.images, y = i % row_bands * size.rows;
      const Band band{g, c, channels, n, std::min(size.images, s.N - n), y, std::min(size.rows, s.OH - y)};
      const Window<C> w = window_of(source, extent, band, s.channels_last, along_x);
      const int64_t* patch = patch_offsets(Scratch::a_offsets, w, source, channels);
      if (along_x) {
        multiply_along_x(w, patch, rows, band, s.OW, grad_planes(s, grad_output, band, o, columns), columns, sums,
                         stride, i > begin);
        continue;
      }
      const int64_t* pixels = pixel_offsets(Scratch::a_steps, w, band, s.OW);
      const Vectors<C> grad = grad_rows(s, grad_output, band, o, columns);
      for_each_chunk(0, band.images * band.rows * s.OW, [&](int64_t k, int64_t kc, bool first, bool) {
        multiply<C>(rows, vectors, kc, {w.data, patch, pixels + k}, {grad.data, grad.offsets, grad.steps + k}, sums,
                    stride, i > begin || !first);
      });
    }
    C* target = partial + ((part * s.groups + g) * K + c * taps) * out + o;
    for (int64_t r = 0; r < rows; ++r) std::copy_n(sums + r * stride, columns, target + r * out);
  });
  T* target = grad_weight;
  if (taps < kernel) target = scratch<T>(Scratch::weight, s.O * K);
  for (int64_t g = 0; g < s.groups; ++g)
    sum_parts(Output<T>{target + g * out * K, Axis::plain(1), Axis::plain(K)}, partial + g * K * out, parts,
              s.groups * K * out, K, out);
  for (int64_t f = 0; f < s.O * source.channels && taps < kernel; ++f)
    for (int64_t t = 0; t < taps; ++t) grad_weight[f * kernel + source.taps[t].index] = target[f * taps + t];
}

template <class T>
void weight_gradient(const Conv2dBackwardArgs& x) {
  const Conv2dShape& s = x.shape;
  const Source<T> source = input_source<T>(s, x.input);
  const T* grad_output = static_cast<const T*>(x.grad_output);
  T* grad_weight = static_cast<T*>(x.grad_weight);
  const int64_t count = s.N * s.O * s.OH * s.OW;
  if (!leaves_image(source, Extent(source)) || all_finite(grad_output, count))
    return weight_gradient_finite(s, source, grad_output, grad_weight);

  weight_gradient_finite(s, source, finite_part(grad_output, count).data(), grad_weight);
  const Layout grad(s.O, s.OH, s.OW, s.channels_last);
  const int64_t in = source.channels, taps = source.tap_count, kernel = s.kernel_h * s.kernel_w;
  for_each_task(s.O * in, 2.0 * count * in * taps, [&](int64_t task) {
    const int64_t o = task / in, channel = o / (s.O / s.groups) * in + task % in;
    for (int64_t n = 0; n < s.N; ++n) {
      const T* image = grad_output + n * grad.image_stride + o * grad.channel_stride;
      for (int64_t t = 0; t < taps; ++t) {
        for_each_inside(source, n, channel, source.taps[t], [&](int64_t y, int64_t column, T value) {
          const T g = image[y * grad.y_stride + column * grad.x_stride];
          if (!is_finite(g)) add_product(grad_weight[task * kernel + source.taps[t].index], g, value);
        });
      }
    }
  });
}

}  // namespace

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
