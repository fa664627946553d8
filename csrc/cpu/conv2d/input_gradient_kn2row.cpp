// The input gradient of conv2d by kn2row (Vasudevan, Anderson & Gregg, "Parallel Multi Channel Convolution using
// General Matrix Multiplication", 2017), one matrix product for each tap, over the pixels whose tap lies inside of the
// image:
//
//   grad_input[pixel of the tap, C] += grad_output[pixel, O] weight[O, C] of the tap
//
// It is chosen where many taps lie outside, because grad_output is hardly larger than the kernel. There a convolution,
// which gathers all taps of a pixel, would have about as many classes of pixels as pixels, or would multiply zeros.
//
// Each product of gemm/microkernel.h adds its sums directly where the tap lies. A task is some images, or a band of
// rows of one, and a block of their channels, whose sums stay in cache.
//
// Every element sums over (tap, chunk of O) in order, whatever the batch and the threads. No zeros are multiplied.
#include "algorithms.h"
#include "border_taps.h"
#include "costs.h"

namespace pyops::cpu {
namespace {

// The weight as [tap][O][stride]: each row holds the weights of all input channels, with zeros up to `stride`.
template <class T>
const T* weights_by_tap(const Conv2dShape& s, const T* weight, int64_t stride) {
  const WeightLayout w(s);
  const int64_t taps = s.kernel_h * s.kernel_w;
  T* by_tap = scratch<T>(Scratch::weight, taps * s.O * stride);
  for_each_task(s.O, 16.0 * s.O * s.C * taps, [&](int64_t o) {
    const T* source = weight + o * w.out_stride;
    for (int64_t t = 0; t < taps; ++t) {
      T* target = by_tap + (t * s.O + o) * stride;
      if (s.weight_channels_last) std::copy_n(source + t * w.tap_stride, s.C, target);
      std::fill(target + s.C, target + stride, T(0));
    }
    if (!s.weight_channels_last) transpose(by_tap + o * stride, s.O * stride, source, taps, s.C, taps);
  });
  return by_tap;
}

template <class T>
void input_gradient_kn2row(const Conv2dBackwardArgs& x) {
  constexpr int64_t lanes = Vec<T>::size(), most_sums = 64 << 10, most_columns = 256;
  constexpr int64_t least_rows = 32, least_columns = 2 * lanes;  // tasks are not made smaller
  const Conv2dShape& s = x.shape;
  const ConvInput<T> source = conv_input<T>(s, nullptr);
  const Layout image(s.C, s.H, s.W, s.channels_last), grad(s.O, s.OH, s.OW, s.channels_last);
  const int64_t stride = ceil_div(s.C, lanes) * lanes;
  const double flops = 2.0 * s.N * s.OH * s.OW * s.O * s.C * source.tap_count;

  // A task is some whole images, or a band of rows of one, with `columns` of their channels.
  int64_t columns = std::min(stride, most_columns);
  int64_t images = std::clamp(most_sums / (s.H * s.W * columns), int64_t{1}, s.N);
  int64_t height = std::clamp(most_sums / (s.W * columns), int64_t{1}, s.H);
  const auto tasks = [&] { return ceil_div(s.N, images) * ceil_div(s.H, height) * ceil_div(stride, columns); };
  const auto few = [&] { return tasks() < tasks_worth(flops); };
  while (few() && images > 1 && images * s.OH * s.OW >= 2 * least_rows) images = ceil_div(images, 2);
  while (few() && columns > least_columns) columns = ceil_div(columns / 2, lanes) * lanes;
  while (few() && images == 1 && height * s.W >= 2 * least_rows) height = ceil_div(height, 2);

  const T* weights = weights_by_tap(s, static_cast<const T*>(x.weight), stride);
  const Output<T> out{static_cast<T*>(x.grad_input),
                      {s.W, s.H * s.W, image.image_stride, image.y_stride, image.x_stride},
                      Axis::plain(image.channel_stride)};
  const int64_t blocks = ceil_div(stride, columns), bands = ceil_div(s.H, height);
  for_each_task(tasks(), flops, [&](int64_t task) {
    const int64_t c = task % blocks * columns, y = task / blocks % bands * height, n = task / blocks / bands * images;
    const int64_t width = std::min(columns, stride - c), vectors = width / lanes;
    const int64_t pixels = std::min(height, s.H - y) * s.W, count = std::min(images, s.N - n);
    T* sums = scratch<T>(Scratch::sums, count * pixels * width);
    std::fill_n(sums, count * pixels * width, T(0));
    int64_t* offsets = scratch<int64_t>(Scratch::a_offsets, count * s.OH * s.OW);
    int64_t* targets = scratch<int64_t>(Scratch::target_rows, count * s.OH * s.OW);
    const int64_t* grad_steps = multiples(Scratch::a_steps, s.O, grad.channel_stride);
    const int64_t* weight_steps = multiples(Scratch::b_steps, s.O, stride);
    const int64_t* next = multiples(Scratch::target_vectors, vectors, lanes);
    for (const Tap* tap = source.taps; tap < source.taps + source.tap_count; ++tap) {
      // The pixels of grad_output whose tap lies in the band, and the places of these taps.
      const Range rows = range_inside(tap->dy - y, s.stride_h, s.OH, pixels / s.W);
      const Range line = range_inside(tap->dx, s.stride_w, s.OW, s.W);
      int64_t met = 0;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t row = rows.begin; row < rows.end; ++row) {
          const int64_t from = i * grad.image_stride + row * grad.y_stride;
          const int64_t to = i * pixels + (row * s.stride_h + tap->dy - y) * s.W + tap->dx;
          for (int64_t column = line.begin; column < line.end; ++column, ++met) {
            offsets[met] = from + column * grad.x_stride;
            targets[met] = (to + column * s.stride_w) * width;
          }
        }
      }
      const T* of_tap = weights + tap->index * s.O * stride + c;
      const T* images_here = static_cast<const T*>(x.grad_output) + n * grad.image_stride;
      for_each_chunk(0, s.O, [&](int64_t o, int64_t kc, bool, bool) {
        macrokernel<T>(met, vectors, kc, {images_here, offsets, grad_steps + o}, {of_tap, next, weight_steps + o},
                       {sums, targets, next}, /*accumulate=*/true, /*last=*/false);
      });
    }
    write(out, sums, width, n * s.H * s.W + y * s.W, count * pixels, c, std::min(width, s.C - c));
  });
}

}  // namespace

template <class T>
bool Kn2row<T>::supports(const InputGradient<T>& x) {
  return std::is_same_v<T, Compute<T>> && x.args.shape.groups == 1;
}

// Compares the share of useful products of adding up tap by tap and of gathering pixel by pixel, with factors fitted to
// measurements.
template <class T>
bool Kn2row<T>::profitable(const InputGradient<T>& x) {
  constexpr int64_t least_terms = 32;  // more channels than batch lanes take (conv2d/batch_lanes.cpp)
  const Conv2dShape& s = x.args.shape;
  if (s.O < least_terms || s.kernel_h * s.kernel_w == 1) return false;
  const double gathered = static_cast<double>(s.H * s.W) / static_cast<double>(s.stride_h * s.stride_w);
  const double met = fraction_inside(conv_input<T>(s, nullptr)) * static_cast<double>(s.OH * s.OW);
  // Gathering copies channels-first images.
  const double gathering = (s.channels_last ? 1.1 : 0.87) * met / gathered;
  // The sums of a tap are loaded and stored, which takes about as long as 16 terms.
  const double terms = static_cast<double>(s.O) / static_cast<double>(s.O + 16);
  const double kn2row = terms * lane_utilization<Compute<T>>(s.C) * (s.C > Vec<Compute<T>>::size() ? 1 : 0.7);
  return gathering < kn2row;
}

template <class T>
void Kn2row<T>::run(const InputGradient<T>& x) {
  if constexpr (std::is_same_v<T, Compute<T>>) input_gradient_kn2row<T>(x.args);
}

#define INSTANTIATE(T) template struct Kn2row<T>;
FOR_EACH_FLOATING(INSTANTIATE)
#undef INSTANTIATE

}  // namespace pyops::cpu
