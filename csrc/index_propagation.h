// Index back-propagation quantization on CPU, forward and backward, without the N x K matrix.
// Gradients and passes are derived in docs/ops/index_propagation.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace titok {

// Columns of `statistics`.
enum IndexPropagationStatistic {
  kLogitMax,     // largest logit
  kLogSum,       // log sum exp(s - largest)
  kSharpMax,     // largest logit of the sharp softmax (high part)
  kSharpLogSum,  // log sum exp((s - sharp max) / T)
  kEntropy,      // of the sharp softmax
  kMaxProbability,
  kSharpMaxLow,   // low part of the sharp maximum
  kSharpInFloat,  // 1: the sharp softmax comes from float32 logits, 0: from the support
  kStatistics
};

struct IndexPropagationArgs {
  const void* z;         // [n, d], rows z_stride elements apart
  const void* codebook;  // [k, d], rows codebook_stride elements apart
  int64_t z_stride, codebook_stride;
  int64_t n, k, d;
  DType dtype;
  float temperature;
  bool entropy;
  int64_t* indices;         // [n]
  float* mean_code;         // [n, d]; nullptr in a forward pass that has no backward
  float* statistics;        // [n, kStatistics]
  int32_t* support_codes;   // [n, support]: -1 ends a row, -2 first: more than fit
  double* support_weights;  // [n, support] log q: the two entropies may nearly cancel
  int64_t support;
  void* workspace;  // index_propagation_cpu_workspace() bytes, 64-byte aligned
  int threads;

  double* code_probability;  // [k], forward only

  // Backward only.
  const float* grad;          // [n, d]
  double sample_weight;       // dL / d(mean entropy)
  const double* code_weight;  // [k]
  void* grad_z;               // [n, d], like z
  void* grad_codebook;        // [k, d], like the codebook
};

std::size_t index_propagation_cpu_workspace(int64_t n, int64_t k, int64_t d, DType dtype,
                                            int threads, bool backward);
void index_propagation_fwd_cpu(const IndexPropagationArgs& args);
void index_propagation_bwd_cpu(const IndexPropagationArgs& args);

// Codes that are packed at a time, and codes per entry of the table of maxima: multiples of the
// register tiles of every instruction set.
constexpr int64_t kIndexPropagationChunk = 384, kIndexPropagationBlock = 64;

// Sizes and byte offsets of one call.
struct IndexPropagationPlan {
  int64_t rows;          // per pass over the codebook
  int64_t blocks;        // of the codebook, its last chunk filled up
  int64_t padded_depth;  // d rounded up to a tile
  int64_t words;         // of a row, at most
  int64_t panel;         // codes whose gradient is summed at a time
  int threads;
  std::size_t row_state, rows_a, columns_t, columns_n, accumulator, counts, scores, score_bytes,
      logits, logit_bytes, z64, z64_bytes, pairs_a, rows_n, panel_grad, finished_grad, chosen,
      chosen_grad, code_weights, table, block_norm, candidates, candidate_bytes, total;
};

struct IndexPropagationKernels {
  int64_t row_group;   // rows are filled up to a multiple of it with zeros
  int64_t row_block;   // scored at a time in the forward pass
  int64_t word_group;  // the words of a product are a multiple of it
  int64_t tile_codes;
  bool turned;  // a chunk's dE is summed as [d, codes]
  void (*forward)(const IndexPropagationArgs&, const IndexPropagationPlan&, const Team::Member&);
  void (*backward)(const IndexPropagationArgs&, const IndexPropagationPlan&, const Team::Member&);
};
extern const IndexPropagationKernels index_propagation_portable;
#if defined(__x86_64__)
extern const IndexPropagationKernels index_propagation_avx2;
extern const IndexPropagationKernels index_propagation_avx512;
extern const IndexPropagationKernels index_propagation_avx512bf16;
extern const IndexPropagationKernels index_propagation_amx;  // of bfloat16 alone
#endif

}  // namespace titok
