// One MaskGIT sampling step: docs/ops/maskgit_step.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"
#include "draw.h"

namespace titok {

enum class Confidence { logit, log_probability };

struct MaskgitStepArgs {
  const void* cond;    // [batch, length, vocabulary], the last dimension contiguous
  const void* uncond;  // the same shape, or null
  int64_t cond_strides[2], uncond_strides[2];
  int64_t batch, length, vocabulary;
  DType dtype;
  bool from_uncond;  // guidance starts from uncond, not from cond
  Confidence kind;

  const int64_t* ids;  // [batch, length]
  int64_t mask_id;
  const int64_t* image_ids;       // [batch], or null: 0, 1, ...
  const int64_t* positions;       // [batch, length] for the random words, or null: 0, 1, ...
  const float* token_noise;       // [batch, length, vocabulary] uniforms, or null
  const float* confidence_noise;  // [batch, length], with token_noise

  Value<int64_t> num_masked, seed, step;
  int64_t num_masked_stride;  // of its tensor: 1 for one count per image, otherwise 0
  Value<float> guidance_scale, softmax_temperature, token_temperature, confidence_temperature;

  int64_t* ids_next;  // [batch, length]
  int64_t* tokens;    // [batch, length]
  float* confidence;  // [batch, length]
  void* workspace;    // maskgit_step_cpu_workspace() bytes, 64-byte aligned; CPU only
  int threads;        // CPU only
  void* stream;       // CUDA only
};

std::size_t maskgit_step_cpu_workspace(int64_t length, int64_t vocabulary, int threads);
void maskgit_step_cpu(const MaskgitStepArgs& args);
void maskgit_step_cuda(const MaskgitStepArgs& args);

// How the CPU's workspace is cut up: per thread a row of logits, sums of chunks and keys.
struct MaskgitStepPlan {
  int64_t padded;  // vocabulary rounded up to whole chunks
  std::size_t sums, keys, thread_bytes;
};

// One per instruction set; see maskgit_step_simd.h.
using MaskgitStepRun = void (*)(const MaskgitStepArgs&, const MaskgitStepPlan&,
                                const Team::Member&);
extern const MaskgitStepRun maskgit_step_portable;
#if defined(__x86_64__)
extern const MaskgitStepRun maskgit_step_avx2;
extern const MaskgitStepRun maskgit_step_avx512;
#endif

// What is drawn at one position, once its logits are summed up.
namespace {
namespace draw {

TITOK_BOTH int64_t image_of(const MaskgitStepArgs& args, int64_t b) {
  return args.image_ids ? args.image_ids[b] : b;
}

// The random words of the `i`-th of all batch * length positions.
TITOK_BOTH Words words_of(const MaskgitStepArgs& args, int64_t i) {
  const int64_t b = i / args.length, l = args.positions ? args.positions[i] : i % args.length;
  return random_words(args.seed.get(), image_of(args, b), args.step.get(), l, 0);
}

TITOK_BOTH int64_t masked_again(const MaskgitStepArgs& args, int64_t b) {
  const Value<int64_t>& count = args.num_masked;
  return count.tensor ? count.tensor[b * args.num_masked_stride] : count.number;
}

// `total` sums the weights at temperature softmax_temperature; only log-probabilities need it.
TITOK_BOTH float confidence(const MaskgitStepArgs& args, float logit, float largest, uint64_t total,
                            float noise) {
  if (!(logit > negative_infinity())) return negative_infinity();
  const float temperature = args.softmax_temperature.get();
  float score = logit / temperature;
  if (args.kind == Confidence::log_probability) {
    score = add(logit, -finite_largest(largest)) / temperature;
    score = score < 0.0f ? score : 0.0f;
    const double mass = mul(static_cast<double>(total > 0 ? total : 1), 0x1p-30);
    score = add(score, -static_cast<float>(natural_log(mass)));
  }
  score = add(score, mul(args.confidence_temperature.get(), noise));
  return score == score ? add(score, 0.0f) : negative_infinity();
}

// The smallest keys are masked again: the least confident, then the lowest positions.
TITOK_BOTH uint64_t mask_order(float confidence, int64_t position) {
  return uint64_t{ordered(confidence)} << 32 | static_cast<uint32_t>(position);
}

}  // namespace draw
}  // namespace

}  // namespace titok
