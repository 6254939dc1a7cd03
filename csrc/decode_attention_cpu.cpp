#include "decode_attention.h"
#include "system.h"

namespace titok {
namespace {

DecodeAttentionRun kernel() { return TITOK_OF_ISA(decode_attention); }

DecodeAttentionPlan make_plan(int64_t length, int64_t width, int threads) {
  DecodeAttentionPlan plan{};
  plan.padded_width = round_up(width, 16);
  plan.thread_bytes =
      static_cast<std::size_t>(plan.padded_width + round_up(length, 16)) * sizeof(float);
  plan.threads = threads;
  return plan;
}

}  // namespace

std::size_t decode_attention_cpu_workspace(int64_t length, int64_t width, int threads) {
  return make_plan(length, width, threads).thread_bytes * static_cast<std::size_t>(threads);
}

void decode_attention_cpu(const DecodeAttentionArgs& args) {
  if (args.batch == 0) return;
  DecodeAttentionPlan plan = make_plan(args.length, args.width, args.threads);
  const double work = 2.0 * static_cast<double>(args.batch * args.heads) *
                      static_cast<double>((args.position + 1) * args.width);
  plan.threads = threads_for(work, 65536, args.threads);
  const DecodeAttentionRun run = kernel();
  Team::run(plan.threads, args.threads,
            [&](const Team::Member& member) { run(args, plan, member); });
}

}  // namespace titok
