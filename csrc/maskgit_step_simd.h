// The MaskGIT step of one instruction set. Everything here is local to the including file, so that
// code compiled for one set is never linked into the path of another.
#pragma once

#include "draw_simd.h"
#include "maskgit_step.h"

namespace titok {
namespace {

using draw::kChunk;
using draw::S;
using draw::V;

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
  float combine(int64_t position) const {
    const T* cond = row(args.cond, args.cond_strides, position);
    const auto guidance = !args.uncond       ? draw::Guidance::none
                          : args.from_uncond ? draw::Guidance::uncond
                                             : draw::Guidance::cond;
    const T* uncond = args.uncond ? row(args.uncond, args.uncond_strides, position) : nullptr;
    return draw::combine_row(guidance, cond, uncond, args.guidance_scale.get(), args.vocabulary,
                             logits(), plan.padded);
  }

  // Sums of the weights of each chunk into sums(); their total.
  uint64_t sum_weights(float largest, float sharpness) const {
    const V top = S::broadcast(largest), factor = S::broadcast(sharpness);
    uint64_t total = 0;
    for (int64_t first = 0; first < plan.padded; first += kChunk) {
      S::Sum sum{};
      for (int64_t v = first; v < first + kChunk; v += 2 * S::lanes) {
        S::add_rounded(sum, draw::weights(S::load(logits() + v), top, factor),
                       draw::weights(S::load(logits() + v + S::lanes), top, factor));
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
      S::add_rounded(sum, draw::weights(S::load(logits() + v), top, factor));
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
    return draw::first_equal(logits(), plan.padded, largest);
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
    const float largest = combine(position), top = draw::finite_largest(largest);
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
    args.confidence[position] =
        draw::confidence(args, logits()[token], largest, total, draw::gumbel(uniform));
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
  simd::with_type(args.dtype, [&](auto x) { Step<decltype(x)>{args, plan, member}.sample_all(); });
}

}  // namespace
}  // namespace titok
