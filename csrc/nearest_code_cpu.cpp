#include <algorithm>

#include "nearest_code.h"
#include "system.h"

namespace titok {
namespace {

constexpr int64_t kMegabyte = int64_t{1} << 20;

const NearestCodeKernels& kernels() { return TITOK_OF_EACH_ISA(nearest_code); }

// Few enough rows that to pack the codes for them takes longer than to read them as they are.
bool is_direct(int64_t n, int64_t d) { return n <= (d < 32 ? 0 : d < 128 ? 2 : 4); }

// Few and short enough codes that a float32 score of each takes less time than to prepare a row for
// a coarser one and to choose among blocks.
bool is_sweep(int64_t codes, int64_t d, int64_t lanes) {
  return codes <= 128 * lanes && codes * d <= 1024 * lanes;
}

NearestCodePlan make_plan(const NearestCodeKernels& kernels, int64_t n, int64_t k, int64_t d,
                          Metric metric, int threads) {
  NearestCodePlan plan{};
  plan.tile_rows = kernels.tile_rows;
  plan.tile_codes = kernels.tile_codes;
  plan.lanes = kernels.lanes;
  plan.depth = round_up(d, 8);
  plan.words = std::max(plan.depth, kernels.word_group);
  plan.padded_depth = round_up(d, plan.lanes * 4);
  plan.values = round_up(d, 4 * kernels.word_group);

  plan.direct = is_direct(n, d);
  if (plan.direct) {
    plan.threads = threads_for(2.0 * (n + 1) * k * d, 1.5e6, threads);
    plan.teams = 1;
    plan.rows = n;
    Workspace workspace;
    plan.best = workspace.take(n * 24 * plan.threads);
    plan.team_bytes = workspace.size;
    return plan;
  }

  const int64_t codes = round_up(k, plan.tile_codes);
  plan.sweep = is_sweep(codes, d, plan.lanes);
  if (plan.sweep) {
    const int64_t tiles = codes / plan.tile_codes;
    plan.blocks = tiles * plan.lanes;
    plan.values = round_up(d, kernels.word_group);
    plan.panel_bytes = static_cast<std::size_t>((plan.values + 2) * plan.tile_codes * 4);
    Workspace workspace;
    plan.center = workspace.take(plan.padded_depth * 4);
    plan.z = workspace.take(kSweepRows * plan.padded_depth * 4);
    plan.factor = workspace.take(metric == Metric::cosine ? codes * 4 : 0);
    plan.block_norm = workspace.take(plan.blocks * 4);
    plan.table = workspace.take(kSweepRows * plan.blocks * 4);
    plan.scores = workspace.take(kSweepRows * codes * 4);
    plan.panels = workspace.take(tiles * static_cast<int64_t>(plan.panel_bytes));
    plan.team_bytes = workspace.size;
    const auto most = static_cast<int>(12 * kMegabyte / static_cast<int64_t>(plan.team_bytes));
    plan.threads = std::min(threads_for(2.0 * n * k * d, 1.5e6, threads), most);
    plan.teams = plan.threads;
    return plan;
  }

  // Rescoring a block costs block_vectors * d, a row's search k * d: small d wants small blocks.
  const int64_t tile_vectors = plan.tile_codes / plan.lanes;
  plan.block_vectors = d <= 32 ? 16 : d <= 64 ? 32 : 64;
  // A small codebook must still give many blocks, or every row would rescore most of it.
  while (plan.block_vectors > tile_vectors && plan.block_vectors * plan.lanes * 16 > k) {
    plan.block_vectors /= 2;
  }
  plan.block_vectors = std::max(plan.block_vectors, tile_vectors);

  const double work = 2.0 * n * k * d;
  plan.threads = threads_for(work, 1.5e6, threads);

  // Table and factors within 8 MB more than min(n, 1024) * k / 128 floats, at most 256 MB; z within
  // 2 MB.
  const int64_t factor_bytes = metric == Metric::cosine ? round_up(k, plan.tile_codes) * 4 : 0;
  const int64_t together = std::min<int64_t>(n, 1024);
  const int64_t table_bytes =
      std::max(kMegabyte,
               8 * kMegabyte + std::min(248 * kMegabyte, together * (k / 128) * 4) - factor_bytes);
  const auto cut = [&](int64_t block_vectors) {
    plan.block_vectors = block_vectors;
    plan.super_codes = block_vectors * plan.lanes;
    plan.blocks = (k + plan.super_codes - 1) / plan.super_codes * plan.lanes;
    return table_bytes / (plan.blocks * 4);
  };
  int64_t by_table = cut(plan.block_vectors);
  while (by_table < together && plan.block_vectors < 128) by_table = cut(2 * plan.block_vectors);
  const int64_t by_z = 2 * kMegabyte / (plan.words * 4);

  // Threads share the codes, pack each once and wait for each other; or each is alone with its rows
  // and packs all codes, which costs as much as some 48 rows. The faster way, or the second for
  // many rows, whose table then stays near; but only while what each keeps of the codes is small.
  const int64_t supers = plan.blocks / plan.lanes;
  const int64_t each = (n + plan.threads - 1) / plan.threads;
  const int64_t share = (supers + plan.threads - 1) / plan.threads;
  const bool faster = (each + 48) * supers < (n + 48) * share;
  const bool many_rows = each >= 2048 && plan.blocks <= 1024;
  plan.panel_bytes = static_cast<std::size_t>((plan.values + 2) * plan.tile_codes * 4);
  const int64_t kept = factor_bytes + static_cast<int64_t>(plan.panel_bytes);
  const int64_t most = std::min({by_table, by_z}) / plan.threads;
  const bool alone = (faster || many_rows) && kept * plan.threads <= 4 * kMegabyte && most >= 128;
  plan.teams = alone ? plan.threads : 1;
  const int64_t near = std::max<int64_t>(1024, kMegabyte / (plan.blocks * 4));
  const int64_t rows = std::max<int64_t>(1, alone ? each : n);
  const int64_t at_once =
      alone ? std::min(most, near) : std::max<int64_t>(1, std::min(by_table, by_z));
  const int64_t passes = (rows + at_once - 1) / at_once;
  plan.rows = round_up((rows + passes - 1) / passes, plan.tile_rows);

  Workspace workspace;
  const auto take = [&](int64_t bytes) { return workspace.take(bytes); };
  plan.center = take(plan.padded_depth * 4);
  plan.z = take(plan.rows * plan.words * 4);
  plan.z_norm = take(plan.rows * 4);
  plan.z_residual = take(plan.rows * 4);
  plan.z_scale = take(plan.rows * 4);
  plan.factor = take(factor_bytes);
  plan.block_norm = take(plan.blocks * 4);
  plan.block_residual = take(plan.blocks * 4);
  plan.table = take(plan.rows * plan.blocks * 4);
  plan.hits = take(plan.rows * (plan.blocks / plan.lanes) * 2);
  const int members = plan.threads / plan.teams;
  plan.best = take(plan.rows * 24 * members);
  plan.hit_codes = take(members * 8);
  plan.panels = take(plan.panel_bytes * members);
  plan.team_bytes = workspace.size;
  return plan;
}

}  // namespace

std::size_t nearest_code_cpu_workspace(int64_t n, int64_t k, int64_t d, Metric metric,
                                       int threads) {
  const NearestCodePlan plan = make_plan(kernels(), n, k, d, metric, threads);
  return plan.team_bytes * plan.teams;
}

void nearest_code_cpu(const NearestCodeArgs& args) {
  if (args.n == 0) return;
  const NearestCodeKernels& set = kernels();
  const NearestCodePlan plan = make_plan(set, args.n, args.k, args.d, args.metric, args.threads);
  Team::run(plan.threads, args.threads, [&](const Team::Member& member) {
    if (plan.teams == 1) return set.run(args, plan, member, {0, args.n}, args.workspace);
    Team own;
    set.run(args, plan, Team::Member{own, 0, 1}, member.share(args.n, plan.tile_rows),
            static_cast<char*>(args.workspace) + member.index * plan.team_bytes);
  });
}

}  // namespace titok
