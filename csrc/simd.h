// The vector types that kernels are templates over. Include only from files that are compiled for
// one instruction set (<op>_avx2.cpp and so on): each sees the types its flags allow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "amx.h"
#include "common.h"

namespace titok {
// Unnamed: a copy compiled for one set must never be linked into the path of another.
namespace {
namespace simd {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// fn(x) with an x of the type that a dtype has here.
template <class Fn>
void with_type(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::float32:
      return fn(float{});
    case DType::float16:
      return fn(Half{});
    case DType::bfloat16:
      return fn(BFloat16{});
  }
}

inline float widen(float x) { return x; }

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

// To the nearest, ties to even.
template <class T>
T rounded(float x);

template <>
inline float rounded(float x) {
  return x;
}

template <>
inline BFloat16 rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(x == x ? nearest : 0x7fc0)};
}

template <>
inline Half rounded(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t result = x == x ? 0x7c00 : 0x7e00;
  if (size < 0x38800000) {  // subnormal: the sum's last bit is 2^-24
    const float sum = std::fabs(x) + 0.5f;
    std::memcpy(&result, &sum, sizeof result);
    result -= 0x3f000000;
  } else if (size < 0x47800000) {
    result = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
#endif
}

#if defined(__AVX2__)

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 load8(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
// The first `count` (fewer than eight), then zeros.
inline __m256 load8_part(const float* p, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p,
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
}
template <class T>
__m256 load8_part(const T* p, int64_t count) {
  T part[8] = {};
  std::memcpy(part, p, static_cast<std::size_t>(count) * sizeof(T));
  return load8(part);
}

#endif

// Eight doubles, whatever the machine: sums over them have one order everywhere.
#if defined(__AVX512F__)

struct Double8 {
  __m512d v;
  static Double8 zero() { return {_mm512_setzero_pd()}; }
  static Double8 broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static Double8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Double8 widen(__m256 x) { return {_mm512_cvtps_pd(x)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  __m256d low() const { return _mm512_castpd512_pd256(v); }
  __m256d high() const { return _mm512_extractf64x4_pd(v, 1); }
};
inline Double8 operator+(Double8 a, Double8 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Double8 operator-(Double8 a, Double8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Double8 operator*(Double8 a, Double8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Double8 operator/(Double8 a, Double8 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline Double8 sqrt(Double8 x) { return {_mm512_sqrt_pd(x.v)}; }
// A NaN in x stays.
inline Double8 max(Double8 floor, Double8 x) { return {_mm512_max_pd(floor.v, x.v)}; }

#elif defined(__AVX2__)

struct Double8 {
  __m256d a, b;
  static Double8 zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Double8 broadcast(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
  static Double8 load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  static Double8 widen(__m256 x) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
            _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
  }
  void store(double* p) const {
    _mm256_storeu_pd(p, a);
    _mm256_storeu_pd(p + 4, b);
  }
  __m256d low() const { return a; }
  __m256d high() const { return b; }
};
inline Double8 operator+(Double8 x, Double8 y) {
  return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)};
}
inline Double8 operator-(Double8 x, Double8 y) {
  return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)};
}
inline Double8 operator*(Double8 x, Double8 y) {
  return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)};
}
inline Double8 operator/(Double8 x, Double8 y) {
  return {_mm256_div_pd(x.a, y.a), _mm256_div_pd(x.b, y.b)};
}
inline Double8 sqrt(Double8 x) { return {_mm256_sqrt_pd(x.a), _mm256_sqrt_pd(x.b)}; }
inline Double8 max(Double8 floor, Double8 x) {
  return {_mm256_max_pd(floor.a, x.a), _mm256_max_pd(floor.b, x.b)};
}

#else

struct Double8 {
  double v[8];
  static Double8 zero() { return {}; }
  static Double8 broadcast(double x) { return {{x, x, x, x, x, x, x, x}}; }
  static Double8 load(const double* p) {
    Double8 out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  void store(double* p) const { std::memcpy(p, v, sizeof v); }
};
template <class Fn>
Double8 each(Double8 a, Double8 b, Fn fn) {
  Double8 out;
  for (int i = 0; i < 8; ++i) out.v[i] = fn(a.v[i], b.v[i]);
  return out;
}
inline Double8 operator+(Double8 a, Double8 b) {
  return each(a, b, [](double x, double y) { return x + y; });
}
inline Double8 operator-(Double8 a, Double8 b) {
  return each(a, b, [](double x, double y) { return x - y; });
}
inline Double8 operator*(Double8 a, Double8 b) {
  return each(a, b, [](double x, double y) { return x * y; });
}
inline Double8 operator/(Double8 a, Double8 b) {
  return each(a, b, [](double x, double y) { return x / y; });
}
inline Double8 sqrt(Double8 a) {
  return each(a, a, [](double x, double) { return std::sqrt(x); });
}
inline Double8 max(Double8 floor, Double8 a) {
  return each(floor, a, [](double x, double y) { return x > y ? x : y; });
}

#endif

// ((0+1)+(2+3)) + ((4+5)+(6+7)): the order that every backend follows.
inline double sum_pairs(Double8 s) {
#if defined(__AVX2__)
  const __m256d pairs = _mm256_hadd_pd(s.low(), s.high());  // 0+1, 4+5, 2+3, 6+7
  const __m128d halves = _mm_add_pd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1));
  return _mm_cvtsd_f64(_mm_add_sd(halves, _mm_unpackhi_pd(halves, halves)));
#else
  return ((s.v[0] + s.v[1]) + (s.v[2] + s.v[3])) + ((s.v[4] + s.v[5]) + (s.v[6] + s.v[7]));
#endif
}

// Lane j is sum_pairs(s[j]), in that order.
inline Double8 sum_pairs(const Double8 (&s)[8]) {
#if defined(__AVX512F__)
  __m512d pairs[4], fours[2];
  for (int j = 0; j < 4; ++j) {
    const __m512d x = s[2 * j].v, y = s[2 * j + 1].v;
    pairs[j] = _mm512_add_pd(_mm512_unpacklo_pd(x, y), _mm512_unpackhi_pd(x, y));
  }
  const auto halve = [](__m512d x, __m512d y) {
    return _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x88), _mm512_shuffle_f64x2(x, y, 0xdd));
  };
  for (int j = 0; j < 2; ++j) fours[j] = halve(pairs[2 * j], pairs[2 * j + 1]);
  return {halve(fours[0], fours[1])};
#elif defined(__AVX2__)
  const auto four = [](__m256d w, __m256d x, __m256d y, __m256d z) {
    const __m256d wx = _mm256_hadd_pd(w, x), yz = _mm256_hadd_pd(y, z);
    return _mm256_add_pd(_mm256_permute2f128_pd(wx, yz, 0x20),
                         _mm256_permute2f128_pd(wx, yz, 0x31));
  };
  return {
      _mm256_add_pd(four(s[0].a, s[1].a, s[2].a, s[3].a), four(s[0].b, s[1].b, s[2].b, s[3].b)),
      _mm256_add_pd(four(s[4].a, s[5].a, s[6].a, s[7].a), four(s[4].b, s[5].b, s[6].b, s[7].b))};
#else
  Double8 out;
  for (int j = 0; j < 8; ++j) out.v[j] = sum_pairs(s[j]);
  return out;
#endif
}

// p[0..8) as doubles, zeros from `count` on.
template <class T>
Double8 widen8(const T* p, int64_t count) {
#if defined(__AVX2__)
  return Double8::widen(count >= 8 ? load8(p) : load8_part(p, count));
#else
  Double8 out = Double8::zero();
  const int64_t end = count < 8 ? count : 8;
  for (int64_t i = 0; i < end; ++i) out.v[i] = widen(p[i]);
  return out;
#endif
}

// A Native set: `lanes` floats a vector; a tile of tile_rows x tile_vectors accumulators, which is
// in registers but with AMX.
#if defined(__AVX512F__)
struct Avx512 {
  static constexpr int lanes = 16;
#if defined(__AMX_BF16__)
  static constexpr int tile_rows = amx::kRows, tile_vectors = 4;
#else
  static constexpr int tile_rows = 6, tile_vectors = 4;
#endif
  using V = __m512;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // The first `count` (fewer than a vector), then zeros.
  static V load_part(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  }
  template <class T>
  static V load_part(const T* p, int64_t count) {
    T part[lanes] = {};
    std::memcpy(part, p, static_cast<std::size_t>(count) * sizeof(T));
    return load(part);
  }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  // Rounded as rounded() does.
  static void store(Half* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, V v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_srli_epi32(
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __m512i result = _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                                 _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
  }
  static V broadcast(float x) { return _mm512_set1_ps(x); }
  static V fmadd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  // a / b to 2^-22 of it, in less time, for b from 1 to e^88.
  static V quotient(V a, V b) {
    const V inverse = _mm512_rcp14_ps(b);
    return mul(a, fmadd(inverse, _mm512_fnmadd_ps(b, inverse, broadcast(1.0f)), inverse));
  }
  static V sqrt(V a) { return _mm512_sqrt_ps(a); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  // Sums of lanes that are rounded to integers in [0, 2^31).
  struct Sum {
    __m512i even, odd;
  };
  static void add_rounded(Sum& sum, V x) { add_integers(sum, _mm512_cvtps_epi32(x)); }
  // Both, whose rounded lanes sum to less than 2^32.
  static void add_rounded(Sum& sum, V x, V y) {
    add_integers(sum, _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_cvtps_epi32(y)));
  }
  static void add_integers(Sum& sum, __m512i integers) {
    sum.even =
        _mm512_add_epi64(sum.even, _mm512_and_si512(integers, _mm512_set1_epi64(0xffffffff)));
    sum.odd = _mm512_add_epi64(sum.odd, _mm512_srli_epi64(integers, 32));
  }
  static uint64_t total(Sum sum) {
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(sum.even, sum.odd)));
  }
  // floor(2^up x / 2^down) of each lane, for integers x in [0, 2^31) and `down` in [0, 64).
  using Wide = Sum;
  template <int up>
  static Wide shifted(V x, V down) {
    const __m512i integers = _mm512_cvtps_epi32(x), counts = _mm512_cvtps_epi32(down);
    const __m512i low = _mm512_set1_epi64(0xffffffff);
    return {_mm512_srlv_epi64(_mm512_slli_epi64(_mm512_and_si512(integers, low), up),
                              _mm512_and_si512(counts, low)),
            _mm512_srlv_epi64(_mm512_slli_epi64(_mm512_srli_epi64(integers, 32), up),
                              _mm512_srli_epi64(counts, 32))};
  }
  static void add(Sum& sum, Wide x) {
    sum.even = _mm512_add_epi64(sum.even, x.even);
    sum.odd = _mm512_add_epi64(sum.odd, x.odd);
  }
  // The even lanes, then the odd ones.
  static void store(uint64_t* p, Wide x) {
    _mm512_storeu_si512(p, x.even);
    _mm512_storeu_si512(p + lanes / 2, x.odd);
  }
  static void store_truncated(int32_t* p, V x) { _mm512_storeu_si512(p, _mm512_cvttps_epi32(x)); }
  static float sum(V a) { return _mm512_reduce_add_ps(a); }
  // sum() of each, to the bit.
  static constexpr int sums_at_once = 8;
  static void sums(const V (&a)[sums_at_once], float* out) {
    V halves[4], quarters[2];
    for (int i = 0; i < 4; ++i) {
      const V x = a[2 * i], y = a[2 * i + 1];
      halves[i] = add(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    for (int i = 0; i < 2; ++i) {
      const V x = halves[2 * i], y = halves[2 * i + 1];
      quarters[i] = add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    }
    const __m512d x = _mm512_castps_pd(quarters[0]), y = _mm512_castps_pd(quarters[1]);
    const V pairs =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    const V sums = add(pairs, _mm512_permute_ps(pairs, 0xb1));
    const __m512i order = _mm512_castsi256_si512(_mm256_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14));
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
  }
  static float largest(V a) { return _mm512_reduce_max_ps(a); }
  // p * 2^n for the n that sits in the low bits of `shifted`.
  static V scale(V p, V shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
  }
  // `value`, and zero in the lanes where x < limit.
  static V zero_below(V value, V x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, broadcast(limit), _CMP_NLT_UQ), value);
  }
  static bool all_between(V a, float low, float high) {
    return (_mm512_cmp_ps_mask(a, broadcast(low), _CMP_GE_OQ) &
            _mm512_cmp_ps_mask(a, broadcast(high), _CMP_LE_OQ)) == 0xffff;
  }
  // Bit i: lane i is not less than the other (true for NaN).
  static unsigned not_less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  // Row i of the result is column i.
  static void transpose(V (&rows)[lanes]) {
    V t[lanes];
    for (int i = 0; i < lanes; i += 2) {
      t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < lanes; i += 4) {
      const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
      const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
      rows[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      rows[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      rows[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      rows[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int i = 0; i < 4; ++i) {  // rows[4 q + i] holds columns i, i + 4, ... of rows 4 q..4 q + 3
      const V low = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
      const V high = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
      t[i] = _mm512_shuffle_f32x4(low, high, 0x88);
      t[i + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);
      const V odd_low = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
      const V odd_high = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
      t[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
    for (int i = 0; i < lanes; ++i) rows[i] = t[i];
  }
};
using Native = Avx512;
#if defined(__AVX512VNNI__)
// Words of four integers from -127 to 127, kept in vectors of floats as those of bfloat16 are. Of
// the two words of a product one is "raised": its integers, from -most_raised to most_raised, are
// moved to zero and more, as the instruction wants them, and lower() takes the product of what was
// added and the other word off beforehand.
struct Bytes {
  static constexpr bool scaled = true;
  static constexpr int terms = 4, most_raised = 127;
  using V = Avx512::V;
  // Not __m512i, whose lanes of 64 bits make GCC 12 spill a tile of sums.
  typedef int32_t Sum __attribute__((vector_size(64)));
  static Sum zero() { return Sum{}; }
  static Sum start(const float* p) { return reinterpret_cast<Sum>(_mm512_loadu_ps(p)); }
  static void store(float* p, Sum sum) { _mm512_storeu_ps(p, reinterpret_cast<V>(sum)); }
  static Sum dot(V raised, V word, Sum sum) {
    return reinterpret_cast<Sum>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sum), _mm512_castps_si512(raised), _mm512_castps_si512(word)));
  }
  static Sum lower(V word, Sum sum) {
    const V raise = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0x80808080u)));
    return sum - dot(raise, word, zero());
  }
  static Sum max(Sum a, Sum b) { return a > b ? a : b; }
  static V widen(Sum sum) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum)); }
  // To the nearest integer.
  static V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  // Words of one integer each of four vectors.
  template <class Load>
  static V zip(const Load& load) {
    const auto byte = [&](int part) {
      return _mm512_and_si512(_mm512_cvtps_epi32(load(part)), _mm512_set1_epi32(0xff));
    };
    const __m512i low = _mm512_or_si512(byte(0), _mm512_slli_epi32(byte(1), 8));
    const __m512i high = _mm512_or_si512(byte(2), _mm512_slli_epi32(byte(3), 8));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // Raised words of consecutive values, rounded; load(0) to load(3) give them.
  template <class Load>
  static V raised_words(const Load& load) {
    const auto bytes = [&](int part) {
      return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(load(part)));
    };
    __m512i words = _mm512_castsi128_si512(bytes(0));
    words = _mm512_inserti32x4(words, bytes(1), 1);
    words = _mm512_inserti32x4(words, bytes(2), 2);
    words = _mm512_inserti32x4(words, bytes(3), 3);
    return _mm512_castsi512_ps(
        _mm512_xor_si512(words, _mm512_set1_epi32(static_cast<int>(0x80808080u))));
  }
};
#endif
#elif defined(__AVX2__)
struct Avx2 {
  static constexpr int lanes = 8;
  static constexpr int tile_rows = 6, tile_vectors = 2;
  using V = __m256;
  template <class T>
  static V load(const T* p) {
    return load8(p);
  }
  template <class T>
  static V load_part(const T* p, int64_t count) {
    return load8_part(p, count);
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store(Half* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, V v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_srli_epi32(
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i result =
        _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
  }
  static V broadcast(float x) { return _mm256_set1_ps(x); }
  static V fmadd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V quotient(V a, V b) { return div(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  struct Sum {
    __m256i even, odd;
  };
  static void add_rounded(Sum& sum, V x) { add_integers(sum, _mm256_cvtps_epi32(x)); }
  static void add_rounded(Sum& sum, V x, V y) {
    add_integers(sum, _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_cvtps_epi32(y)));
  }
  static void add_integers(Sum& sum, __m256i integers) {
    sum.even =
        _mm256_add_epi64(sum.even, _mm256_and_si256(integers, _mm256_set1_epi64x(0xffffffff)));
    sum.odd = _mm256_add_epi64(sum.odd, _mm256_srli_epi64(integers, 32));
  }
  static uint64_t total(Sum sum) {
    const __m256i lanes = _mm256_add_epi64(sum.even, sum.odd);
    const __m128i half =
        _mm_add_epi64(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return static_cast<uint64_t>(_mm_extract_epi64(half, 0) + _mm_extract_epi64(half, 1));
  }
  using Wide = Sum;
  template <int up>
  static Wide shifted(V x, V down) {
    const __m256i integers = _mm256_cvtps_epi32(x), counts = _mm256_cvtps_epi32(down);
    const __m256i low = _mm256_set1_epi64x(0xffffffff);
    return {_mm256_srlv_epi64(_mm256_slli_epi64(_mm256_and_si256(integers, low), up),
                              _mm256_and_si256(counts, low)),
            _mm256_srlv_epi64(_mm256_slli_epi64(_mm256_srli_epi64(integers, 32), up),
                              _mm256_srli_epi64(counts, 32))};
  }
  static void add(Sum& sum, Wide x) {
    sum.even = _mm256_add_epi64(sum.even, x.even);
    sum.odd = _mm256_add_epi64(sum.odd, x.odd);
  }
  static void store(uint64_t* p, Wide x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.even);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + lanes / 2), x.odd);
  }
  static void store_truncated(int32_t* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvttps_epi32(x));
  }
  static float sum(V a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static constexpr int sums_at_once = 4;
  static void sums(const V (&a)[sums_at_once], float* out) {
    __m128 halves[4], quarters[2];
    for (int i = 0; i < 4; ++i) {
      halves[i] = _mm_add_ps(_mm256_castps256_ps128(a[i]), _mm256_extractf128_ps(a[i], 1));
    }
    for (int i = 0; i < 2; ++i) {
      const __m128 x = halves[2 * i], y = halves[2 * i + 1];
      quarters[i] = _mm_add_ps(_mm_movelh_ps(x, y), _mm_movehl_ps(y, x));
    }
    _mm_storeu_ps(out, _mm_hadd_ps(quarters[0], quarters[1]));
  }
  static float largest(V a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static V scale(V p, V shifted) {
    return _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
  }
  static V zero_below(V value, V x, float limit) {
    return _mm256_and_ps(value, _mm256_cmp_ps(x, broadcast(limit), _CMP_NLT_UQ));
  }
  static bool all_between(V a, float low, float high) {
    const V inside = _mm256_and_ps(_mm256_cmp_ps(a, broadcast(low), _CMP_GE_OQ),
                                   _mm256_cmp_ps(a, broadcast(high), _CMP_LE_OQ));
    return _mm256_movemask_ps(inside) == 255;
  }
  static unsigned not_less(V a, V b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
  }
  static void transpose(V (&rows)[lanes]) {
    V t[lanes];
    for (int i = 0; i < lanes; i += 2) {
      t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < lanes; i += 4) {
      rows[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      rows[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      rows[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      rows[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
    }
    for (int i = 0; i < lanes; ++i) rows[i] = t[i];
  }
};
using Native = Avx2;
// As those of AVX-512 VNNI, but 16 bits must hold the sum of two products: raised integers have
// seven bits.
struct Bytes {
  static constexpr bool scaled = true;
  static constexpr int terms = 4, most_raised = 63;
  using V = Avx2::V;
  typedef int32_t Sum __attribute__((vector_size(32)));
  static Sum zero() { return Sum{}; }
  static Sum start(const float* p) { return reinterpret_cast<Sum>(_mm256_loadu_ps(p)); }
  static void store(float* p, Sum sum) { _mm256_storeu_ps(p, reinterpret_cast<V>(sum)); }
  static Sum dot(V raised, V word, Sum sum) {
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_castps_si256(raised), _mm256_castps_si256(word));
    return sum + reinterpret_cast<Sum>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Sum lower(V word, Sum sum) {
    return sum - dot(_mm256_castsi256_ps(_mm256_set1_epi8(64)), word, zero());
  }
  static Sum max(Sum a, Sum b) { return a > b ? a : b; }
  static V widen(Sum sum) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(sum)); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  template <class Load>
  static V zip(const Load& load) {
    const auto byte = [&](int part) {
      return _mm256_and_si256(_mm256_cvtps_epi32(load(part)), _mm256_set1_epi32(0xff));
    };
    const __m256i low = _mm256_or_si256(byte(0), _mm256_slli_epi32(byte(1), 8));
    const __m256i high = _mm256_or_si256(byte(2), _mm256_slli_epi32(byte(3), 8));
    return _mm256_castsi256_ps(_mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }
  template <class Load>
  static V raised_words(const Load& load) {
    const auto integers = [&](int part) { return _mm256_cvtps_epi32(load(part)); };
    const __m256i low = _mm256_packs_epi32(integers(0), integers(1));
    const __m256i high = _mm256_packs_epi32(integers(2), integers(3));
    const __m256i words =  // each half has a word of every part
        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return _mm256_castsi256_ps(_mm256_add_epi8(words, _mm256_set1_epi8(64)));
  }
};
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
  template <class T>
  static V load(const T* p) {
    return load_part(p, lanes);
  }
  template <class T>
  static V load_part(const T* p, int64_t count) {
    V v{};
    for (int64_t i = 0; i < count; ++i) v[i] = widen(p[i]);
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  template <class T>
  static void store(T* p, V v) {
    for (int i = 0; i < lanes; ++i) p[i] = rounded<T>(v[i]);
  }
  static V broadcast(float x) { return V{x, x, x, x}; }
  static V fmadd(V a, V b, V c) { return a * b + c; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V quotient(V a, V b) { return div(a, b); }
  static V sqrt(V a) {
    V v;
    for (int i = 0; i < lanes; ++i) v[i] = std::sqrt(a[i]);
    return v;
  }
  static V max(V a, V b) { return a > b ? a : b; }
  static V min(V a, V b) { return a < b ? a : b; }
  struct Sum {
    uint64_t value;
  };
  static void add_rounded(Sum& sum, V x) {
    for (int i = 0; i < lanes; ++i) sum.value += static_cast<uint64_t>(lrintf(x[i]));
  }
  static void add_rounded(Sum& sum, V x, V y) {
    add_rounded(sum, x);
    add_rounded(sum, y);
  }
  static uint64_t total(Sum sum) { return sum.value; }
  struct Wide {
    uint64_t lane[lanes];
  };
  template <int up>
  static Wide shifted(V x, V down) {
    Wide wide;
    for (int i = 0; i < lanes; ++i) {
      wide.lane[i] = static_cast<uint64_t>(x[i]) << up >> static_cast<int>(down[i]);
    }
    return wide;
  }
  static void add(Sum& sum, Wide x) {
    for (int i = 0; i < lanes; ++i) sum.value += x.lane[i];
  }
  static void store(uint64_t* p, Wide x) {
    for (int i = 0; i < lanes; ++i) p[i % 2 * (lanes / 2) + i / 2] = x.lane[i];
  }
  static void store_truncated(int32_t* p, V x) {
    for (int i = 0; i < lanes; ++i) p[i] = static_cast<int32_t>(x[i]);
  }
  static float sum(V a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  static constexpr int sums_at_once = 4;
  static void sums(const V (&a)[sums_at_once], float* out) {
    for (int i = 0; i < sums_at_once; ++i) out[i] = sum(a[i]);
  }
  static float largest(V a) {
    const float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
  }
  static V scale(V p, V shifted) {
    typedef uint32_t I __attribute__((vector_size(16)));
    return reinterpret_cast<V>(reinterpret_cast<I>(p) + (reinterpret_cast<I>(shifted) << 23));
  }
  static V zero_below(V value, V x, float limit) { return x < limit ? V{} : value; }
  static bool all_between(V a, float low, float high) {
    bool inside = true;
    for (int i = 0; i < lanes; ++i) inside = inside && a[i] >= low && a[i] <= high;
    return inside;
  }
  static unsigned not_less(V a, V b) {
    typedef int32_t I __attribute__((vector_size(16)));
    const I bits = ~(a < b) & I{1, 2, 4, 8};
    return static_cast<unsigned>((bits[0] | bits[1]) | (bits[2] | bits[3]));
  }
  static void transpose(V (&rows)[lanes]) {
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float x = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = x;
      }
    }
  }
};
using Native = Portable;
#endif

// What a register tile multiplies: words of `terms` values, whose products one dot() adds per lane;
// store() rounds a vector of them.
// words() packs load(0), load(1), ...: `terms` vectors of consecutive values; zip() one value each
// of two vectors.
struct Single {
  static constexpr int terms = 1;
  using V = Native::V;
  using Value = float;
  static V dot(V a, V b, V c) { return Native::fmadd(a, b, c); }
  static void store(Value* p, V v) { Native::store(p, v); }
  template <class Load>
  static V words(const Load& load) {
    return load(0);
  }
  static V zip(V low, V) { return low; }
};
#if defined(__AVX512BF16__)
// Pairs of bfloat16, summed in float32: half the steps.
struct Pairs {
  static constexpr int terms = 2;
  using V = Native::V;
  using Value = BFloat16;
  // Subnormals become zeros, as the product takes them.
  static void store(Value* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
  static V dot(V a, V b, V c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  template <class Load>
  static V words(const Load& load) {
    const V low = load(0), high = load(1);
    return reinterpret_cast<V>(_mm512_cvtne2ps_pbh(high, low));
  }
  static V zip(V low, V high) {
    const __m512i a = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)));
    const __m512i b = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high)));
    return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
};
using Words = Pairs;
#else
using Words = Single;
#endif

// row[0..lanes) where `left` values remain, zeros past them.
template <class T>
Native::V load_row(const T* row, int64_t left) {
  if (left >= Native::lanes) return Native::load(row);
  return left > 0 ? Native::load_part(row, left) : Native::broadcast(0.0f);
}

// row[0..lanes), rounded, where `left` values have room, at least one.
template <class T>
void store_row(T* row, Native::V v, int64_t left) {
  if (left >= Native::lanes) return Native::store(row, v);
  T part[Native::lanes];
  Native::store(part, v);
  std::memcpy(row, part, static_cast<std::size_t>(left) * sizeof(T));
}

// e^x for x <= 88, to 2 ulp; 0 below -60, so that products with it are not slow denormals; NaN
// stays.
inline Native::V exp(Native::V x) {
  using S = Native;
  constexpr float kLowest = -60.0f, kMagic = 12582912.0f;  // 1.5 * 2^23: its sum rounds to integer
  const S::V y = S::max(S::broadcast(kLowest), x);         // max keeps its second operand for a NaN
  const S::V shifted = S::fmadd(y, S::broadcast(1.44269504f), S::broadcast(kMagic));
  const S::V n = S::sub(shifted, S::broadcast(kMagic));
  S::V r = S::fmadd(n, S::broadcast(-0.693359375f), y);
  r = S::fmadd(n, S::broadcast(2.12194440e-4f), r);
  S::V p = S::broadcast(1.9841270e-4f);
  for (const float c :
       {1.3888889e-3f, 8.3333333e-3f, 4.1666667e-2f, 0.16666667f, 0.5f, 1.0f, 1.0f}) {
    p = S::fmadd(p, r, S::broadcast(c));
  }
  return S::zero_below(S::mul(p, S::scale(S::broadcast(1.0f), shifted)), x, kLowest);
}

// 2^x for x <= 127, to 2^-23 of it; 0 below -87; NaN stays.
inline Native::V exp2(Native::V x) {
  using S = Native;
  constexpr float kLowest = -87.0f, kMagic = 12582912.0f;  // as in exp()
  const S::V y = S::max(S::broadcast(kLowest), x);
  const S::V shifted = S::add(y, S::broadcast(kMagic));
  const S::V r = S::sub(y, S::sub(shifted, S::broadcast(kMagic)));
  S::V p = S::broadcast(1.5345811e-4f);
  for (const float c :
       {1.3399931e-3f, 9.6184890e-3f, 5.5503288e-2f, 0.24022647f, 0.69314721f, 1.0f}) {
    p = S::fmadd(p, r, S::broadcast(c));
  }
  return S::zero_below(S::mul(p, S::scale(S::broadcast(1.0f), shifted)), x, kLowest);
}

// v sigmoid(v); 0 below -88; NaN stays, and -inf is one.
inline Native::V silu(Native::V v) {
  using S = Native;
  constexpr float kLowest = -88.0f;
  const S::V zero = S::broadcast(0.0f);
  const S::V power = S::min(S::broadcast(-kLowest), S::sub(zero, v));
  const S::V product = S::quotient(v, S::add(S::broadcast(1.0f), exp(power)));
  return S::fmadd(S::min(zero, v), zero, S::zero_below(product, v, kLowest));
}

}  // namespace simd
}  // namespace
}  // namespace titok
