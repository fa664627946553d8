// The PTX instructions that the kernels use besides CUDA C++: cp.async, ldmatrix, cvt.rna.tf32 and mma.sync, with the
// fragment layouts of the PTX manual. Two uses of a PTX instruction cannot be told apart by their place in the source,
// so each instruction is one site.
//
// These mistakes are reported: copies and rows that are misaligned, of an invalid size, or outside shared memory;
// copies that a thread has not waited for when it ends; and TF32 operands that were not rounded. The target of a
// cp.async is NaN from its start until its thread has waited for it, so a missing wait shows, and so does a stage that
// is filled again while other threads still read it.
#pragma once

namespace emulator {

constexpr unsigned all_lanes = 0xffffffffu;

inline void check_shared(const void* memory, size_t bytes, const char* message) {
  const auto* first = static_cast<const unsigned char*>(memory);
  if (first < block.shared || first + bytes > block.shared + block.shared_bytes) fail(message);
}

// ---- cp.async ----

// Copies `bytes` bytes to shared memory, and zeros to the rest of `size`. They arrive in wait_copies().
inline void copy_async(void* target, const void* source, size_t size, size_t bytes) {
  if (size != 4 && size != 8 && size != 16) fail("cp.async: not of 4, 8 or 16 bytes");
  if (bytes > size) fail("cp.async: reads more than it writes");
  if (reinterpret_cast<uintptr_t>(target) % size != 0 || reinterpret_cast<uintptr_t>(source) % size != 0)
    fail("cp.async: an address that is not aligned to its size");
  check_shared(target, size, "cp.async: a target outside of shared memory");
  std::memset(target, 0xff, size);
  Thread& self = *block.current;
  self.copies.push_back({static_cast<unsigned char*>(target), source, bytes, size - bytes});
  ++self.open_copies;
}

inline void commit_copies() {
  Thread& self = *block.current;
  self.groups.push_back(self.open_copies);
  self.open_copies = 0;
}

// Lets the oldest groups of copies arrive until at most `pending` are in flight.
inline void wait_copies(size_t pending) {
  Thread& self = *block.current;
  size_t arrived = 0;
  while (self.groups.size() > pending) {
    arrived += self.groups.front();
    self.groups.erase(self.groups.begin());
  }
  for (size_t i = 0; i < arrived; ++i) {
    const Copy& copy = self.copies[i];
    if (copy.bytes) std::memcpy(copy.target, copy.source, copy.bytes);
    std::memset(copy.target + copy.bytes, 0, copy.zeros);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(arrived));
}

// ---- ldmatrix.x4: four matrices of 8 rows of 16 bytes ----

inline void load_matrices(uint32_t (&result)[4], const void* row, bool transposed, const char* site) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: a row that is not aligned to 16 bytes");
  check_shared(row, 16, "ldmatrix: a row outside of shared memory");
  struct Row {
    uint16_t elements[8];
  };
  Row mine;
  std::memcpy(&mine, row, sizeof(mine));
  const Exchange<Row> rows(all_lanes, mine, site);
  const int l = lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair = 0;
    for (int i = 0; i < 2; ++i) {
      const int r = transposed ? 2 * (l % 4) + i : l / 4, c = transposed ? l / 4 : 2 * (l % 4) + i;
      pair |= static_cast<uint32_t>(rows[matrix * 8 + r].elements[c]) << (16 * i);
    }
    result[matrix] = pair;
  }
}

// ---- mma.sync: sums[M, N] += a[M, K] b[K, N] of a warp, computed by the last lane to arrive ----

template <class Sum, class Register>
struct Fragments {
  Sum* sums;
  const Register *a, *b;
};

// Calls compute(lanes) with the fragments of each lane.
template <class Sum, class Register, class Compute>
void multiply(Sum* sums, const Register* a, const Register* b, const char* site, const Compute& compute) {
  using Mine = Fragments<Sum, Register>;
  Thread& self = *block.current;
  auto* slots = block.warps[self.number / warp_size].slots[self.parity ^= 1];
  const Mine mine{sums, a, b};
  std::memcpy(slots[self.number % warp_size], &mine, sizeof(mine));
  meet(all_lanes, site, [&] {
    Mine lanes[warp_size];
    for (int i = 0; i < warp_size; ++i) std::memcpy(&lanes[i], slots[i], sizeof(Mine));
    compute(lanes);
  });
}

inline float truncated(double sum) {
  const auto rounded = static_cast<float>(sum);
  if (!(std::fabs(rounded) > std::fabs(sum)) || std::isinf(rounded)) return rounded;
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  float result;
  std::memcpy(&result, &--bits, sizeof(result));
  return result;
}

// Adds products to sums[16, 8] of floats: `chunk` of them at a time are added in double, and the result is truncated,
// as was measured on GPUs of compute capability 8.0 (Fasi, Higham, Mikaitis and Pranesh, 2021), which add them exactly.
template <int depth, int chunk>
void add_products(const Fragments<float, uint32_t>* lanes, const float (&a)[16][depth], const float (&b)[depth][8]) {
  for (int row = 0; row < 16; ++row) {
    double sums[8];
    const auto sum = [&](int column) -> float& {
      return lanes[row % 8 * 4 + column / 2].sums[row / 8 * 2 + column % 2];
    };
    for (int column = 0; column < 8; ++column) sums[column] = sum(column);
    for (int k = 0; k < depth; k += chunk) {
      for (int i = k; i < k + chunk; ++i)
        for (int column = 0; column < 8; ++column) sums[column] += double{a[row][i]} * b[i][column];
      for (double& value : sums) value = truncated(value);
    }
    for (int column = 0; column < 8; ++column) sum(column) = static_cast<float>(sums[column]);
  }
}

// m16n8k16 with 16-bit elements.
template <class T, class Widen>
void multiply_16_bit(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Widen& widen) {
  multiply(&sums[0], &a[0], &b[0], "mma.m16n8k16", [&](const Fragments<float, uint32_t>* lanes) {
    const auto element = [&](uint32_t pair, int which) {
      const auto bits = static_cast<uint16_t>(pair >> (16 * which));
      T value;
      std::memcpy(&value, &bits, sizeof(bits));
      return widen(value);
    };
    float of_a[16][16], of_b[16][8];
    for (int l = 0; l < warp_size; ++l) {
      for (int i = 0; i < 8; ++i)
        of_a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = element(lanes[l].a[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) of_b[l % 4 * 2 + i % 2 + i / 2 * 8][l / 4] = element(lanes[l].b[i / 2], i % 2);
    }
    add_products<16, 8>(lanes, of_a, of_b);
  });
}

// m16n8k8 with TF32 elements.
inline void multiply_tf32(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(&sums[0], &a[0], &b[0], "mma.m16n8k8.tf32", [&](const Fragments<float, uint32_t>* lanes) {
    const auto element = [](uint32_t bits) {
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      if (bits & 0x1fff && value == value) fail("mma: a TF32 operand that was not rounded");
      return value;
    };
    float of_a[16][8], of_b[8][8];
    for (int l = 0; l < warp_size; ++l) {
      for (int i = 0; i < 4; ++i) of_a[l / 4 + i % 2 * 8][l % 4 + i / 2 * 4] = element(lanes[l].a[i]);
      for (int i = 0; i < 2; ++i) of_b[l % 4 + i * 4][l / 4] = element(lanes[l].b[i]);
    }
    add_products<8, 4>(lanes, of_a, of_b);
  });
}

// m8n8k4 with double elements.
inline void multiply_double(double (&sums)[2], double a, double b) {
  multiply(&sums[0], &a, &b, "mma.m8n8k4.f64", [&](const Fragments<double, double>* lanes) {
    for (int l = 0; l < warp_size; ++l)
      for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 4; ++k)
          lanes[l].sums[i] = std::fma(*lanes[l / 4 * 4 + k].a, *lanes[(l % 4 * 2 + i) * 4 + k].b, lanes[l].sums[i]);
  });
}

// cvt.rna.tf32.f32 rounds to nearest, with ties away from 0.
inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fffffff;
  return (bits + 0x1000) & ~uint32_t{0x1fff};
}

}  // namespace emulator
