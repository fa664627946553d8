// The emulator's own tests of threads, barriers and warps. See check.h for how they are run.
#include "check.h"

namespace {

using emulator::Order;

__global__ void number_threads(int* numbers) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  numbers[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<int>(100 * block + thread);
}

void every_thread_runs_once() {
  std::vector<int> numbers(2 * 3 * 4 * 30);
  EXPECT(launch(number_threads, {2, 3, 4}, {5, 3, 2}, 0, numbers.data()) == cudaSuccess);
  for (int i = 0; i < 2 * 3 * 4 * 30; ++i) EXPECT(numbers[i] == 100 * (i / 30) + i % 30);
}

template <bool with_barrier>
__global__ void sum_of_block(const float* input, float* output) {
  float* values = shared<float>();
  const int i = threadIdx.x;
  values[i] = input[blockIdx.x * blockDim.x + i];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (with_barrier) __syncthreads();
    if (i < static_cast<int>(half)) values[i] += values[i + half];
  }
  if (i == 0) output[blockIdx.x] = values[0];
}

template <bool with_barrier>
std::vector<float> sums(Order order) {
  emulator::order = order;
  std::vector<float> input(3 * 256), output(3);
  for (int i = 0; i < 3 * 256; ++i) input[i] = static_cast<float>(i % 7);
  EXPECT(launch(sum_of_block<with_barrier>, 3, 256, 256 * sizeof(float), input.data(), output.data()) == cudaSuccess);
  return output;
}

void barriers_make_sums_right_in_every_order() {
  const std::vector<float> expected{762, 771, 766};  // sums of 256 values i % 7, from i = 0, 256 and 512 on
  for (const Order order : {Order::forward, Order::reverse, Order::shuffled, Order::alternating})
    EXPECT(sums<true>(order) == expected);
}

void a_missing_barrier_shows() {
  EXPECT(sums<false>(Order::forward) != sums<true>(Order::forward));
  EXPECT(sums<false>(Order::shuffled) != sums<true>(Order::forward));
}

__global__ void last_writer(int* value) {
  *value = static_cast<int>(1000 * blockIdx.x + threadIdx.x);
}

void orders_differ() {
  int value = -1;
  const auto run = [&](Order order) {
    emulator::order = order;
    EXPECT(launch(last_writer, 50, 64, 0, &value) == cudaSuccess);
    return value;
  };
  EXPECT(run(Order::forward) == 49063);
  EXPECT(run(Order::reverse) == 0);
  const int shuffled = run(Order::shuffled);
  EXPECT(shuffled != 49063 && shuffled != 0);
  bool found[3] = {};
  for (int i = 0; i < 3; ++i) {
    const int alternating = run(Order::alternating);
    found[alternating == 49063 ? 0 : alternating == 0 ? 1 : 2] = true;
  }
  EXPECT(found[0] && found[1] && found[2]);
}

__global__ void warp_operations(int* output) {
  const int t = threadIdx.x, lane = t % 32;
  const unsigned all = 0xffffffffu;
  int* mine = output + t * 6;
  mine[0] = __shfl_sync(all, t * 10, 5);
  mine[1] = __shfl_xor_sync(all, t * 10, 12);
  mine[2] = __shfl_down_sync(all, t * 10, 3);
  mine[3] = static_cast<int>(__ballot_sync(all, lane % 3 == 0));
  if (lane < 8) {
    mine[4] = static_cast<int>(__ballot_sync(0xffu, lane & 1));
  } else {
    mine[4] = __shfl_xor_sync(0xffffff00u, lane, 1);
  }
  __syncwarp();
  mine[5] = output[(t ^ 1) * 6 + 4];
}

void lanes_exchange_values() {
  std::vector<int> output(96 * 6);
  EXPECT(launch(warp_operations, 1, 96, 0, output.data()) == cudaSuccess);
  for (int t = 0; t < 96; ++t) {
    const int lane = t % 32, warp = t - lane, *mine = output.data() + t * 6;
    const auto fourth = [](int l) { return l < 8 ? 0xaa : l ^ 1; };
    EXPECT(mine[0] == (warp + 5) * 10);
    EXPECT(mine[1] == (warp + (lane ^ 12)) * 10);
    EXPECT(mine[2] == (lane + 3 < 32 ? t + 3 : t) * 10);
    EXPECT(mine[3] == 0x49249249);
    EXPECT(mine[4] == fourth(lane));
    EXPECT(mine[5] == fourth(lane ^ 1));
  }
}

__global__ void leave_early(int* output) {
  if (threadIdx.x % 2) return;
  int* values = shared<int>();
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  output[threadIdx.x] = values[blockDim.x - 2 - threadIdx.x];
}

void ended_threads_do_not_hold_up_a_barrier() {
  std::vector<int> output(64, -1);
  EXPECT(launch(leave_early, 1, 64, 64 * sizeof(int), output.data()) == cudaSuccess);
  for (int i = 0; i < 64; ++i) EXPECT(output[i] == (i % 2 ? -1 : 62 - i));
}

__global__ void read_unwritten(float* output) {
  output[threadIdx.x] = shared<float>()[threadIdx.x];
  __syncthreads();
  shared<float>()[threadIdx.x] = 1;
}

void unwritten_shared_memory_is_nan() {
  std::vector<float> output(32);
  EXPECT(launch(read_unwritten, 2, 32, 128, output.data()) == cudaSuccess);
  for (const float value : output) EXPECT(value != value);
}

__global__ void nothing() {}

void impossible_launches_fail() {
  EXPECT(launch(nothing, {1, 65535, 1}, 1, 0) == cudaSuccess);
  EXPECT(launch(nothing, 65537, 1, 0) == cudaSuccess);
  for (const dim3 grid : {dim3(0, 1, 1), dim3(1, 65536, 1), dim3(1, 1, 65536)})
    EXPECT(launch(nothing, grid, 1, 0) == cudaErrorInvalidConfiguration);
  for (const dim3 threads : {dim3(0, 1, 1), dim3(1025, 1, 1), dim3(32, 33, 1), dim3(1, 1, 65)})
    EXPECT(launch(nothing, 1, threads, 0) == cudaErrorInvalidConfiguration);
  EXPECT(launch(nothing, 1, 1, 49152) == cudaSuccess);
  EXPECT(launch(nothing, 1, 1, 49153) == cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000) == cudaSuccess);
  EXPECT(launch(nothing, 1, 1, 100000) == cudaSuccess);
  EXPECT(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 240000) == cudaErrorInvalidValue);
}

void small_floats_convert() {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const __half h{static_cast<uint16_t>(bits)};
    const __nv_bfloat16 b{static_cast<uint16_t>(bits)};
    const float from_half = __half2float(h), from_bfloat = __bfloat162float(b);
    EXPECT(from_half != from_half || __float2half_rn(from_half).bits == bits);
    EXPECT(from_bfloat != from_bfloat || __float2bfloat16_rn(from_bfloat).bits == bits);
  }
  const auto bfloat = [](float value) { return __bfloat162float(__float2bfloat16_rn(value)); };
  EXPECT(bfloat(1 + 1.0f / 256) == 1 && bfloat(1 + 3.0f / 256) == 1 + 4.0f / 256);  // ties to even
  EXPECT(bfloat(1 + 1.01f / 256) == 1 + 2.0f / 256);
  EXPECT(bfloat(std::numeric_limits<float>::max()) == std::numeric_limits<float>::infinity());
  const auto half = [](float value) { return __half2float(__float2half_rn(value)); };
  EXPECT(half(2049) == 2048 && half(2051) == 2052 && half(65520) == std::numeric_limits<float>::infinity());
  EXPECT(half(65519) == 65504 && __half2float({0x0001}) == 0x1p-24f);
}

__global__ void different_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void warp_and_barrier() {
  if (threadIdx.x == 7) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void ended_lane() {
  if (threadIdx.x == 7) return;
  __ballot_sync(0xffffffffu, true);
}
__global__ void different_operations() {
  if (threadIdx.x % 2) {
    __shfl_xor_sync(0xffffffffu, 1, 1);
  } else {
    __ballot_sync(0xffffffffu, true);
  }
}
__global__ void different_masks() {
  __ballot_sync(threadIdx.x % 32 < 16 ? 0xffffffffu : 0xffff0000u, true);
}
__global__ void mask_without_itself() {
  __ballot_sync(0x0000ffffu, true);
}
__global__ void lane_that_is_not_there() {
  __syncwarp();
}
__global__ void shuffle_from_outside() {
  if (threadIdx.x < 16) __shfl_down_sync(0x0000ffffu, 1, 8);
}

void two_limits() {
  cudaFuncSetAttribute(ended_lane, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000);
  cudaFuncSetAttribute(ended_lane, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000);
}
void run_small() {
  launch(lane_that_is_not_there, 1, 48, 0);
}

const char* mixed = "lanes of a warp wait at different operations";
const Case cases[] = {
    {"every_thread_runs_once", every_thread_runs_once},
    {"barriers_make_sums_right_in_every_order", barriers_make_sums_right_in_every_order},
    {"a_missing_barrier_shows", a_missing_barrier_shows},
    {"orders_differ", orders_differ},
    {"lanes_exchange_values", lanes_exchange_values},
    {"ended_threads_do_not_hold_up_a_barrier", ended_threads_do_not_hold_up_a_barrier},
    {"unwritten_shared_memory_is_nan", unwritten_shared_memory_is_nan},
    {"impossible_launches_fail", impossible_launches_fail},
    {"small_floats_convert", small_floats_convert},
    {"refuses_different_barriers", run<different_barriers>, "threads of a block met at different barriers"},
    {"refuses_a_barrier_in_half_a_warp", run<warp_and_barrier>, mixed},
    {"refuses_an_ended_lane", run<ended_lane>, mixed},
    {"refuses_different_operations", run<different_operations>, mixed},
    {"refuses_different_masks", run<different_masks>, mixed},
    {"refuses_a_mask_without_the_lane", run<mask_without_itself>, "mask does not name the lane itself"},
    {"refuses_a_lane_that_is_not_there", run_small, "a lane that the block does not have"},
    {"refuses_two_limits_of_shared_memory", two_limits, "the limit changes that another thread may rely on"},
    {"refuses_a_shuffle_from_outside", run<shuffle_from_outside>, "a lane that its mask does not name"},
};

}  // namespace

int main(int count, char** arguments) {
  return run_cases(cases, count, arguments);
}
