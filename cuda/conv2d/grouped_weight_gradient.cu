// The weight gradient of grouped convolutions, including depthwise ones, in either layout:
//
//   grad_weight[o, c, i, j] = sum over n, y, x of grad_output[n, o, y, x] input[n, c, y stride - padding + i, ..]
//
// A thread takes an output channel o and an input channel c of its group, and keeps the sums of all taps in registers.
// It reads each input that the taps of a strip of four pixels meet (conv2d/lanes.h) once: 18 + 4 reads for 36
// multiply-adds with 3x3 taps at stride 1. A block adds up its threads and gives one partial sum for each weight,
// through shared memory and, in N C H W, where the threads have the same channels, by shuffles before that.
//
// The result is deterministic: the number of partial sums depends only on the shape, and they are added in order, in
// double. Only taps inside the image count, even if a factor is infinite.
//
// On sm_80 and sm_90 the kernels take 55 to 80 registers for 3x3, so that an SM holds three blocks of 256 threads; 92
// to 128 for 5x5, two blocks; 146 to 201 for 7x7, one block; and at most 255 for double. For each tap they take 1 KB of
// shared memory in N H W C (2 KB for double) and 32 bytes in N C H W (64 for double).
#include "../common/sums.h"
#include "lanes.h"

namespace pyops::cuda {
namespace {

struct WeightGradient {
  Conv<int32_t> conv;
  Lanes lanes;               // a lane is a pair of channels, c O + o
  Divider<int32_t> outputs;  // O
  int32_t strips_per_part;
};

template <class C, int kernel, class T, int stride>
__device__ __forceinline__ void add_strip(const WeightGradient& g, const T* grad_output, const T* input,
                                          const Strip& strip, int32_t o, int32_t channel, C (&sums)[kernel * kernel]) {
  C grads[strip_rows];
#pragma unroll
  for (int r = 0; r < strip_rows; ++r)
    grads[r] = strip.y + r < g.conv.output.height()
                   ? widen(grad_output[g.conv.output.offset(strip.n, o, strip.y + r, strip.x)])
                   : C(0);
  const int32_t h0 = strip.y * stride - g.conv.padding_h, w0 = strip.x * stride - g.conv.padding_w;
#pragma unroll
  for (int j = 0; j < kernel; ++j) {
    const int32_t w = w0 + j;
    const bool column = w >= 0 && w < g.conv.input.width();
#pragma unroll
    for (int row = 0; row < (strip_rows - 1) * stride + kernel; ++row) {
      const int32_t h = h0 + row;
      const bool inside = column && h >= 0 && h < g.conv.input.height();
      const C value = inside ? widen(input[g.conv.input.offset(strip.n, channel, h, w)]) : C(0);
#pragma unroll
      for (int r = 0; r < strip_rows; ++r) {
        const int i = row - r * stride;
        if (i >= 0 && i < kernel) sums[i * kernel + j] = multiply_add(grads[r], value, sums[i * kernel + j]);
      }
    }
  }
}

// Writes partials[part][lane][tap].
template <class T, int kernel, int stride>
__global__ void __launch_bounds__(block_threads, 1)
    partial_weight_gradients(const __grid_constant__ WeightGradient g, const T* grad_output, const T* input,
                             Compute<T>* partials) {
  using C = Compute<T>;
  constexpr int taps = kernel * kernel;
  int32_t lane, part;
  const int32_t slot = g.lanes.slot(lane), first_lane = g.lanes.first_lane(part), lanes = g.lanes.lanes.value();
  C sums[taps] = {};
  if (slot < g.lanes.slots && first_lane + lane < g.lanes.total) {
    int32_t c = first_lane + lane;
    const int32_t o = take_digit(c, g.outputs);
    const int32_t channel = g.conv.out_per_group.quotient(o) * g.conv.in_per_group.value() + c;
    const int32_t end = min(g.lanes.strips, (part + 1) * g.strips_per_part);
    for (int32_t k = part * g.strips_per_part + slot; k < end; k += g.lanes.slots)
      add_strip<C, kernel, T, stride>(g, grad_output, input, g.lanes.strip(k), o, channel, sums);
  }
  // sums_of[tap][slot][lane]. If there is one lane, shuffles first make each warp a single slot.
  C* sums_of = shared_memory<C>();
  int32_t slots = g.lanes.slots, number = slot * lanes + lane;
  if (lanes == 1) {
#pragma unroll
    for (int tap = 0; tap < taps; ++tap)
      for (int distance = 16; distance > 0; distance /= 2)
        sums[tap] += __shfl_xor_sync(0xffffffffu, sums[tap], distance);
    slots /= 32;
    number = threadIdx.x % 32 == 0 ? static_cast<int32_t>(threadIdx.x) / 32 : -1;
  }
  const int32_t all = slots * lanes;
  if (number >= 0 && number < all) {
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) sums_of[tap * all + number] = sums[tap];
  }
  __syncthreads();
  for (int32_t k = threadIdx.x; k < lanes * taps; k += blockDim.x) {
    const int32_t tap = k % taps, of_lane = k / taps;
    if (first_lane + of_lane >= g.lanes.total) break;
    C sum = 0;
    for (int32_t s = 0; s < slots; ++s) sum += sums_of[tap * all + s * lanes + of_lane];
    partials[(static_cast<int64_t>(part) * g.lanes.total + first_lane + of_lane) * taps + tap] = sum;
  }
}

// Adds the partial sums. Taps outside the image counted as 0 in them, so a sum that is NaN, as infinity times 0 is, is
// taken again over the taps inside.
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    finish_weight_gradients(const __grid_constant__ WeightGradient g, const T* grad_output, const T* input,
                            const Compute<T>* partials, int64_t parts, Divider<int32_t> taps, T* grad_weight) {
  const int64_t number = thread_number(), count = static_cast<int64_t>(g.lanes.total) * taps.value();
  if (number >= count) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += partials[part * count + number];
  auto c = static_cast<int32_t>(number);
  const int32_t tap = take_digit(c, taps), o = take_digit(c, g.outputs);
  const int32_t weight = (o * g.conv.in_per_group.value() + c) * taps.value() + tap;
  if (sum != sum) {
    const auto pixels = static_cast<int32_t>(g.conv.output.count / g.conv.output.C.value());
    sum = gradient_of_weight<T, int32_t>(g.conv, grad_output, input, weight, 0, 1, pixels);
  }
  grad_weight[weight] = narrow<T>(sum);
}

template <class T, int kernel, int stride>
cudaError_t launch_weight_gradient(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  using C = Compute<T>;
  constexpr int taps = kernel * kernel;
  const Conv2dShape& s = x.shape;
  const int64_t pairs = s.O * (s.C / s.groups);
  WeightGradient g{Conv<int32_t>(s), Lanes(pairs, s.channels_last ? 32 : 1, s.N, s.OH, s.OW), Divider<int32_t>(s.O), 0};
  const int64_t lanes = g.lanes.lanes.value(), chunks = g.lanes.chunks.value();
  const int64_t parts = sum_parts(chunks, int64_t{g.lanes.strips} * strip_rows * lanes);
  g.strips_per_part = static_cast<int32_t>(ceil_div(g.lanes.strips, parts));
  const auto *grad_output = static_cast<const T*>(x.grad_output), *input = static_cast<const T*>(x.input);
  C* partials = workspace.array<C>(parts * pairs * taps);
  const int64_t slots = lanes == 1 ? g.lanes.threads / 32 : g.lanes.slots;
  PYOPS_RETURN_ON_ERROR(launch(partial_weight_gradients<T, kernel, stride>, parts * chunks, g.lanes.threads,
                               taps * slots * lanes * sizeof(C), stream, g, grad_output, input, partials));
  return launch_for(finish_weight_gradients<T>, pairs * taps, stream, g, grad_output, input, partials, parts,
                    Divider<int32_t>(taps), static_cast<T*>(x.grad_weight));
}

template <class T, int stride>
cudaError_t dispatch_kernel(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  if (x.shape.kernel_h == 3) return launch_weight_gradient<T, 3, stride>(x, workspace, stream);
  if (x.shape.kernel_h == 5) return launch_weight_gradient<T, 5, stride>(x, workspace, stream);
  return launch_weight_gradient<T, 7, stride>(x, workspace, stream);
}

}  // namespace

cudaError_t grouped_weight_gradient(const Conv2dBackwardArgs& x, Workspace& workspace, cudaStream_t stream) {
  return dispatch_floating(x.dtype, [&](auto t) {
    using T = decltype(t);
    return x.shape.stride_h == 1 ? dispatch_kernel<T, 1>(x, workspace, stream)
                                 : dispatch_kernel<T, 2>(x, workspace, stream);
  });
}

}  // namespace pyops::cuda
