// Exact nearest-code search on CPU. The algorithm and its error bound: docs/ops/nearest_code.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace titok {

enum class Metric { l2, cosine, dot };

struct NearestCodeArgs {
  const void* z;         // [n, d], rows z_stride elements apart
  const void* codebook;  // [k, d], rows codebook_stride elements apart
  int64_t z_stride, codebook_stride;
  int64_t n, k, d;
  DType dtype;
  Metric metric;
  int64_t* indices;   // [n]
  float* distances;   // [n] or null
  int64_t* rescored;  // [n] codes scored in float64, or null
  void* workspace;    // nearest_code_cpu_workspace() bytes, 64-byte aligned
  int threads;
};

std::size_t nearest_code_cpu_workspace(int64_t n, int64_t k, int64_t d, Metric metric, int threads);
void nearest_code_cpu(const NearestCodeArgs& args);

// Rows whose scores of a whole codebook are held at a time, where that is small.
constexpr int kSweepRows = 6;

// How one call is cut up: a function of the sizes and the instruction set's tile.
struct NearestCodePlan {
  int64_t tile_rows, tile_codes, lanes;  // register tile and vector width
  int64_t block_vectors;                 // codes per block: one lane of this many vectors
  int64_t super_codes;   // block_vectors * lanes: codes that one vector of maxima covers
  int64_t blocks;        // table width, in floats
  int64_t rows;          // rows per pass over the codebook
  int64_t depth;         // d rounded up to 8
  int64_t words;         // of a row, at most
  int64_t padded_depth;  // d rounded up to the widest step of the packing
  int64_t values;        // d rounded up to words of any kind
  int threads;
  bool direct;  // whether rows meet the codes as they are; then only `best` counts of the offsets
  bool sweep;   // whether the scores of a few rows and all codes are held at a time
  int teams;    // of threads that share the codes: one of all, or each thread alone with its rows
  std::size_t panel_bytes, team_bytes;
  // Byte offsets in a team's workspace.
  std::size_t center, z, z_norm, z_residual, z_scale, factor, block_norm, block_residual, table,
      scores, hits, best, hit_codes, panels;
};

// One set per instruction set; see nearest_code_simd.h.
struct NearestCodeKernels {
  int64_t tile_rows, tile_codes, lanes;
  int64_t word_group;  // the words of a product are a multiple of it
  void (*run)(const NearestCodeArgs&, const NearestCodePlan&, const Team::Member&,
              Team::Member::Range rows, void* workspace);
};
extern const NearestCodeKernels nearest_code_portable;
#if defined(__x86_64__)
extern const NearestCodeKernels nearest_code_avx2;
extern const NearestCodeKernels nearest_code_avx512;
extern const NearestCodeKernels nearest_code_avx512vnni;
extern const NearestCodeKernels nearest_code_avx512bf16;
extern const NearestCodeKernels nearest_code_amx;
#endif

}  // namespace titok
