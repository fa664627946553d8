// The emulator's own tests of the PTX instructions: fragments against the tables of the PTX manual, and copies. See
// check.h for how they are run.
#include "check.h"

namespace {

using emulator::Order;

// Each lane writes one row of the four matrices; then the warp loads them, plain and transposed.
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
  // Lane 5 holds columns 2 and 3 of row 1 or, transposed, rows 2 and 3 of column 1.
  EXPECT(plain[5 * 4] == (10u | 11u << 16) && transposed[5 * 4] == (17u | 25u << 16));
  EXPECT(plain[0] == (0u | 1u << 16) && transposed[0] == (0u | 8u << 16));
  EXPECT(plain[31 * 4 + 3] == (254u | 255u << 16) && transposed[31 * 4 + 3] == (247u | 255u << 16));
}

// ---- products: a[16, depth] b[depth, 8], of small integers, which are exact in every type ----

int of_a(int row, int k) {
  return (row * 16 + k) * 7 % 11 - 5;
}
int of_b(int k, int column) {
  return (k * 8 + column) * 5 % 13 - 6;
}

// Expects that sums[rows, 8] is 1 + the product.
template <class Sum>
void expect_products(const std::vector<Sum>& sums, int rows, int depth) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < 8; ++column) {
      int sum = 1;
      for (int k = 0; k < depth; ++k) sum += of_a(row, k) * of_b(k, column);
      EXPECT(sums[row * 8 + column] == static_cast<Sum>(sum));
    }
  }
}

void store_sums(const float (&sums)[4], float* c) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}

template <class T, class Conversions>
__global__ void multiply_16_bit(float* c) {
  const int row = threadIdx.x / 4, k = threadIdx.x % 4 * 2;
  const auto pair = [](int low, int high) {
    const T a = Conversions::narrow(static_cast<float>(low)), b = Conversions::narrow(static_cast<float>(high));
    return a.bits | static_cast<uint32_t>(b.bits) << 16;
  };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const int r = row + i % 2 * 8, first = k + i / 2 * 8;
    a[i] = pair(of_a(r, first), of_a(r, first + 1));
  }
  for (int i = 0; i < 2; ++i) b[i] = pair(of_b(k + i * 8, row), of_b(k + i * 8 + 1, row));
  float sums[4] = {1, 1, 1, 1};
  emulator::multiply_16_bit<T>(sums, a, b, Conversions::widen);
  store_sums(sums, c);
}

struct HalfConversions {
  static __half narrow(float value) { return __float2half_rn(value); }
  static float widen(__half value) { return __half2float(value); }
};
struct BfloatConversions {
  static __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
  static float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
};

void products_of_16_bits() {
  std::vector<float> c(128);
  EXPECT(launch(multiply_16_bit<__half, HalfConversions>, 1, 32, 0, c.data()) == cudaSuccess);
  expect_products(c, 16, 16);
  EXPECT(launch(multiply_16_bit<__nv_bfloat16, BfloatConversions>, 1, 32, 0, c.data()) == cudaSuccess);
  expect_products(c, 16, 16);
}

__global__ void multiply_tf32(float* c) {
  const int row = threadIdx.x / 4, k = threadIdx.x % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = emulator::to_tf32(static_cast<float>(of_a(row + i % 2 * 8, k + i / 2 * 4)));
  for (int i = 0; i < 2; ++i) b[i] = emulator::to_tf32(static_cast<float>(of_b(k + i * 4, row)));
  float sums[4] = {1, 1, 1, 1};
  emulator::multiply_tf32(sums, a, b);
  store_sums(sums, c);
}

void products_of_tf32() {
  std::vector<float> c(128);
  EXPECT(launch(multiply_tf32, 1, 32, 0, c.data()) == cudaSuccess);
  expect_products(c, 16, 8);
}

__global__ void multiply_double(double* c) {
  const int row = threadIdx.x / 4, k = threadIdx.x % 4;
  double sums[2] = {1, 1};
  emulator::multiply_double(sums, of_a(row, k), of_b(k, row));
  for (int i = 0; i < 2; ++i) c[row * 8 + k * 2 + i] = sums[i];
}

void products_of_doubles() {
  std::vector<double> c(64);
  EXPECT(launch(multiply_double, 1, 32, 0, c.data()) == cudaSuccess);
  expect_products(c, 8, 4);
}

// Adds `value` twice to sums that begin with 1, by products at k = 0 and at k = 4, after each of which the sums are
// truncated.
__global__ void add_small_products(float value, float* c) {
  const int k = threadIdx.x % 4;
  const uint32_t one = k == 0 ? emulator::to_tf32(1) : 0, a[4] = {one, one, one, one};
  const uint32_t small = emulator::to_tf32(value), b[2] = {small, small};
  float sums[4] = {1, 1, 1, 1};
  emulator::multiply_tf32(sums, a, b);
  store_sums(sums, c);
}

void sums_are_truncated() {
  const auto sum_with = [](float value) {
    std::vector<float> c(128);
    EXPECT(launch(add_small_products, 1, 32, 0, value, c.data()) == cudaSuccess);
    for (const float each : c) EXPECT(each == c[0]);
    return c[0];
  };
  EXPECT(sum_with(0x1p-22f) == 1 + 0x1p-21f);
  EXPECT(sum_with(0x1.8p-24f) == 1);            // if it were rounded, each would add 2^-23
  EXPECT(sum_with(-0x1p-25f) == 1 - 0x1p-23f);  // each subtracts 2^-24, as it is truncated
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

void floats_round_to_tf32() {
  const auto rounded = [](float value) { return from_bits(emulator::to_tf32(value)); };
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT(rounded(1 + 0x1p-10f) == 1 + 0x1p-10f && rounded(1 + 0x1p-11f) == 1 + 0x1p-10f);  // ties away from 0
  EXPECT(rounded(-1 - 0x1p-11f) == -1 - 0x1p-10f && rounded(1 + 0x1.ffcp-12f) == 1);
  EXPECT(rounded(0x1.ffcp-5f) == 0x1.ffcp-5f && rounded(0x1.ffep-5f) == 0x1p-4f);
  EXPECT(rounded(std::numeric_limits<float>::max()) == infinity && rounded(-infinity) == -infinity);
  EXPECT(rounded(nan) != rounded(nan) && rounded(0x1p-149f) == 0);
}

// ---- cp.async: each thread copies 16 bytes, and reads those that its neighbour copied ----

enum class Wait { for_all, for_first_group, not_at_all };

template <Wait wait, bool with_barrier = true>
__global__ void copy_groups(const float* input, float* output) {
  float* stages = shared<float>();  // two stages of 4 floats for each thread
  const int t = threadIdx.x, threads = blockDim.x;
  for (int stage = 0; stage < 2; ++stage) {
    emulator::copy_async(stages + (stage * threads + t) * 4, input + (stage * threads + t) * 4, 16,
                         stage == 0 ? 16 : 8);
    emulator::commit_copies();
  }
  if (wait == Wait::for_all) emulator::wait_copies(0);
  if (wait == Wait::for_first_group) emulator::wait_copies(1);
  if (with_barrier) __syncthreads();
  for (int stage = 0; stage < 2; ++stage)
    for (int i = 0; i < 4; ++i)
      output[(stage * threads + t) * 4 + i] = stages[(stage * threads + (t + 1) % threads) * 4 + i];
  __syncthreads();
  emulator::wait_copies(0);
}

template <Wait wait, bool with_barrier = true>
std::vector<float> copied() {
  std::vector<float> input(512), output(512);
  std::iota(input.begin(), input.end(), 1.0f);
  EXPECT(launch(copy_groups<wait, with_barrier>, 1, 64, 2048, input.data(), output.data()) == cudaSuccess);
  return output;
}

void copies_arrive_by_groups() {
  const std::vector<float> all = copied<Wait::for_all>(), first = copied<Wait::for_first_group>();
  for (int i = 0; i < 512; ++i) {
    const int thread = i / 4 % 64, source = i / 256 * 256 + (thread + 1) % 64 * 4 + i % 4;
    const float expected = i >= 256 && i % 4 >= 2 ? 0 : static_cast<float>(source + 1);  // 8 bytes, then zeros
    EXPECT(all[i] == expected);
    EXPECT(i < 256 ? first[i] == expected : first[i] != first[i]);
  }
}

void a_missing_wait_shows() {
  for (const float value : copied<Wait::not_at_all>()) EXPECT(value != value);
}

void a_missing_barrier_after_a_wait_shows() {
  emulator::order = Order::forward;
  const std::vector<float> output = copied<Wait::for_all, false>();
  EXPECT(std::any_of(output.begin(), output.end(), [](float value) { return value != value; }));
}

__global__ void copy_nothing() {
  emulator::copy_async(shared<float>() + threadIdx.x, nullptr, 4, 0);
  emulator::commit_copies();
  emulator::wait_copies(0);
  if (shared<float>()[threadIdx.x] != 0) std::exit(1);
}

void nothing_is_read_for_zeros() {
  EXPECT(launch(copy_nothing, 1, 64, 1024) == cudaSuccess);
}

// ---- misuse ----

__global__ void misaligned_row() {
  uint32_t result[4];
  emulator::load_matrices(result, shared<unsigned char>() + 8, false, "here");
}
__global__ void row_outside() {
  uint32_t result[4];
  emulator::load_matrices(result, shared<unsigned char>() + 1024, false, "here");
}
__global__ void misaligned_target() {
  emulator::copy_async(shared<unsigned char>() + 8, shared<unsigned char>(), 16, 16);
}
__global__ void misaligned_source() {
  emulator::copy_async(shared<unsigned char>(), shared<unsigned char>() + 4, 8, 8);
}
__global__ void copy_of_2_bytes() {
  emulator::copy_async(shared<unsigned char>(), shared<unsigned char>(), 2, 2);
}
__global__ void copy_that_reads_too_much() {
  emulator::copy_async(shared<unsigned char>(), shared<unsigned char>(), 4, 8);
}
__global__ void target_outside() {
  static float memory[4];
  emulator::copy_async(memory, shared<float>(), 4, 4);
}
__global__ void copy_not_waited_for() {
  emulator::copy_async(shared<float>(), shared<float>() + 4, 4, 4);
  emulator::commit_copies();
}
__global__ void copy_not_committed() {
  emulator::copy_async(shared<float>(), shared<float>() + 4, 4, 4);
  emulator::wait_copies(0);
}
__global__ void operand_not_rounded() {
  const uint32_t a[4] = {0x3f800001, 0, 0, 0}, b[2] = {};
  float sums[4] = {};
  emulator::multiply_tf32(sums, a, b);
}
__global__ void product_of_half_a_warp() {
  const uint32_t a[4] = {}, b[2] = {};
  float sums[4] = {};
  if (threadIdx.x % 32 < 16) emulator::multiply_tf32(sums, a, b);
}

const char* misaligned = "cp.async: an address that is not aligned to its size";
const char* not_waited_for = "copies of cp.async that it has not waited for";
const Case cases[] = {
    {"matrices_load_as_fragments", matrices_load_as_fragments},
    {"products_of_16_bits", products_of_16_bits},
    {"products_of_tf32", products_of_tf32},
    {"products_of_doubles", products_of_doubles},
    {"sums_are_truncated", sums_are_truncated},
    {"floats_round_to_tf32", floats_round_to_tf32},
    {"copies_arrive_by_groups", copies_arrive_by_groups},
    {"a_missing_wait_shows", a_missing_wait_shows},
    {"a_missing_barrier_after_a_wait_shows", a_missing_barrier_after_a_wait_shows},
    {"nothing_is_read_for_zeros", nothing_is_read_for_zeros},
    {"refuses_a_misaligned_row", run_with_shared<misaligned_row>, "ldmatrix: a row that is not aligned"},
    {"refuses_a_row_outside_of_shared_memory", run_with_shared<row_outside>, "ldmatrix: a row outside of shared"},
    {"refuses_a_misaligned_target", run_with_shared<misaligned_target>, misaligned},
    {"refuses_a_misaligned_source", run_with_shared<misaligned_source>, misaligned},
    {"refuses_a_copy_of_2_bytes", run_with_shared<copy_of_2_bytes>, "cp.async: not of 4, 8 or 16 bytes"},
    {"refuses_to_read_more_than_it_writes", run_with_shared<copy_that_reads_too_much>, "reads more than it writes"},
    {"refuses_a_target_outside_of_shared_memory", run_with_shared<target_outside>, "a target outside of shared memory"},
    {"refuses_a_copy_not_waited_for", run_with_shared<copy_not_waited_for>, not_waited_for},
    {"refuses_a_copy_not_committed", run_with_shared<copy_not_committed>, not_waited_for},
    {"refuses_an_operand_not_rounded", run<operand_not_rounded>, "a TF32 operand that was not rounded"},
    {"refuses_a_product_of_half_a_warp", run<product_of_half_a_warp>, "lanes of a warp wait at different operations"},
};

}  // namespace

int main(int count, char** arguments) {
  return run_cases(cases, count, arguments);
}
