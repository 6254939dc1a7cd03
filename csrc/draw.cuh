// What the kernels that draw tokens share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "draw.h"

namespace titok {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// 16 bytes of logits.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

// A row of logits, as one block reads it. Where guidance, aligned and ragged are constants, loops
// ask for them no more.
template <class T>
struct Row {
  static constexpr int kSize = Vector<T>::size;
  const T* cond;
  const T* uncond;
  int64_t vocabulary;
  float scale;
  draw::Guidance guidance;
  bool aligned;
  bool ragged;  // the last vector may be shorter

  __device__ Vector<T> load(const T* row, int64_t v) const {
    Vector<T> out;
    if (aligned && (!ragged || v + kSize <= vocabulary)) {
      const int4 bits = __ldg(reinterpret_cast<const int4*>(row + v));
      memcpy(&out, &bits, sizeof out);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        out.values[i] = v + i < vocabulary ? row[v + i] : T(-INFINITY);
      }
    }
    return out;
  }

  // Combined logits of tokens v..v + kSize, -inf past the end.
  struct Loaded {
    Vector<T> cond, uncond;
  };
  __device__ Loaded load(int64_t v) const {
    Loaded loaded{load(cond, v), {}};
    if (guidance != draw::Guidance::none) loaded.uncond = load(uncond, v);
    return loaded;
  }
  __device__ void combine(const Loaded& loaded, int64_t v, float (&out)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float x = draw::combine(widen(loaded.cond.values[i]), widen(loaded.uncond.values[i]),
                                    scale, guidance);
      out[i] = !ragged || v + i < vocabulary ? x : draw::negative_infinity();
    }
  }
  __device__ float at(int64_t v) const {
    const float u = guidance == draw::Guidance::none ? 0.0f : widen(uncond[v]);
    return draw::combine(widen(cond[v]), u, scale, guidance);
  }
};

template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T x, const Combine& combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = combine(x, __shfl_xor_sync(kAll, x, distance));
  }
  return x;
}

// The same for every thread of the block; `scratch` holds one value a warp.
template <class T, class Combine>
__device__ T block_reduce(T x, T* scratch, const Combine& combine) {
  x = warp_reduce(x, combine);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = combine(x, scratch[w]);
  return x;
}

// Whether every row of logits begins where 16 bytes can be loaded; null pointers do.
template <class T, class... Strides>
bool is_aligned(const T* logits, Strides... strides) {
  return reinterpret_cast<std::uintptr_t>(logits) % 16 == 0 &&
         ((strides * static_cast<int64_t>(sizeof(T)) % 16 == 0) && ...);
}

}  // namespace
}  // namespace titok
