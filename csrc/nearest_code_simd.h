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

  // l2 distances do not change when both sides move; near zero, float32 keeps more of them.
  void find_center() const {
    float* out = center();
    for (int64_t i = 0; i < plan.depth; ++i) out[i] = 0.0f;
    if (args.metric != Metric::l2) return;
    const int64_t count = args.k < 64 ? args.k : 64;
    for (int64_t i = 0; i < args.d; ++i) {
      double sum = 0.0;
      for (int64_t j = 0; j < count; ++j) sum += simd::widen(code(args.k * j / count)[i]);
      const double mean = sum / static_cast<double>(count);
      out[i] = std::fabs(mean) < kLargestNorm ? static_cast<float>(mean) : 0.0f;
    }
  }

  // Rows as [tile][d][row of the tile], so that a tile reads one stream.
  void prepare_rows(int64_t first, int64_t rows) const {
    const float* c = center();
    const auto share = member.share(rows, kTileRows);
    const int64_t end = (share.end + kTileRows - 1) / kTileRows * kTileRows;
    for (int64_t r = share.begin; r < end; ++r) {
      float* out = z() + r / kTileRows * kTileRows * plan.depth + r % kTileRows;
      double sum = 0.0;
      if (r < share.end) {
        const T* row = z_row(first + r);
        for (int64_t i = 0; i < args.d; ++i) {
          const float value = simd::widen(row[i]) - c[i];
          out[i * kTileRows] = value;
          sum += static_cast<double>(value) * value;
        }
      }
      const double norm = std::sqrt(sum);
      const bool coarse = r < share.end && norm <= kLargestNorm;
      z_norm()[r] = coarse ? static_cast<float>(norm * norm_margin()) : kInfinity;
      if (!coarse) {
        for (int64_t i = 0; i < args.d; ++i) out[i * kTileRows] = 0.0f;
      }
    }
  }

  // Codes [first, first + kTileCodes) as [bias][d][code]; a code that float32 cannot hold safely
  // gets bias -inf and norm inf, which keeps its block out of the bounds and always rescored.
  void pack(int64_t first, bool first_of_block, float* norms) const {
    const float* c = center();
    float* bias = panel();
    float* out = bias + kTileCodes;
    const T* rows[kTileCodes];
    for (int j = 0; j < kTileCodes; ++j)
      rows[j] = code(first + j < args.k ? first + j : args.k - 1);

    float squares[kTileCodes] = {};
    for (int64_t i = 0; i < args.d; ++i, out += kTileCodes) {
      for (int j = 0; j < kTileCodes; ++j) out[j] = simd::widen(rows[j][i]) - c[i];
      for (int j = 0; j < kTileCodes; j += S::lanes) {
        const V e = S::load(out + j);
        S::store(squares + j, S::fmadd(e, e, S::load(squares + j)));
      }
    }

    out = bias + kTileCodes;
    const bool cosine = args.metric == Metric::cosine;
    float scales[kTileCodes];
    for (int j = 0; j < kTileCodes; j += S::lanes) {
      V square = S::load(squares + j);
      // Common case: every norm of the vector is neither tiny nor huge, and every code exists.
      if (S::all_between(square, kSmallSquare, kLargestSquare) && first + j + S::lanes <= args.k) {
        S::store(bias + j, args.metric == Metric::l2 ? S::mul(square, S::broadcast(-0.5f))
                                                     : S::broadcast(0.0f));
        if (cosine) {
          S::store(scales + j, S::div(S::broadcast(1.0f), S::sqrt(square)));
          square = S::broadcast(1.0f);
        }
      } else {
        for (int l = j; l < j + S::lanes; ++l) pack_edge(first, l, out, bias, scales, squares);
        square = S::load(squares + j);
      }
      S::store(norms, first_of_block && j == 0 ? square : S::max(square, S::load(norms)));
    }
    if (!cosine) return;
    for (int64_t i = 0; i < args.d; ++i, out += kTileCodes) {
      for (int j = 0; j < kTileCodes; ++j) out[j] *= scales[j];
    }
  }

  // Code j of a packed tile, when it is past the end, huge, not finite, or so small that float32
  // may have lost terms of its norm. Leaves the square of the scaled norm in `squares`.
  void pack_edge(int64_t first, int j, float* out, float* bias, float* scales,
                 float* squares) const {
    double square = 0.0;
    for (int64_t i = 0; i < args.d; ++i) {
      square += static_cast<double>(out[i * kTileCodes + j]) * out[i * kTileCodes + j];
    }
    const bool coarse = square <= kLargestSquare;
    bias[j] = args.metric == Metric::l2 ? static_cast<float>(-0.5 * square) : 0.0f;
    scales[j] = 1.0f;
    if (args.metric == Metric::cosine) {
      const double norm = std::sqrt(square);
      scales[j] = static_cast<float>(1.0 / (norm > kNormFloor ? norm : kNormFloor));
      square *= static_cast<double>(scales[j]) * scales[j];
    }
    squares[j] = coarse ? static_cast<float>(square * kSquareMargin) : kInfinity;
    if (!coarse) {
      for (int64_t i = 0; i < args.d; ++i) out[i * kTileCodes + j] = 0.0f;
    }
    if (!coarse || first + j >= args.k) bias[j] = -kInfinity;
    if (first + j >= args.k) squares[j] = 0.0f;
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
    for (int64_t i = 0; i < args.d; ++i) {
      V codes[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) codes[v] = S::load(e + i * kTileCodes + v * S::lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const V value = S::broadcast(rows[i * kTileRows + r]);
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = S::fmadd(value, codes[v], acc[r][v]);
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
    float* unused = panel() + (args.d + 1) * kTileCodes;  // norms that another member stores
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

  // Sums of eight interleaved parts, then pairs: the order that every backend follows.
  static double reduce(const Double8& s) {
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }

  static Double8 widen8(const T* p, int64_t count) {
    Double8 out;
    if (count >= 8) {
      for (int i = 0; i < 8; ++i) out[i] = simd::widen(p[i]);
    } else {
      for (int i = 0; i < 8; ++i) out[i] = i < count ? simd::widen(p[i]) : 0.0f;
    }
    return out;
  }

  // Larger is nearer: minus the squared distance, the cosine or the logit.
  double exact_score(int64_t k) const {
    const double* zr = z64();
    const T* e = code(k);
    Double8 sum{}, square{};
    for (int64_t i = 0; i < plan.depth; i += 8) {
      const Double8 b = widen8(e + i, args.d - i);
      Double8 a;
      std::memcpy(&a, zr + i, sizeof a);
      if (args.metric == Metric::l2) {
        const Double8 difference = a - b;
        sum += difference * difference;
      } else {
        sum += a * b;
        if (args.metric == Metric::cosine) square += b * b;
      }
    }
    if (args.metric == Metric::l2) return -reduce(sum);
    if (args.metric == Metric::dot) return reduce(sum);
    const double norm = std::sqrt(reduce(square));
    return reduce(sum) / (norm < kNormFloor ? kNormFloor : norm);
  }

  double norm64(const T* row) const {
    Double8 sum{};
    for (int64_t i = 0; i < plan.depth; i += 8) {
      const Double8 x = widen8(row + i, args.d - i);
      sum += x * x;
    }
    const double norm = std::sqrt(reduce(sum));
    return norm < kNormFloor ? kNormFloor : norm;
  }

  float distance(int64_t row, int64_t k, double score) const {
    if (args.metric == Metric::l2) return static_cast<float>(-score);
    if (args.metric == Metric::dot) return static_cast<float>(score);
    const T* a = z_row(row);
    const T* b = code(k);
    const double a_norm = norm64(a), b_norm = norm64(b);
    Double8 sum{};
    for (int64_t i = 0; i < plan.depth; i += 8) {
      const Double8 difference =
          widen8(a + i, args.d - i) / a_norm - widen8(b + i, args.d - i) / b_norm;
      sum += difference * difference;
    }
    return static_cast<float>(reduce(sum));
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

  void rescore_row(int64_t row, int64_t table_row) const {
    double* zr = z64();
    bool has_nan = false;
    for (int64_t i = 0; i < plan.depth; ++i) {
      zr[i] = i < args.d ? simd::widen(z_row(row)[i]) : 0.0;
      has_nan = has_nan || std::isnan(zr[i]);
    }
    if (has_nan) {
      args.indices[row] = 0;
      args.distances[row] = std::numeric_limits<float>::quiet_NaN();
      return;
    }

    Best best;
    const float norm = z_norm()[table_row];
    if (norm == kInfinity) {
      for (int64_t k = 0; k < args.k; ++k) best.offer(exact_score(k), k);
    } else {
      rescore_blocks(norm, table() + table_row * plan.blocks, best);
    }
    args.indices[row] = best.index;
    args.distances[row] = distance(row, best.index, best.score);
  }

  void rescore_blocks(double norm, const float* maxima, Best& best) const {
    // error(M) = c0 + c1 M + c2 M^2 bounds |coarse - exact| for codes of norm up to M:
    // float32 products, sums and norms, float64 rescoring, and flushed subnormals.
    const double d = static_cast<double>(args.d);
    const double coarse = (2.0 * d + 16.0) * 0x1p-24 * 1.05, fine = (d + 8.0) * 0x1p-51;
    const double tiny = 4.0 * d * 0x1p-126;
    const bool l2 = args.metric == Metric::l2;
    const V c0 =
        S::broadcast(static_cast<float>((l2 ? fine * norm * norm : 0.0) + tiny * (1.0 + norm)));
    const V c1 = S::broadcast(static_cast<float>((coarse + 2.0 * fine) * norm + tiny));
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
    for (int64_t b = 0; b < plan.blocks; b += S::lanes) {
      unsigned hits = S::not_less(S::add(S::load(maxima + b), error(b)), limit);
      for (; hits; hits &= hits - 1) {
        const int64_t lane = __builtin_ctz(hits);
        const int64_t first = b / S::lanes * plan.super_codes + lane;
        for (int64_t v = 0; v < plan.block_vectors; ++v) {
          const int64_t k = first + v * S::lanes;
          if (k >= args.k) break;
          best.offer(exact_score(k), k);
        }
      }
    }
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

constexpr NearestCodeKernels make_kernels() { return {kTileRows, kTileCodes, S::lanes, run}; }

}  // namespace
}  // namespace titok
