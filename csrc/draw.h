// Drawing tokens, on CPUs and GPUs alike: random words, logarithms and integer weights. The results
// have the same bits everywhere, because each operation is rounded alone: files that include this
// are compiled without contraction, and the GPU's intrinsics are never fused.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TITOK_BOTH __host__ __device__ __forceinline__
#else
#define TITOK_BOTH inline
#endif

namespace titok {

// A number, or where on the op's device it is kept so that a captured graph can change it.
template <class T>
struct Value {
  T number;
  const T* tensor;
  TITOK_BOTH __attribute__((always_inline)) T get() const { return tensor ? *tensor : number; }
};

// Unnamed: a copy compiled for one instruction set must never be linked into the path of another.
namespace {
namespace draw {

constexpr int64_t kChunk = 256;  // tokens that a sum of weights covers on a CPU
constexpr int kWeightBits = 30, kWideBits = 40;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kUniformFloor = 1e-20;  // the official code's guard against log(0)
constexpr float kFloatMax = 3.402823466e38f;
constexpr float kLowest = -40.0f;                    // 2^-40 is far below half a weight
constexpr float kWideLowest = -41.0f;                // below 2^-40, where wide weights end
constexpr float kMagic = 12582912.0f + kWeightBits;  // a sum with it is rounded to an integer
// 2^f = 1 + f (c1 + f (c2 + ...)) on [-1/2, 1/2], highest power first.
#define TITOK_EXP2 \
  {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f}

#if defined(__CUDA_ARCH__)
TITOK_BOTH float add(float a, float b) { return __fadd_rn(a, b); }
TITOK_BOTH float mul(float a, float b) { return __fmul_rn(a, b); }
TITOK_BOTH double add(double a, double b) { return __dadd_rn(a, b); }
TITOK_BOTH double mul(double a, double b) { return __dmul_rn(a, b); }
#else
TITOK_BOTH float add(float a, float b) { return a + b; }
TITOK_BOTH float mul(float a, float b) { return a * b; }
TITOK_BOTH double add(double a, double b) { return a + b; }
TITOK_BOTH double mul(double a, double b) { return a * b; }
#endif

template <class To, class From>
TITOK_BOTH To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  memcpy(&result, &x, sizeof result);
  return result;
}

TITOK_BOTH float negative_infinity() { return bits_of<float>(0xff800000u); }

struct Words {
  uint32_t w[4];
};

// Philox4x32-10 (Salmon et al., SC 2011).
TITOK_BOTH Words philox4x32(Words counter, uint32_t low_key, uint32_t high_key) {
  uint32_t (&c)[4] = counter.w;
  for (int round = 0; round < 10; ++round) {
    const uint64_t ab = uint64_t{0xD2511F53u} * c[0], cd = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(cd >> 32) ^ c[1] ^ low_key;
    c[2] = static_cast<uint32_t>(ab >> 32) ^ c[3] ^ high_key;
    c[1] = static_cast<uint32_t>(cd);
    c[3] = static_cast<uint32_t>(ab);
    low_key += 0x9E3779B9u;
    high_key += 0xBB67AE85u;
  }
  return counter;
}

TITOK_BOTH Words random_words(int64_t seed, int64_t image, int64_t step, int64_t position,
                              uint32_t draw) {
  const uint64_t key = static_cast<uint64_t>(seed);
  return philox4x32({{static_cast<uint32_t>(image), static_cast<uint32_t>(step),
                      static_cast<uint32_t>(position), draw}},
                    static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// floor(u total) for u = (2^32 high + low) / 2^64: in [0, total).
TITOK_BOTH uint64_t scaled_uniform(uint32_t high, uint32_t low, uint64_t total) {
  const uint64_t u = uint64_t{high} << 32 | low;
#if defined(__CUDA_ARCH__)
  return __umul64hi(u, total);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(u) * total >> 64);
#endif
}

// In (0, 1).
TITOK_BOTH double uniform(uint32_t word) {
  return mul(add(static_cast<double>(word), 0.5), 0x1p-32);
}

// log of a positive number.
TITOK_BOTH double natural_log(double x) {
  int exponent;
  double mantissa = frexp(x, &exponent);
  if (mantissa < 0.70710678118654757) {
    mantissa += mantissa;
    --exponent;
  }
  const double s = add(mantissa, -1.0) / add(mantissa, 1.0), square = mul(s, s);
  constexpr double kAtanh[] = {1.0 / 23, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13,
                               1.0 / 11, 1.0 / 9,  1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};
  double series = kAtanh[0];
  for (int i = 1; i < 12; ++i) series = add(mul(series, square), kAtanh[i]);
  return add(mul(exponent, kLn2), mul(mul(s, 2.0), series));
}

TITOK_BOTH float gumbel(double u) {
  const double inner = -natural_log(u > kUniformFloor ? u : kUniformFloor);
  return static_cast<float>(-natural_log(inner > kUniformFloor ? inner : kUniformFloor));
}

// Factor from a difference of logits to an exponent of 2; never negative or NaN.
TITOK_BOTH float sharpness(float temperature, float other = 1.0f) {
  const double factor = kLog2E / mul(static_cast<double>(temperature), static_cast<double>(other));
  if (!(factor > 0.0)) return 0.0f;
  return static_cast<float>(factor < kFloatMax ? factor : kFloatMax);
}

// What the weights measure from.
TITOK_BOTH float finite_largest(float largest) { return largest < kFloatMax ? largest : kFloatMax; }

// factor (x - largest), within [lowest, 0]; NaN and -inf are `lowest`, +inf is 0.
TITOK_BOTH float exponent(float x, float finite_largest, float factor, float lowest) {
  float t = mul(add(x, -finite_largest), factor);
  t = t > lowest ? t : lowest;
  return t < 0.0f ? t : 0.0f;
}

// 2^t as `mantissa`, about 1, times 2^n, where n + kWeightBits stands in the low bits of `shifted`.
struct Power {
  float mantissa, shifted;
};

TITOK_BOTH Power power_of_two(float t) {
  constexpr float kCoefficients[] = TITOK_EXP2;
  const float shifted = add(t, kMagic), f = add(t, -add(shifted, -kMagic));
  float p = kCoefficients[0];
  for (int i = 1; i < 6; ++i) p = add(mul(p, f), kCoefficients[i]);
  return {p, shifted};
}

TITOK_BOTH uint32_t rounded(float x) {
#if defined(__CUDA_ARCH__)
  return __float2uint_rn(x);
#else
  return static_cast<uint32_t>(lrintf(x));
#endif
}

// round(2^30 2^(factor (x - largest))); 0 for NaN and -inf, 2^30 for +inf.
TITOK_BOTH uint32_t weight(float x, float finite_largest, float factor) {
  const Power power = power_of_two(exponent(x, finite_largest, factor, kLowest));
  return rounded(
      bits_of<float>(bits_of<uint32_t>(power.mantissa) + (bits_of<uint32_t>(power.shifted) << 23)));
}

// floor(2^40 2^t) for t in [kWideLowest, 0].
TITOK_BOTH uint64_t wide_weight(float t) {
  const Power power = power_of_two(t);
  const uint64_t mantissa = rounded(mul(power.mantissa, 0x1p30f));
  const uint32_t shift = bits_of<uint32_t>(kMagic) - bits_of<uint32_t>(power.shifted);
  return mantissa << (kWideBits - 30) >> shift;
}

// Which base the guidance starts from; `none` has conditional logits alone.
enum class Guidance { none, cond, uncond };

TITOK_BOTH float combine(float cond, float uncond, float scale, Guidance guidance) {
  if (guidance == Guidance::none) return cond;
  return add(guidance == Guidance::cond ? cond : uncond, mul(scale, add(cond, -uncond)));
}

// Sorts as the float does; NaN must not come.
TITOK_BOTH uint32_t ordered(float x) {
  const uint32_t bits = bits_of<uint32_t>(add(x, 0.0f));  // -0.0 is 0.0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace draw
}  // namespace
}  // namespace titok
