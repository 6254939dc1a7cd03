// Attention of one query per sequence to a cache: docs/ops/decode_attention.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace titok {

struct DecodeAttentionArgs {
  const void* qkv;  // [batch, (heads + 2 kv_heads) width], rows contiguous
  int64_t qkv_stride;
  void* keys;             // [batch, kv_heads, length, width]
  void* values;           // the same
  const float* rotation;  // [length, width / 2, 2]
  int64_t position;       // below length
  void* out;              // [batch, heads width]
  int64_t batch, heads, kv_heads, length, width;
  DType dtype;
  void* workspace;  // decode_attention_cpu_workspace() bytes, 64-byte aligned
  int threads;
};

std::size_t decode_attention_cpu_workspace(int64_t length, int64_t width, int threads);
void decode_attention_cpu(const DecodeAttentionArgs& args);

struct DecodeAttentionPlan {
  int64_t padded_width;
  std::size_t thread_bytes;  // a query and the scores of one head
  int threads;
};

// One per instruction set; see decode_attention_simd.h.
using DecodeAttentionRun = void (*)(const DecodeAttentionArgs&, const DecodeAttentionPlan&,
                                    const Team::Member&);
extern const DecodeAttentionRun decode_attention_portable;
#if defined(__x86_64__)
extern const DecodeAttentionRun decode_attention_avx2;
extern const DecodeAttentionRun decode_attention_avx512;
#endif

}  // namespace titok
