#include "cuda_common.cuh"
#include "draw.cuh"
#include "maskgit_step.h"

namespace titok {
namespace {

constexpr std::size_t kKeptBytes = 47 << 10;  // of combined logits, and no more than 48 KiB in all
constexpr int kNone = -1;                     // of tokens
constexpr int kTile = 1024;                   // keys of the selection in shared memory

// The vectors of a thread: its warp has one range of tokens, so that the draw looks into one range
// only, and in each of its steps every lane has one vector, the same in all passes.
template <class T>
struct Share {
  static constexpr int kSize = Row<T>::kSize, kStep = 32 * kSize;
  int vocabulary, steps;

  __device__ int first(int step) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return (warp * steps + step) * kStep + lane * kSize;
  }
  __device__ bool has(int step) const { return step < steps && first(step) < vocabulary; }
};

// Where the combined logits of a thread's vectors stay; nobody else reads them.
template <int kSize>
struct Kept {
  float4* memory;
  __device__ float4& at(int step, int j) const {
    return memory[(step * (kSize / 4) + j / 4) * kThreads + threadIdx.x];
  }
  __device__ void store(int step, const float (&x)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; j += 4)
      at(step, j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
  }
  __device__ void load(int step, float (&x)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; j += 4) {
      const float4 part = at(step, j);
      x[j] = part.x;
      x[j + 1] = part.y;
      x[j + 2] = part.z;
      x[j + 3] = part.w;
    }
  }
};

// The largest combined logit of this thread; with `kept` all of them into `memory`.
template <bool kept, class T>
__device__ __forceinline__ float combine_all(const Row<T>& row, const Share<T>& share,
                                             const Kept<Row<T>::kSize>& memory) {
  constexpr int kBatch = 2;  // vectors that are loaded before one is used
  float largest = draw::negative_infinity();
  for (int step = 0; step < share.steps; step += kBatch) {
    typename Row<T>::Loaded loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (share.has(step + i)) loaded[i] = row.load(share.first(step + i));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!share.has(step + i)) break;
      float x[Row<T>::kSize];
      row.combine(loaded[i], share.first(step + i), x);
#pragma unroll
      for (int j = 0; j < Row<T>::kSize; ++j) largest = fmaxf(largest, x[j]);
      if constexpr (kept) memory.store(step + i, x);
    }
  }
  return largest;
}

// The same for whole vectors and one form of guidance.
template <draw::Guidance guidance, bool kept, class T>
__device__ float combine_whole(Row<T> row, const Share<T>& share,
                               const Kept<Row<T>::kSize>& memory) {
  row.guidance = guidance;
  row.aligned = true;
  row.ragged = false;
  return combine_all<kept>(row, share, memory);
}

// One block per position: draws its token and scores it. kept: the combined logits stay in shared
// memory, so that they are read once; otherwise they are combined again for each pass.
template <class T, bool kept>
__global__ void __launch_bounds__(kThreads, 4)
    maskgit_step_draw_kernel(const MaskgitStepArgs args, int steps, bool aligned) {
  constexpr int kSize = Row<T>::kSize;
  extern __shared__ float4 shared_logits[];
  __shared__ uint64_t scratch[kWarps];
  __shared__ float float_scratch[kWarps];
  // What one thread finds out for all, while the logits come.
  __shared__ uint32_t target_words[2];
  __shared__ float plain_factor, factor, noise, shared_logit;
  __shared__ int shared_token;

  const auto position = blockIdx.x;
  const int64_t id = args.ids[position];
  if (id != args.mask_id) {
    if (threadIdx.x == 0) {
      args.tokens[position] = id;
      args.confidence[position] = -draw::negative_infinity();
    }
    return;
  }
  const float softmax = args.softmax_temperature.get(), sharp = args.token_temperature.get();
  if (threadIdx.x == 0) {
    const draw::Words words = draw::words_of(args, position);
    target_words[0] = words.w[0];
    target_words[1] = words.w[1];
    plain_factor = draw::sharpness(softmax);
    factor = draw::sharpness(softmax, sharp);
  } else if (threadIdx.x == 32) {
    noise = draw::gumbel(args.token_noise ? static_cast<double>(args.confidence_noise[position])
                                          : draw::uniform(draw::words_of(args, position).w[2]));
  }

  const auto length = static_cast<uint32_t>(args.length);
  const int64_t b = position / length, l = position % length;
  const auto guidance = !args.uncond       ? draw::Guidance::none
                        : args.from_uncond ? draw::Guidance::uncond
                                           : draw::Guidance::cond;
  const bool ragged = args.vocabulary % kSize != 0;
  const Row<T> row{
      static_cast<const T*>(args.cond) + b * args.cond_strides[0] + l * args.cond_strides[1],
      static_cast<const T*>(args.uncond) + b * args.uncond_strides[0] + l * args.uncond_strides[1],
      args.vocabulary,
      args.guidance_scale.get(),
      guidance,
      aligned,
      ragged};
  const Share<T> share{static_cast<int>(args.vocabulary), steps};
  const Kept<kSize> memory{shared_logits};
  float largest;
  if (!aligned || ragged) {
    largest = combine_all<kept>(row, share, memory);
  } else if (guidance == draw::Guidance::none) {
    largest = combine_whole<draw::Guidance::none, kept>(row, share, memory);
  } else if (guidance == draw::Guidance::cond) {
    largest = combine_whole<draw::Guidance::cond, kept>(row, share, memory);
  } else {
    largest = combine_whole<draw::Guidance::uncond, kept>(row, share, memory);
  }
  largest = block_reduce(largest, float_scratch, [](float a, float c) { return a > c ? a : c; });

  const auto combined = [&](int step, float (&x)[kSize]) {
    if constexpr (kept) {
      memory.load(step, x);
    } else {
      row.combine(row.load(share.first(step)), share.first(step), x);
    }
  };
  const float top = draw::finite_largest(largest);
  const auto sum_weights = [&](int step, float sharpness) {
    uint64_t sum = 0;
    if (share.has(step)) {
      float x[kSize];
      combined(step, x);
#pragma unroll
      for (int j = 0; j < kSize; j += 2) {  // two of up to 2^30 are below 2^32
        sum += draw::weight(x[j], top, sharpness) + draw::weight(x[j + 1], top, sharpness);
      }
    }
    return sum;
  };
  const auto total_weight = [&](float sharpness) {
    uint64_t sum = 0;
    for (int step = 0; step < steps; ++step) sum += sum_weights(step, sharpness);
    return block_reduce(sum, scratch, [](uint64_t a, uint64_t c) { return a + c; });
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t total = 0;
  if (threadIdx.x == 0) shared_token = kNone;
  if (args.token_noise || sharp == 0.0f) {
    // The largest logit, or sum of logit and Gumbel noise; the lowest token of equal ones.
    uint64_t best = 0;
    const float* uniforms = args.token_noise + position * args.vocabulary;
    for (int step = 0; share.has(step); ++step) {
      float x[kSize];
      combined(step, x);
      for (int j = 0; j < kSize; ++j) {
        const int v = share.first(step) + j;
        if (v >= share.vocabulary) break;
        if (sharp != 0.0f) {
          x[j] = draw::add(x[j] / softmax, draw::mul(sharp, draw::gumbel(uniforms[v])));
        }
        if (!(x[j] > draw::negative_infinity())) continue;
        const uint64_t key = uint64_t{draw::ordered(x[j])} << 32 | ~static_cast<uint32_t>(v);
        best = key > best ? key : best;
      }
    }
    best = block_reduce(best, scratch, [](uint64_t a, uint64_t c) { return a > c ? a : c; });
    if (threadIdx.x == 0 && best > 0) {
      shared_token = static_cast<int>(~static_cast<uint32_t>(best));
      shared_logit = row.at(shared_token);
    }
  } else {
    total = total_weight(factor);
    if (total > 0) {
      uint64_t target = draw::scaled_uniform(target_words[0], target_words[1], total);
      int chosen = 0;
      for (; target >= scratch[chosen]; ++chosen) target -= scratch[chosen];
      if (warp == chosen) {
        for (int step = 0;; ++step) {
          const uint64_t mine = sum_weights(step, factor);
          uint64_t upto = mine;
#pragma unroll
          for (int distance = 1; distance < 32; distance *= 2) {
            const uint64_t before = __shfl_up_sync(kAll, upto, distance);
            if (lane >= distance) upto += before;
          }
          const uint64_t of_step = __shfl_sync(kAll, upto, 31);
          if (target >= of_step) {
            target -= of_step;
            continue;
          }
          if (target < upto && target >= upto - mine) {
            uint64_t left = target - (upto - mine);
            float x[kSize];
            combined(step, x);
            bool found = false;
#pragma unroll
            for (int j = 0; j < kSize; ++j) {
              const uint64_t w = draw::weight(x[j], top, factor);
              if (!found && left < w) {
                found = true;
                shared_token = share.first(step) + j;
                shared_logit = x[j];
              }
              if (!found) left -= w;
            }
          }
          break;
        }
      }
    }
  }
  const bool weighed = total > 0 && factor == plain_factor;
  if (args.kind == Confidence::log_probability && !weighed) total = total_weight(plain_factor);
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool none = shared_token == kNone;
    args.tokens[position] = none ? 0 : shared_token;
    args.confidence[position] =
        draw::confidence(args, none ? row.at(0) : shared_logit, largest, total, noise);
  }
}

// One block per image: masks its least confident positions again. A position's rank is the number
// of smaller keys.
__global__ void __launch_bounds__(kThreads) maskgit_step_mask_kernel(const MaskgitStepArgs args) {
  __shared__ uint64_t keys[kTile];
  const int64_t b = blockIdx.x, first = b * args.length;
  const int64_t again = draw::masked_again(args, b);
  for (int64_t start = 0; start < args.length; start += kThreads) {
    const int64_t l = start + threadIdx.x;
    const bool masked = l < args.length && args.ids[first + l] == args.mask_id;
    const uint64_t own = masked ? draw::mask_order(args.confidence[first + l], l) : 0;
    int rank = 0;
    for (int64_t tile = 0; tile < args.length; tile += kTile) {
      const int64_t left = args.length - tile;
      const int count = static_cast<int>(left < kTile ? left : kTile);
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int64_t p = first + tile + i;
        keys[i] = args.ids[p] == args.mask_id ? draw::mask_order(args.confidence[p], tile + i)
                                              : ~uint64_t{0};
      }
      __syncthreads();
      for (int i = 0; i < count; ++i) rank += keys[i] < own;
    }
    if (l < args.length) {
      args.ids_next[first + l] = masked && rank < again ? args.mask_id : args.tokens[first + l];
    }
  }
}

template <class T>
void launch(const MaskgitStepArgs& args) {
  const auto is_aligned_as = [](const void* logits, const int64_t (&strides)[2]) {
    return is_aligned(static_cast<const T*>(logits), strides[0], strides[1]);
  };
  const bool aligned = is_aligned_as(args.cond, args.cond_strides) &&
                       is_aligned_as(args.uncond, args.uncond_strides);
  const int64_t positions = args.batch * args.length;
  const int64_t step = kWarps * Share<T>::kStep;
  const int steps = static_cast<int>((args.vocabulary + step - 1) / step);
  const std::size_t bytes = steps * step * sizeof(float);
  if (bytes <= kKeptBytes) {
    launch_kernel(maskgit_step_draw_kernel<T, true>, positions, kThreads, bytes, args.stream, args,
                  steps, aligned);
  } else {
    launch_kernel(maskgit_step_draw_kernel<T, false>, positions, kThreads, 0, args.stream, args,
                  steps, aligned);
  }
  launch_kernel(maskgit_step_mask_kernel, args.batch, kThreads, 0, args.stream, args);
}

}  // namespace

void maskgit_step_cuda(const MaskgitStepArgs& args) {
  if (args.batch * args.length == 0) return;
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
