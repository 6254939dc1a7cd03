#include <algorithm>

#include "cuda_common.cuh"
#include "draw.cuh"
#include "sample_token.h"

namespace titok {
namespace {

using Count = unsigned long long;  // what atomicAdd takes for a uint64_t

constexpr int64_t kGrain = kThreads * 8;  // tokens that a block takes at least, whole vectors
constexpr int64_t kBlocks = 1024;         // from which on blocks take more
enum Stage { bins_stage, top_k_stage, top_p_stage, draw_stage, stages };

// What the blocks of a row leave for each other, at the head of its workspace.
struct State {
  int bin;        // tokens of the bins before it stay, and in it those
  uint32_t cut;   // whose ordered() logit is not below this
  uint64_t left;  // what may still be measured in `bin` before it is cut
  bool listing;   // the tokens of `bin` are to be listed and `cut` found
  unsigned listed;
  unsigned arrived[stages];  // blocks that are done
};

// Behind it: per block its largest logit and its sum of weights, the bins and the list.
struct Plan {
  int blocks;     // of a row
  int64_t range;  // tokens of a block
  std::size_t largest, sums, bins, list, row_bytes;
};

// The filters that may leave a token out; of one whose number is a tensor only the device knows.
struct Filters {
  bool top_k, top_p;
};

Filters filters_of(const SampleTokenArgs& args) {
  return {args.top_k.tensor || draw::has_top_k(args), args.top_p.tensor || draw::has_top_p(args)};
}

Plan make_plan(const SampleTokenArgs& args, const Filters& filters) {
  const int64_t batch = args.batch, vocabulary = args.vocabulary;
  const int64_t grains = round_up(vocabulary, kGrain) / kGrain;
  const int64_t per_block = std::max<int64_t>(1, batch * grains / kBlocks);
  Plan plan{};
  plan.range = per_block * kGrain;
  plan.blocks = static_cast<int>(round_up(vocabulary, plan.range) / plan.range);
  std::size_t at = 0;
  const auto take = [&](std::size_t bytes) {
    const std::size_t start = at;
    at += static_cast<std::size_t>(round_up(static_cast<int64_t>(bytes), 64));
    return start;
  };
  take(sizeof(State));
  plan.largest = take(plan.blocks * sizeof(uint64_t));
  plan.sums = take(plan.blocks * sizeof(uint64_t));
  plan.bins = take((draw::kLastBin + 1) * sizeof(draw::Bin));
  if (filters.top_k || filters.top_p)
    plan.list = take(static_cast<std::size_t>(vocabulary) * sizeof(draw::Listed));
  plan.row_bytes = at;
  return plan;
}

__device__ __forceinline__ float logit_of(uint32_t ordered) {
  return draw::bits_of<float>(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

struct Plus {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Larger {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// One block's part of a row.
template <class T>
struct Part {
  static constexpr int kSize = Row<T>::kSize;
  const SampleTokenArgs& args;
  const Plan& plan;
  int64_t b, begin, end;
  int block;
  Row<T> row;
  char* memory;

  __device__ Part(const SampleTokenArgs& args, const Plan& plan, bool aligned)
      : args(args),
        plan(plan),
        b(blockIdx.x / plan.blocks),
        block(static_cast<int>(blockIdx.x % plan.blocks)),
        row{static_cast<const T*>(args.cond) + b * args.cond_stride,
            static_cast<const T*>(args.uncond) + b * args.uncond_stride,
            args.vocabulary,
            args.guidance_scale.get(),
            draw::guidance_of(args),
            aligned,
            true},
        memory(static_cast<char*>(args.workspace) + b * plan.row_bytes) {
    begin = block * plan.range;
    end = begin + plan.range < args.vocabulary ? begin + plan.range : args.vocabulary;
  }

  __device__ State& state() const { return *reinterpret_cast<State*>(memory); }
  __device__ uint64_t* largest() const {
    return reinterpret_cast<uint64_t*>(memory + plan.largest);
  }
  __device__ uint64_t* sums() const { return reinterpret_cast<uint64_t*>(memory + plan.sums); }
  __device__ draw::Bin* bins() const { return reinterpret_cast<draw::Bin*>(memory + plan.bins); }
  __device__ draw::Listed* list() const {
    return reinterpret_cast<draw::Listed*>(memory + plan.list);
  }

  // visit(v, logit) for each token of the block; past the end of the row for logits of -inf.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    for (int64_t v = begin + threadIdx.x * kSize; v < end; v += kThreads * kSize) {
      float x[kSize];
      row.combine(row.load(v), v, x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) visit(v + j, x[j]);
    }
  }

  // The row's largest logit and its lowest token, as ordered() above ~token; 0 if all are -inf.
  __device__ uint64_t row_largest(uint64_t* scratch) const {
    uint64_t best = 0;
    for (int i = threadIdx.x; i < plan.blocks; i += kThreads) {
      best = largest()[i] > best ? largest()[i] : best;
    }
    return block_reduce(best, scratch, Larger{});
  }

  // Whether this is the last block of its row to arrive, which then sees what all have written.
  __device__ bool last_to_arrive(Stage stage) const {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(&state().arrived[stage], 1u) == static_cast<unsigned>(plan.blocks) - 1;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
  }
};

// Exponents and weights of a row's logits.
struct Weigher {
  float top, factor;
  __device__ Weigher(uint64_t largest, float temperature)
      : top(draw::finite_largest(largest > 0 ? logit_of(static_cast<uint32_t>(largest >> 32))
                                             : draw::negative_infinity())),
        factor(draw::sharpness(temperature)) {}
  __device__ float exponent(float x) const {
    return draw::exponent(x, top, factor, draw::kWideLowest);
  }
  __device__ static bool weightless(float exponent) { return exponent <= draw::kWideLowest; }
  __device__ static int bin(float exponent) {
    return static_cast<int>(draw::mul(exponent, -draw::kBinsPerOctave));
  }
};

struct Found {
  int64_t index;
  uint64_t left;  // of the target, at `index`
};

// The first of `count` values with which their running sum passes `target`; `count` if none does.
template <class Value>
__device__ Found locate(int64_t count, uint64_t target, uint64_t* scratch, const Value& value) {
  __shared__ Found found;
  const int64_t share = (count + kThreads - 1) / kThreads, first = threadIdx.x * share;
  const int64_t last = first + share < count ? first + share : count;
  uint64_t own = 0;
  for (int64_t i = first; i < last; ++i) own += value(i);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t upto = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t before = __shfl_up_sync(kAll, upto, distance);
    if (lane >= distance) upto += before;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += scratch[w];
  if (threadIdx.x == kThreads - 1 && target >= upto) found = {count, target - upto};
  if (target < upto && target >= upto - own) {
    uint64_t left = target - (upto - own);
    int64_t i = first;
    for (uint64_t here = value(i); left >= here; here = value(++i)) left -= here;
    found = {i, left};
  }
  __syncthreads();
  return found;
}

// Adds a value below 2^41 to `sums[index]` in shared memory for each lane with `real`. Lanes of one
// index, as most are, add up first: 64-bit additions there are loops that wait for each other.
__device__ void add_together(Count* sums, bool real, int index, uint64_t value) {
  constexpr int kGroups = 4, kLow = 20;
  const auto low = static_cast<uint32_t>(value & ((1u << kLow) - 1));
  const auto high = static_cast<uint32_t>(value >> kLow);
  const int lane = threadIdx.x % 32;
  unsigned left = __ballot_sync(kAll, real);
  for (int group = 0; left != 0 && group < kGroups; ++group) {
    const int leader = __ffs(left) - 1, this_index = __shfl_sync(kAll, index, leader);
    const bool mine = real && index == this_index;
    const Count sum_low = __reduce_add_sync(kAll, mine ? low : 0);
    const Count sum_high = __reduce_add_sync(kAll, mine ? high : 0);
    if (lane == leader) atomicAdd(sums + index, (sum_high << kLow) + sum_low);
    left &= ~__ballot_sync(kAll, mine);
  }
  if (left >> lane & 1) atomicAdd(sums + index, static_cast<Count>(value));
}

// The key, among those listed from `cut` on, with which the measure passes `left`: a byte a round.
template <class T>
__device__ uint32_t select(const Part<T>& part, draw::Measure measure, uint64_t* scratch) {
  __shared__ Count digits[256];
  static_assert(kThreads == 256, "a thread for each digit");
  const State state = part.state();
  uint64_t left = state.left;
  uint32_t key = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncthreads();
    digits[threadIdx.x] = 0;
    __syncthreads();
    for (unsigned first = 0; first < state.listed; first += kThreads) {
      const unsigned i = first + threadIdx.x;
      const draw::Listed x = i < state.listed ? part.list()[i] : draw::Listed{};
      const bool real =
          i < state.listed && x.key >= state.cut && (uint64_t{x.key ^ key} >> shift) >> 8 == 0;
      add_together(digits, real, x.key >> shift & 0xff, measure == draw::by_weight ? x.weight : 1);
    }
    __syncthreads();
    const Found found = locate(256, left, scratch, [&](int64_t i) { return digits[255 - i]; });
    key |= static_cast<uint32_t>(255 - found.index) << shift;
    left = found.left;
  }
  return key;
}

// Finds the bin in which the measure passes `limit`. If it is the one whose tokens are listed, cuts
// it; otherwise they are to be listed. By one block.
template <class T>
__device__ void narrow(const Part<T>& part, draw::Measure measure, uint64_t limit,
                       uint64_t* scratch) {
  State& state = part.state();
  const int bin = state.bin;
  const Found found =
      locate(bin, limit, scratch, [&](int64_t i) { return part.bins()[i].value[measure]; });
  if (threadIdx.x == 0) {
    state.left = found.left;
    if (found.index < bin) {
      state.bin = static_cast<int>(found.index);
      state.cut = 0;
      state.listed = 0;
      state.listing = true;
    }
  }
  __syncthreads();
  if (found.index < bin || bin == draw::kLastBin) return;
  const uint32_t cut = select(part, measure, scratch);
  if (threadIdx.x == 0) state.cut = cut;
}

// Top-p of what is kept so far. By one block.
template <class T>
__device__ void narrow_by_weight(const Part<T>& part, uint64_t* scratch) {
  const State state = part.state();
  uint64_t sum = 0;
  for (int i = threadIdx.x; i < state.bin; i += kThreads) {
    sum += part.bins()[i].value[draw::by_weight];
  }
  for (unsigned i = threadIdx.x; i < state.listed; i += kThreads) {
    const draw::Listed x = part.list()[i];
    if (x.key >= state.cut) sum += x.weight;
  }
  const uint64_t total = block_reduce(sum, scratch, Plus{});
  narrow(part, draw::by_weight, draw::top_p_limit(part.args, total), scratch);
}

__device__ bool is_filtered(const SampleTokenArgs& args) {
  return args.temperature.get() != 0.0f && (draw::has_top_k(args) || draw::has_top_p(args));
}

// The largest logit of each block; clears what the other kernels count in.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    sample_token_largest_kernel(const SampleTokenArgs args, const Plan plan, bool aligned) {
  __shared__ uint64_t scratch[kWarps];
  const Part<T> part(args, plan, aligned);
  for (int i = part.block * kThreads + threadIdx.x; i <= draw::kLastBin;
       i += plan.blocks * kThreads) {
    part.bins()[i] = {};
  }
  if (part.block == 0 && threadIdx.x == 0) {
    part.state() = {};
    part.state().bin = draw::kLastBin;
  }
  uint64_t best = 0;
  part.each([&](int64_t v, float x) {
    if (!(x > draw::negative_infinity())) return;
    const uint64_t key = uint64_t{draw::ordered(x)} << 32 | ~static_cast<uint32_t>(v);
    best = key > best ? key : best;
  });
  best = block_reduce(best, scratch, Larger{});
  if (threadIdx.x == 0) part.largest()[part.block] = best;
}

// Sorts the tokens into bins; the last block of a row finds the bin where top-k, or top-p, ends.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    sample_token_bins_kernel(const SampleTokenArgs args, const Plan plan, bool aligned) {
  __shared__ uint64_t scratch[kWarps];
  __shared__ Count weights[draw::kLastBin];
  __shared__ unsigned counts[draw::kLastBin];
  if (!is_filtered(args)) return;
  const Part<T> part(args, plan, aligned);
  for (int i = threadIdx.x; i < draw::kLastBin; i += kThreads) weights[i] = counts[i] = 0;
  const Weigher weigher(part.row_largest(scratch), args.temperature.get());
  __syncthreads();
  part.each([&](int64_t, float x) {
    const float t = weigher.exponent(x);
    if (Weigher::weightless(t)) return;
    const int bin = Weigher::bin(t);
    atomicAdd(weights + bin, static_cast<Count>(draw::wide_weight(t)));
    atomicAdd(counts + bin, 1u);
  });
  __syncthreads();
  for (int i = threadIdx.x; i < draw::kLastBin; i += kThreads) {
    if (counts[i] == 0) continue;
    draw::Bin& bin = part.bins()[i];
    atomicAdd(reinterpret_cast<Count*>(bin.value + draw::by_weight), weights[i]);
    atomicAdd(reinterpret_cast<Count*>(bin.value + draw::by_count), static_cast<Count>(counts[i]));
  }
  if (!part.last_to_arrive(bins_stage)) return;
  if (draw::has_top_k(args)) {
    narrow(part, draw::by_count, static_cast<uint64_t>(args.top_k.get()) - 1, scratch);
  } else {
    narrow_by_weight(part, scratch);
  }
}

// Lists the tokens of the bin where top-k (by_count) or top-p (by_weight) ends; the last block of a
// row cuts it and, after top-k, finds the bin of top-p.
template <class T, draw::Measure measure>
__global__ void __launch_bounds__(kThreads, 4)
    sample_token_cut_kernel(const SampleTokenArgs args, const Plan plan, bool aligned) {
  __shared__ uint64_t scratch[kWarps];
  constexpr bool top_k = measure == draw::by_count;
  if (!is_filtered(args) || !(top_k ? draw::has_top_k(args) : draw::has_top_p(args))) return;
  const Part<T> part(args, plan, aligned);
  const int bin = part.state().bin;
  const bool listing = part.state().listing;
  if (listing) {
    const Weigher weigher(part.row_largest(scratch), args.temperature.get());
    part.each([&](int64_t v, float x) {
      const float t = weigher.exponent(x);
      if (Weigher::weightless(t) || Weigher::bin(t) != bin) return;
      part.list()[atomicAdd(&part.state().listed, 1u)] = {draw::wide_weight(t), draw::ordered(x),
                                                          static_cast<uint32_t>(v)};
    });
  }
  if (!part.last_to_arrive(top_k ? top_k_stage : top_p_stage)) return;
  if (listing) {
    const uint32_t cut = select(part, measure, scratch);
    if (threadIdx.x == 0) {
      part.state().cut = cut;
      part.state().listing = false;
    }
    __syncthreads();
  }
  if (top_k && draw::has_top_p(args)) narrow_by_weight(part, scratch);
}

// Sums the weights of each block's kept tokens; the last block of a row draws.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    sample_token_draw_kernel(const SampleTokenArgs args, const Plan plan, bool aligned) {
  __shared__ uint64_t scratch[kWarps];
  const Part<T> part(args, plan, aligned);
  const uint64_t largest = part.row_largest(scratch);
  const float temperature = args.temperature.get();
  if (temperature == 0.0f) {
    if (part.block == 0 && threadIdx.x == 0) {
      args.tokens[part.b] = largest > 0 ? ~static_cast<uint32_t>(largest) : 0;
    }
    return;
  }
  const Weigher weigher(largest, temperature);
  const uint32_t cut = part.state().cut;
  const auto weight = [&](float x) {
    return draw::ordered(x) < cut ? 0 : draw::wide_weight(weigher.exponent(x));
  };
  uint64_t sum = 0;
  part.each([&](int64_t, float x) { sum += weight(x); });
  sum = block_reduce(sum, scratch, Plus{});
  if (threadIdx.x == 0) part.sums()[part.block] = sum;
  if (!part.last_to_arrive(draw_stage)) return;

  uint64_t total = 0;
  for (int i = threadIdx.x; i < plan.blocks; i += kThreads) total += part.sums()[i];
  total = block_reduce(total, scratch, Plus{});
  int64_t token = 0;
  if (total > 0) {
    const draw::Words words = draw::words_of(args, part.b);
    const uint64_t target = draw::scaled_uniform(words.w[0], words.w[1], total);
    const Found of_row =
        locate(plan.blocks, target, scratch, [&](int64_t i) { return part.sums()[i]; });
    const int64_t first = of_row.index * plan.range;
    const int64_t count =
        first + plan.range < args.vocabulary ? plan.range : args.vocabulary - first;
    token = first + locate(count, of_row.left, scratch, [&](int64_t i) {
                      return weight(part.row.at(first + i));
                    }).index;
  }
  if (threadIdx.x == 0) args.tokens[part.b] = token;
}

template <class T>
void launch(const SampleTokenArgs& args) {
  // A kernel whose work only the device can rule out returns at once there.
  const auto [top_k, top_p] = filters_of(args);
  const Plan plan = make_plan(args, {top_k, top_p});
  const bool aligned = is_aligned(static_cast<const T*>(args.cond), args.cond_stride) &&
                       is_aligned(static_cast<const T*>(args.uncond), args.uncond_stride);
  const auto run = [&](auto* kernel) {
    launch_kernel(kernel, args.batch * plan.blocks, kThreads, 0, args.stream, args, plan, aligned);
  };
  run(sample_token_largest_kernel<T>);
  if (top_k || top_p) run(sample_token_bins_kernel<T>);
  if (top_k) run(sample_token_cut_kernel<T, draw::by_count>);
  if (top_p) run(sample_token_cut_kernel<T, draw::by_weight>);
  run(sample_token_draw_kernel<T>);
}

}  // namespace

std::size_t sample_token_cuda_workspace(const SampleTokenArgs& args) {
  return make_plan(args, filters_of(args)).row_bytes * static_cast<std::size_t>(args.batch);
}

void sample_token_cuda(const SampleTokenArgs& args) {
  if (args.batch == 0) return;
  switch (args.dtype) {
    case DType::float32:
      return launch<float>(args);
    case DType::float16:
      return launch<__half>(args);
    case DType::bfloat16:
      return launch<__nv_bfloat16>(args);
  }
}

}  // namespace titok
