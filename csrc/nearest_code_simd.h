// The nearest-code search of one instruction set. Everything here is local to the including file,
// so that code compiled for one set is never linked into the path of another.
#pragma once

#include <cmath>
#include <limits>

#include "nearest_code.h"
#include "simd.h"

namespace titok {
namespace {

using S = simd::Native;
using V = S::V;
using simd::Double8;
using simd::sum_pairs;
using simd::widen8;

constexpr int kTerms = S::terms;
constexpr int kTileRows = S::tile_rows;
constexpr int kTileVectors = S::tile_vectors;
constexpr int kTileCodes = kTileVectors * S::lanes;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Norms up to this keep every coarse product and sum inside float32.
constexpr double kLargestNorm = 1e18;
constexpr double kNormFloor = 1e-12;
constexpr double kLargestSquare = 1e36;
constexpr double kSmallSquare = 1e-24;
constexpr double kSquareMargin = 1.0001;
constexpr double kTinySquare = 1e-37;  // what float32 may flush of a smaller one
// bfloat16 moves each factor by at most 2^-9 of itself.
constexpr double kRounding = kTerms == 2 ? 0x1.01p-8 : 0.0;

template <class T>
struct Search {
  const NearestCodeArgs& args;
  const NearestCodePlan& plan;
  const Team::Member& member;

  const T* z_row(int64_t row) const { return static_cast<const T*>(args.z) + row * args.z_stride; }
  const T* code(int64_t k) const {
    return static_cast<const T*>(args.codebook) + k * args.codebook_stride;
  }
  template <class U>
  U* at(std::size_t offset) const {
    return reinterpret_cast<U*>(static_cast<char*>(args.workspace) + offset);
  }
  float* center() const { return at<float>(plan.center); }
  float* z() const { return at<float>(plan.z); }
  float* z_norm() const { return at<float>(plan.z_norm); }
  float* block_norm() const { return at<float>(plan.block_norm); }
  float* table() const { return at<float>(plan.table); }
  float* panel() const { return at<float>(plan.panels + member.index * plan.panel_bytes); }
  double* z64() const { return at<double>(plan.z64) + member.index * plan.depth; }

  // Covers the rounding of a norm that was summed in float32.
  double norm_margin() const { return 1.0001 + static_cast<double>(args.d) * 0x1p-23; }

  int64_t words() const { return (args.d + kTerms - 1) / kTerms; }

  // l2 distances do not change when both sides move; near zero, the coarse pass keeps more of them.
  void find_center() const {
    float* out = center();
    for (int64_t i = 0; i < plan.padded_depth; ++i) out[i] = 0.0f;
    if (args.metric != Metric::l2) return;
    const int64_t count = args.k < 64 ? args.k : 64;
    for (int64_t i = 0; i < args.d; ++i) {
      double sum = 0.0;
      for (int64_t j = 0; j < count; ++j) sum += simd::widen(code(args.k * j / count)[i]);
      const double mean = sum / static_cast<double>(count);
      out[i] = std::fabs(mean) < kLargestNorm ? static_cast<float>(mean) : 0.0f;
    }
  }

  // row[i..i + lanes) - center, zeros past the end.
  V centred(const T* row, int64_t i) const {
    const int64_t left = args.d - i;
    if (left <= 0) return S::broadcast(0.0f);
    const V x = left >= S::lanes ? S::load(row + i) : S::load_part(row + i, left);
    return S::sub(x, S::load(center() + i));
  }

  float square(const T* row) const {
    V sum = S::broadcast(0.0f);
    for (int64_t i = 0; i < args.d; i += S::lanes) {
      const V x = centred(row, i);
      sum = S::fmadd(x, x, sum);
    }
    return S::sum(sum);
  }

  // For what float32 may overflow or flush.
  double careful_square(const T* row) const {
    double sum = 0.0;
    for (int64_t i = 0; i < args.d; ++i) {
      const float x = simd::widen(row[i]) - center()[i];
      sum += static_cast<double>(x) * x;
    }
    return sum;
  }

  // kTerms consecutive values in each of a vector's words, from row[i] on, times `scale`.
  V packed(const T* row, int64_t i, float scale) const {
    const V factor = S::broadcast(scale);
    return S::words([&](int part) { return S::mul(centred(row, i + part * S::lanes), factor); });
  }

  // Rows as [tile][word][row of the tile], so that a tile reads one stream.
  void prepare_rows(int64_t first, int64_t rows) const {
    const auto share = member.share(rows, kTileRows);
    const int64_t end = (share.end + kTileRows - 1) / kTileRows * kTileRows;
    float buffer[S::lanes];
    for (int64_t r = share.begin; r < end; ++r) {
      float* out = z() + r / kTileRows * kTileRows * plan.depth + r % kTileRows;
      double norm = kInfinity;
      if (r < share.end) {
        const T* row = z_row(first + r);
        const float quick = square(row);
        const bool safe = quick >= kSmallSquare && quick <= kLargestSquare;
        norm = std::sqrt(safe ? quick : careful_square(row));
      }
      const bool coarse = norm <= kLargestNorm;
      z_norm()[r] = coarse ? static_cast<float>(norm * norm_margin()) : kInfinity;
      for (int64_t w = 0; w < words(); w += S::lanes) {
        S::store(buffer, coarse ? packed(z_row(first + r), w * kTerms, 1.0f) : S::broadcast(0.0f));
        const int64_t count = words() - w < S::lanes ? words() - w : S::lanes;
        for (int64_t i = 0; i < count; ++i) out[(w + i) * kTileRows] = buffer[i];
      }
    }
  }

  // Codes [first, first + kTileCodes) as [bias][word][code]; a code that the coarse pass cannot
  // hold gets bias -inf and norm inf, which keeps its block out of the bounds and always rescored.
  void pack(int64_t first, bool first_of_block, float* norms) const {
    float* bias = panel();
    const T* rows[kTileCodes];
    float squares[kTileCodes], scales[kTileCodes];
    for (int j = 0; j < kTileCodes; ++j) {
      rows[j] = code(first + j < args.k ? first + j : args.k - 1);
      squares[j] = square(rows[j]);
      scales[j] = 1.0f;
    }

    bool edge = false;
    for (int j = 0; j < kTileCodes; j += S::lanes) {
      V square = S::load(squares + j);
      // Common case: every norm of the vector is neither tiny nor huge, and every code exists.
      if (S::all_between(square, kSmallSquare, kLargestSquare) && first + j + S::lanes <= args.k) {
        S::store(bias + j, args.metric == Metric::l2 ? S::mul(square, S::broadcast(-0.5f))
                                                     : S::broadcast(0.0f));
        if (args.metric == Metric::cosine) {
          S::store(scales + j, S::div(S::broadcast(1.0f), S::sqrt(square)));
          square = S::broadcast(1.0f);
        }
      } else {
        for (int l = j; l < j + S::lanes; ++l) {
          pack_edge(first + l, rows[l], bias[l], scales[l], squares[l]);
        }
        square = S::load(squares + j);
        edge = true;
      }
      S::store(norms, first_of_block && j == 0 ? square : S::max(square, S::load(norms)));
    }

    float* out = bias + kTileCodes;
    V tile[S::lanes];
    for (int j = 0; j < kTileCodes; j += S::lanes) {
      for (int64_t w = 0; w < words(); w += S::lanes) {
        for (int l = 0; l < S::lanes; ++l) tile[l] = packed(rows[j + l], w * kTerms, scales[j + l]);
        S::transpose(tile);
        const int64_t count = words() - w < S::lanes ? words() - w : S::lanes;
        for (int64_t i = 0; i < count; ++i) S::store(out + (w + i) * kTileCodes + j, tile[i]);
      }
    }
    if (!edge) return;
    for (int j = 0; j < kTileCodes; ++j) {
      if (bias[j] != -kInfinity) continue;
      for (int64_t w = 0; w < words(); ++w) out[w * kTileCodes + j] = 0.0f;
    }
  }

  // Bias, scale and squared scaled norm of a code that is past the end, huge, not finite, or so
  // small that float32 may have lost terms of its norm.
  void pack_edge(int64_t k, const T* row, float& bias, float& scale, float& squared) const {
    double square = careful_square(row);
    const bool coarse = square <= kLargestSquare;
    bias = args.metric == Metric::l2 ? static_cast<float>(-0.5 * square) : 0.0f;
    if (args.metric == Metric::cosine) {
      const double norm = std::sqrt(square);
      scale = static_cast<float>(1.0 / (norm > kNormFloor ? norm : kNormFloor));
      square *= static_cast<double>(scale) * scale;
    }
    squared = coarse ? static_cast<float>(square * kSquareMargin) : kInfinity;
    if (!coarse || k >= args.k) bias = -kInfinity;
    if (k >= args.k) squared = 0.0f;
  }

  // One register tile: bias + z . e for kTileRows rows and kTileCodes codes, folded into the table.
  void score_tile(int64_t row, float* maxima, bool first_of_block) const {
    V acc[kTileRows][kTileVectors];
    const float* bias = panel();
    const float* e = bias + kTileCodes;
    const float* rows = z() + row * plan.depth;
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = S::load(bias + v * S::lanes);
    }
    const int64_t steps = words();
    for (int64_t i = 0; i < steps; ++i) {
      V codes[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) codes[v] = S::load(e + i * kTileCodes + v * S::lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const V value = S::broadcast(rows[i * kTileRows + r]);
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = S::dot(value, codes[v], acc[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      V best = acc[r][0];
#pragma GCC unroll 8
      for (int v = 1; v < kTileVectors; ++v) best = S::max(best, acc[r][v]);
      float* out = maxima + r * plan.blocks;
      if (!first_of_block) best = S::max(best, S::load(out));
      S::store(out, best);
    }
  }

  void score(int64_t rows) const {
    const int64_t supers = plan.blocks / plan.lanes;
    const bool split_codes = supers >= 4 * member.size;
    const int64_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows;
    const Team::Member::Range all_rows{0, padded}, all_supers{0, supers};
    const auto my_rows = split_codes ? all_rows : member.share(padded, kTileRows);
    const auto my_supers = split_codes ? member.share(supers) : all_supers;
    float* unused = panel() + (words() + 1) * kTileCodes;  // norms that another member stores
    for (int64_t super = my_supers.begin; super < my_supers.end; ++super) {
      const bool owner = split_codes || member.index == 0;
      float* norms = owner ? block_norm() + super * plan.lanes : unused;
      for (int64_t v = 0; v < plan.block_vectors; v += kTileVectors) {
        const int64_t first = (super * plan.block_vectors + v) * plan.lanes;
        if (first >= args.k && v > 0) break;
        pack(first, v == 0, norms);
        for (int64_t r = my_rows.begin; r < my_rows.end; r += kTileRows) {
          score_tile(r, table() + r * plan.blocks + super * plan.lanes, v == 0);
        }
      }
      for (int l = 0; l < S::lanes; ++l) {
        norms[l] = static_cast<float>(std::sqrt(norms[l] + kTinySquare) * norm_margin());
      }
    }
  }

  struct Best {
    double score = std::numeric_limits<double>::quiet_NaN();
    int64_t index = -1;

    void offer(double candidate, int64_t k) {
      const bool nearer = std::isnan(score)
                              ? !std::isnan(candidate) || index < 0 || k < index
                              : candidate > score || (candidate == score && k < index);
      if (nearer) {
        score = candidate;
        index = k;
      }
    }
  };

  // Codes first, first + step, ..., `count` of them, at most eight. Larger is nearer: minus the
  // squared distance, the cosine or the logit.
  template <Metric metric>
  void offer(int64_t first, int64_t step, int64_t count, Best& best) const {
    const double* zr = z64();
    Double8 sums[8], squares[8];
    for (int j = 0; j < 8; ++j) {
      const T* e = code(first + step * (j < count ? j : 0));
      Double8 sum = Double8::zero(), square = Double8::zero();
      for (int64_t i = 0; i < plan.depth; i += 8) {
        const Double8 b = widen8(e + i, args.d - i), a = Double8::load(zr + i);
        if constexpr (metric == Metric::l2) {
          const Double8 difference = a - b;
          sum = sum + difference * difference;
        } else {
          sum = sum + a * b;
          if constexpr (metric == Metric::cosine) square = square + b * b;
        }
      }
      sums[j] = sum;
      squares[j] = square;
    }
    Double8 score = sum_pairs(sums);
    if constexpr (metric == Metric::l2) score = Double8::broadcast(-0.0) - score;
    if constexpr (metric == Metric::cosine) {
      score = score / max(Double8::broadcast(kNormFloor), sqrt(sum_pairs(squares)));
    }
    unsigned nearer = not_less(score, Double8::broadcast(best.score)) & ((1u << count) - 1);
    if (!nearer) return;
    double scores[8];
    score.store(scores);
    for (; nearer; nearer &= nearer - 1) {
      const int j = __builtin_ctz(nearer);
      best.offer(scores[j], first + step * j);
    }
  }

  // Codes first, first + step, ... below `end`; returns how many.
  int64_t offer_all(int64_t first, int64_t end, int64_t step, Best& best) const {
    if (end > args.k) end = args.k;
    const int64_t all = first < end ? (end - first + step - 1) / step : 0;
    for (int64_t done = 0; done < all; done += 8) {
      const int64_t count = all - done < 8 ? all - done : 8, k = first + done * step;
      switch (args.metric) {
        case Metric::l2:
          offer<Metric::l2>(k, step, count, best);
          break;
        case Metric::cosine:
          offer<Metric::cosine>(k, step, count, best);
          break;
        case Metric::dot:
          offer<Metric::dot>(k, step, count, best);
          break;
      }
    }
    return all;
  }

  double norm64(const T* row) const {
    Double8 sum = Double8::zero();
    for (int64_t i = 0; i < plan.depth; i += 8) {
      const Double8 x = widen8(row + i, args.d - i);
      sum = sum + x * x;
    }
    const double norm = std::sqrt(sum_pairs(sum));
    return norm < kNormFloor ? kNormFloor : norm;
  }

  float distance(int64_t row, int64_t k, double score) const {
    if (args.metric == Metric::l2) return static_cast<float>(-score);
    if (args.metric == Metric::dot) return static_cast<float>(score);
    const T* a = z_row(row);
    const T* b = code(k);
    const Double8 a_norm = Double8::broadcast(norm64(a)), b_norm = Double8::broadcast(norm64(b));
    Double8 sum = Double8::zero();
    for (int64_t i = 0; i < plan.depth; i += 8) {
      const Double8 difference =
          widen8(a + i, args.d - i) / a_norm - widen8(b + i, args.d - i) / b_norm;
      sum = sum + difference * difference;
    }
    return static_cast<float>(sum_pairs(sum));
  }

  void rescore_row(int64_t row, int64_t table_row) const {
    double* zr = z64();
    bool has_nan = false;
    for (int64_t i = 0; i < plan.depth; ++i) {
      zr[i] = i < args.d ? simd::widen(z_row(row)[i]) : 0.0;
      has_nan = has_nan || std::isnan(zr[i]);
    }
    Best best{std::numeric_limits<double>::quiet_NaN(), 0};
    int64_t rescored = 0;
    if (!has_nan) {
      best.index = -1;
      const float norm = z_norm()[table_row];
      rescored = norm == kInfinity ? offer_all(0, args.k, 1, best)
                                   : rescore_blocks(norm, table() + table_row * plan.blocks, best);
    }
    args.indices[row] = best.index;
    args.distances[row] =
        has_nan ? std::numeric_limits<float>::quiet_NaN() : distance(row, best.index, best.score);
    if (args.rescored) args.rescored[row] = rescored;
  }

  int64_t rescore_blocks(double norm, const float* maxima, Best& best) const {
    // error(M) = c0 + c1 M + c2 M^2 bounds |coarse - exact| for codes of norm up to M:
    // float32 products, sums and norms, float64 rescoring, and flushed subnormals.
    const double d = static_cast<double>(args.d);
    const double coarse = (2.0 * d + 16.0) * 0x1p-24 * 1.05, fine = (d + 8.0) * 0x1p-51;
    const double tiny = 4.0 * d * 0x1p-126;
    const bool l2 = args.metric == Metric::l2;
    const V c0 =
        S::broadcast(static_cast<float>((l2 ? fine * norm * norm : 0.0) + tiny * (1.0 + norm)));
    const V c1 = S::broadcast(static_cast<float>((coarse + kRounding + 2.0 * fine) * norm + tiny));
    const V c2 = S::broadcast(static_cast<float>(l2 ? 0.5 * coarse + fine : 0.0));
    const auto error = [&](int64_t b) {
      const V m = S::load(block_norm() + b);
      return S::fmadd(m, S::fmadd(m, c2, c1), c0);
    };

    V lower = S::broadcast(-kInfinity);
    for (int64_t b = 0; b < plan.blocks; b += S::lanes) {
      // A block with an infinite norm has a NaN or -inf bound; max keeps its second operand then.
      lower = S::max(S::sub(S::load(maxima + b), error(b)), lower);
    }
    float bounds[S::lanes];
    S::store(bounds, lower);
    float threshold = bounds[0];
    for (const float bound : bounds) threshold = bound > threshold ? bound : threshold;

    const V limit = S::broadcast(threshold);
    int64_t rescored = 0;
    for (int64_t b = 0; b < plan.blocks; b += S::lanes) {
      unsigned hits = S::not_less(S::add(S::load(maxima + b), error(b)), limit);
      for (; hits; hits &= hits - 1) {
        const int64_t super = b / S::lanes * plan.super_codes;
        rescored +=
            offer_all(super + __builtin_ctz(hits), super + plan.super_codes, S::lanes, best);
      }
    }
    return rescored;
  }

  void run() const {
    if (member.index == 0) find_center();
    member.barrier();
    for (int64_t first = 0; first < args.n; first += plan.rows) {
      const int64_t rows = args.n - first < plan.rows ? args.n - first : plan.rows;
      prepare_rows(first, rows);
      member.barrier();
      score(rows);
      member.barrier();
      const auto share = member.share(rows);
      for (int64_t r = share.begin; r < share.end; ++r) rescore_row(first + r, r);
      member.barrier();
    }
  }
};

void run(const NearestCodeArgs& args, const NearestCodePlan& plan, const Team::Member& member) {
  switch (args.dtype) {
    case DType::float32:
      return Search<float>{args, plan, member}.run();
    case DType::float16:
      return Search<simd::Half>{args, plan, member}.run();
    case DType::bfloat16:
      return Search<simd::BFloat16>{args, plan, member}.run();
  }
}

constexpr NearestCodeKernels make_kernels() {
  return {kTileRows, kTileCodes, S::lanes, kTerms, run};
}

}  // namespace
}  // namespace titok
