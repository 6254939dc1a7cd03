#include <algorithm>

#include "maskgit_step.h"
#include "system.h"

namespace titok {
namespace {

MaskgitStepRun kernel() { return TITOK_OF_ISA(maskgit_step); }

MaskgitStepPlan make_plan(int64_t length, int64_t vocabulary) {
  MaskgitStepPlan plan{};
  plan.padded = round_up(vocabulary, draw::kChunk);
  plan.sums = static_cast<std::size_t>(plan.padded) * sizeof(float);
  plan.keys = plan.sums + static_cast<std::size_t>(plan.padded / draw::kChunk) * 8;
  plan.thread_bytes =
      static_cast<std::size_t>(round_up(static_cast<int64_t>(plan.keys) + length * 8, 64));
  return plan;
}

void mask_again(const MaskgitStepArgs& args, int64_t b, uint64_t* keys) {
  const int64_t first = b * args.length;
  int64_t count = 0;
  for (int64_t l = 0; l < args.length; ++l) {
    const int64_t p = first + l;
    if (args.ids[p] == args.mask_id) {
      keys[count++] = draw::mask_order(args.confidence[p], l);
    } else {
      args.tokens[p] = args.ids[p];
      args.confidence[p] = -draw::negative_infinity();
    }
    args.ids_next[p] = args.tokens[p];
  }
  const int64_t again = std::min(count, std::max<int64_t>(0, draw::masked_again(args, b)));
  std::nth_element(keys, keys + again, keys + count);
  for (int64_t i = 0; i < again; ++i) {
    args.ids_next[first + static_cast<int64_t>(keys[i] & 0xffffffffu)] = args.mask_id;
  }
}

}  // namespace

std::size_t maskgit_step_cpu_workspace(int64_t length, int64_t vocabulary, int threads) {
  return make_plan(length, vocabulary).thread_bytes * static_cast<std::size_t>(threads);
}

void maskgit_step_cpu(const MaskgitStepArgs& args) {
  if (args.batch * args.length == 0) return;
  const double work = static_cast<double>(args.batch * args.length) * args.vocabulary;
  const int threads = threads_for(work, 65536, args.threads);
  const MaskgitStepPlan plan = make_plan(args.length, args.vocabulary);
  const MaskgitStepRun sample = kernel();
  Team::run(threads, args.threads, [&](const Team::Member& member) {
    sample(args, plan, member);
    member.barrier();
    char* mine = static_cast<char*>(args.workspace) + member.index * plan.thread_bytes;
    const auto share = member.share(args.batch);
    for (int64_t b = share.begin; b < share.end; ++b) {
      mask_again(args, b, reinterpret_cast<uint64_t*>(mine + plan.keys));
    }
  });
}

}  // namespace titok
