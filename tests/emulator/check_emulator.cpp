// The emulator's own tests: `check_emulator NAME` runs one; without NAME it lists them. A name that begins with
// "refuses" is of a misuse that must abort; test_emulator.py looks for the message that stands beside it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <limits>
#include <string>

namespace {

using emulator::Order;

void expect(bool condition, const char* text, int line) {
  if (condition) return;
  std::printf("line %d: not true: %s\n", line, text);
  std::exit(1);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, Arguments... arguments) {
  const cudaLaunchConfig_t config{grid, threads, shared, nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T>
T* shared() {
  return reinterpret_cast<T*>(emulator::block.shared);
}

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
  const std::vector<float> expected{762, 771, 766};  // of i % 7 for i from 0, 256 and 512
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

// What a fragment holds, by the tables of the PTX manual: one lane and element at a time.
__global__ void load_rows(const uint16_t* matrices, uint32_t* plain, uint32_t* transposed) {
  uint16_t* tile = shared<uint16_t>();
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) tile[lane * 8 + i] = matrices[lane * 8 + i];
  __syncthreads();
  uint32_t result[4];
  emulator::load_matrices(result, tile + lane * 8, false, "plain");
  for (int i = 0; i < 4; ++i) plain[lane * 4 + i] = result[i];
  emulator::load_matrices(result, tile + lane * 8, true, "transposed");
  for (int i = 0; i < 4; ++i) transposed[lane * 4 + i] = result[i];
}

void matrices_load_as_fragments() {
  std::vector<uint16_t> matrices(256);
  std::iota(matrices.begin(), matrices.end(), 0);
  std::vector<uint32_t> plain(128), transposed(128);
  EXPECT(launch(load_rows, 1, 32, 512, matrices.data(), plain.data(), transposed.data()) == cudaSuccess);
  // Lane 5 holds row 1, columns 2 and 3; transposed: column 1, rows 2 and 3.
  EXPECT(plain[5 * 4] == (10u | 11u << 16) && transposed[5 * 4] == (17u | 25u << 16));
  EXPECT(plain[0] == (0u | 1u << 16) && transposed[0] == (0u | 8u << 16));
  EXPECT(plain[31 * 4 + 3] == (254u | 255u << 16) && transposed[31 * 4 + 3] == (247u | 255u << 16));
}

template <class T>
__global__ void multiply(const T* a, const T* b, float* c) {
  const int lane = threadIdx.x, row = lane / 4, k = lane % 4 * 2;
  const auto pair = [](T low, T high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
  uint32_t of_a[4];
  for (int i = 0; i < 4; ++i) {
    const T* p = a + (row + i % 2 * 8) * 16 + k + i / 2 * 8;
    of_a[i] = pair(p[0], p[1]);
  }
  const T* p = b + k * 8 + row;  // b[k][column]
  float sums[4] = {1, 1, 1, 1};
  const auto widen = [](T value) {
    if constexpr (std::is_same_v<T, __half>) {
      return __half2float(value);
    } else {
      return __bfloat162float(value);
    }
  };
  emulator::multiply_matrices<T>(sums, of_a, pair(p[0], p[8]), pair(p[64], p[72]), widen);
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + k + i % 2] = sums[i];
}

template <class T, class Narrow>
void check_product(const Narrow& narrow) {
  std::vector<T> a(256), b(128);
  for (int i = 0; i < 256; ++i) a[i] = narrow(static_cast<float>(i * 7 % 11 - 5));
  for (int i = 0; i < 128; ++i) b[i] = narrow(static_cast<float>(i * 5 % 13 - 6));
  std::vector<float> c(128);
  EXPECT(launch(multiply<T>, 1, 32, 0, a.data(), b.data(), c.data()) == cudaSuccess);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int sum = 1;
      for (int k = 0; k < 16; ++k) sum += ((row * 16 + k) * 7 % 11 - 5) * ((k * 8 + column) * 5 % 13 - 6);
      EXPECT(c[row * 8 + column] == static_cast<float>(sum));
    }
  }
}

void matrices_multiply() {
  check_product<__half>(__float2half_rn);
  check_product<__nv_bfloat16>(__float2bfloat16_rn);
}

__global__ void misaligned_row() {
  uint32_t result[4];
  emulator::load_matrices(result, shared<unsigned char>() + 8, false, "here");
}
__global__ void row_outside() {
  uint32_t result[4];
  emulator::load_matrices(result, shared<unsigned char>() + 1024, false, "here");
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

template <void (*kernel)()>
void run() {
  launch(kernel, 1, 64, 0);
}
template <void (*kernel)()>
void run_with_shared() {
  launch(kernel, 1, 64, 1024);
}
void run_small() {
  launch(lane_that_is_not_there, 1, 48, 0);
}

struct Case {
  const char* name;
  void (*run)();
  const char* message = nullptr;
};
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
    {"matrices_load_as_fragments", matrices_load_as_fragments},
    {"matrices_multiply", matrices_multiply},
    {"refuses_a_misaligned_row", run_with_shared<misaligned_row>, "ldmatrix: a row that is not aligned"},
    {"refuses_a_row_outside_of_shared_memory", run_with_shared<row_outside>, "ldmatrix: a row outside of shared"},
    {"refuses_different_barriers", run<different_barriers>, "threads of a block met at different barriers"},
    {"refuses_a_barrier_in_half_a_warp", run<warp_and_barrier>, mixed},
    {"refuses_an_ended_lane", run<ended_lane>, mixed},
    {"refuses_different_operations", run<different_operations>, mixed},
    {"refuses_different_masks", run<different_masks>, mixed},
    {"refuses_a_mask_without_the_lane", run<mask_without_itself>, "mask does not name the lane itself"},
    {"refuses_a_lane_that_is_not_there", run_small, "a lane that the block does not have"},
    {"refuses_a_shuffle_from_outside", run<shuffle_from_outside>, "a lane that its mask does not name"},
};

}  // namespace

int main(int count, char** arguments) {
  for (const Case& one : cases) {
    if (count < 2) {
      std::printf("%s;%s\n", one.name, one.message ? one.message : "");
    } else if (std::string(arguments[1]) == one.name) {
      one.run();
    }
  }
}
