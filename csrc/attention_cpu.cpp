#include <algorithm>

#include "attention.h"
#include "system.h"

namespace titok {
namespace {

AttentionRun kernel() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512bf16:
      return attention_avx512bf16;
    case Isa::avx512vnni:
    case Isa::avx512:
      return attention_avx512;
    case Isa::avx2:
      return attention_avx2;
    default:
      break;
  }
#endif
  return attention_portable;
}

AttentionPlan make_plan(int64_t length, int64_t width) {
  AttentionPlan plan{};
  plan.blocks = (length + kAttentionRows - 1) / kAttentionRows;
  plan.score_stride = round_up(length, 16);
  Workspace workspace;
  plan.queries = workspace.take(kAttentionRows * width * 4);
  plan.keys = workspace.take(round_up(length, 16) * width * 4);
  plan.values = workspace.take(length * round_up(width, 16) * 4);
  plan.scores = workspace.take(kAttentionRows * plan.score_stride * 4);
  plan.thread_bytes = workspace.size;
  return plan;
}

}  // namespace

std::size_t attention_cpu_workspace(int64_t length, int64_t width, int threads) {
  return make_plan(length, width).thread_bytes * static_cast<std::size_t>(threads);
}

void attention_cpu(const AttentionArgs& args) {
  if (args.batch == 0) return;
  const AttentionPlan plan = make_plan(args.length, args.width);
  // A thread may have to be woken: give each at least a million operations.
  const double work = 4.0 * static_cast<double>(args.batch * args.heads) *
                      static_cast<double>(args.length * args.length * args.width);
  const int threads = static_cast<int>(std::max(1.0, std::min<double>(args.threads, work / 1e6)));
  const AttentionRun run = kernel();
  Team::run(threads, args.threads, [&](const Team::Member& member) { run(args, plan, member); });
}

}  // namespace titok
