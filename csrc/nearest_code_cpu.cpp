#include <algorithm>

#include "nearest_code.h"
#include "system.h"

namespace titok {
namespace {

constexpr int64_t kMegabyte = int64_t{1} << 20;

const NearestCodeKernels& kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512bf16:
      return nearest_code_avx512bf16;
    case Isa::avx512:
      return nearest_code_avx512;
    case Isa::avx2:
      return nearest_code_avx2;
    default:
      break;
  }
#endif
  return nearest_code_portable;
}

NearestCodePlan make_plan(const NearestCodeKernels& kernels, int64_t n, int64_t k, int64_t d,
                          int threads) {
  NearestCodePlan plan{};
  plan.tile_rows = kernels.tile_rows;
  plan.tile_codes = kernels.tile_codes;
  plan.lanes = kernels.lanes;
  plan.depth = round_up(d, 8);
  plan.padded_depth = round_up(d, plan.lanes * kernels.terms);

  // Rescoring a block costs block_vectors * d, a row's search k * d: small d wants small blocks.
  const int64_t tile_vectors = plan.tile_codes / plan.lanes;
  plan.block_vectors = d <= 32 ? 16 : d <= 64 ? 32 : d <= 128 ? 64 : 128;
  // A small codebook must still give many blocks, or every row would rescore most of it.
  while (plan.block_vectors > tile_vectors && plan.block_vectors * plan.lanes * 16 > k) {
    plan.block_vectors /= 2;
  }
  plan.block_vectors = std::max(plan.block_vectors, tile_vectors);
  plan.super_codes = plan.block_vectors * plan.lanes;
  plan.blocks = (k + plan.super_codes - 1) / plan.super_codes * plan.lanes;

  // Table within max(8 MB, min(n, 1024) * k / 128 floats up to 256 MB); rows of z within 4 MB.
  const int64_t table_bytes = std::max(
      8 * kMegabyte, std::min(256 * kMegabyte, std::min<int64_t>(n, 1024) * (k / 128) * 4));
  const int64_t by_table = table_bytes / (plan.blocks * 4);
  const int64_t by_z = 4 * kMegabyte / (plan.depth * 4);
  plan.rows = std::max<int64_t>(1, std::min({by_table, by_z, n}));
  if (plan.rows > plan.tile_rows && plan.rows < n) plan.rows -= plan.rows % plan.tile_rows;

  // A thread costs some 20 us to start: give each at least 4 MFLOP of coarse search.
  const double work = 2.0 * n * k * d;
  plan.threads = static_cast<int>(std::max(1.0, std::min<double>(threads, work / 4e6)));

  std::size_t at = 0;
  const auto take = [&](int64_t bytes) {
    const std::size_t here = at;
    at += static_cast<std::size_t>(round_up(bytes, 64));
    return here;
  };
  const int64_t words = (d + kernels.terms - 1) / kernels.terms;
  const int64_t padded_rows = round_up(plan.rows, plan.tile_rows);
  plan.center = take(plan.padded_depth * 4);
  plan.z = take(padded_rows * plan.depth * 4);
  plan.z_norm = take(padded_rows * 4);
  plan.block_norm = take(plan.blocks * 4);
  plan.table = take(padded_rows * plan.blocks * 4);
  // Bias, codes, and a vector of norms that a member without the block's ownership discards.
  plan.panel_bytes =
      static_cast<std::size_t>(round_up(((words + 1) * plan.tile_codes + plan.lanes) * 4, 64));
  plan.panels = take(static_cast<int64_t>(plan.panel_bytes) * plan.threads);
  plan.z64 = take(plan.depth * 8 * plan.threads);
  plan.total = at;
  return plan;
}

}  // namespace

std::size_t nearest_code_cpu_workspace(int64_t n, int64_t k, int64_t d, int threads) {
  return make_plan(kernels(), n, k, d, threads).total;
}

void nearest_code_cpu(const NearestCodeArgs& args) {
  if (args.n == 0) return;
  const NearestCodeKernels& set = kernels();
  const NearestCodePlan plan = make_plan(set, args.n, args.k, args.d, args.threads);
  Team::run(plan.threads, [&](const Team::Member& member) { set.run(args, plan, member); });
}

}  // namespace titok
