// A token drawn from each row of logits: docs/ops/sample_token.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"
#include "draw.h"

namespace titok {

struct SampleTokenArgs {
  const void* cond;    // [batch, vocabulary], the last dimension contiguous
  const void* uncond;  // the same shape, or null
  int64_t cond_stride, uncond_stride;
  int64_t batch, vocabulary;
  DType dtype;
  const int64_t* image_ids;  // [batch], or null: 0, 1, ...

  Value<int64_t> top_k, seed, step;
  Value<float> guidance_scale, temperature, top_p;

  int64_t* tokens;  // [batch]
  void* workspace;  // sample_token_<device>_workspace() bytes, 64-byte aligned
  int threads;      // CPU only
  void* stream;     // CUDA only
};

std::size_t sample_token_cpu_workspace(int64_t batch, int64_t vocabulary, int threads);
void sample_token_cpu(const SampleTokenArgs& args);
// Reads batch, vocabulary, top_k and top_p alone.
std::size_t sample_token_cuda_workspace(const SampleTokenArgs& args);
void sample_token_cuda(const SampleTokenArgs& args);

// What one thread keeps at the head of its workspace, behind it a row of logits, the sums of its
// chunks, a list of tokens and the bins.
struct SampleTokenHead {
  float largest;
  int64_t listed;
};

struct SampleTokenPlan {
  int64_t chunks;
  std::size_t row, sums, list, bins, thread_bytes;
  int64_t alone;  // rows that one thread draws each; all threads draw each of the others together
  int threads;
};

// One per instruction set; see sample_token_simd.h.
using SampleTokenRun = void (*)(const SampleTokenArgs&, const SampleTokenPlan&,
                                const Team::Member&);
extern const SampleTokenRun sample_token_portable;
#if defined(__x86_64__)
extern const SampleTokenRun sample_token_avx2;
extern const SampleTokenRun sample_token_avx512;
#endif

namespace {
namespace draw {

// Logits below the largest are sorted into bins of 1/32 of a power of two. What the last bin takes
// has no weight.
constexpr int kBinsPerOctave = 32, kLastBin = 41 * kBinsPerOctave;

// Top-k counts the tokens that it keeps, top-p weighs them.
enum Measure { by_weight, by_count };

struct Bin {
  uint64_t value[2];  // of each Measure
};

// One token of the bin where top-k or top-p ends.
struct Listed {
  uint64_t weight;
  uint32_t key;  // its logit, ordered()
  uint32_t token;
};

TITOK_BOTH Guidance guidance_of(const SampleTokenArgs& args) {
  return args.uncond && args.guidance_scale.get() != 1.0f ? Guidance::uncond : Guidance::none;
}

TITOK_BOTH Words words_of(const SampleTokenArgs& args, int64_t b) {
  const int64_t image = args.image_ids ? args.image_ids[b] : b;
  return random_words(args.seed.get(), image, args.step.get(), 0, 1);
}

TITOK_BOTH bool has_top_k(const SampleTokenArgs& args) {
  return args.top_k.get() > 0 && args.top_k.get() < args.vocabulary;
}

TITOK_BOTH bool has_top_p(const SampleTokenArgs& args) { return args.top_p.get() < 1.0f; }

// A token stays while no more than this weighs more than it.
TITOK_BOTH uint64_t top_p_limit(const SampleTokenArgs& args, uint64_t total) {
  const double p = args.top_p.get();
  return p > 0.0 ? static_cast<uint64_t>(mul(p, static_cast<double>(total))) : 0;
}

}  // namespace draw
}  // namespace

}  // namespace titok
