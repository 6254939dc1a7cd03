#include "decode_linear.h"
#include "system.h"

namespace titok {
namespace {

DecodeLinearRun kernel(DType dtype) { return TITOK_OF_ISA_AND_DTYPE(decode_linear, dtype); }

DecodeLinearPlan make_plan(int64_t batch, int64_t width, int64_t size, int threads) {
  DecodeLinearPlan plan{};
  plan.padded_width = round_up(width, 64);
  plan.tiles = static_cast<std::size_t>(batch * plan.padded_width) * sizeof(float);
  const int64_t tile_rows = active_isa() == Isa::amx ? round_up(batch, 16) : 0;
  plan.thread_bytes = plan.tiles + static_cast<std::size_t>(tile_rows * plan.padded_width * 2);
  const double work = static_cast<double>(width) * static_cast<double>(size);
  plan.threads = threads_for(work, 65536, threads);
  return plan;
}

}  // namespace

std::size_t decode_linear_cpu_workspace(int64_t batch, int64_t width, int64_t size, int threads) {
  const DecodeLinearPlan plan = make_plan(batch, width, size, threads);
  return plan.thread_bytes * static_cast<std::size_t>(plan.threads);
}

void decode_linear_cpu(const DecodeLinearArgs& args) {
  if (args.batch == 0) return;
  const DecodeLinearPlan plan = make_plan(args.batch, args.width, args.size, args.threads);
  const DecodeLinearRun run = kernel(args.dtype);
  Team::run(plan.threads, args.threads,
            [&](const Team::Member& member) { run(args, plan, member); });
}

}  // namespace titok
