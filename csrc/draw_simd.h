// Vector forms of draw.h. Include only from files that are compiled for one instruction set: all is
// local to the including file.
#pragma once

#include "draw.h"
#include "simd.h"

namespace titok {
namespace {
namespace draw {

using S = simd::Native;
using V = S::V;

// draw::exponent of each lane.
inline V exponents(V x, V largest, V factor, float lowest) {
  V t = S::mul(S::sub(x, largest), factor);
  t = S::max(t, S::broadcast(lowest));  // max keeps its second operand for a NaN
  return S::min(t, S::broadcast(0.0f));
}

// 2^t is mantissa / scale times 2^exponent; `shifted` as in draw::Power.
struct Powers {
  V mantissa, exponent, shifted;
};

// draw::power_of_two of each lane, its mantissa times `scale`, a power of two.
inline Powers powers_of_two(V t, float scale) {
  constexpr float kCoefficients[] = TITOK_EXP2;
  const V magic = S::broadcast(kMagic);
  const V shifted = S::add(t, magic), n = S::sub(shifted, magic), f = S::sub(t, n);
  V p = S::broadcast(kCoefficients[0] * scale);
  for (int i = 1; i < 6; ++i) p = S::add(S::mul(p, f), S::broadcast(kCoefficients[i] * scale));
  return {p, n, shifted};
}

// draw::weight of each lane, as integers held in floats.
inline V weights(V x, V largest, V factor) {
  const Powers powers = powers_of_two(exponents(x, largest, factor, kLowest), 1.0f);
  return S::scale(powers.mantissa, powers.shifted);
}

// draw::wide_weight of each lane; 0 where t is below `limit`.
inline S::Wide wide_weights(V t, float limit) {
  const Powers powers = powers_of_two(t, 0x1p30f);
  return S::shifted<kWideBits - 30>(S::zero_below(powers.mantissa, t, limit),
                                    S::sub(S::broadcast(0.0f), powers.exponent));
}

// Combined logits of `count` tokens into `out`, unless it is null, and -inf from there up to
// `padded`; the largest, NaN apart. Without `out`, `count` is a multiple of S::lanes.
template <Guidance guidance, class T>
float combine_row(const T* cond, const T* uncond, float scale, int64_t count, float* out,
                  int64_t padded) {
  const V scales = S::broadcast(scale);
  V largest = S::broadcast(negative_infinity());
  const auto take = [&](int64_t v, const auto& load) {
    V x = load(cond + v);
    if constexpr (guidance != Guidance::none) {
      const V u = load(uncond + v);
      x = S::add(guidance == Guidance::cond ? x : u, S::mul(scales, S::sub(x, u)));
    }
    if (out) S::store(out + v, x);
    return x;
  };
  int64_t v = 0;
  for (; v + S::lanes <= count; v += S::lanes) {
    largest = S::max(take(v, [](const T* p) { return S::load(p); }), largest);
  }
  if (!out) return S::largest(largest);
  if (v < count) {
    const int64_t left = count - v;
    take(v, [=](const T* p) { return S::load_part(p, left); });
    for (int64_t i = count; i < v + S::lanes; ++i) out[i] = negative_infinity();
    largest = S::max(S::load(out + v), largest);
    v += S::lanes;
  }
  for (; v < padded; v += S::lanes) S::store(out + v, S::broadcast(negative_infinity()));
  return S::largest(largest);
}

template <class T>
float combine_row(Guidance guidance, const T* cond, const T* uncond, float scale, int64_t count,
                  float* out, int64_t padded) {
  switch (guidance) {
    case Guidance::cond:
      return combine_row<Guidance::cond>(cond, uncond, scale, count, out, padded);
    case Guidance::uncond:
      return combine_row<Guidance::uncond>(cond, uncond, scale, count, out, padded);
    default:
      return combine_row<Guidance::none>(cond, uncond, scale, count, out, padded);
  }
}

// The first of `count` logits, a multiple of S::lanes, that is `largest`; `count` where none is.
inline int64_t first_equal(const float* logits, int64_t count, float largest) {
  const V top = S::broadcast(largest);
  for (int64_t v = 0; v < count; v += S::lanes) {
    unsigned hits = S::not_less(S::load(logits + v), top);  // NaN too
    for (; hits; hits &= hits - 1) {
      const int64_t token = v + __builtin_ctz(hits);
      if (logits[token] == largest) return token;
    }
  }
  return count;
}

}  // namespace draw
}  // namespace
}  // namespace titok
