#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(x < 0 ? 0xfc00 : 0x7c00) {}  // kernels make infinities alone
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float size = std::ldexp(static_cast<float>(mantissa + (exponent > 0 ? 1024 : 0)),
                          (exponent > 0 ? exponent : 1) - 25);
  if (exponent == 31) size = mantissa > 0 ? NAN : INFINITY;
  return x.bits >> 15 ? -size : size;
}
