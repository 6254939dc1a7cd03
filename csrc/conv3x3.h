// A 3x3 convolution with its neighbours: docs/ops/conv3x3.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace titok {

// Feature maps lie pixel by pixel, their channels together, without gaps.
struct Conv3x3Args {
  const void* x;       // [batch, height, width, channels]
  const void* weight;  // as conv3x3_cpu_layout() says
  const void* bias;    // [outputs], null for none
  const void* norm;    // [channels] of GroupNorm, with groups > 0, which SiLU follows
  const void* norm_bias;
  const void* residual;  // as out, null for none
  void* out;             // [batch, height, width, outputs], twice the size with `upsample`
  int64_t batch, height, width, channels, outputs, groups;
  float norm_eps;
  bool upsample;
  DType dtype;      // of everything but the weight
  void* workspace;  // conv3x3_cpu_workspace() bytes, 64-byte aligned
  int threads;
};

// Winograd's F(2x2, 3x3), with a weight for each of the 16 inputs of a patch, or the nine weights.
enum class Conv3x3Method { winograd, direct };

// The weight of the products: [outputs / columns, positions, padded / terms, columns, terms], the
// channels padded to a multiple of `channels` and the outputs to one of `columns`; positions are
// those of the method; bfloat16 where terms is 2. Of the direct method the channels go by groups:
// [outputs / columns, padded / channels, positions, channels / terms, columns, terms].
struct Conv3x3Layout {
  int64_t columns, positions, channels;
  int64_t terms;
};

Conv3x3Layout conv3x3_cpu_layout(DType dtype);
std::size_t conv3x3_cpu_workspace(const Conv3x3Args& args);
void conv3x3_cpu(const Conv3x3Args& args);

constexpr int64_t kConv3x3Positions = 16;  // of a patch of 4x4 inputs, for 2x2 outputs
// Of so many patches, inputs and products leave room in the second cache for a product's weights.
constexpr int64_t kConv3x3Patches = 24;

struct Conv3x3Plan {
  int64_t height, width;                     // of the output
  int64_t padded_channels, summed_channels;  // of the layout, of GroupNorm's sums
  int64_t parts;                             // of the panels of outputs, each an item of its own
  int threads;
  // Direct: rows that are multiplied together, how many times, and what lies of them.
  int64_t strip_rows, strips, strip_columns, pixel_stride;
  // Winograd.
  int64_t patch_rows, patch_columns;  // of the whole output
  int64_t block_rows, block_columns;  // patches that are multiplied together
  int64_t block_patches;              // and room for whole tiles of them
  int64_t blocks_down, blocks_across;
  // In bytes, in the workspace; those of a thread are `thread_bytes` apart.
  std::size_t sums, scales, pixels, inputs, products, thread_bytes, total;
};

// One per instruction set; see conv3x3_simd.h.
using Conv3x3Run = void (*)(const Conv3x3Args&, const Conv3x3Plan&, const Team::Member&);
struct Conv3x3Kernel {
  Conv3x3Method method;
  int64_t columns, channels;  // of the layout
  bool pairs;                 // of bfloat16
  Conv3x3Run run;
};
extern const Conv3x3Kernel conv3x3_portable;
#if defined(__x86_64__)
extern const Conv3x3Kernel conv3x3_avx2;
extern const Conv3x3Kernel conv3x3_avx512;
extern const Conv3x3Kernel conv3x3_avx512bf16;
extern const Conv3x3Kernel conv3x3_amx;  // of bfloat16 alone
#endif

}  // namespace titok
