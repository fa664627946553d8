// The tile unit of Intel AMX, as far as products of bfloat16 pairs need it: eight registers, each of up to 16 rows of
// up to 64 bytes. AmxTiles executes the instructions, and TileModel computes what they do on any CPU. The code that
// uses a unit is a template, so that both run it; which one a process uses is decided in tile_unit.cpp.
//
// A unit has these members. A register t is a number from 0 to 7, and strides are in bytes.
//
//   configure(c)             sets the shapes of all registers (ldtilecfg), which fills them with zeros
//   zero<t>()                t = 0 (tilezero)
//   load<t>(p, stride)       row i of t = the bytes at p + i * stride, of which only the configured ones are read
//   store<t>(p, stride)      the reverse
//   multiply_add<c, a, b>()  c += a b, with the arithmetic below (tdpbf16ps)
//
// The constructor does nothing, and the destructor gives the registers back (tilerelease), so that the system need not
// save them when it switches threads.
//
// multiply_add: row m of a and row k of b hold the pairs A[m, k] and B[k, n], and c holds floats. For each m and n, two
// sums begin at zero and take the products of the first and of the second numbers in the order of k, each by one fused
// multiply-add. Then c[m, n] = c[m, n] + (first sum + second sum). Every result is rounded to nearest, ties to even.
// Denormal numbers are zeros of their sign, as operands and as results. A NaN stays a NaN, with any payload. The state
// of the processor's rounding mode and flags has no influence and is not changed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace pyops::cpu {

// Which unit multiplies the bfloat16 pairs of this process; `none`: vector instructions do.
enum class TileUnit { none, amx, model };

// The choice is made at the first call. The variable PYOPS_TILES makes it: `off`, `model`, or `amx`, which is refused
// where there is none. Without the variable, the unit of the CPU is used if the system permits it. Throws
// std::invalid_argument if the variable has a value that cannot be obeyed.
TileUnit tile_unit();

// The operand of ldtilecfg: the shape of each register.
struct TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int t, int64_t row_count, int64_t bytes) {
    rows[t] = static_cast<uint8_t>(row_count), row_bytes[t] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfiguration) == 64);

#if defined(__x86_64__)
// In assembly, because the compiler may not use this instruction set anywhere else.
class AmxTiles {
 public:
  AmxTiles() = default;
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() { asm volatile("tilerelease"); }

  void configure(const TileConfiguration& c) { asm volatile("ldtilecfg %0" : : "m"(c)); }
  template <int t>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int t>
  void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};
#endif

// The instructions in C++. Where they would raise an exception of the processor, it throws std::logic_error.
class TileModel {
 public:
  void configure(const TileConfiguration& c) {
    bool valid = c.palette == 1 && c.start_row == 0;
    for (int t = 0; t < 16; ++t)
      valid &= (c.rows[t] == 0) == (c.row_bytes[t] == 0) && c.rows[t] <= (t < 8 ? 16 : 0) && c.row_bytes[t] <= 64;
    require(valid);
    shape_ = c;
    std::memset(data_, 0, sizeof(data_));
  }
  template <int t>
  void zero() {
    require(shape_.rows[t] > 0);
    std::memset(data_[t], 0, sizeof(data_[t]));
  }
  template <int t>
  void load(const void* p, int64_t stride) {
    zero<t>();
    for (int i = 0; i < shape_.rows[t]; ++i)
      std::memcpy(data_[t][i], static_cast<const char*>(p) + i * stride, shape_.row_bytes[t]);
  }
  template <int t>
  void store(void* p, int64_t stride) {
    require(shape_.rows[t] > 0);
    for (int i = 0; i < shape_.rows[t]; ++i)
      std::memcpy(static_cast<char*>(p) + i * stride, data_[t][i], shape_.row_bytes[t]);
  }
  template <int c, int a, int b>
  void multiply_add() {
    static_assert(c != a && c != b && a != b);
    const TileConfiguration& s = shape_;
    require(s.rows[c] > 0 && s.rows[a] == s.rows[c] && s.row_bytes[b] == s.row_bytes[c] &&
            s.row_bytes[a] == 4 * s.rows[b] && s.row_bytes[c] % 4 == 0);
    const int steps = s.rows[b];
    float firsts[16][16], seconds[16][16];
    for (int k = 0; k < steps; ++k)
      for (int n = 0; n < 16; ++n) firsts[k][n] = first(data_[b][k][n]), seconds[k][n] = second(data_[b][k][n]);
    for (int m = 0; m < s.rows[c]; ++m) {
      float sum[16] = {}, sum_of_seconds[16] = {}, total[16];
      for (int k = 0; k < steps; ++k) {
        const float x = first(data_[a][m][k]), y = second(data_[a][m][k]);
        for (int n = 0; n < 16; ++n) sum[n] = flushed(std::fma(x, firsts[k][n], sum[n]));
        for (int n = 0; n < 16; ++n) sum_of_seconds[n] = flushed(std::fma(y, seconds[k][n], sum_of_seconds[n]));
      }
      std::memcpy(total, data_[c][m], sizeof(total));
      for (int n = 0; n < 16; ++n) total[n] = flushed(flushed(total[n]) + flushed(sum[n] + sum_of_seconds[n]));
      std::memcpy(data_[c][m], total, shape_.row_bytes[c]);
    }
  }

 private:
  static void require(bool valid) {
    if (!valid) throw std::logic_error("a tile instruction with wrong operands");
  }
  static float flushed(float x) { return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
  static float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return flushed(x);
  }
  static float first(uint32_t pair) { return from_bits(pair << 16); }
  static float second(uint32_t pair) { return from_bits(pair & 0xFFFF0000); }

  TileConfiguration shape_;
  uint32_t data_[8][16][16] = {};
};

}  // namespace pyops::cpu
