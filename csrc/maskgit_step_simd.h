// The MaskGIT step of one instruction set. Everything here is local to the including file, so that
// code compiled for one set is never linked into the path of another.
#pragma once

#include "maskgit_step.h"
#include "simd.h"

namespace titok {
namespace {

using S = simd::Native;
using V = S::V;

constexpr int64_t kChunk = kMaskgitStepChunk;

// draw::weight of each lane, as integers held in floats.
V weights(V x, V largest, V factor) {
  constexpr float kCoefficients[] = TITOK_EXP2;
  V t = S::mul(S::sub(x, largest), factor);
  t = S::max(t, S::broadcast(draw::kLowest));  // max keeps its second operand for a NaN
  t = S::min(t, S::broadcast(0.0f));
  const V magic = S::broadcast(draw::kMagic);
  const V shifted = S::add(t, magic), f = S::sub(t, S::sub(shifted, magic));
  V p = S::broadcast(kCoefficients[0]);
  for (int i = 1; i < 6; ++i) p = S::add(S::mul(p, f), S::broadcast(kCoefficients[i]));
  return S::scale(p, shifted);
}

template <class T>
struct Step {
  const MaskgitStepArgs& args;
  const MaskgitStepPlan& plan;
  const Team::Member& member;

  char* mine() const {
    return static_cast<char*>(args.workspace) + member.index * plan.thread_bytes;
  }
  float* logits() const { return reinterpret_cast<float*>(mine()); }
  uint64_t* sums() const { return reinterpret_cast<uint64_t*>(mine() + plan.sums); }

  const T* row(const void* logits, const int64_t (&strides)[2], int64_t position) const {
    const int64_t b = position / args.length, l = position % args.length;
    return static_cast<const T*>(logits) + b * strides[0] + l * strides[1];
  }

  bool masked(int64_t position) const { return args.ids[position] == args.mask_id; }

  // Combined logits into logits(), -inf past their end; the largest, NaN apart.
  template <draw::Guidance guidance>
  float combine(int64_t position) const {
    const V scale = S::broadcast(args.guidance_scale.get());
    const T* cond = row(args.cond, args.cond_strides, position);
    const T* uncond = nullptr;
    if (guidance != draw::Guidance::none) uncond = row(args.uncond, args.uncond_strides, position);
    float* out = logits();
    V largest = S::broadcast(draw::negative_infinity());
    const auto take = [&](int64_t v, const auto& load) {
      V x = load(cond + v);
      if constexpr (guidance != draw::Guidance::none) {
        const V u = load(uncond + v);
        x = S::add(guidance == draw::Guidance::cond ? x : u, S::mul(scale, S::sub(x, u)));
      }
      S::store(out + v, x);
      return x;
    };
    int64_t v = 0;
    for (; v + S::lanes <= args.vocabulary; v += S::lanes) {
      largest = S::max(take(v, [](const T* p) { return S::load(p); }), largest);
    }
    if (v < args.vocabulary) {
      const int64_t left = args.vocabulary - v;
      take(v, [=](const T* p) { return S::load_part(p, left); });
      for (int64_t i = args.vocabulary; i < v + S::lanes; ++i) out[i] = draw::negative_infinity();
      largest = S::max(S::load(out + v), largest);
      v += S::lanes;
    }
    for (; v < plan.padded; v += S::lanes) {
      S::store(out + v, S::broadcast(draw::negative_infinity()));
    }
    return S::largest(largest);
  }

  float combined(int64_t position) const {
    if (!args.uncond) return combine<draw::Guidance::none>(position);
    return args.from_uncond ? combine<draw::Guidance::uncond>(position)
                            : combine<draw::Guidance::cond>(position);
  }

  // Sums of the weights of each chunk into sums(); their total.
  uint64_t sum_weights(float largest, float sharpness) const {
    const V top = S::broadcast(largest), factor = S::broadcast(sharpness);
    uint64_t total = 0;
    for (int64_t first = 0; first < plan.padded; first += kChunk) {
      S::Sum sum{};
      for (int64_t v = first; v < first + kChunk; v += S::lanes) {
        S::add_rounded(sum, weights(S::load(logits() + v), top, factor));
      }
      const uint64_t of_chunk = S::total(sum);
      sums()[first / kChunk] = of_chunk;
      total += of_chunk;
    }
    return total;
  }

  // The first token where the running sum of weights passes `target`, which is below their total.
  int64_t find(float largest, float sharpness, uint64_t target) const {
    const V top = S::broadcast(largest), factor = S::broadcast(sharpness);
    int64_t chunk = 0;
    for (; target >= sums()[chunk]; ++chunk) target -= sums()[chunk];
    int64_t v = chunk * kChunk;
    for (;; v += S::lanes) {
      S::Sum sum{};
      S::add_rounded(sum, weights(S::load(logits() + v), top, factor));
      const uint64_t of_vector = S::total(sum);
      if (target < of_vector) break;
      target -= of_vector;
    }
    for (;; ++v) {
      const uint64_t w = draw::weight(logits()[v], largest, sharpness);
      if (target < w) return v;
      target -= w;
    }
  }

  int64_t first_largest(float largest) const {
    if (largest == draw::negative_infinity()) return 0;
    const V top = S::broadcast(largest);
    for (int64_t v = 0;; v += S::lanes) {
      unsigned hits = S::not_less(S::load(logits() + v), top);  // NaN too
      for (; hits; hits &= hits - 1) {
        const int64_t token = v + __builtin_ctz(hits);
        if (logits()[token] == largest) return token;
      }
    }
  }

  // The official code's way: the largest sum of logit and Gumbel noise.
  int64_t noisiest(int64_t position) const {
    const float softmax = args.softmax_temperature.get(), scale = args.token_temperature.get();
    const float* noise = args.token_noise + position * args.vocabulary;
    float best = draw::negative_infinity();
    int64_t token = 0;
    for (int64_t v = 0; v < args.vocabulary; ++v) {
      const float x = draw::add(logits()[v] / softmax, draw::mul(scale, draw::gumbel(noise[v])));
      if (x > best) {
        best = x;
        token = v;
      }
    }
    return token;
  }

  void sample(int64_t position) const {
    const float softmax = args.softmax_temperature.get(), sharp = args.token_temperature.get();
    const float largest = combined(position), top = draw::finite_largest(largest);
    const draw::Words words = draw::words_of(args, position);
    double uniform = draw::uniform(words.w[2]);
    const float plain_factor = draw::sharpness(softmax);
    const float factor = draw::sharpness(softmax, sharp);
    uint64_t total = 0;
    int64_t token = 0;
    if (args.token_noise) {
      uniform = args.confidence_noise[position];
      token = sharp == 0.0f ? first_largest(largest) : noisiest(position);
    } else if (sharp == 0.0f) {
      token = first_largest(largest);
    } else {
      total = sum_weights(top, factor);
      if (total > 0) {
        token = find(top, factor, draw::scaled_uniform(words.w[0], words.w[1], total));
      }
    }
    const bool weighed = total > 0 && factor == plain_factor;
    if (args.kind == Confidence::log_probability && !weighed) {
      total = sum_weights(top, plain_factor);
    }
    args.tokens[position] = token;
    args.confidence[position] = draw::confidence(args, logits()[token], largest, total, uniform);
  }

  void sample_all() const {
    const int64_t positions = args.batch * args.length;
    int64_t count = 0;
    for (int64_t p = 0; p < positions; ++p) count += masked(p);
    const auto share = member.share(count);
    int64_t i = 0;
    for (int64_t p = 0; i < share.end; ++p) {
      if (!masked(p)) continue;
      if (i >= share.begin) sample(p);
      ++i;
    }
  }
};

void run(const MaskgitStepArgs& args, const MaskgitStepPlan& plan, const Team::Member& member) {
  switch (args.dtype) {
    case DType::float32:
      return Step<float>{args, plan, member}.sample_all();
    case DType::float16:
      return Step<simd::Half>{args, plan, member}.sample_all();
    case DType::bfloat16:
      return Step<simd::BFloat16>{args, plan, member}.sample_all();
  }
}

}  // namespace
}  // namespace titok
