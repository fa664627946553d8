// __half for the emulator. It has conversions only, because the kernels compute in float.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  _Float16 number;
  std::memcpy(&number, &value, sizeof(number));
  return static_cast<float>(number);
}

inline __half __float2half_rn(float value) {
  const auto number = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result, &number, sizeof(number));
  return result;
}
