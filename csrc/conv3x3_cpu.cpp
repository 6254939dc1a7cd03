#include <algorithm>

#include "conv3x3.h"
#include "system.h"

namespace titok {
namespace {

const Conv3x3Kernel& kernel(DType dtype) { return TITOK_OF_ISA_AND_DTYPE(conv3x3, dtype); }

constexpr int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows of the direct method, as many for each thread where that goes.
void cut_strips(Conv3x3Plan& plan, int64_t batch) {
  // An odd number of cache lines apart, 16 pixels are in as many sets of the first cache.
  const int64_t lines = plan.padded_channels / 32;
  plan.pixel_stride = 32 * (lines + 1 - lines % 2);
  plan.strip_columns = round_up(plan.width, 16) + 2;
  // In the second cache, with room for sums and weights.
  constexpr int64_t kMost = int64_t{640} << 10;
  const int64_t row_bytes = plan.strip_columns * plan.pixel_stride * 2;
  const int64_t most = std::max<int64_t>(1, std::min(plan.height, kMost / row_bytes - 2));
  plan.strips = parts_of(plan.height, most);
  while (batch * plan.strips % plan.threads != 0 && plan.height / (plan.strips + 1) >= 4) {
    ++plan.strips;
  }
  plan.strip_rows = parts_of(plan.height, plan.strips);
  plan.strips = parts_of(plan.height, plan.strip_rows);
}

Conv3x3Plan make_plan(const Conv3x3Args& args) {
  const Conv3x3Kernel& set = kernel(args.dtype);
  const Conv3x3Layout layout = conv3x3_cpu_layout(args.dtype);
  const bool direct = set.method == Conv3x3Method::direct;
  const int64_t value_bytes = layout.terms == 2 ? 2 : 4;
  Conv3x3Plan plan{};
  plan.height = args.height << args.upsample;
  plan.width = args.width << args.upsample;
  plan.padded_channels = round_up(args.channels, layout.channels);
  plan.summed_channels = round_up(args.channels, 32);
  plan.patch_rows = parts_of(plan.height, 2);
  plan.patch_columns = parts_of(plan.width, 2);

  const double work = 32.0 *
                      static_cast<double>(args.batch * plan.patch_rows * plan.patch_columns) *
                      static_cast<double>(args.channels * args.outputs);
  plan.threads = threads_for(work, 4e6, args.threads);

  int64_t blocks = 0, pixel_bytes = 16 * plan.summed_channels, input_bytes = 0, product_bytes = 0;
  if (direct) {
    cut_strips(plan, args.batch);
    blocks = args.batch * plan.strips;
    input_bytes = (plan.strip_rows + 2) * plan.strip_columns * plan.pixel_stride * 2;
    product_bytes =
        round_up(plan.strip_rows * parts_of(plan.width, 16), 2) * 16 * layout.columns * 4;
  } else {
    plan.block_columns = std::min<int64_t>(plan.patch_columns, 8);
    plan.block_rows = std::min<int64_t>(plan.patch_rows, kConv3x3Patches / plan.block_columns);
    plan.block_patches = round_up(plan.block_rows * plan.block_columns, kConv3x3Patches / 2);
    plan.blocks_down = parts_of(plan.patch_rows, plan.block_rows);
    plan.blocks_across = parts_of(plan.patch_columns, plan.block_columns);
    blocks = args.batch * plan.blocks_down * plan.blocks_across;
    const int64_t pixels = (2 * plan.block_rows + 2) * (2 * plan.block_columns + 2) * 16;
    pixel_bytes = std::max(4 * pixels, pixel_bytes);
    const int64_t patches = kConv3x3Positions * plan.block_patches;
    input_bytes = patches * plan.padded_channels * value_bytes;
    product_bytes = patches * layout.columns * 4;
  }
  // With few blocks threads share the outputs of one, and load its inputs each for itself.
  const int64_t panels = parts_of(args.outputs, layout.columns);
  plan.parts = 1;
  const int64_t enough = direct ? plan.threads : 4 * plan.threads;
  while (plan.threads > 1 && blocks * plan.parts < enough && plan.parts < panels) plan.parts *= 2;
  plan.parts = std::min(plan.parts, panels);

  Workspace workspace;
  const auto take = [&](int64_t bytes) { return workspace.take(bytes); };
  if (args.groups > 0) {
    plan.sums = take(args.batch * args.height * args.groups * 16);
    plan.scales = take(args.batch * plan.padded_channels * 12);
  }
  const std::size_t begin = workspace.size;
  plan.pixels = take(pixel_bytes);
  plan.inputs = take(input_bytes);
  plan.products = take(product_bytes);
  plan.thread_bytes = workspace.size - begin;
  plan.total = begin + plan.thread_bytes * static_cast<std::size_t>(plan.threads);
  return plan;
}

}  // namespace

Conv3x3Layout conv3x3_cpu_layout(DType dtype) {
  const Conv3x3Kernel& set = kernel(dtype);
  return {set.columns, set.method == Conv3x3Method::direct ? 9 : kConv3x3Positions, set.channels,
          set.pairs && dtype == DType::bfloat16 ? 2 : 1};
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
