#include "attention.h"
#include "system.h"

namespace titok {
namespace {

const AttentionKernel& kernel(DType dtype) { return TITOK_OF_ISA_AND_DTYPE(attention, dtype); }

AttentionPlan make_plan(const AttentionKernel& kernel, int64_t length, int64_t width) {
  AttentionPlan plan{};
  plan.blocks = (length + kernel.rows - 1) / kernel.rows;
  const int64_t depth = round_up(width, kernel.group), steps = round_up(length, kernel.group);
  plan.score_stride = round_up(length, 16);
  Workspace workspace;
  plan.queries = workspace.take(kernel.rows * depth * 4);
  plan.keys = workspace.take(round_up(length, 16) * depth * 4);
  plan.values = workspace.take(steps * round_up(width, 16) * 4);
  plan.scores = workspace.take(kernel.rows * plan.score_stride * 4);
  plan.thread_bytes = workspace.size;
  return plan;
}

}  // namespace

std::size_t attention_cpu_workspace(int64_t length, int64_t width, DType dtype, int threads) {
  return make_plan(kernel(dtype), length, width).thread_bytes * static_cast<std::size_t>(threads);
}

void attention_cpu(const AttentionArgs& args) {
  if (args.batch == 0) return;
  const AttentionKernel& set = kernel(args.dtype);
  const AttentionPlan plan = make_plan(set, args.length, args.width);
  const double work = 4.0 * static_cast<double>(args.batch * args.heads) *
                      static_cast<double>(args.length * args.length * args.width);
  const int threads = threads_for(work, 1e6, args.threads);
  Team::run(threads, args.threads,
            [&](const Team::Member& member) { set.run(args, plan, member); });
}

}  // namespace titok
