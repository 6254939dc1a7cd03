#include <algorithm>

#include "index_propagation.h"
#include "system.h"

namespace titok {
namespace {

constexpr int64_t kRows = 2048;  // bounds the table of maxima and the packed rows
// Between two packings of the same rows, where more than kRows are packed again and again.
constexpr int64_t kPanelChunks = 8;

const IndexPropagationKernels& kernels(DType dtype) {
  return TITOK_OF_ISA_AND_DTYPE(index_propagation, dtype);
}

IndexPropagationPlan make_plan(const IndexPropagationKernels& set, int64_t n, int64_t k, int64_t d,
                               int threads, bool backward) {
  IndexPropagationPlan plan{};
  plan.blocks = round_up(k, kIndexPropagationChunk) / kIndexPropagationBlock;
  plan.padded_depth = round_up(d, set.tile_codes);
  plan.words = std::max(d, set.word_group);
  plan.rows = round_up(std::min<int64_t>(std::max<int64_t>(n, 1), kRows), set.row_group);
  plan.panel = kIndexPropagationChunk * (n <= plan.rows ? 1 : kPanelChunks);
  const int64_t state_rows = backward ? round_up(n, set.row_group) : plan.rows;
  const double work = 4.0 * n * k * d;
  plan.threads = threads_for(work, 4e6, threads);

  Workspace workspace;
  const auto take = [&](int64_t bytes) { return workspace.take(bytes); };
  const auto take_floats = [&](int64_t count) { return take(count * 4); };
  const int64_t score_row = kIndexPropagationChunk + 16;  // an odd number of cache lines
  plan.row_state = take(state_rows * 96);
  plan.rows_a = take_floats(plan.rows * plan.words);
  plan.columns_t = take_floats(kIndexPropagationChunk * plan.words);
  plan.columns_n = take_floats(kIndexPropagationChunk * plan.padded_depth);
  plan.accumulator = take_floats(state_rows * plan.padded_depth);
  const int64_t teams = backward ? 1 : plan.threads;
  const int64_t score_floats = (backward ? plan.rows : set.row_block) * score_row;
  plan.score_bytes = static_cast<std::size_t>(
      round_up(std::max(score_floats, plan.words * set.tile_codes) * 4, 64));
  plan.scores = take(static_cast<int64_t>(plan.score_bytes) * teams);
  plan.logit_bytes = static_cast<std::size_t>(round_up(k * 8, 64));
  plan.logits = take(static_cast<int64_t>(plan.logit_bytes) * plan.threads);
  plan.z64_bytes = static_cast<std::size_t>(round_up(d, 8) * 8);
  plan.z64 = take(static_cast<int64_t>(plan.z64_bytes) * plan.threads);
  if (backward) {
    plan.pairs_a = take_floats(2 * plan.rows * plan.words);
    plan.code_weights = take_floats(round_up(k, kIndexPropagationChunk));
    plan.rows_n = take_floats(plan.rows * plan.padded_depth);
    plan.panel_grad = take_floats(plan.panel * plan.padded_depth);
    if (set.turned) plan.finished_grad = take_floats(kIndexPropagationChunk * plan.padded_depth);
    plan.chosen = take(k * 4);
    plan.chosen_grad = take_floats(std::min(n, k) * d);
  } else {
    plan.counts = take(k * 8);
    plan.table = take_floats(plan.rows * plan.blocks);
    plan.block_norm = take_floats(plan.blocks);
    plan.candidate_bytes = static_cast<std::size_t>(round_up(k * 4, 64));
    plan.candidates = take(static_cast<int64_t>(plan.candidate_bytes) * plan.threads);
  }
  plan.total = workspace.size;
  return plan;
}

}  // namespace

std::size_t index_propagation_cpu_workspace(int64_t n, int64_t k, int64_t d, DType dtype,
                                            int threads, bool backward) {
  return make_plan(kernels(dtype), n, k, d, threads, backward).total;
}

void index_propagation_fwd_cpu(const IndexPropagationArgs& args) {
  const IndexPropagationKernels& set = kernels(args.dtype);
  const auto plan = make_plan(set, args.n, args.k, args.d, args.threads, false);
  Team::run(plan.threads, args.threads,
            [&](const Team::Member& member) { set.forward(args, plan, member); });
}

void index_propagation_bwd_cpu(const IndexPropagationArgs& args) {
  const IndexPropagationKernels& set = kernels(args.dtype);
  const auto plan = make_plan(set, args.n, args.k, args.d, args.threads, true);
  Team::run(plan.threads, args.threads,
            [&](const Team::Member& member) { set.backward(args, plan, member); });
}

}  // namespace titok
