// A linear layer of a decoding step with its neighbours: docs/ops/decode_linear.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace titok {

// Rows of a tensor, each contiguous; null where an argument is left out.
struct DecodeRows {
  const void* data;
  int64_t stride;
};

struct DecodeLinearArgs {
  DecodeRows x;       // [batch, width]
  DecodeRows weight;  // [size, width]
  const void* norm;   // [width]
  float norm_eps;
  DecodeRows scale, shift;    // [batch, width]
  DecodeRows up_weight;       // [size, width]
  DecodeRows residual;        // [batch, size]
  DecodeRows residual_scale;  // [batch, size]
  void* out;                  // [batch, size], contiguous
  int64_t batch, width, size;
  DType dtype;
  void* workspace;  // decode_linear_cpu_workspace() bytes, 64-byte aligned
  int threads;
};

std::size_t decode_linear_cpu_workspace(int64_t batch, int64_t width, int64_t size, int threads);
void decode_linear_cpu(const DecodeLinearArgs& args);

struct DecodeLinearPlan {
  int64_t padded_width;
  std::size_t tiles;         // where a thread's copy of the normalised rows lies as tiles, in bytes
  std::size_t thread_bytes;  // of both copies
  int threads;
};

// One per instruction set; see decode_linear_simd.h.
using DecodeLinearRun = void (*)(const DecodeLinearArgs&, const DecodeLinearPlan&,
                                 const Team::Member&);
extern const DecodeLinearRun decode_linear_portable;
#if defined(__x86_64__)
extern const DecodeLinearRun decode_linear_avx2;
extern const DecodeLinearRun decode_linear_avx512;
extern const DecodeLinearRun decode_linear_avx512bf16;
extern const DecodeLinearRun decode_linear_amx;  // of bfloat16 alone
#endif

}  // namespace titok
