#include <algorithm>

#include "attention.h"
#include "system.h"

namespace titok {
namespace {

const AttentionKernel& kernel(DType dtype) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::amx:
      return dtype == DType::bfloat16 ? attention_amx : attention_avx512bf16;
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
  // A thread may have to be woken: give each at least a million operations.
  const double work = 4.0 * static_cast<double>(args.batch * args.heads) *
                      static_cast<double>(args.length * args.length * args.width);
  const int threads = static_cast<int>(std::max(1.0, std::min<double>(args.threads, work / 1e6)));
  Team::run(threads, args.threads,
            [&](const Team::Member& member) { set.run(args, plan, member); });
}

}  // namespace titok
