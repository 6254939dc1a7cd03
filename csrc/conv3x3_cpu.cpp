#include <algorithm>

#include "conv3x3.h"
#include "system.h"

namespace titok {
namespace {

const Conv3x3Kernel& kernel(DType dtype) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::amx:
      return dtype == DType::bfloat16 ? conv3x3_amx : conv3x3_avx512bf16;
    case Isa::avx512bf16:
      return conv3x3_avx512bf16;
    case Isa::avx512vnni:
    case Isa::avx512:
      return conv3x3_avx512;
    case Isa::avx2:
      return conv3x3_avx2;
    default:
      break;
  }
#endif
  return conv3x3_portable;
}

Conv3x3Plan make_plan(const Conv3x3Args& args) {
  const Conv3x3Layout layout = conv3x3_cpu_layout(args.dtype);
  const int64_t patches = kernel(args.dtype).patches;
  const int64_t value_bytes = layout.terms == 2 ? 2 : 4;
  Conv3x3Plan plan{};
  plan.height = args.height << args.upsample;
  plan.width = args.width << args.upsample;
  plan.padded_channels = round_up(args.channels, layout.channels);
  plan.summed_channels = round_up(args.channels, 32);
  plan.patch_rows = (plan.height + 1) / 2;
  plan.patch_columns = (plan.width + 1) / 2;

  // Of so few patches, inputs and products leave room in the second cache for the weights of a
  // product.
  plan.block_columns = std::min<int64_t>(plan.patch_columns, 8);
  plan.block_rows = std::min<int64_t>(plan.patch_rows, patches / plan.block_columns);
  plan.block_patches = round_up(plan.block_rows * plan.block_columns, patches / 2);
  const auto parts_of = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
  plan.blocks_down = parts_of(plan.patch_rows, plan.block_rows);
  plan.blocks_across = parts_of(plan.patch_columns, plan.block_columns);

  // A thread may have to be woken: give each at least 4 MFLOP.
  const double work = 32.0 *
                      static_cast<double>(args.batch * plan.patch_rows * plan.patch_columns) *
                      static_cast<double>(args.channels * args.outputs);
  plan.threads = static_cast<int>(std::max(1.0, std::min<double>(args.threads, work / 4e6)));
  // With few blocks threads share the outputs of one, and transform its inputs each for itself.
  const int64_t blocks = args.batch * plan.blocks_down * plan.blocks_across;
  const int64_t panels = parts_of(args.outputs, layout.columns);
  plan.parts = 1;
  while (plan.threads > 1 && blocks * plan.parts < 4 * plan.threads && plan.parts < panels) {
    plan.parts *= 2;
  }
  plan.parts = std::min(plan.parts, panels);

  Workspace workspace;
  const auto take = [&](int64_t bytes) { return workspace.take(bytes); };
  if (args.groups > 0) {
    plan.sums = take(args.batch * args.height * args.groups * 16);
    plan.scales = take(args.batch * plan.padded_channels * 12);
  }
  const std::size_t begin = workspace.size;
  const int64_t pixels = (2 * plan.block_rows + 2) * (2 * plan.block_columns + 2) * 16;
  plan.pixels = take(std::max(4 * pixels, 16 * plan.summed_channels));
  plan.inputs = take(kConv3x3Positions * plan.block_patches * plan.padded_channels * value_bytes);
  plan.products = take(kConv3x3Positions * plan.block_patches * layout.columns * 4);
  plan.thread_bytes = workspace.size - begin;
  plan.total = begin + plan.thread_bytes * static_cast<std::size_t>(plan.threads);
  return plan;
}

}  // namespace

Conv3x3Layout conv3x3_cpu_layout(DType dtype) {
  const Conv3x3Kernel& set = kernel(dtype);
  return {set.columns, set.channels, set.pairs && dtype == DType::bfloat16 ? 2 : 1};
}

std::size_t conv3x3_cpu_workspace(const Conv3x3Args& args) { return make_plan(args).total; }

void conv3x3_cpu(const Conv3x3Args& args) {
  if (args.batch == 0) return;
  const Conv3x3Plan plan = make_plan(args);
  const Conv3x3Kernel& set = kernel(args.dtype);
  Team::run(plan.threads, args.threads,
            [&](const Team::Member& member) { set.run(args, plan, member); });
}

}  // namespace titok
