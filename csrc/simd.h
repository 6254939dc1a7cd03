// The vector types that kernels are templates over. Include only from files that are compiled for
// one instruction set (<op>_avx2.cpp and so on): each sees the types its flags allow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace titok {
// Unnamed: a copy compiled for one set must never be linked into the path of another.
namespace {
namespace simd {

#if defined(__AVX512F__)
struct Avx512 {
  static constexpr int lanes = 16;
  static constexpr int tile_rows = 6, tile_vectors = 4;
  using V = __m512;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V broadcast(float x) { return _mm512_set1_ps(x); }
  static V fmadd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V sqrt(V a) { return _mm512_sqrt_ps(a); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static bool all_between(V a, float low, float high) {
    return (_mm512_cmp_ps_mask(a, broadcast(low), _CMP_GE_OQ) &
            _mm512_cmp_ps_mask(a, broadcast(high), _CMP_LE_OQ)) == 0xffff;
  }
  // Bit i: lane i is not less than the other (true for NaN).
  static unsigned not_less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
};
using Native = Avx512;
#elif defined(__AVX2__)
struct Avx2 {
  static constexpr int lanes = 8;
  static constexpr int tile_rows = 6, tile_vectors = 2;
  using V = __m256;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V broadcast(float x) { return _mm256_set1_ps(x); }
  static V fmadd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static bool all_between(V a, float low, float high) {
    const V inside = _mm256_and_ps(_mm256_cmp_ps(a, broadcast(low), _CMP_GE_OQ),
                                   _mm256_cmp_ps(a, broadcast(high), _CMP_LE_OQ));
    return _mm256_movemask_ps(inside) == 255;
  }
  static unsigned not_less(V a, V b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
  }
};
using Native = Avx2;
#else
struct Portable {
  static constexpr int lanes = 4;
  static constexpr int tile_rows = 4, tile_vectors = 2;
  typedef float V __attribute__((vector_size(16)));
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  static V broadcast(float x) { return V{x, x, x, x}; }
  static V fmadd(V a, V b, V c) { return a * b + c; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V sqrt(V a) {
    V v;
    for (int i = 0; i < lanes; ++i) v[i] = std::sqrt(a[i]);
    return v;
  }
  static bool all_between(V a, float low, float high) {
    bool inside = true;
    for (int i = 0; i < lanes; ++i) inside = inside && a[i] >= low && a[i] <= high;
    return inside;
  }
  static V max(V a, V b) {
    V v;
    for (int i = 0; i < lanes; ++i) v[i] = a[i] > b[i] ? a[i] : b[i];
    return v;
  }
  static unsigned not_less(V a, V b) {
    unsigned mask = 0;
    for (int i = 0; i < lanes; ++i) mask |= static_cast<unsigned>(!(a[i] < b[i])) << i;
    return mask;
  }
};
using Native = Portable;
#endif

// Eight doubles, whatever the machine: sums over them have one order everywhere.
typedef double Double8 __attribute__((vector_size(64)));

inline float widen(float x) { return x; }

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f;
  const uint32_t mantissa = x.bits & 0x3ff;
  float result;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    result = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -result : result;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u | mantissa << 13
                                               : (exponent + 112) << 23 | mantissa << 13);
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

}  // namespace simd
}  // namespace
}  // namespace titok
