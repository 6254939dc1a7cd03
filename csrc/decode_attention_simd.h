// decode_attention for one instruction set: a thread takes whole key and value heads.
#pragma once

#include "decode_attention.h"
#include "simd.h"

namespace titok {
namespace {
namespace decode {

using S = simd::Native;
using V = S::V;

// Pairs of consecutive channels times the position's rotation and `factor`.
template <class T>
void rotate(const T* x, const float* rotation, int64_t width, float factor, float* out) {
  for (int64_t i = 0; i < width; i += 2) {
    const float real = simd::widen(x[i]), imaginary = simd::widen(x[i + 1]);
    const float cosine = rotation[i] * factor, sine = rotation[i + 1] * factor;
    out[i] = real * cosine - imaginary * sine;
    out[i + 1] = imaginary * cosine + real * sine;
  }
}

template <class T>
float dot(const float* query, const T* key, int64_t width) {
  V sum = S::broadcast(0.0f);
  for (int64_t i = 0; i < width; i += S::lanes) {
    sum = S::fmadd(S::load(query + i), simd::load_row(key + i, width - i), sum);
  }
  return S::sum(sum);
}

// Asks for a row that is read later.
template <class T>
void fetch(const T* row, int64_t width) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < width; i += line) __builtin_prefetch(row + i, 0, 2);
}

// out[0..count) of the sums over `rows` values, each `width` long, times their weights.
template <int vectors, class T>
void weigh(const float* weights, const T* values, int64_t rows, int64_t width, int64_t count,
           T* out) {
  V sums[vectors];
  for (V& sum : sums) sum = S::broadcast(0.0f);
  for (int64_t s = 0; s < rows; ++s) {
    const V weight = S::broadcast(weights[s]);
    for (int j = 0; j < vectors; ++j) {
      const V value = simd::load_row(values + s * width + j * S::lanes, count - j * S::lanes);
      sums[j] = S::fmadd(weight, value, sums[j]);
    }
  }
  for (int j = 0; j < vectors && j * S::lanes < count; ++j) {
    simd::store_row(out + j * S::lanes, sums[j], count - j * S::lanes);
  }
}

// Scores to probabilities, in place; `padded` of them may be written.
inline void softmax(float* scores, int64_t count, int64_t padded) {
  V largest = S::broadcast(-INFINITY);
  for (int64_t s = count; s < padded; ++s) scores[s] = -INFINITY;
  for (int64_t s = 0; s < padded; s += S::lanes) largest = S::max(S::load(scores + s), largest);
  const V top = S::broadcast(S::largest(largest));
  V sum = S::broadcast(0.0f);
  for (int64_t s = 0; s < padded; s += S::lanes) {
    const V weight = simd::exp(S::sub(S::load(scores + s), top));
    S::store(scores + s, weight);
    sum = S::add(sum, weight);
  }
  const V factor = S::broadcast(1.0f / S::sum(sum));
  for (int64_t s = 0; s < padded; s += S::lanes) {
    S::store(scores + s, S::mul(S::load(scores + s), factor));
  }
}

template <class T>
void run_typed(const DecodeAttentionArgs& args, const DecodeAttentionPlan& plan,
               const Team::Member& member) {
  auto* query =
      reinterpret_cast<float*>(static_cast<char*>(args.workspace) +
                               static_cast<std::size_t>(member.index) * plan.thread_bytes);
  float* scores = query + plan.padded_width;
  const int64_t width = args.width, group = args.heads / args.kv_heads, end = args.position + 1;
  const int64_t padded = round_up(end, S::lanes);
  const float* rotation = args.rotation + args.position * width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  const auto share = member.share(args.batch * args.kv_heads);
  for (int64_t item = share.begin; item < share.end; ++item) {
    const int64_t b = item / args.kv_heads, head = item % args.kv_heads;
    const T* row = static_cast<const T*>(args.qkv) + b * args.qkv_stride;
    const T* key = row + (args.heads + head) * width;
    const T* value = key + args.kv_heads * width;
    T* keys = static_cast<T*>(args.keys) + item * args.length * width;
    T* values = static_cast<T*>(args.values) + item * args.length * width;
    rotate(key, rotation, width, 1.0f, query);
    for (int64_t i = 0; i < width; ++i) {
      keys[args.position * width + i] = simd::rounded<T>(query[i]);
      values[args.position * width + i] = value[i];
    }
    for (int64_t g = head * group; g < (head + 1) * group; ++g) {
      for (int64_t i = width; i < plan.padded_width; ++i) query[i] = 0.0f;
      rotate(row + g * width, rotation, width, scale, query);
      for (int64_t s = 0; s < end; ++s) {
        const T* key = keys + s * width;
        scores[s] = dot(query, key, width);
        fetch(values + s * width, width);
        fetch(key + args.length * width, width);  // of the next head
      }
      softmax(scores, end, padded);
      T* out = static_cast<T*>(args.out) + (b * args.heads + g) * width;
      constexpr int vectors = 4;
      for (int64_t i = 0; i < width; i += vectors * S::lanes) {
        const int64_t left = width - i, most = vectors * S::lanes;
        weigh<vectors>(scores, values + i, end, width, left < most ? left : most, out + i);
      }
    }
  }
}

void run(const DecodeAttentionArgs& args, const DecodeAttentionPlan& plan,
         const Team::Member& member) {
  simd::with_type(args.dtype, [&](auto x) { run_typed<decltype(x)>(args, plan, member); });
}

}  // namespace decode
}  // namespace
}  // namespace titok
