#include <algorithm>

#include "sample_token.h"
#include "system.h"

namespace titok {
namespace {

// From this size on, threads share the rows that do not come out even among them, if there is more
// to do than to draw: they wait for each other between passes.
constexpr int64_t kShared = int64_t{1} << 17;

SampleTokenRun kernel() { return TITOK_OF_ISA(sample_token); }

SampleTokenPlan make_plan(int64_t batch, int64_t vocabulary, int threads) {
  const double work = static_cast<double>(batch) * static_cast<double>(vocabulary);
  const double most = vocabulary >= kShared ? threads : std::min<double>(threads, batch);
  SampleTokenPlan plan{};
  plan.threads = threads_for(work, 65536, most);
  plan.chunks = round_up(vocabulary, draw::kChunk) / draw::kChunk;
  Workspace workspace;
  const auto take = [&](int64_t bytes) { return workspace.take(bytes); };
  take(sizeof(SampleTokenHead));
  plan.row = take(plan.chunks * draw::kChunk * 4);
  plan.sums = take(plan.chunks * 8);
  plan.list = take(plan.chunks * draw::kChunk * static_cast<int64_t>(sizeof(draw::Listed)));
  plan.bins = take((draw::kLastBin + 1) * static_cast<int64_t>(sizeof(draw::Bin)));
  plan.thread_bytes = workspace.size;
  return plan;
}

}  // namespace

std::size_t sample_token_cpu_workspace(int64_t batch, int64_t vocabulary, int threads) {
  const SampleTokenPlan plan = make_plan(batch, vocabulary, threads);
  return plan.thread_bytes * static_cast<std::size_t>(plan.threads);
}

void sample_token_cpu(const SampleTokenArgs& args) {
  if (args.batch == 0) return;
  SampleTokenPlan plan = make_plan(args.batch, args.vocabulary, args.threads);
  const bool shared =
      args.vocabulary >= kShared && (draw::has_top_k(args) || draw::has_top_p(args));
  plan.alone = shared ? args.batch / plan.threads * plan.threads : args.batch;
  if (!shared) plan.threads = static_cast<int>(std::min<int64_t>(plan.threads, args.batch));
  const SampleTokenRun sample = kernel();
  Team::run(plan.threads, args.threads,
            [&](const Team::Member& member) { sample(args, plan, member); });
}

}  // namespace titok
