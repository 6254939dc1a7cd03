// decode_linear for one instruction set: each thread normalises all rows for itself, then streams
// its share of the weights, a few rows of them against all of those.
#pragma once

#include <type_traits>
#include <utility>

#include "decode_linear.h"
#include "simd.h"

namespace titok {
namespace {
namespace decode {

using S = simd::Native;
using V = S::V;

// Weights widened as they are loaded, against rows in float32.
template <class T>
struct Widened {
  using Row = float;
  static constexpr int lanes = S::lanes;
  static V load(const T* p) { return S::load(p); }
  static V load_part(const T* p, int64_t count) { return S::load_part(p, count); }
  static V load_row(const Row* p) { return S::load(p); }
  static V dot(V a, V b, V sum) { return S::fmadd(a, b, sum); }
};
template <class T>
struct Factors : Widened<T> {};
#if defined(__AVX512BF16__)
// Pairs of bfloat16 as they lie, against rows in bfloat16.
struct AsTheyLie {
  using Row = simd::BFloat16;
  static constexpr int lanes = 2 * S::lanes;
  static V load(const Row* p) { return _mm512_loadu_ps(p); }
  static V load_part(const Row* p, int64_t count) {
    Row part[lanes] = {};
    std::memcpy(part, p, static_cast<std::size_t>(count) * sizeof(Row));
    return load(part);
  }
  static V load_row(const Row* p) { return load(p); }
  static V dot(V a, V b, V sum) { return simd::Pairs::dot(a, b, sum); }
};
template <>
struct Factors<simd::BFloat16> : AsTheyLie {};
#endif

// Accumulators fill the registers: rows of weights by rows of x.
constexpr int kWeights = S::lanes == 4 ? 2 : 3, kRows = S::sums_at_once;
constexpr int kAhead = 4 * kWeights;  // rows of weights that are fetched ahead of their use
constexpr int kChunk = 48;            // rows of weights that stay in the cache for all of x
static_assert(kChunk % kWeights == 0 && kChunk % S::lanes == 0);

template <class T>
const T* row(const DecodeRows& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + i * rows.stride;
}

// The normalised and modulated row, rounded as x is, and zeros up to the padded width.
template <class T, class Row>
void normalise(const DecodeLinearArgs& args, int64_t b, int64_t padded, Row* h) {
  const T* x = row<T>(args.x, b);
  const auto load = [&](const T* p, int64_t k) { return simd::load_row(p + k, args.width - k); };
  V factor = S::broadcast(1.0f);
  if (args.norm) {
    V squares = S::broadcast(0.0f);
    for (int64_t k = 0; k < args.width; k += S::lanes) {
      const V v = load(x, k);
      squares = S::fmadd(v, v, squares);
    }
    const float mean = S::sum(squares) / static_cast<float>(args.width);
    factor = S::broadcast(1.0f / std::sqrt(mean + args.norm_eps));
  }
  for (int64_t k = 0; k < padded; k += S::lanes) {
    V v = load(x, k);
    if (args.norm) v = S::mul(S::mul(v, factor), load(static_cast<const T*>(args.norm), k));
    if (args.scale.data) v = S::mul(v, load(row<T>(args.scale, b), k));
    if (args.shift.data) v = S::add(v, load(row<T>(args.shift, b), k));
    if constexpr (std::is_same_v<Row, T>) {
      S::store(h + k, v);
    } else {
      T rounded[S::lanes];
      S::store(rounded, v);
      S::store(h + k, S::load(rounded));
    }
  }
}

// out[n][r] += weights[n] . h[r]; a sum has one order, whatever `rows` and `count` are.
template <class F, int rows, int count, class T, class Row>
void add_products(const T* weights, int64_t stride, const Row* h, int64_t padded, int64_t width,
                  float (*out)[kRows]) {
  V sums[count][kRows];
  for (auto& of_weight : sums) {
    for (V& sum : of_weight) sum = S::broadcast(0.0f);
  }
  const auto step = [&](int64_t k, const auto& load) {
    V w[count];
    for (int n = 0; n < count; ++n) {
      w[n] = load(weights + n * stride + k);
      __builtin_prefetch(weights + (n + kAhead) * stride + k, 0, 2);  // not into the first cache
    }
    for (int r = 0; r < rows; ++r) {
      const V x = F::load_row(h + r * padded + k);
      for (int n = 0; n < count; ++n) sums[n][r] = F::dot(w[n], x, sums[n][r]);
    }
  };
  int64_t k = 0;
  for (; k + F::lanes <= width; k += F::lanes) {
    step(k, [](const T* p) { return F::load(p); });
  }
  if (k < width) step(k, [=](const T* p) { return F::load_part(p, width - k); });
  for (int n = 0; n < count; ++n) {
    float totals[kRows];
    if constexpr (rows <= 2) {
      for (int r = 0; r < rows; ++r) totals[r] = S::sum(sums[n][r]);
    } else {
      S::sums(sums[n], totals);
    }
    for (int r = 0; r < rows; ++r) out[n][r] += totals[r];
  }
}

template <class F, int count, class T, class Row, int... rows>
void add_products(int64_t given, const T* weights, int64_t stride, const Row* h, int64_t padded,
                  int64_t width, float (*out)[kRows], std::integer_sequence<int, rows...>) {
  ((rows + 1 == given ? add_products<F, rows + 1, count>(weights, stride, h, padded, width, out)
                      : void()),
   ...);
}

// The products of up to kChunk rows of weights with up to kRows of h.
template <class F, class T, class Row>
void multiply(const T* weights, int64_t stride, int64_t count, const Row* h, int64_t padded,
              int64_t width, int64_t rows, float (&out)[kChunk][kRows]) {
  constexpr auto all = std::make_integer_sequence<int, kRows>();
  constexpr int64_t depth = 2048 / static_cast<int64_t>(sizeof(Row));
  std::memset(out, 0, sizeof out);
  for (int64_t k = 0; k < width; k += depth) {
    const int64_t part = width - k < depth ? width - k : depth;
    const T* w = weights + k;
    int64_t n = 0;
    for (; n + kWeights <= count; n += kWeights) {
      add_products<F, kWeights>(rows, w + n * stride, stride, h + k, padded, part, out + n, all);
    }
    for (; n < count; ++n) {
      add_products<F, 1>(rows, w + n * stride, stride, h + k, padded, part, out + n, all);
    }
  }
}

// SiLU of y times up, in place.
inline void gate(float* y, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += S::lanes) {
    S::store(y + i, S::mul(simd::silu(S::load(y + i)), S::load(up + i)));
  }
}

// What follows the products, for `count` outputs of row b from n on, in a whole number of vectors.
template <class T>
void finish(const DecodeLinearArgs& args, int64_t b, int64_t n, int64_t count, const float* y) {
  T* out = static_cast<T*>(args.out) + b * args.size + n;
  for (int64_t i = 0; i < count; i += S::lanes) {
    const int64_t left = count - i;
    V v = S::load(y + i);
    if (args.residual_scale.data) {
      v = S::mul(v, simd::load_row(row<T>(args.residual_scale, b) + n + i, left));
    }
    if (args.residual.data) {
      v = S::add(v, simd::load_row(row<T>(args.residual, b) + n + i, left));
    }
    simd::store_row(out + i, v, left);
  }
}

template <class T>
void run_typed(const DecodeLinearArgs& args, const DecodeLinearPlan& plan,
               const Team::Member& member) {
  using F = Factors<T>;
  using Row = typename F::Row;
  auto* h = reinterpret_cast<Row*>(static_cast<char*>(args.workspace) +
                                   static_cast<std::size_t>(member.index) * plan.thread_bytes);
  const int64_t padded = plan.padded_width;
  for (int64_t b = 0; b < args.batch; ++b) normalise<T>(args, b, padded, h + b * padded);

  float y[kChunk][kRows], up[kChunk][kRows];
  const auto share = member.share(args.size, kWeights);
  for (int64_t n = share.begin; n < share.end; n += kChunk) {
    const int64_t count = share.end - n < kChunk ? share.end - n : kChunk;
    for (int64_t b = 0; b < args.batch; b += kRows) {
      const int64_t rows = args.batch - b < kRows ? args.batch - b : kRows;
      const auto with = [&](const DecodeRows& weight, float (&result)[kChunk][kRows]) {
        multiply<F>(row<T>(weight, n), weight.stride, count, h + b * padded, padded, args.width,
                    rows, result);
      };
      with(args.weight, y);
      if (args.up_weight.data) {
        with(args.up_weight, up);
        gate(y[0], up[0], kChunk * kRows);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float of_row[kChunk];
        for (int i = 0; i < kChunk; ++i) of_row[i] = y[i][r];
        finish<T>(args, b + r, n, count, of_row);
      }
    }
  }
}

#if !defined(__AMX_BF16__)
void run(const DecodeLinearArgs& args, const DecodeLinearPlan& plan, const Team::Member& member) {
  simd::with_type(args.dtype, [&](auto x) { run_typed<decltype(x)>(args, plan, member); });
}
#endif

}  // namespace decode
}  // namespace
}  // namespace titok
