#include <algorithm>

#include "decode_linear.h"
#include "system.h"

namespace titok {
namespace {

DecodeLinearRun kernel(DType dtype) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::amx:
      return dtype == DType::bfloat16 ? decode_linear_amx : decode_linear_avx512bf16;
    case Isa::avx512bf16:
      return decode_linear_avx512bf16;
    case Isa::avx512vnni:
    case Isa::avx512:
      return decode_linear_avx512;
    case Isa::avx2:
      return decode_linear_avx2;
    default:
      break;
  }
#endif
  return decode_linear_portable;
}

DecodeLinearPlan make_plan(int64_t batch, int64_t width, int64_t size, int threads) {
  DecodeLinearPlan plan{};
  plan.padded_width = round_up(width, 64);
  plan.tiles = static_cast<std::size_t>(batch * plan.padded_width) * sizeof(float);
  const int64_t tile_rows = active_isa() == Isa::amx ? round_up(batch, 16) : 0;
  plan.thread_bytes = plan.tiles + static_cast<std::size_t>(tile_rows * plan.padded_width * 2);
  // A thread may have to be woken: give each at least 64 thousand weights.
  const double work = static_cast<double>(width) * static_cast<double>(size);
  plan.threads = static_cast<int>(std::max(1.0, std::min<double>(threads, work / 65536)));
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
