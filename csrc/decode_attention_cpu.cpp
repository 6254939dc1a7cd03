#include <algorithm>

#include "decode_attention.h"
#include "system.h"

namespace titok {
namespace {

DecodeAttentionRun kernel() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::amx:
    case Isa::avx512bf16:
    case Isa::avx512vnni:
    case Isa::avx512:
      return decode_attention_avx512;
    case Isa::avx2:
      return decode_attention_avx2;
    default:
      break;
  }
#endif
  return decode_attention_portable;
}

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
  // A thread may have to be woken: give each at least 64 thousand products.
  const double work = 2.0 * static_cast<double>(args.batch * args.heads) *
                      static_cast<double>((args.position + 1) * args.width);
  plan.threads = static_cast<int>(std::max(1.0, std::min<double>(args.threads, work / 65536)));
  const DecodeAttentionRun run = kernel();
  Team::run(plan.threads, args.threads,
            [&](const Team::Member& member) { run(args, plan, member); });
}

}  // namespace titok
