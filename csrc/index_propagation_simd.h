// Index back-propagation of one instruction set. Everything here is local to the including file,
// so that code compiled for one set is never linked into the path of another.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "index_propagation.h"
#include "tile.h"

namespace titok {
namespace {

using S = simd::Native;
using V = S::V;
using simd::Double8;

using simd::add_product_to;
using simd::kPackedStep;
using simd::kTileRows;
using simd::kTileVectors;
using simd::load_tile;
using simd::multiply;
using simd::packed_word;
using simd::PackedRow;
using simd::product;
using simd::product_to;
using simd::store_tile;
constexpr int kPairs = kTileRows / 2;
constexpr int kTileCodes = simd::kTileColumns;
constexpr int64_t kChunk = kIndexPropagationChunk, kBlock = kIndexPropagationBlock;
constexpr int64_t kScoreRow = kChunk + 16;
constexpr int64_t kGradRows = 256;  // rows whose scores and columns stay in the first cache
// Whether a chunk's dE is summed as [d, codes]: a factor of tiles has its words next to each other,
// and those of dL/ds, over rows, are a row apart.
constexpr bool kTurned = simd::kWordGroup > 1;
constexpr int64_t kRowGroup = kTurned ? simd::kWordGroup * simd::Words::terms : kTileRows;
constexpr int64_t kRowBlock = 8 * kTileRows;  // rows that a member scores at a time
constexpr int64_t kCodeGroup = kTurned ? S::lanes : kTileRows;  // of a member's dE

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kLargestNorm = 1e18;
constexpr double kUnit = 0x1p-24;
// Of (s - max) / T: below, float32 and a sum of a million terms lose nothing.
constexpr double kSharpReach = 36.0;
constexpr float kSmallestWeight = 0x1p-40f;
// What float32 logits may cost the sharp softmax, relative, before it needs float64 ones.
constexpr double kSharpError = 2e-5;
constexpr double kFixedPoint = 0x1p40;  // sums of integers do not depend on their order

struct RowState {
  float max = -kInfinity;
  float norm = 0.0f;                   // rounded up; inf: float32 cannot score the row
  double sum = 0.0;                    // of exp(s - max)
  double sharp = 0.0, weighted = 0.0;  // of exp(x) and exp(x) x, x = (s - max) / T
  float log_sum = 0.0f, sharp_log_sum = 0.0f;
  double entropy = 0.0;
  double mean_code_weight = 0.0;     // sum q code_weight
  float mean_logit_gradient = 0.0f;  // g . mean_code
  float residual = 0.0f;       // of the straight-through dL/ds, which sum to 0 but for rounding
  int32_t support = 0;         // codes in it
  int32_t begin = 0, end = 0;  // those of the panel
  bool dense = false;          // more codes than the support holds
};
static_assert(sizeof(RowState) <= 96, "the plan's row_state");

template <class T>
struct Propagation {
  // bfloat16 inputs multiply as pairs where the CPU does; all others in float32.
  using Words = std::conditional_t<std::is_same_v<T, simd::BFloat16>, simd::Words, simd::Single>;
  static constexpr int kTerms = Words::terms;

  const IndexPropagationArgs& args;
  const IndexPropagationPlan& plan;
  const Team::Member& member;

  int64_t d() const { return args.d; }
  int64_t words() const { return round_up((args.d + kTerms - 1) / kTerms, simd::kWordGroup); }
  const T* z_row(int64_t row) const { return static_cast<const T*>(args.z) + row * args.z_stride; }
  const T* code(int64_t k) const {
    return static_cast<const T*>(args.codebook) + k * args.codebook_stride;
  }
  template <class U>
  U* at(std::size_t offset) const {
    return reinterpret_cast<U*>(static_cast<char*>(args.workspace) + offset);
  }
  RowState& state(int64_t row) const { return at<RowState>(plan.row_state)[row]; }
  float* statistics(int64_t row) const { return args.statistics + row * kStatistics; }
  float* rows_a() const { return at<float>(plan.rows_a); }
  float* pairs_a() const { return at<float>(plan.pairs_a); }
  float* rows_n() const { return at<float>(plan.rows_n); }
  float* columns_t() const { return at<float>(plan.columns_t); }
  float* columns_n() const { return at<float>(plan.columns_n); }
  float* accumulator() const { return at<float>(plan.accumulator); }
  float* table() const { return at<float>(plan.table); }
  float* block_norm() const { return at<float>(plan.block_norm); }
  int64_t* counts() const { return at<int64_t>(plan.counts); }
  double* z64() const { return at<double>(plan.z64 + member.index * plan.z64_bytes); }
  float* scores(int owner) const { return at<float>(plan.scores + owner * plan.score_bytes); }
  int32_t* chosen() const { return at<int32_t>(plan.chosen); }
  float* chosen_grad() const { return at<float>(plan.chosen_grad); }
  float* panel(int64_t c) const { return at<float>(plan.panel_grad) + c * plan.padded_depth; }
  double* logits(int owner) const { return at<double>(plan.logits + owner * plan.logit_bytes); }
  int32_t* candidates() const {
    return at<int32_t>(plan.candidates + member.index * plan.candidate_bytes);
  }

  // A column panel over D: out[word][c] = code c0 + c; zeros past the codebook.
  void pack_transposed(int64_t c0, float* out) const {
    V tile[S::lanes];
    for (int64_t c = 0; c < kTileCodes; c += S::lanes) {
      for (int64_t w = 0; w < words(); w += S::lanes) {
        for (int l = 0; l < S::lanes; ++l) {
          const int64_t k = c0 + c + l;
          const T* row = code(k < args.k ? k : 0);
          tile[l] = Words::words([&](int part) {
            const int64_t i = w * kTerms + part * S::lanes;
            return simd::load_row(row + i, k < args.k ? d() - i : 0);
          });
        }
        S::transpose(tile);
        const int64_t count = words() - w < S::lanes ? words() - w : S::lanes;
        for (int64_t j = 0; j < count; ++j) S::store(out + (w + j) * kTileCodes + c, tile[j]);
      }
    }
  }

  // Column panels over rows: word `to` of `steps` holds kTerms of `rows`, null for zeros.
  void pack_natural(const T* const (&rows)[kTerms], int64_t to, int64_t steps, float* out) const {
    for (int64_t i = 0; i < plan.padded_depth; i += S::lanes) {
      const auto part = [&](int t) {
        return rows[t] ? simd::load_row(rows[t] + i, d() - i) : S::broadcast(0.0f);
      };
      S::store(out + (i / kTileCodes * steps + to) * kTileCodes + i % kTileCodes,
               Words::zip(part(0), part(kTerms - 1)));
    }
  }

  // Codes [c0, c0 + kChunk), as columns over D (transposed) and, with `natural`, over the codes.
  void pack_chunk(int64_t c0, bool natural) const {
    const auto share = member.share(kChunk, kTileCodes);
    for (int64_t c = share.begin; c < share.end; c += kTileCodes) {
      pack_transposed(c0 + c, columns_t() + c * plan.words);
      if (!natural) continue;
      for (int64_t j = c; j < c + kTileCodes; j += kTerms) {
        const T* codes[kTerms];
        for (int t = 0; t < kTerms; ++t) {
          codes[t] = c0 + j + t < args.k ? code(c0 + j + t) : nullptr;
        }
        pack_natural(codes, j / kTerms, kChunk / kTerms, columns_n());
      }
    }
  }

  // Row r of a packed tile, zeros where it is null.
  template <class U>
  void pack_row(const U* row, int64_t r, float* tile) const {
    float buffer[S::lanes];
    for (int64_t w = 0; w < words(); w += S::lanes) {
      S::store(buffer, Words::words([&](int part) {
                 const int64_t i = w * kTerms + part * S::lanes;
                 return row ? simd::load_row(row + i, d() - i) : S::broadcast(0.0f);
               }));
      const int64_t count = words() - w < S::lanes ? words() - w : S::lanes;
      for (int64_t j = 0; j < count; ++j) tile[packed_word(r, w + j)] = buffer[j];
    }
  }

  // Replaces a row of kChunk values by their words.
  static void narrow(float* row) {
    if constexpr (kTerms == 1) return;
    for (int64_t w = 0; w < kChunk / kTerms; w += S::lanes) {
      S::store(row + w,
               Words::words([&](int part) { return S::load(row + w * kTerms + part * S::lanes); }));
    }
  }

  double norm(const T* row) const {
    Double8 sum = Double8::zero();
    for (int64_t i = 0; i < d(); i += 8) {
      const Double8 x = simd::widen8(row + i, d() - i);
      sum = sum + x * x;
    }
    return std::sqrt(simd::sum_pairs(sum));
  }

  // Rows first + [0, rows) as tiles of kTileRows, the last filled with zeros; norms to the state.
  void pack_rows(int64_t first, int64_t rows) const {
    const auto share = member.share(round_up(rows, kRowGroup), kRowGroup);
    for (int64_t r = share.begin; r < share.end; ++r) {
      const T* row = r < rows ? z_row(first + r) : nullptr;
      pack_row(row, r % kTileRows, rows_a() + r / kTileRows * kTileRows * plan.words);
    }
  }

  // Block maxima of norms, for the exact index and the choice of the sharp softmax's logits.
  void measure_codes() const {
    const auto share = member.share(plan.blocks);
    for (int64_t b = share.begin; b < share.end; ++b) {
      double largest = 0.0;
      for (int64_t k = b * kBlock; k < (b + 1) * kBlock && k < args.k; ++k) {
        const double length = norm(code(k));
        if (!(length <= largest)) largest = length <= kLargestNorm ? length : kInfinity;
      }
      block_norm()[b] = static_cast<float>(largest * 1.0001);
    }
  }

  // Whether float32 logits are good enough for the sharp softmax of every row.
  bool sharp_in_float(int64_t rows) const {
    float codes = 0.0f, z = 0.0f;
    for (int64_t b = 0; b < plan.blocks; ++b) codes = std::fmax(codes, block_norm()[b]);
    for (int64_t r = 0; r < rows; ++r) z = std::fmax(z, state(r).norm);
    return static_cast<double>(codes) * z * kUnit / args.temperature <= kSharpError;
  }

  // ---- forward ----

  void score_rows(int64_t begin, int64_t end, int64_t c0, float* out) const {
    for (int64_t c = 0; c < kChunk; c += kTileCodes) {
      for (int64_t r = begin; r < end; r += kTileRows) {
        product_to<Words, kTileVectors>(out + (r - begin) * kScoreRow + c, kScoreRow,
                                        rows_a() + r * plan.words, PackedRow(), kPackedStep,
                                        columns_t() + c * plan.words, words());
      }
    }
    for (int64_t c = args.k - c0; c < kChunk; ++c) {
      for (int64_t r = 0; r < end - begin; ++r) out[r * kScoreRow + c] = -kInfinity;
    }
  }

  // Turns a row of scores into exp(s - max), keeps its sums, and returns the factor that brings
  // what was summed before to the new maximum.
  float soften(RowState& row, float* s, float* maxima, bool sharp) const {
    float largest = row.max;
    for (int64_t b = 0; b < kChunk; b += kBlock) {
      V best = S::load(s + b);
      for (int64_t c = b + S::lanes; c < b + kBlock; c += S::lanes) {
        best = S::max(S::load(s + c), best);  // keeps its second operand for a NaN
      }
      const float block = S::largest(best);
      maxima[b / kBlock] = block;
      if (block > largest) largest = block;
    }
    const V max = S::broadcast(largest > -kInfinity ? largest : 0.0f),
            lowest = S::broadcast(-200.0f);
    const V inverse = S::broadcast(1.0f / args.temperature);
    V sum = S::broadcast(0.0f), sharp_sum = sum, weighted = sum;
    for (int64_t c = 0; c < kChunk; c += S::lanes) {
      const V x = S::sub(S::load(s + c), max);
      const V p = simd::exp(x);
      S::store(s + c, p);
      sum = S::add(sum, p);
      if (sharp) {
        const V y = S::max(lowest, S::mul(x, inverse));
        const V q = simd::exp(y);
        sharp_sum = S::add(sharp_sum, q);
        weighted = S::fmadd(q, y, weighted);
      }
    }
    float factor = 0.0f;
    if (row.max > -kInfinity) {
      const double step = static_cast<double>(row.max) - largest;
      factor = static_cast<float>(std::exp(step));
      const double sharp_step = step / args.temperature, sharp_factor = std::exp(sharp_step);
      row.sum *= std::exp(step);
      if (sharp_factor > 0.0) {
        row.weighted = sharp_factor * (row.weighted + row.sharp * sharp_step);
        row.sharp *= sharp_factor;
      } else {
        row.weighted = row.sharp = 0.0;
      }
    }
    row.max = largest;
    row.sum += S::sum(sum);
    row.sharp += S::sum(sharp_sum);
    row.weighted += S::sum(weighted);
    return factor;
  }

  // accumulator = accumulator * factor + P E for the rows [begin, end).
  void average_codes(int64_t begin, int64_t end, const float* p, const float* factors) const {
    for (int64_t i = 0; i < plan.padded_depth; i += kTileCodes) {
      for (int64_t r = begin; r < end; r += kTileRows) {
        simd::Tile acc;
        float* out = accumulator() + r * plan.padded_depth + i;
        load_tile(acc, out, plan.padded_depth);
        for (int j = 0; j < kTileRows; ++j) {
          const V factor = S::broadcast(factors[r - begin + j]);
          for (V& v : acc[j]) v = S::mul(v, factor);
        }
        multiply<Words>(acc, p + (r - begin) * kScoreRow, kScoreRow, 1,
                        columns_n() + i * (kChunk / kTerms), kChunk / kTerms);
        store_tile(acc, out, plan.padded_depth);
      }
    }
  }

  // Of the row in z64 and the codes [begin, end), in the order of nearest_code, so that indices
  // agree with it.
  void exact_logits(int64_t begin, int64_t end, double* out) const {
    for (int64_t k = begin; k < end; ++k) {
      Double8 sum = Double8::zero();
      for (int64_t i = 0; i < d(); i += 8) {
        sum = sum + Double8::load(z64() + i) * simd::widen8(code(k) + i, d() - i);
      }
      out[k - begin] = simd::sum_pairs(sum);
    }
  }

  // Returns whether the row has a NaN.
  bool load_z64(int64_t row) const {
    bool has_nan = false;
    for (int64_t i = 0; i < round_up(d(), 8); ++i) {
      z64()[i] = i < d() ? simd::widen(z_row(row)[i]) : 0.0;
      has_nan = has_nan || std::isnan(z64()[i]);
    }
    return has_nan;
  }

  // The exact index of a row and, unless float32 did it, its sharp softmax in float64.
  void finish_row(int64_t row, int64_t local, bool sharp_float) const {
    RowState& own = state(local);
    float* out = statistics(row);
    const bool has_nan = load_z64(row);
    const bool sharp = args.entropy && !sharp_float;
    double* values = logits(member.index);
    int32_t* codes = candidates();
    int64_t count = 0;
    const float* maxima = table() + local * plan.blocks;
    const double unit = (2.0 * d() + 16.0) * kUnit * 1.05;
    const double tiny = 4.0 * static_cast<double>(d()) * 0x1p-126;
    const auto error = [&](int64_t b) {
      const double m = block_norm()[b];
      return unit * own.norm * m + tiny * (1.0 + own.norm + m);
    };
    double threshold = -kInfinity;
    if (own.norm < kInfinity) {
      for (int64_t b = 0; b < plan.blocks; ++b) {
        const double lower = maxima[b] - error(b);
        if (lower > threshold) threshold = lower;
      }
      if (sharp) threshold -= kSharpReach * args.temperature;
    }
    for (int64_t b = 0; b < plan.blocks && !has_nan; ++b) {
      if (maxima[b] + error(b) < threshold) continue;  // a NaN excludes nothing
      const int64_t begin = b * kBlock, end = begin + kBlock < args.k ? begin + kBlock : args.k;
      exact_logits(begin, end, values + count);
      for (int64_t k = begin; k < end; ++k) codes[count++] = static_cast<int32_t>(k);
    }

    double best = kNaN;
    int64_t index = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] > best || (std::isnan(best) && !std::isnan(values[i]))) {
        best = values[i];
        index = codes[i];
      }
    }
    args.indices[row] = index;
    out[kLogitMax] = own.max;
    out[kLogSum] = own.log_sum = static_cast<float>(std::log(own.sum));
    out[kMaxProbability] = static_cast<float>(1.0 / own.sum);
    out[kSharpInFloat] = sharp_float ? 1.0f : 0.0f;
    out[kSharpMax] = own.max;
    out[kSharpMaxLow] = out[kSharpLogSum] = out[kEntropy] = 0.0f;
    if (!args.entropy) return;
    if (sharp_float) {
      out[kSharpLogSum] = own.sharp_log_sum = static_cast<float>(std::log(own.sharp));
      out[kEntropy] = static_cast<float>(std::log(own.sharp) - own.weighted / own.sharp);
    } else {
      sharpen(row, values, codes, count, has_nan ? kNaN : best);
    }
  }

  void sharpen(int64_t row, double* values, const int32_t* codes, int64_t count,
               double best) const {
    float* out = statistics(row);
    double sum = 0.0, weighted = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      const double x = (values[i] - best) / args.temperature;
      values[i] = x;
      if (x < -2 * kSharpReach) continue;
      const double q = std::exp(x);
      sum += q;
      weighted += q * x;
    }
    if (std::isnan(best)) sum = kNaN;
    out[kSharpMax] = static_cast<float>(best);
    out[kSharpMaxLow] = static_cast<float>(best - out[kSharpMax]);
    const double log_sum = std::log(sum);
    out[kSharpLogSum] = static_cast<float>(log_sum);
    out[kEntropy] = static_cast<float>(log_sum - weighted / sum);

    int32_t* support_codes = args.support_codes + row * args.support;
    double* support_weights = args.support_weights + row * args.support;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!(values[i] >= -2 * kSharpReach)) continue;
      const double q = std::exp(values[i]) / sum;
      if (std::isnan(q)) continue;  // another code of the row is
      __atomic_fetch_add(counts() + codes[i], static_cast<int64_t>(q * kFixedPoint + 0.5),
                         __ATOMIC_RELAXED);
      if (!(q >= kSmallestWeight)) continue;
      if (kept < args.support) {
        support_codes[kept] = codes[i];
        support_weights[kept] = values[i] - log_sum;
      }
      ++kept;
    }
    if (args.support == 0) return;
    if (kept > args.support || std::isnan(sum)) {
      support_codes[0] = -2;
    } else if (kept < args.support) {
      support_codes[kept] = -1;
    }
  }

  // code_probability += sum over the rows of q, from float32 logits; members own codes.
  void add_columns(int64_t rows) const {
    const auto share = member.share(round_up(args.k, kTileCodes), kTileCodes);
    float* columns = scores(member.index);
    const V inverse = S::broadcast(1.0f / args.temperature), lowest = S::broadcast(-200.0f);
    for (int64_t c = share.begin; c < share.end; c += kTileCodes) {
      pack_transposed(c, columns);
      double totals[kTileCodes] = {};
      for (int64_t begin = 0; begin < rows; begin += kGradRows) {
        V sums[kTileVectors];
        for (V& sum : sums) sum = S::broadcast(0.0f);
        const int64_t end = begin + kGradRows < rows ? begin + kGradRows : rows;
        for (int64_t r = begin / kTileRows * kTileRows; r < end; r += kTileRows) {
          simd::Tile acc;
          product<Words>(acc, rows_a() + r * plan.words, PackedRow(), kPackedStep, columns,
                         words());
          for (int j = 0; j < kTileRows; ++j) {
            if (r + j < begin || r + j >= end) continue;
            const V max = S::broadcast(state(r + j).max);
            const V log_sum = S::broadcast(state(r + j).sharp_log_sum);
            for (int v = 0; v < kTileVectors; ++v) {
              const V y = S::sub(S::mul(S::sub(acc[j][v], max), inverse), log_sum);
              sums[v] = S::add(sums[v], simd::exp(S::max(lowest, y)));
            }
          }
        }
        float part[kTileCodes];
        for (int v = 0; v < kTileVectors; ++v) S::store(part + v * S::lanes, sums[v]);
        for (int j = 0; j < kTileCodes; ++j) totals[j] += part[j];
      }
      for (int j = 0; j < kTileCodes && c + j < args.k; ++j) {
        args.code_probability[c + j] += totals[j] / static_cast<double>(args.n);
      }
    }
  }

  void forward() const {
    [[maybe_unused]] const simd::Registers registers;
    measure_codes();
    const bool means = args.mean_code != nullptr;
    const auto codes = member.share(args.k);
    for (int64_t k = codes.begin; k < codes.end; ++k) {
      counts()[k] = 0;
      args.code_probability[k] = 0.0;
    }
    for (int64_t first = 0; first < args.n; first += plan.rows) {
      const int64_t rows = args.n - first < plan.rows ? args.n - first : plan.rows;
      pack_rows(first, rows);
      const auto mine = member.share(round_up(rows, kRowGroup), kRowGroup);
      for (int64_t r = mine.begin; r < mine.end; ++r) {
        state(r) = RowState{};
        if (r < rows) {
          const double length = norm(z_row(first + r));
          state(r).norm = length <= kLargestNorm ? static_cast<float>(length * 1.0001) : kInfinity;
        }
        for (int64_t i = 0; means && i < plan.padded_depth; ++i) {
          accumulator()[r * plan.padded_depth + i] = 0.0f;
        }
      }
      member.barrier();
      const bool sharp_float = args.entropy && sharp_in_float(rows);

      float* s = scores(member.index);
      float factors[kRowBlock];
      for (int64_t c0 = 0; c0 < args.k; c0 += kChunk) {
        pack_chunk(c0, means);
        member.barrier();
        for (int64_t begin = mine.begin; begin < mine.end; begin += kRowBlock) {
          const int64_t end = begin + kRowBlock < mine.end ? begin + kRowBlock : mine.end;
          score_rows(begin, end, c0, s);
          for (int64_t r = begin; r < end; ++r) {
            factors[r - begin] = soften(state(r), s + (r - begin) * kScoreRow,
                                        table() + r * plan.blocks + c0 / kBlock, sharp_float);
            if (means) narrow(s + (r - begin) * kScoreRow);
          }
          if (means) average_codes(begin, end, s, factors);
        }
        member.barrier();
      }

      for (int64_t r = mine.begin; r < mine.end && r < rows; ++r) {
        finish_row(first + r, r, sharp_float);
        const double scale = 1.0 / state(r).sum;
        for (int64_t i = 0; means && i < d(); ++i) {
          args.mean_code[(first + r) * d() + i] =
              static_cast<float>(accumulator()[r * plan.padded_depth + i] * scale);
        }
      }
      member.barrier();
      if (sharp_float) add_columns(rows);
      // Pass by pass: the counts of 2^23 rows could overflow.
      for (int64_t k = codes.begin; args.entropy && !sharp_float && k < codes.end; ++k) {
        const double sparse = static_cast<double>(counts()[k]) / kFixedPoint;
        args.code_probability[k] += sparse / static_cast<double>(args.n);
        counts()[k] = 0;
      }
      member.barrier();
    }
    if (!args.entropy) return;
    bool has_nan = false;
    for (int64_t r = 0; r < args.n; ++r) has_nan = has_nan || std::isnan(statistics(r)[kEntropy]);
    for (int64_t k = codes.begin; has_nan && k < codes.end; ++k) args.code_probability[k] = kNaN;
  }

  // ---- backward ----

  // Rows of one pass, whose sharp softmax comes from float32 logits or from the support.
  struct Group {
    int64_t first, rows;
    bool sharp;
  };
  Group group(int64_t first) const {
    return {first, args.n - first < plan.rows ? args.n - first : plan.rows,
            args.entropy && statistics(first)[kSharpInFloat] != 0.0f};
  }

  const int32_t* support_codes(int64_t row) const {
    return args.support_codes + row * args.support;
  }
  const double* support_weights(int64_t row) const {
    return args.support_weights + row * args.support;
  }

  template <class U>
  void add_scaled(float factor, const U* from, float* to) const {
    for (int64_t i = 0; i < d(); ++i) to[i] += factor * simd::widen(from[i]);
  }

  float entropy_gradient(const RowState& row, int64_t k, double log_q) const {
    const double unit =
        std::exp(log_q) / (static_cast<double>(args.temperature) * static_cast<double>(args.n));
    return static_cast<float>(unit * (args.code_weight[k] - row.mean_code_weight -
                                      args.sample_weight * (log_q + row.entropy)));
  }

  // Of the codes [begin, end), in float64.
  void exact_log_q(int64_t r, int64_t begin, int64_t end, double* out) const {
    const float* kept = statistics(r);
    const double max = static_cast<double>(kept[kSharpMax]) + kept[kSharpMaxLow];
    load_z64(r);
    exact_logits(begin, end, out);
    for (int64_t i = 0; i < end - begin; ++i) {
      out[i] = (out[i] - max) / args.temperature - kept[kSharpLogSum];
    }
  }

  void load_rows() const {
    const auto mine = member.share(round_up(args.n, kRowGroup), kRowGroup);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      RowState& row = state(r) = RowState{};
      float* grad_row = accumulator() + r * plan.padded_depth;
      for (int64_t i = 0; i < plan.padded_depth; ++i) grad_row[i] = 0.0f;
      row.max = kInfinity;  // of a row past the end: every weight is 0
      if (r >= args.n) continue;
      const float* kept = statistics(r);
      row.max = kept[kLogitMax];
      row.log_sum = kept[kLogSum];
      row.sharp_log_sum = kept[kSharpLogSum];
      row.entropy = kept[kEntropy];
      const float* g = args.grad + r * d();
      double dot = 0.0;
      for (int64_t i = 0; i < d(); ++i) {
        dot += static_cast<double>(g[i]) * args.mean_code[r * d() + i];
      }
      row.mean_logit_gradient = static_cast<float>(dot);
      if (args.entropy && kept[kSharpInFloat] == 0.0f) load_support(r);
    }
  }

  // What the entropy terms need of a row whose sharp softmax lives on a few codes.
  void load_support(int64_t r) const {
    RowState& row = state(r);
    const int32_t* codes = support_codes(r);
    const double* weights = support_weights(r);
    row.dense = codes[0] == -2;
    if (row.dense) return load_dense(r);
    double mean = 0.0, total = 0.0;
    row.entropy = 0.0;
    for (; row.support < args.support && codes[row.support] >= 0; ++row.support) {
      const double log_q = weights[row.support], q = std::exp(log_q);
      total += q;
      row.entropy -= q * log_q;
      mean += q * args.code_weight[codes[row.support]];
    }
    row.mean_code_weight = mean / total;
  }

  // The same, and the terms of dz, where q has more codes than the support holds: in float64.
  void load_dense(int64_t r) const {
    RowState& row = state(r);
    double* log_q = logits(member.index);
    exact_log_q(r, 0, args.k, log_q);
    for (int64_t k = 0; k < args.k; ++k) {
      if (log_q[k] < -kSharpReach) continue;
      row.mean_code_weight += std::exp(log_q[k]) * args.code_weight[k];
    }
    for (int64_t k = 0; k < args.k; ++k) {
      if (log_q[k] < -kSharpReach) continue;
      add_scaled(entropy_gradient(row, k, log_q[k]), code(k),
                 accumulator() + r * plan.padded_depth);
    }
  }

  // Of the codes that a row chose: their dE is held in float32 until the residuals are known.
  void number_chosen() const {
    for (int64_t k = 0; k < args.k; ++k) chosen()[k] = -1;
    int32_t count = 0;
    for (int64_t r = 0; r < args.n; ++r) {
      int32_t& number = chosen()[args.indices[r]];
      if (number < 0) number = count++;
    }
  }

  // The value path.
  void start_chosen() const {
    const auto codes = member.share(args.k);
    for (int64_t k = codes.begin; k < codes.end; ++k) {
      if (chosen()[k] >= 0) std::memset(chosen_grad() + chosen()[k] * d(), 0, d() * sizeof(float));
    }
    for (int64_t r = 0; r < args.n; ++r) {
      const int64_t k = args.indices[r];
      if (k < codes.begin || k >= codes.end) continue;
      add_scaled(1.0f, args.grad + r * d(), chosen_grad() + chosen()[k] * d());
    }
  }

  void pack_group(const Group& group) const {
    const auto mine = member.share(round_up(group.rows, kRowGroup), kRowGroup);
    const auto z_or_null = [&](int64_t r) {
      return r < group.rows ? z_row(group.first + r) : nullptr;
    };
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      float* tile = pairs_a() + r / kPairs * kTileRows * plan.words;
      const float* grad = args.grad + (group.first + r) * d();
      pack_row(z_or_null(r), r % kPairs, tile);
      pack_row(r < group.rows ? grad : nullptr, kPairs + r % kPairs, tile);
      if (kTurned || r % kTerms != 0) continue;
      const T* together[kTerms];
      for (int t = 0; t < kTerms; ++t) together[t] = z_or_null(r + t);
      pack_natural(together, r / kTerms, plan.rows / kTerms, rows_n());
    }
    if (!kTurned) return;
    for (int64_t r = mine.begin; r < mine.end; r += kRowGroup) {
      for (int64_t i = 0; i < plan.padded_depth; i += S::lanes) {
        V words[S::lanes];
        for (int64_t w = 0; w < S::lanes; ++w) {
          const auto part = [&](int64_t t) {
            const T* row = z_or_null(r + w * kTerms + t);
            return row ? simd::load_row(row + i, d() - i) : S::broadcast(0.0f);
          };
          words[w] = Words::zip(part(0), part(kTerms - 1));
        }
        S::transpose(words);
        float* tile = rows_n() + (i * plan.rows + r * S::lanes) / kTerms;
        for (int64_t j = 0; j < S::lanes; ++j) S::store(tile + j * S::lanes, words[j]);
      }
    }
  }

  V sharp_exponent(V s, const RowState& row) const {
    const V x = S::sub(s, S::broadcast(row.max));
    const V y =
        S::sub(S::mul(x, S::broadcast(1.0f / args.temperature)), S::broadcast(row.sharp_log_sum));
    // A column past the last code can reach far above 0, and has no weight if it is finite.
    return S::max(S::broadcast(-200.0f), S::min(S::broadcast(1.0f), y));
  }

  V code_weights(int64_t k) const { return S::load(at<float>(plan.code_weights) + k); }

  // sum_k q_k code_weight_k of each row, from float32 logits.
  void average_code_weights(const Group& group) const {
    pack_rows(group.first, group.rows);
    const auto mine = member.share(round_up(group.rows, kRowGroup), kRowGroup);
    for (int64_t c0 = 0; c0 < args.k; c0 += kChunk) {
      pack_chunk(c0, false);
      member.barrier();
      for (int64_t r = mine.begin; r < mine.end; r += kTileRows) {
        double totals[kTileRows] = {};
        for (int64_t c = 0; c < kChunk && c0 + c < args.k; c += kTileCodes) {
          simd::Tile acc;
          product<Words>(acc, rows_a() + r * plan.words, PackedRow(), kPackedStep,
                         columns_t() + c * plan.words, words());
          for (int j = 0; j < kTileRows; ++j) {
            V sum = S::broadcast(0.0f);
            for (int v = 0; v < kTileVectors; ++v) {
              const V q = simd::exp(sharp_exponent(acc[j][v], state(group.first + r + j)));
              sum = S::fmadd(q, code_weights(c0 + c + v * S::lanes), sum);
            }
            totals[j] += S::sum(sum);
          }
        }
        for (int j = 0; j < kTileRows; ++j) {
          state(group.first + r + j).mean_code_weight += totals[j];
        }
      }
      member.barrier();
    }
  }

  // dL/ds of kPairs rows and kTileCodes codes: S and g E^T from one tile.
  void logit_gradients(const Group& group, int64_t r, int64_t c0, int64_t c, float* out) const {
    simd::Tile acc;
    product<Words>(acc, pairs_a() + 2 * r * plan.words, PackedRow(), kPackedStep,
                   columns_t() + c * plan.words, words());
    const float weight = 1.0f / (args.temperature * static_cast<float>(args.n));
    const int64_t left = args.k - c0 - c;
    for (int j = 0; j < kPairs; ++j) {
      RowState& row = state(group.first + r + j);
      const V max = S::broadcast(row.max), log_sum = S::broadcast(row.log_sum);
      const V mean = S::broadcast(row.mean_logit_gradient);
      for (int v = 0; v < kTileVectors; ++v) {
        const V s = acc[j][v];
        const V p = simd::exp(S::sub(S::sub(s, max), log_sum));
        V ds = S::mul(p, S::sub(acc[kPairs + j][v], mean));
        if (left >= kTileCodes) {
          row.residual += S::sum(ds);
        } else {
          float part[S::lanes];
          S::store(part, ds);
          for (int l = 0; l < S::lanes && v * S::lanes + l < left; ++l) row.residual += part[l];
        }
        if (group.sharp) {
          const V log_q = sharp_exponent(s, row);
          const V spread = S::mul(S::add(log_q, S::broadcast(static_cast<float>(row.entropy))),
                                  S::broadcast(static_cast<float>(-args.sample_weight) * weight));
          const V pull = S::sub(code_weights(c0 + c + v * S::lanes),
                                S::broadcast(static_cast<float>(row.mean_code_weight)));
          ds = S::fmadd(simd::exp(log_q), S::fmadd(pull, S::broadcast(weight), spread), ds);
        }
        S::store(out + j * kScoreRow + v * S::lanes, ds);
      }
    }
  }

  // Rows of dL/ds as words over the codes, in their first half, and of two rows each, in the rest:
  // the first codes behind the even row, the others behind the odd one.
  static void narrow_pairs(int64_t begin, int64_t end, float* s) {
    constexpr int64_t kHalf = kChunk / 2;
    float zipped[kChunk];
    for (int64_t r = begin; r < end; r += 2) {
      float *even = s + r * kScoreRow, *odd = even + kScoreRow;
      for (int64_t c = 0; c < kChunk; c += S::lanes) {
        S::store(zipped + c, Words::zip(S::load(even + c), S::load(odd + c)));
      }
      narrow(even);
      narrow(odd);
      std::memcpy(even + kHalf, zipped, kHalf * sizeof(float));
      std::memcpy(odd + kHalf, zipped + kHalf, kHalf * sizeof(float));
    }
  }

  // Where dL/ds of code c begins, as words of kTerms rows from r on, kTerms * kScoreRow apart.
  static const float* over_rows(const float* s, int64_t r, int64_t c) {
    if (kTerms == 1) return s + r * kScoreRow + c;
    return c < kChunk / 2 ? s + r * kScoreRow + kChunk / 2 + c : s + (r + 1) * kScoreRow + c;
  }

  // Adds to the dz of a group's rows and to `sums`, dE of the chunk's codes.
  void backward_chunk(const Group& group, int64_t c0, float* sums) const {
    const auto mine = member.share(round_up(group.rows, kRowGroup), kRowGroup);
    const int64_t columns = args.k - c0 < kChunk ? args.k - c0 : kChunk;
    float* s = scores(0);
    for (int64_t begin = mine.begin; begin < mine.end; begin += kRowBlock) {
      const int64_t end = begin + kRowBlock < mine.end ? begin + kRowBlock : mine.end;
      for (int64_t c = 0; c < kChunk; c += kTileCodes) {
        for (int64_t r = begin; r < end; r += kPairs) {
          logit_gradients(group, r, c0, c, s + r * kScoreRow + c);
        }
      }
      for (int64_t r = begin; r < end; ++r) {  // codes past the end take no part
        for (int64_t c = columns; c < kChunk; ++c) s[r * kScoreRow + c] = 0.0f;
      }
      if constexpr (kTerms == 2) narrow_pairs(begin, end, s);
      for (int64_t i = 0; i < plan.padded_depth; i += kTileCodes) {
        for (int64_t r = begin; r < end; r += kTileRows) {
          add_product_to<Words, kTileVectors>(
              accumulator() + (group.first + r) * plan.padded_depth + i, plan.padded_depth,
              s + r * kScoreRow, kScoreRow, 1, columns_n() + i * (kChunk / kTerms),
              kChunk / kTerms);
        }
      }
    }
    member.barrier();

    const auto codes = member.share(kChunk, kCodeGroup);
    for (int64_t r = 0; r < group.rows; r += kGradRows) {
      const int64_t left = group.rows - r < kGradRows ? group.rows - r : kGradRows;
      const int64_t steps = round_up((left + kTerms - 1) / kTerms, simd::kWordGroup);
      const bool first = group.first + r == 0;
#if defined(__AMX_BF16__)
      constexpr int64_t kHalf = kChunk / 2;  // over_rows() keeps each in a place of its own
      for (int64_t c = codes.begin; c < codes.end;) {
        const int64_t last = c < kHalf && codes.end > kHalf ? kHalf : codes.end;
        const int64_t columns = last - c < kTileCodes ? last - c : kTileCodes;
        simd::with_vectors(columns, [&](auto vectors) {
          using Sums = amx::Sums<vectors>;
          for (int64_t i = 0; i < plan.padded_depth; i += kTileRows) {
            float* out = sums + i * kChunk + c;
            if (first) {
              Sums::clear();
            } else {
              Sums::load(out, 4 * kChunk);
            }
            Sums::multiply(rows_n() + (i * plan.rows + r * kTileRows) / kTerms, PackedRow(),
                           kPackedStep * simd::kWordGroup, over_rows(s, r, c), kTerms * kScoreRow,
                           steps);
            Sums::store(out, 4 * kChunk);
          }
        });
        c += columns;
      }
#else
      for (int64_t i = 0; i < plan.padded_depth; i += kTileCodes) {
        const float* panel = rows_n() + (i * plan.rows + r * kTileCodes) / kTerms;
        for (int64_t c = codes.begin; c < codes.end; c += kTileRows) {
          float* out = sums + c * plan.padded_depth + i;
          const float* ds = over_rows(s, r, c);
          if (first) {
            product_to<Words, kTileVectors>(out, plan.padded_depth, ds, PackedRow(),
                                            kTerms * kScoreRow, panel, steps);
          } else {
            add_product_to<Words, kTileVectors>(out, plan.padded_depth, ds, PackedRow(),
                                                kTerms * kScoreRow, panel, steps);
          }
        }
      }
#endif
    }
  }

  // A member's share of a chunk's dE, its first code and up, as [codes, d].
  float* finished(float* sums, const Team::Member::Range& codes) const {
    if (!kTurned) return sums + codes.begin * plan.padded_depth;
    auto* out = at<float>(plan.finished_grad);
    for (int64_t c = codes.begin; c < codes.end; c += S::lanes) {
      for (int64_t i = 0; i < plan.padded_depth; i += S::lanes) {
        V block[S::lanes];
        for (int64_t j = 0; j < S::lanes; ++j) block[j] = S::load(sums + (i + j) * kChunk + c);
        S::transpose(block);
        for (int64_t j = 0; j < S::lanes; ++j) {
          S::store(out + (c + j) * plan.padded_depth + i, block[j]);
        }
      }
    }
    return out + codes.begin * plan.padded_depth;
  }

  // Row `row` of an output, rounded once.
  void store_row(const float* from, void* out, int64_t row) const {
    T* to = static_cast<T*>(out) + row * d();
    for (int64_t i = 0; i < d(); ++i) to[i] = simd::rounded<T>(from[i]);
  }

  // Moves the rows' support on to the panel that ends before code `end`.
  void find_support(const Group& group, int64_t end) const {
    const auto mine = member.share(group.rows);
    for (int64_t r = group.first + mine.begin; r < group.first + mine.end; ++r) {
      RowState& row = state(r);
      row.begin = row.end;
      while (row.end < row.support && support_codes(r)[row.end] < end) ++row.end;
    }
  }

  // Adds the entropy terms to `sums`, dE of the codes [begin, end), and stores it.
  void finish_codes(int64_t begin, int64_t end, float* sums) const {
    for (int64_t r = 0; r < args.n; ++r) {
      const RowState& row = state(r);
      const auto add = [&](int64_t k, double log_q) {
        add_scaled(entropy_gradient(row, k, log_q), z_row(r),
                   sums + (k - begin) * plan.padded_depth);
      };
      for (int32_t i = row.begin; i < row.end; ++i) {
        const int64_t k = support_codes(r)[i];
        if (k >= begin && k < end) add(k, support_weights(r)[i]);
      }
      if (!row.dense) continue;
      double log_q[kChunk];
      exact_log_q(r, begin, end, log_q);
      for (int64_t k = begin; k < end; ++k) {
        if (!(log_q[k - begin] < -kSharpReach)) add(k, log_q[k - begin]);
      }
    }
    for (int64_t k = begin; k < end; ++k, sums += plan.padded_depth) {
      const int32_t number = chosen()[k];
      if (number < 0) {
        store_row(sums, args.grad_codebook, k);
      } else {
        add_scaled(1.0f, sums, chosen_grad() + number * d());
      }
    }
  }

  // The entropy terms of dz, and the rounding of g.e_k - g.m taken back: when one code has nearly
  // all of p that difference is small against its terms, and the other codes give it more exactly.
  void finish() const {
    const auto codes = member.share(args.k), mine = member.share(args.n);
    for (int64_t r = 0; r < args.n; ++r) {
      const int64_t k = args.indices[r];
      if (k < codes.begin || k >= codes.end) continue;
      float* out = chosen_grad() + chosen()[k] * d();
      add_scaled(-state(r).residual * statistics(r)[kMaxProbability], z_row(r), out);
    }
    for (int64_t k = codes.begin; k < codes.end; ++k) {
      const int32_t number = chosen()[k];
      if (number >= 0) store_row(chosen_grad() + number * d(), args.grad_codebook, k);
    }
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      float* out = accumulator() + r * plan.padded_depth;
      const RowState& row = state(r);
      add_scaled(-row.residual, args.mean_code + r * d(), out);
      for (int32_t i = 0; i < row.support; ++i) {
        const int32_t k = support_codes(r)[i];
        add_scaled(entropy_gradient(row, k, support_weights(r)[i]), code(k), out);
      }
      store_row(out, args.grad_z, r);
    }
  }

  void backward() const {
    [[maybe_unused]] const simd::Registers registers;
    const auto weights = member.share(round_up(args.k, kChunk));
    for (int64_t k = weights.begin; k < weights.end; ++k) {
      at<float>(plan.code_weights)[k] = k < args.k ? static_cast<float>(args.code_weight[k]) : 0.0f;
    }
    load_rows();
    if (member.index == 0) number_chosen();
    member.barrier();
    start_chosen();
    for (int64_t first = 0; first < args.n; first += plan.rows) {
      if (group(first).sharp) average_code_weights(group(first));
    }
    const bool one_group = args.n <= plan.rows;
    if (one_group) pack_group(group(0));
    for (int64_t begin = 0; begin < args.k; begin += plan.panel) {
      const int64_t end = begin + plan.panel < args.k ? begin + plan.panel : args.k;
      for (int64_t first = 0; first < args.n; first += plan.rows) {
        const Group current = group(first);
        if (!one_group) {
          member.barrier();
          pack_group(current);
        }
        for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
          pack_chunk(c0, true);
          member.barrier();
          if (c0 == begin) find_support(current, end);
          backward_chunk(current, c0, panel(c0 - begin));
        }
      }
      const auto codes = member.share(kChunk, kCodeGroup);
      for (int64_t c0 = begin; c0 < end; c0 += kChunk) {
        const int64_t last = c0 + codes.end < end ? c0 + codes.end : end;
        finish_codes(c0 + codes.begin, last, finished(panel(c0 - begin), codes));
      }
    }
    member.barrier();
    finish();
  }
};

template <class Fn>
void with_dtype(const IndexPropagationArgs& args, const IndexPropagationPlan& plan,
                const Team::Member& member, const Fn& fn) {
#if defined(__AMX_BF16__)
  fn(Propagation<simd::BFloat16>{args, plan, member});
#else
  simd::with_type(args.dtype, [&](auto x) { fn(Propagation<decltype(x)>{args, plan, member}); });
#endif
}

void forward(const IndexPropagationArgs& args, const IndexPropagationPlan& plan,
             const Team::Member& member) {
  with_dtype(args, plan, member, [](const auto& propagation) { propagation.forward(); });
}

void backward(const IndexPropagationArgs& args, const IndexPropagationPlan& plan,
              const Team::Member& member) {
  with_dtype(args, plan, member, [](const auto& propagation) { propagation.backward(); });
}

constexpr IndexPropagationKernels make_kernels() {
  return {kRowGroup, kRowBlock, simd::kWordGroup, kTileCodes, kTurned, forward, backward};
}

}  // namespace
}  // namespace titok
