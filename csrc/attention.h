// Bidirectional softmax attention, forward: docs/ops/attention.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace titok {

struct AttentionArgs {
  const void* qkv;  // [batch, length, 3, heads, width], the last dimension dense
  int64_t batch_stride, row_stride, part_stride, head_stride;
  void* out;  // [batch, length, heads, width]
  int64_t batch, length, heads, width;
  DType dtype;
  void* workspace;  // attention_cpu_workspace() bytes, 64-byte aligned
  int threads;
};

std::size_t attention_cpu_workspace(int64_t length, int64_t width, DType dtype, int threads);
void attention_cpu(const AttentionArgs& args);

// A thread takes blocks of a head's queries, and packs the head's keys and values for them.
struct AttentionPlan {
  int64_t blocks;                             // of a head
  int64_t score_stride;                       // floats from one query's scores to the next
  std::size_t queries, keys, values, scores;  // in the workspace, of the first thread
  std::size_t thread_bytes;
};

// One per instruction set; see attention_simd.h.
struct AttentionKernel {
  int64_t rows;   // of a block
  int64_t group;  // what a product sums over is rounded up to a multiple of it
  void (*run)(const AttentionArgs&, const AttentionPlan&, const Team::Member&);
};
extern const AttentionKernel attention_portable;
#if defined(__x86_64__)
extern const AttentionKernel attention_avx2;
extern const AttentionKernel attention_avx512;
extern const AttentionKernel attention_avx512bf16;
extern const AttentionKernel attention_amx;  // of bfloat16 alone
#endif

}  // namespace titok
