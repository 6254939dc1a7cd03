// attention for one instruction set: products of a block of queries with all keys, softmax of whole
// rows, products with all values.
#pragma once

#include <type_traits>

#include "attention.h"
#include "tile.h"

namespace titok {
namespace {
namespace attend {

using S = simd::Native;
using V = S::V;
using simd::kTileColumns;
using simd::kTileRows;
using simd::with_vectors;
constexpr int64_t kBlockRows = kTileRows == 16 ? 32 : 24;  // queries
static_assert(kBlockRows % kTileRows == 0, "a block is whole tiles");

// Sums over the keys are of parts, each of so many terms at most: shorter chains round less.
constexpr int64_t kChain = 128;

template <class T>
struct Attention {
  using Words = std::conditional_t<std::is_same_v<T, simd::BFloat16>, simd::Words, simd::Single>;
  static constexpr int64_t kTerms = Words::terms;

  const AttentionArgs& args;
  const AttentionPlan& plan;
  const Team::Member& member;

  float* own(std::size_t offset) const {
    return reinterpret_cast<float*>(static_cast<char*>(args.workspace) + offset +
                                    static_cast<std::size_t>(member.index) * plan.thread_bytes);
  }
  // Words of a query or key, and of a row of probabilities; the last may be zeros.
  int64_t depth() const { return round_up(args.width / kTerms, simd::kWordGroup); }
  int64_t steps() const { return round_up((args.length + kTerms - 1) / kTerms, simd::kWordGroup); }

  // The words [w, w + lanes) of a query or key.
  V load_words(const T* row, int64_t w) const {
    const int64_t left = args.width / kTerms - w;
    if constexpr (kTerms == 2) {
      return simd::load_row(reinterpret_cast<const float*>(row) + w, left);
    } else {
      return simd::load_row(row + w, left);
    }
  }

  void pack_queries(const T* rows, int64_t count) const {
    float* out = own(plan.queries);
    for (int64_t r = 0; r < round_up(count, kTileRows); ++r, out += depth()) {
      for (int64_t w = 0; w < depth(); w += S::lanes) {
        const V v = r < count ? load_words(rows + r * args.row_stride, w) : S::broadcast(0.0f);
        simd::store_row(out + w, v, depth() - w);
      }
    }
  }

  // Panels of kTileColumns keys, each [depth, keys of the panel]; zeros past the last key.
  void pack_keys(const T* rows) const {
    for (int64_t j = 0; j < args.length; j += S::lanes) {
      const int64_t begin = j / kTileColumns * kTileColumns;
      const int64_t columns = panel(args.length, begin);
      float* out = own(plan.keys) + begin * depth() + j - begin;
      for (int64_t w = 0; w < depth(); w += S::lanes) {
        V words[S::lanes];
        for (int64_t i = 0; i < S::lanes; ++i) {
          words[i] = j + i < args.length ? load_words(rows + (j + i) * args.row_stride, w)
                                         : S::broadcast(0.0f);
        }
        S::transpose(words);
        const int64_t count = depth() - w < S::lanes ? depth() - w : S::lanes;
        for (int64_t i = 0; i < count; ++i) S::store(out + (w + i) * columns, words[i]);
      }
    }
  }

  // Panels of kTileColumns channels, each [steps, channels of the panel].
  void pack_values(const T* rows) const {
    for (int64_t c = 0; c < args.width; c += S::lanes) {
      const int64_t begin = c / kTileColumns * kTileColumns;
      const int64_t columns = panel(args.width, begin);
      float* out = own(plan.values) + begin * steps() + c - begin;
      for (int64_t j = 0; j < steps() * kTerms; j += kTerms, out += columns) {
        const T* row = rows + j * args.row_stride + c;
        V low = S::broadcast(0.0f), high = low;
        if (j < args.length) low = simd::load_row(row, args.width - c);
        if (kTerms == 2 && j + 1 < args.length) {
          high = simd::load_row(row + args.row_stride, args.width - c);
        }
        S::store(out, Words::zip(low, high));
      }
    }
  }

  // Columns, up to a multiple of a vector, of the panel that begins at `begin`.
  static int64_t panel(int64_t count, int64_t begin) {
    const int64_t left = round_up(count - begin, S::lanes);
    return left < kTileColumns ? left : kTileColumns;
  }

  void multiply_keys(int64_t rows) const {
    for (int64_t j = 0; j < args.length; j += kTileColumns) {
      const float* keys = own(plan.keys) + j * depth();
      with_vectors(panel(args.length, j), [&](auto vectors) {
        for (int64_t r = 0; r < rows; r += kTileRows) {
          simd::product_to<Words, vectors>(own(plan.scores) + r * plan.score_stride + j,
                                           plan.score_stride, own(plan.queries) + r * depth(),
                                           depth(), 1, keys, depth());
        }
      });
    }
  }

  // Scores to words of probabilities times their sum, in place.
  void softmax(int64_t rows, float* sums) const {
    const int64_t last = round_up(args.length, S::lanes) - S::lanes;
    float bounds[S::lanes];  // -inf where the last vector has no key
    for (int64_t i = 0; i < S::lanes; ++i) {
      bounds[i] = last + i < args.length ? INFINITY : -INFINITY;
    }
    const V bound = S::load(bounds);
    const V scale = S::broadcast(
        static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(args.width))));
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = own(plan.scores) + r * plan.score_stride;
      // min keeps its second operand for a NaN.
      const V tail = S::min(bound, S::load(scores + last));
      V largest = tail;
      for (int64_t j = 0; j < last; j += S::lanes) largest = S::max(S::load(scores + j), largest);
      const V top = S::broadcast(S::largest(largest));
      V sum = S::broadcast(0.0f), part = sum;
      auto* out = reinterpret_cast<typename Words::Value*>(scores);
      const auto weigh = [&](int64_t j, V score) {
        const V weight = simd::exp2(S::mul(S::sub(score, top), scale));
        part = S::add(part, weight);
        Words::store(out + j, weight);
      };
      for (int64_t j = 0; j < last;) {
        const int64_t end = last - j < kChain ? last : j + kChain;
        for (; j < end; j += S::lanes) weigh(j, S::load(scores + j));
        sum = S::add(sum, part);
        part = S::broadcast(0.0f);
      }
      weigh(last, tail);
      sum = S::add(sum, part);
      sums[r] = S::sum(sum);
      for (int64_t j = last + S::lanes; j < steps() * kTerms; j += S::lanes) {
        Words::store(out + j, S::broadcast(0.0f));
      }
    }
  }

  // One vector of the output, where `left` channels have room.
  static void store_out(T* out, V v, int64_t left) {
    if constexpr (kTerms == 2) {
      if (left >= S::lanes) return Words::store(out, v);
    }
    simd::store_row(out, v, left);
  }

  void multiply_values(int64_t rows, const float* sums, T* out) const {
    for (int64_t c = 0; c < args.width; c += kTileColumns) {
      const float* values = own(plan.values) + c * steps();
      with_vectors(panel(args.width, c), [&](auto vectors) {
        for (int64_t r = 0; r < rows; r += kTileRows) {
          float products[kTileRows * kTileColumns];
          for (int64_t step = 0; step < steps(); step += kChain) {
            const int64_t left = steps() - step;
            V acc[kTileRows][vectors];
            simd::product<Words>(acc, own(plan.scores) + r * plan.score_stride + step,
                                 plan.score_stride, 1, values + step * vectors * S::lanes,
                                 left < kChain ? left : kChain);
            if (step > 0) simd::add_tile(acc, products, kTileColumns);
            simd::store_tile(acc, products, kTileColumns);
          }
          for (int64_t i = 0; i < kTileRows && r + i < rows; ++i) {
            const V factor = S::broadcast(1.0f / sums[r + i]);
            T* row = out + (r + i) * args.heads * args.width + c;
            for (int v = 0; v < vectors; ++v) {
              const V product = S::load(products + i * kTileColumns + v * S::lanes);
              store_out(row + v * S::lanes, S::mul(product, factor), args.width - c - v * S::lanes);
            }
          }
        }
      });
    }
  }

  void run() const {
    [[maybe_unused]] const simd::Registers registers;
    const auto mine = member.share(args.batch * args.heads * plan.blocks);
    int64_t packed = -1;
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t head = item / plan.blocks, b = head / args.heads, h = head % args.heads;
      const T* first =
          static_cast<const T*>(args.qkv) + b * args.batch_stride + h * args.head_stride;
      if (head != packed) {
        pack_keys(first + args.part_stride);
        pack_values(first + 2 * args.part_stride);
        packed = head;
      }
      const int64_t begin = item % plan.blocks * kBlockRows;
      const int64_t left = args.length - begin;
      const int64_t rows = left < kBlockRows ? left : kBlockRows;
      pack_queries(first + begin * args.row_stride, rows);
      multiply_keys(rows);
      float sums[kBlockRows];
      softmax(rows, sums);
      multiply_values(
          rows, sums,
          static_cast<T*>(args.out) + ((b * args.length + begin) * args.heads + h) * args.width);
    }
  }
};

void run(const AttentionArgs& args, const AttentionPlan& plan, const Team::Member& member) {
#if defined(__AMX_BF16__)
  Attention<simd::BFloat16>{args, plan, member}.run();
#else
  simd::with_type(args.dtype, [&](auto x) { Attention<decltype(x)>{args, plan, member}.run(); });
#endif
}

constexpr AttentionKernel make_kernel() {
  return {kBlockRows, simd::kWordGroup * simd::Words::terms, run};
}

}  // namespace attend
}  // namespace
}  // namespace titok
