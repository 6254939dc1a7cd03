#include "cuda_common.cuh"
#include "draw.cuh"
#include "maskgit_step.h"

namespace titok {
namespace {

constexpr int64_t kKept = 12032;  // logits that fit into 48 KiB of shared memory
constexpr int kTile = 1024;       // keys of the selection in shared memory

// One block per position: draws its token and scores it. kept: the combined logits stay in shared
// memory, so that they are read once; otherwise they are combined again for each pass.
template <class T, bool kept>
__global__ void __launch_bounds__(kThreads, 3)
    maskgit_step_draw_kernel(const MaskgitStepArgs args, bool aligned) {
  constexpr int kSize = Row<T>::kSize;
  constexpr int kBatch = 2;  // vectors that a thread loads before it uses one
  extern __shared__ float4 shared_logits[];
  __shared__ uint64_t scratch[kWarps];
  __shared__ float float_scratch[kWarps];
  float* const logits = reinterpret_cast<float*>(shared_logits);

  const int64_t position = blockIdx.x;
  const int64_t b = position / args.length, l = position % args.length;
  const int64_t id = args.ids[position];
  if (id != args.mask_id) {
    if (threadIdx.x == 0) {
      args.tokens[position] = id;
      args.confidence[position] = -draw::negative_infinity();
    }
    return;
  }
  const draw::Words words = draw::words_of(args, position);
  const auto guidance = !args.uncond       ? draw::Guidance::none
                        : args.from_uncond ? draw::Guidance::uncond
                                           : draw::Guidance::cond;
  const Row<T> row{
      static_cast<const T*>(args.cond) + b * args.cond_strides[0] + l * args.cond_strides[1],
      static_cast<const T*>(args.uncond) + b * args.uncond_strides[0] + l * args.uncond_strides[1],
      args.vocabulary,
      args.guidance_scale.get(),
      guidance,
      aligned};
  const int64_t vocabulary = args.vocabulary;

  float largest = draw::negative_infinity();
  for (int64_t first = threadIdx.x * kSize; first < vocabulary;
       first += kBatch * kThreads * kSize) {
    typename Row<T>::Loaded loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t v = first + i * kThreads * kSize;
      if (v < vocabulary) loaded[i] = row.load(v);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t v = first + i * kThreads * kSize;
      if (v >= vocabulary) break;
      float x[kSize];
      row.combine(loaded[i], v, x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) largest = x[j] > largest ? x[j] : largest;
      if constexpr (kept) {
#pragma unroll
        for (int j = 0; j < kSize; j += 4) {
          shared_logits[(v + j) / 4] = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
        }
      }
    }
  }
  largest = block_reduce(largest, float_scratch, [](float a, float c) { return a > c ? a : c; });

  const auto combined = [&](int64_t v, float (&x)[kSize]) {
    if constexpr (kept) {
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        const float4 part = shared_logits[(v + j) / 4];
        x[j] = part.x;
        x[j + 1] = part.y;
        x[j + 2] = part.z;
        x[j + 3] = part.w;
      }
    } else {
      row.combine(row.load(v), v, x);
    }
  };

  // Each warp has one range of tokens, so that the draw looks into one range only.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int64_t kStep = 32 * kSize;
  const int64_t range = (vocabulary + kWarps * kStep - 1) / (kWarps * kStep) * kStep;
  const float top = draw::finite_largest(largest);
  const auto sum_weights = [&](int64_t v, float factor) {
    uint64_t sum = 0;
    if (v < vocabulary) {
      float x[kSize];
      combined(v, x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum += draw::weight(x[j], top, factor);
    }
    return sum;
  };
  const auto plus = [](uint64_t a, uint64_t c) { return a + c; };
  const auto total_weight = [&](float factor) {
    uint64_t sum = 0;
    for (int64_t v = warp * range; v < (warp + 1) * range; v += kStep) {
      sum += sum_weights(v + lane * kSize, factor);
    }
    return block_reduce(sum, scratch, plus);
  };

  const float softmax = args.softmax_temperature.get(), sharp = args.token_temperature.get();
  const float plain_factor = draw::sharpness(softmax), factor = draw::sharpness(softmax, sharp);
  uint64_t total = 0;
  __shared__ int64_t shared_token;
  if (threadIdx.x == 0) shared_token = 0;
  if (args.token_noise || sharp == 0.0f) {
    // The largest logit, or sum of logit and Gumbel noise; the lowest token of equal ones.
    uint64_t best = 0;
    const float* noise = args.token_noise + position * vocabulary;
    for (int64_t v = threadIdx.x; v < vocabulary; v += kThreads) {
      float x = kept ? logits[v] : row.at(v);
      if (sharp != 0.0f) {
        x = draw::add(x / softmax, draw::mul(sharp, draw::gumbel(noise[v])));
      }
      if (!(x > draw::negative_infinity())) continue;
      const uint64_t key = uint64_t{draw::ordered(x)} << 32 | ~static_cast<uint32_t>(v);
      best = key > best ? key : best;
    }
    best = block_reduce(best, scratch, [](uint64_t a, uint64_t c) { return a > c ? a : c; });
    if (threadIdx.x == 0 && best > 0) shared_token = ~static_cast<uint32_t>(best);
  } else {
    total = total_weight(factor);
    if (total > 0) {
      uint64_t target = draw::scaled_uniform(words.w[0], words.w[1], total);
      int chosen = 0;
      for (; target >= scratch[chosen]; ++chosen) target -= scratch[chosen];
      if (warp == chosen) {
        for (int64_t v = warp * range;; v += kStep) {
          const uint64_t mine = sum_weights(v + lane * kSize, factor);
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
            combined(v + lane * kSize, x);
            int token = 0;
            bool found = false;
#pragma unroll
            for (int j = 0; j < kSize; ++j) {
              const uint64_t w = draw::weight(x[j], top, factor);
              if (!found && left < w) {
                found = true;
                token = j;
              }
              if (!found) left -= w;
            }
            shared_token = v + lane * kSize + token;
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
    const int64_t token = shared_token;
    const double uniform = args.token_noise ? static_cast<double>(args.confidence_noise[position])
                                            : draw::uniform(words.w[2]);
    const float logit = kept ? logits[token] : row.at(token);
    args.tokens[position] = token;
    args.confidence[position] = draw::confidence(args, logit, largest, total, uniform);
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
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const auto is_aligned_as = [](const void* logits, const int64_t (&strides)[2]) {
    return is_aligned(static_cast<const T*>(logits), strides[0], strides[1]);
  };
  const bool aligned = is_aligned_as(args.cond, args.cond_strides) &&
                       is_aligned_as(args.uncond, args.uncond_strides);
  const auto positions = static_cast<unsigned>(args.batch * args.length);
  if (args.vocabulary <= kKept) {
    const int64_t padded = (args.vocabulary + Row<T>::kSize - 1) / Row<T>::kSize * Row<T>::kSize;
    maskgit_step_draw_kernel<T, true>
        <<<positions, kThreads, padded * sizeof(float), stream>>>(args, aligned);
  } else {
    maskgit_step_draw_kernel<T, false><<<positions, kThreads, 0, stream>>>(args, aligned);
  }
  TITOK_CHECK_CUDA(cudaGetLastError());
  maskgit_step_mask_kernel<<<static_cast<unsigned>(args.batch), kThreads, 0, stream>>>(args);
  TITOK_CHECK_CUDA(cudaGetLastError());
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
