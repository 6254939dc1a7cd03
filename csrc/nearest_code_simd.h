// The nearest-code search of one instruction set. Everything here is local to the including file,
// so that code compiled for one set is never linked into the path of another.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "nearest_code.h"
#include "tile.h"

namespace titok {
namespace {

using S = simd::Native;
using V = S::V;
using simd::Double8;
using simd::sum_pairs;
using simd::widen8;

constexpr int kTerms = simd::Words::terms;
using simd::kTileRows;
using simd::kTileVectors;
constexpr int kTileCodes = simd::kTileColumns;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Norms up to this keep every coarse product and sum inside float32.
constexpr double kLargestNorm = 1e18;
constexpr double kNormFloor = 1e-12;
constexpr double kLargestSquare = 1e36;
constexpr double kSmallSquare = 1e-24;
constexpr double kSquareMargin = 1.0001;
constexpr double kTinySquare = 1e-37;  // what float32 may flush of a smaller one
// bfloat16 moves each factor by at most 2^-8 of itself.
constexpr double kRounding = kTerms == 2 ? 0x1.01p-8 : 0.0;
constexpr float kSmallestPeak = 1e-30f;      // of values that are worth a scale in bytes
constexpr int64_t kMostByteTerms = 1 << 16;  // keeps the sums of products inside int32
// A second coarse pass costs as much as rescoring one in so many codes.
constexpr int64_t kCoarsePass = 8;

// What the coarse pass multiplies: the set's own words of float32 or pairs of bfloat16 ...
template <class Words>
struct Unscaled : Words {
  static constexpr bool scaled = false;
  using Sum = V;
  static Sum start(const float* p) { return S::load(p); }
};
using Floats = Unscaled<simd::Words>;
using Singles = Unscaled<simd::Single>;
// ... or bytes, at twice the rate of float32 (AVX2) or bfloat16 (VNNI) and a tenth of the accuracy
// of the latter: where few blocks need rescoring even so, this is the faster way.
#if !defined(__AMX_BF16__) && \
    (defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__)))
using simd::Bytes;
constexpr bool kHasBytes = true;
#else
using Bytes = Floats;
constexpr bool kHasBytes = false;
#endif

// A row's best code so far, and how many were offered, in whatever order.
struct Best {
  double score = std::numeric_limits<double>::quiet_NaN();
  int64_t index = -1;
  int64_t offers = 0;

  void offer(double candidate, int64_t k) {
    const bool nearer = std::isnan(score) ? !std::isnan(candidate) || index < 0 || k < index
                                          : candidate > score || (candidate == score && k < index);
    if (nearer) {
      score = candidate;
      index = k;
    }
  }
};

// Bounds |coarse - exact| of a row of norm `norm` that rounding moved by up to `moved`: what
// rounding lost, float32 products, sums and norms, float64 rescoring, and flushed subnormals.
struct Bound {
  double norm, coarse, fine, tiny;
  bool l2;
  V c0, c1, c2, c3;

  Bound(const NearestCodeArgs& args, double norm, double moved) : norm(norm) {
    const double d = static_cast<double>(args.d);
    coarse = (2.0 * d + 16.0) * 0x1p-24 * 1.05, fine = (d + 8.0) * 0x1p-51;
    tiny = d * 0x1p-110;  // a product of scales may be flushed, times 127^2
    l2 = args.metric == Metric::l2;
    const auto vector = [](double x) { return S::broadcast(static_cast<float>(x)); };
    c0 = vector((l2 ? fine * norm * norm : 0.0) + tiny * (1.0 + norm));
    c1 = vector(1.0001 * (moved + coarse * (norm + moved) + 2.0 * fine * norm) + tiny);
    c2 = vector(l2 ? 0.5 * coarse + fine : 0.0);
    c3 = vector(1.0001 * (1.0 + coarse) * (norm + moved));
  }
  // For codes of norm up to m that rounding moved by up to `moved`, or not at all.
  V error(V m) const { return S::fmadd(m, S::fmadd(m, c2, c1), c0); }
  V error(V m, V moved) const { return S::fmadd(m, S::fmadd(m, c2, c1), S::fmadd(moved, c3, c0)); }
  // For a code of norm up to m, where float32 alone rounded.
  double of_float32(double m) const {
    return (l2 ? fine * norm * norm : 0.0) + tiny * (1.0 + norm + m) +
           1.0002 * (coarse + 2.0 * fine) * norm * m + (l2 ? (0.5 * coarse + fine) * m * m : 0.0);
  }
};

// Asks for a range of memory in equal steps; codes are read once, and nobody else would.
struct Prefetch {
  const char* at;
  const char* end;
  int64_t lines;

  Prefetch(const void* p, int64_t bytes, int64_t steps)
      : at(static_cast<const char*>(p)), end(at + bytes), lines(bytes / 64 / (steps + 1) + 1) {}
  void step() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

template <class T>
struct Search {
  const NearestCodeArgs& args;
  const NearestCodePlan& plan;
  const Team::Member& member;
  void* workspace;
  float* panel;  // a tile of codes: bias, start of the byte sums, values

  const T* z_row(int64_t row) const { return static_cast<const T*>(args.z) + row * args.z_stride; }
  const T* code(int64_t k) const {
    return static_cast<const T*>(args.codebook) + k * args.codebook_stride;
  }
  template <class U>
  U* at(std::size_t offset) const {
    return reinterpret_cast<U*>(static_cast<char*>(workspace) + offset);
  }
  float* center() const { return at<float>(plan.center); }
  float* z() const { return at<float>(plan.z); }
  float* z_norm() const { return at<float>(plan.z_norm); }
  float* z_residual() const { return at<float>(plan.z_residual); }
  float* z_scale() const { return at<float>(plan.z_scale); }
  float* factor() const { return at<float>(plan.factor); }  // of a cosine, one a code
  float* block_norm() const { return at<float>(plan.block_norm); }
  float* block_residual() const { return at<float>(plan.block_residual); }
  // Of a row, the maxima of a super-block, one a block. The rows of a super-block are together: it
  // is scored for all of them before the next.
  float* row_maxima(int64_t super, int64_t row) const {
    return at<float>(plan.table) + (super * plan.rows + row) * S::lanes;
  }
  // Of a row of a sweep, its scores and the largest of each lane of a tile.
  float* scores(int r) const { return at<float>(plan.scores) + r * plan.blocks * kTileVectors; }
  float* tops(int r) const { return at<float>(plan.table) + r * plan.blocks; }
  // Bit l of [super-block][row]: block l of the super-block is to be rescored.
  uint16_t* hits() const { return at<uint16_t>(plan.hits); }
  Best* best(int of_member) const { return at<Best>(plan.best) + of_member * plan.rows; }
  int64_t* hit_codes() const { return at<int64_t>(plan.hit_codes); }
  float* bias() const { return panel; }
  float* starts() const { return bias() + kTileCodes; }
  float* values() const { return starts() + kTileCodes; }

  // Covers the rounding of a norm that was summed in float32.
  double norm_margin() const { return 1.0001 + static_cast<double>(args.d) * 0x1p-23; }

  template <class C>
  int64_t words() const {
    return round_up((args.d + C::terms - 1) / C::terms, simd::kWordGroup);
  }

  // l2 distances do not change when both sides move; near zero, the coarse pass keeps more of them.
  // The median of some codes is where most are, however many are dead or far away.
  void find_center() const {
    constexpr int kSample = 31;
    const int count = args.k < kSample ? static_cast<int>(args.k) : kSample;
    V sample[kSample];
    for (int64_t i = 0; i < plan.padded_depth; i += S::lanes) {
      float* out = center() + i;
      if (args.metric != Metric::l2 || i >= args.d) {
        S::store(out, S::broadcast(0.0f));
        continue;
      }
      for (int j = 0; j < count; ++j) {
        sample[j] = simd::load_row(code(args.k * j / count) + i, args.d - i);
      }
      for (int j = 0; j <= count / 2; ++j) {
        for (int l = j + 1; l < count; ++l) {
          const V low = S::min(sample[j], sample[l]);
          sample[l] = S::max(sample[j], sample[l]);
          sample[j] = low;
        }
      }
      S::store(out, sample[count / 2]);
      for (int l = 0; l < S::lanes; ++l) {
        if (!(std::fabs(out[l]) < kLargestNorm)) out[l] = 0.0f;
      }
    }
  }

  // row[i..i + lanes) - center, zeros past the end.
  V centred(const T* row, int64_t i) const {
    return S::sub(simd::load_row(row + i, args.d - i), S::load(center() + i));
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

  double norm(const T* row) const {
    const float quick = square(row);
    const bool safe = quick >= kSmallSquare && quick <= kLargestSquare;
    return std::sqrt(safe ? quick : careful_square(row));
  }

  struct Scale {
    float value = 0.0f, inverse = 0.0f;
    Scale(float peak, float levels) {
      if (peak < kSmallestPeak) return;
      value = peak / levels;
      inverse = levels / peak;
    }
  };

  // Bounds the norm of what bytes lose of a vector; `sum` is its square in units of the scale,
  // whose terms float32 may have flushed.
  V residual(const Scale& scale, V sum) const {
    const double root = std::sqrt(static_cast<double>(args.d));
    if (scale.value == 0.0f) return S::broadcast(static_cast<float>(root * kSmallestPeak));
    const auto factor = static_cast<float>(norm_margin() * scale.value);
    const auto flushed = static_cast<float>(1e-5 * root * scale.value);
    return S::fmadd(S::sqrt(sum), S::broadcast(factor), S::broadcast(flushed));
  }

  // Scale and residual of a row in bytes.
  template <class C>
  Scale measure(const T* row, int64_t r) const {
    V peak = S::broadcast(0.0f);
    for (int64_t i = 0; i < args.d; i += S::lanes) {
      const V x = centred(row, i);
      peak = S::max(peak, S::max(x, S::sub(S::broadcast(0.0f), x)));
    }
    const Scale scale(S::largest(peak), C::most_raised);
    V sum = S::broadcast(0.0f);
    for (int64_t i = 0; i < args.d; i += S::lanes) {
      const V x = centred(row, i), q = C::round(S::mul(x, S::broadcast(scale.inverse)));
      const V rest =
          S::mul(S::fmadd(q, S::broadcast(-scale.value), x), S::broadcast(scale.inverse));
      sum = S::fmadd(rest, rest, sum);
    }
    z_scale()[r] = scale.value;
    z_residual()[r] = S::largest(residual(scale, S::broadcast(S::sum(sum))));
    return scale;
  }

  // Rows packed tile by tile, so that a tile reads one stream.
  template <class C>
  void prepare_rows(int64_t first, int64_t rows) const {
    const auto share = member.share(rows, kTileRows);
    const int64_t end = round_up(share.end, kTileRows), all = words<C>();
    float buffer[S::lanes] = {};
    for (int64_t r = share.begin; r < end; ++r) {
      float* tile = z() + r / kTileRows * kTileRows * plan.words;
      const auto put = [&](int64_t w, float word) {
        tile[simd::packed_word(r % kTileRows, w)] = word;
      };
      const T* row = z_row(first + r);
      const double length = r < share.end ? norm(row) : kInfinity;
      const bool coarse = length <= kLargestNorm;
      z_norm()[r] = coarse ? static_cast<float>(length * norm_margin()) : kInfinity;
      z_residual()[r] = static_cast<float>(kRounding * z_norm()[r]);
      if (!coarse) {
        z_scale()[r] = 0.0f;
        for (int64_t w = 0; w < all; ++w) put(w, 0.0f);
        continue;
      }
      V inverse{};
      if constexpr (C::scaled) inverse = S::broadcast(measure<C>(row, r).inverse);
      for (int64_t w = 0; w < all; w += S::lanes) {
        const auto values_of = [&](int part) {
          return centred(row, w * C::terms + part * S::lanes);
        };
        if constexpr (C::scaled) {
          S::store(buffer,
                   C::raised_words([&](int part) { return S::mul(values_of(part), inverse); }));
        } else {
          S::store(buffer, C::words(values_of));
        }
        const int64_t count = all - w < S::lanes ? all - w : S::lanes;
        for (int64_t i = 0; i < count; ++i) put(w + i, buffer[i]);
      }
    }
  }

  // What the codes of a tile have in common, and each one's own: squared norm, largest magnitude
  // and the factor that makes its cosine.
  struct Tile {
    float scale = 0.0f;   // of bytes
    bool biased = false;  // a bias other than zero
    float square[kTileCodes], peak[kTileCodes], factor[kTileCodes];
  };

  // Codes [first, first + kTileCodes), moved by the center, as [value][code].
  template <class C>
  void lay_out(int64_t first, Tile& tile) const {
    const int64_t all = words<C>() * C::terms;
    const T* rows[S::lanes];
    V block[S::lanes];
    for (int j = 0; j < kTileCodes; j += S::lanes) {
      for (int l = 0; l < S::lanes; ++l) {
        const int64_t k = first + j + l;
        rows[l] = code(k < args.k ? k : args.k - 1);
      }
      V square = S::broadcast(0.0f), low = square, high = square;
      for (int64_t i = 0; i < all; i += S::lanes) {
        for (int l = 0; l < S::lanes; ++l) block[l] = centred(rows[l], i);
        S::transpose(block);
        const int64_t count = all - i < S::lanes ? all - i : S::lanes;
        for (int64_t v = 0; v < count; ++v) {
          S::store(values() + (i + v) * kTileCodes + j, block[v]);
          square = S::fmadd(block[v], block[v], square);
          if constexpr (C::scaled) {
            low = S::min(low, block[v]);
            high = S::max(high, block[v]);
          }
        }
      }
      S::store(tile.square + j, square);
      S::store(tile.factor + j, S::broadcast(1.0f));
      S::store(tile.peak + j, S::max(high, S::sub(S::broadcast(0.0f), low)));
    }
  }

  // Codes [first, first + kTileCodes) for score_tile(). A code that the coarse pass cannot hold
  // gets bias -inf and norm inf, which keeps its block out of the bounds and always rescored.
  template <class C>
  Tile pack(int64_t first, bool first_of_block, float* norms, float* residuals) const {
    Tile tile;
    lay_out<C>(first, tile);
    tile.biased = args.metric == Metric::l2;
    for (int j = 0; j < kTileCodes; j += S::lanes) {
      V square = S::load(tile.square + j);
      // Common case: every norm of the vector is neither tiny nor huge, and every code exists.
      if (S::all_between(square, kSmallSquare, kLargestSquare) && first + j + S::lanes <= args.k) {
        S::store(bias() + j, args.metric == Metric::l2 ? S::mul(square, S::broadcast(-0.5f))
                                                       : S::broadcast(0.0f));
        if (args.metric == Metric::cosine) {
          S::store(tile.factor + j, S::div(S::broadcast(1.0f), S::sqrt(square)));
          square = S::broadcast(1.0f);
        }
      } else {
        for (int l = j; l < j + S::lanes; ++l) pack_edge(first + l, l, tile);
        square = S::load(tile.square + j);
      }
      S::store(norms, first_of_block && j == 0 ? square : S::max(square, S::load(norms)));
    }
    if (args.metric == Metric::cosine) {
      std::memcpy(factor() + first, tile.factor, sizeof tile.factor);
    }
    if constexpr (C::scaled) {
      narrow_to_bytes<C>(tile, first_of_block, residuals);
    } else {
      narrow<C>(tile);
    }
    return tile;
  }

  // A code that is past the end, huge, not finite, or so small that float32 may have lost terms of
  // its norm.
  void pack_edge(int64_t k, int l, Tile& tile) const {
    double square = careful_square(code(k < args.k ? k : args.k - 1));
    const bool coarse = square <= kLargestSquare;
    bias()[l] = args.metric == Metric::l2 ? static_cast<float>(-0.5 * square) : 0.0f;
    if (args.metric == Metric::cosine) {
      const double length = std::sqrt(square);
      tile.factor[l] = static_cast<float>(1.0 / (length > kNormFloor ? length : kNormFloor));
      square *= static_cast<double>(tile.factor[l]) * tile.factor[l];
    }
    tile.square[l] = coarse ? static_cast<float>(square * kSquareMargin) : kInfinity;
    if (k >= args.k) tile.square[l] = 0.0f;
    if (coarse && k < args.k) return;
    tile.biased = true;
    bias()[l] = -kInfinity;
    tile.factor[l] = tile.peak[l] = 0.0f;
    for (int64_t i = 0; i < plan.values; ++i) values()[i * kTileCodes + l] = 0.0f;
  }

  // To words without a scale, in place.
  template <class C>
  void narrow(const Tile& tile) const {
    if (C::terms == 1 && args.metric != Metric::cosine) return;
    for (int j = 0; j < kTileCodes; j += S::lanes) {
      const V factor = S::load(tile.factor + j);
      for (int64_t w = 0; w < words<C>(); ++w) {
        const float* in = values() + w * C::terms * kTileCodes + j;
        const V low = S::mul(S::load(in), factor);
        const V high = S::mul(S::load(in + (C::terms - 1) * kTileCodes), factor);
        S::store(values() + w * kTileCodes + j, C::zip(low, high));
      }
    }
  }

  // To words of bytes under one scale, in place.
  template <class C>
  void narrow_to_bytes(Tile& tile, bool first_of_block, float* residuals) const {
    V peak = S::broadcast(0.0f);
    for (int j = 0; j < kTileCodes; j += S::lanes) {
      peak = S::max(peak, S::mul(S::load(tile.peak + j), S::load(tile.factor + j)));
    }
    const Scale scale(S::largest(peak), 127.0f);
    tile.scale = scale.value;
    const V step = S::broadcast(-scale.value), inverse = S::broadcast(scale.inverse);
    for (int j = 0; j < kTileCodes; j += S::lanes) {
      const V factor = S::load(tile.factor + j);
      V sum = S::broadcast(0.0f);
      typename C::Sum start = C::zero();
      for (int64_t w = 0; w < words<C>(); ++w) {
        const float* in = values() + w * C::terms * kTileCodes + j;
        const V word = C::zip([&](int part) {
          const V x = S::mul(S::load(in + part * kTileCodes), factor);
          const V q = C::round(S::mul(x, inverse));
          const V rest = S::mul(S::fmadd(q, step, x), inverse);
          sum = S::fmadd(rest, rest, sum);
          return q;
        });
        start = C::lower(word, start);
        S::store(values() + w * kTileCodes + j, word);
      }
      C::store(starts() + j, start);
      const V lost = residual(scale, sum);
      S::store(residuals, first_of_block && j == 0 ? lost : S::max(lost, S::load(residuals)));
    }
  }

  // acc = start + z . e for kTileRows rows from `row` on and the tile's codes.
  template <class C>
  __attribute__((always_inline)) void multiply(
      int64_t row, typename C::Sum (&acc)[kTileRows][kTileVectors]) const {
    const float* start = C::scaled ? starts() : bias();
    const float* e = values();
    const float* rows = z() + row * plan.words;
#if defined(__AMX_BF16__)
    using Sums = amx::Sums<kTileVectors>;
    Sums::load(start, 0);  // into every row
    Sums::multiply(rows, simd::PackedRow(), simd::kPackedStep * simd::kWordGroup, e, kTileCodes,
                   words<C>());
    Sums::store(acc, sizeof acc[0]);
#else
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = C::start(start + v * S::lanes);
    }
    const int64_t steps = words<C>();
    for (int64_t i = 0; i < steps; ++i) {
      V codes[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) codes[v] = S::load(e + i * kTileCodes + v * S::lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const V value = S::broadcast(rows[i * kTileRows + r]);
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = C::dot(value, codes[v], acc[r][v]);
      }
    }
#endif
  }

  // One tile of scores, folded into the table. A function of its own, so that its accumulators stay
  // in registers.
  template <class C, bool biased>
  __attribute__((noinline)) void score_tile(float tile_scale, int64_t row, float* maxima,
                                            bool first_of_block) const {
    typename C::Sum acc[kTileRows][kTileVectors];
    multiply<C>(row, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      V best;
      if constexpr (!C::scaled) {
        best = acc[r][0];
#pragma GCC unroll 8
        for (int v = 1; v < kTileVectors; ++v) best = S::max(best, acc[r][v]);
      } else {
        const V scale = S::broadcast(tile_scale * z_scale()[row + r]);
        if constexpr (biased) {
          best = S::broadcast(-kInfinity);
#pragma GCC unroll 8
          for (int v = 0; v < kTileVectors; ++v) {
            const V bias_v = S::load(bias() + v * S::lanes);
            best = S::max(best, S::fmadd(C::widen(acc[r][v]), scale, bias_v));
          }
        } else {
          typename C::Sum sum = acc[r][0];
#pragma GCC unroll 8
          for (int v = 1; v < kTileVectors; ++v) sum = C::max(sum, acc[r][v]);
          best = S::mul(C::widen(sum), scale);
        }
      }
      float* out = maxima + r * S::lanes;
      if (!first_of_block) best = S::max(best, S::load(out));
      S::store(out, best);
    }
  }

  template <class C>
  void score(int64_t rows) const {
    const auto share = member.share(plan.blocks / plan.lanes);
    for (int64_t super = share.begin; super < share.end; ++super) {
      float* norms = block_norm() + super * plan.lanes;
      float* residuals = block_residual() + super * plan.lanes;
      for (int64_t v = 0; v < plan.block_vectors; v += kTileVectors) {
        const int64_t first = (super * plan.block_vectors + v) * plan.lanes;
        if (first >= args.k && v > 0) break;
        const Tile tile = pack<C>(first, v == 0, norms, residuals);
        const int64_t left = args.k - first - kTileCodes;
        const int64_t codes = args.codebook_stride > 2 * args.d || left < 0 ? 0 : left;
        Prefetch next(code(codes > 0 ? first + kTileCodes : 0),
                      (codes < kTileCodes ? codes : kTileCodes) * args.codebook_stride *
                          static_cast<int64_t>(sizeof(T)),
                      rows / kTileRows);
        for (int64_t r = 0; r < rows; r += kTileRows) {
          next.step();
          float* maxima = row_maxima(super, r);
          // Floats start from their bias, whatever it is.
          if (tile.biased || !C::scaled) {
            score_tile<C, true>(tile.scale, r, maxima, v == 0);
          } else {
            score_tile<C, false>(tile.scale, r, maxima, v == 0);
          }
        }
      }
      for (int l = 0; l < S::lanes; ++l) {
        norms[l] = length_of(norms[l]);
        if (!C::scaled) residuals[l] = static_cast<float>(kRounding * norms[l]);
      }
    }
  }

  // Bounds the norm of a code from its square in float32.
  float length_of(float square) const {
    return static_cast<float>(std::sqrt(square + kTinySquare) * norm_margin());
  }

  // The float64 scores of at most eight codes. Larger is nearer: minus the squared distance, the
  // cosine or the logit.
  template <Metric metric>
  void offer(const T* row, const int64_t* codes, int count, Best& best) const {
    Double8 sums[8], squares[8];
    for (int j = 0; j < 8; ++j) sums[j] = squares[j] = Double8::zero();
    for (int j = 0; j < count; ++j) {
      const T* e = code(codes[j]);
      Double8 sum = Double8::zero(), square = Double8::zero();
      for (int64_t i = 0; i < plan.depth; i += 8) {
        const Double8 b = widen8(e + i, args.d - i), a = widen8(row + i, args.d - i);
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
    if (count == 1) {  // as below, of one
      double score = sum_pairs(sums[0]);
      if constexpr (metric == Metric::l2) score = -0.0 - score;
      if constexpr (metric == Metric::cosine) {
        const double norm = std::sqrt(sum_pairs(squares[0]));
        score /= norm < kNormFloor ? kNormFloor : norm;
      }
      return best.offer(score, codes[0]);
    }
    Double8 score = sum_pairs(sums);
    if constexpr (metric == Metric::l2) score = Double8::broadcast(-0.0) - score;
    if constexpr (metric == Metric::cosine) {
      score = score / max(Double8::broadcast(kNormFloor), sqrt(sum_pairs(squares)));
    }
    double scores[8];
    score.store(scores);
    for (int j = 0; j < count; ++j) best.offer(scores[j], codes[j]);
  }

  // What a float32 sum of d terms may lose, of their sizes, and beside that where they underflow.
  float rounding() const {
    return static_cast<float>((static_cast<double>(args.d) + 16.0) * 0x1.1p-23);
  }
  float flushed() const { return static_cast<float>(args.d) * 0x1p-120f; }

  // Lane l is the sum of the lanes of parts[l].
  static V sum_each(V (&parts)[S::lanes]) {
    S::transpose(parts);
    V sum = parts[0];
    for (int l = 1; l < S::lanes; ++l) sum = S::add(sum, parts[l]);
    return sum;
  }

  // As `estimate`, of neighbouring codes, for dot and cosine, which bounds the products themselves.
  template <Metric metric>
  V estimate_alone(const T* row, int64_t first, int64_t count, V& error) const {
    constexpr int kGroup = 4;
    const V zero = S::broadcast(0.0f);
    V sums[S::lanes], sizes[S::lanes], squares[S::lanes];
    for (int l = 0; l < S::lanes; l += kGroup) {
      const T* e[kGroup];
      V sum[kGroup], size[kGroup], square[kGroup];
      for (int g = 0; g < kGroup; ++g) {
        e[g] = code(first + (l + g < count ? l + g : 0));
        sum[g] = size[g] = square[g] = zero;
      }
      for (int64_t i = 0; i < args.d; i += S::lanes) {
        const V a = simd::load_row(row + i, args.d - i);
        for (int g = 0; g < kGroup; ++g) {
          const V b = simd::load_row(e[g] + i, args.d - i);
          const V product = S::mul(a, b);
          sum[g] = S::add(sum[g], product);
          size[g] = S::add(size[g], S::max(product, S::sub(zero, product)));
          if constexpr (metric == Metric::cosine) square[g] = S::fmadd(b, b, square[g]);
        }
      }
      for (int g = 0; g < kGroup; ++g) {
        sums[l + g] = sum[g], sizes[l + g] = size[g], squares[l + g] = square[g];
      }
    }
    V score = sum_each(sums);
    error = S::fmadd(sum_each(sizes), S::broadcast(rounding()), S::broadcast(flushed()));
    if constexpr (metric == Metric::cosine) {
      const V square = sum_each(squares);
      const V norm = S::max(S::sqrt(square), S::broadcast(static_cast<float>(kNormFloor)));
      score = S::div(score, norm);
      // NaN where the square or the score is infinite.
      const V size = S::add(square, S::max(score, S::sub(zero, score)));
      error = S::add(S::div(error, norm), S::mul(size, zero));
    }
    return score;
  }

  // The scores of codes first, first + step, ... in float32; `error` bounds their distance from
  // those in float64, and is infinite where float32 cannot tell. `reach` bounds ||z|| ||e||.
  template <Metric metric>
  V estimate(const T* row, int64_t first, int64_t step, int64_t count, float reach,
             V& error) const {
    constexpr int kGroup = 4;
    const auto sum_group = [&](int l, V* sums) __attribute__((always_inline)) {
      const T* e[kGroup];
      V sum[kGroup];
      for (int g = 0; g < kGroup; ++g) {
        e[g] = code(first + step * (l + g < count ? l + g : 0));
        sum[g] = S::broadcast(0.0f);
      }
      for (int64_t i = 0; i < args.d; i += S::lanes) {
        const V a = simd::load_row(row + i, args.d - i);
        for (int g = 0; g < kGroup; ++g) {
          const V b = simd::load_row(e[g] + i, args.d - i);
          const V x = metric == Metric::l2 ? S::sub(a, b) : b;
          sum[g] = S::fmadd(metric == Metric::l2 ? x : a, x, sum[g]);
        }
      }
      for (int g = 0; g < kGroup; ++g) sums[l + g] = sum[g];
    };
    V score;
    if (count <= kGroup) {  // of a small codebook: no need of a whole vector of codes
      V sums[S::sums_at_once];
      for (int l = kGroup; l < S::sums_at_once; ++l) sums[l] = S::broadcast(0.0f);
      sum_group(0, sums);
      float totals[S::lanes];
      S::sums(sums, totals);
      const float worst = metric == Metric::l2 ? kInfinity : -kInfinity;
      for (int64_t l = count; l < S::lanes; ++l) totals[l] = worst;
      score = S::load(totals);
    } else {
      V sums[S::lanes];
      for (int l = 0; l < S::lanes; l += kGroup) sum_group(l, sums);
      score = sum_each(sums);
    }
    if constexpr (metric == Metric::l2) {
      error = S::fmadd(score, S::broadcast(rounding()), S::broadcast(flushed()));
      return S::sub(S::broadcast(0.0f), score);
    }
    error = S::broadcast(rounding() * reach + flushed());
    if constexpr (metric == Metric::cosine) {
      float factors[S::lanes];
      for (int l = 0; l < S::lanes; ++l) factors[l] = factor()[first + step * (l < count ? l : 0)];
      score = S::mul(score, S::load(factors));
      error = S::broadcast(rounding() * reach + 0x1p40f * flushed());  // factors reach 1e12
    }
    return score;
  }

  // Codes first, first + step, ... below `end`.
  template <Metric metric, bool alone = false>
  void offer_codes(const T* row, int64_t first, int64_t end, int64_t step, float reach,
                   Best& best) const {
    const int64_t all = codes_between(first, end, step);
    for (int64_t done = 0; done < all; done += S::lanes) {
      const int64_t count = all - done < S::lanes ? all - done : S::lanes, k = first + done * step;
      V error, score;
      if constexpr (alone && metric != Metric::l2) {
        score = estimate_alone<metric>(row, k, count, error);
      } else {
        score = estimate<metric>(row, k, step, count, reach, error);
      }
      // Below the best so far, rounded down, or below another of these, a code has no chance.
      constexpr double kLargest = std::numeric_limits<float>::max();
      float known = -kInfinity;
      if (best.score >= -kLargest) {
        known = static_cast<float>(best.score < kLargest ? best.score : kLargest);
        known -= std::fabs(known) * 0x1p-22f + 0x1p-120f;
      }
      const float limit = S::largest(S::max(S::sub(score, error), S::broadcast(known)));
      unsigned left = S::not_less(S::add(score, error), S::broadcast(limit));
      left &= (1u << count) - 1;
      int64_t codes[S::lanes];
      int found = 0;
      for (; left; left &= left - 1) codes[found++] = k + step * __builtin_ctz(left);
      for (int at = 0; at < found; at += 8) {
        offer<metric>(row, codes + at, found - at < 8 ? found - at : 8, best);
      }
      best.offers += found;
    }
  }

  void offer_block(int64_t r, const T* row, int64_t block, Best& best) const {
    const int64_t super = block / S::lanes * plan.super_codes;
    const int64_t first = super + block % S::lanes, end = super + plan.super_codes;
    const float reach = z_norm()[r] * block_norm()[block];
    switch (args.metric) {
      case Metric::l2:
        return offer_codes<Metric::l2>(row, first, end, S::lanes, reach, best);
      case Metric::cosine:
        return offer_codes<Metric::cosine>(row, first, end, S::lanes, reach, best);
      default:
        return offer_codes<Metric::dot>(row, first, end, S::lanes, reach, best);
    }
  }

  int64_t codes_between(int64_t first, int64_t end, int64_t step) const {
    if (end > args.k) end = args.k;
    return first < end ? (end - first + step - 1) / step : 0;
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

  bool has_nan(const T* row) const {
    bool found = false;
    for (int64_t i = 0; i < args.d; ++i) found = found || std::isnan(simd::widen(row[i]));
    return found;
  }

  // The best coarse score that a block attains in float32, -inf for none.
  float attained(const T* row, int64_t block) const {
    const int64_t super = block / S::lanes * plan.super_codes, first = super + block % S::lanes;
    const int64_t count = codes_between(first, super + plan.super_codes, S::lanes);
    float best = -kInfinity;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = first + i * S::lanes;
      const V scale = S::broadcast(args.metric == Metric::cosine ? factor()[k] : 1.0f);
      const V half = S::broadcast(args.metric == Metric::l2 ? 0.5f : 0.0f);
      V sum = S::broadcast(0.0f), square = sum;
      for (int64_t j = 0; j < args.d; j += S::lanes) {
        const V e = S::mul(centred(code(k), j), scale);
        sum = S::fmadd(centred(row, j), e, sum);
        square = S::fmadd(S::mul(e, half), e, square);
      }
      const float score = S::sum(sum) - S::sum(square);
      if (score > best) best = score;
    }
    return best;
  }

  // Marks the blocks that may hold the row's best code; returns how many codes they have.
  template <class C>
  int64_t mark(int64_t first, int64_t r) const {
    const float length = z_norm()[r];
    if (length == kInfinity) {
      const bool none = has_nan(z_row(first + r));
      for (int64_t super = 0; super < plan.blocks / S::lanes; ++super) {
        hits()[super * plan.rows + r] = static_cast<uint16_t>(none ? 0 : (1u << S::lanes) - 1);
      }
      return none ? 0 : args.k;
    }

    const Bound bound(args, length, z_residual()[r]);
    const auto maxima = [&](int64_t b) { return row_maxima(b / S::lanes, r) + b % S::lanes; };
    const auto error = [&](int64_t b) {
      return bound.error(S::load(block_norm() + b), S::load(block_residual() + b));
    };

    V lower = S::broadcast(-kInfinity);
    for (int64_t b = 0; b < plan.blocks; b += S::lanes) {
      // A block with an infinite norm has a NaN or -inf bound; max keeps its second operand then.
      lower = S::max(S::sub(S::load(maxima(b)), error(b)), lower);
    }
    float limit = S::largest(lower);
    const auto mark_from = [&] {
      int64_t codes = 0;
      for (int64_t b = 0; b < plan.blocks; b += S::lanes) {
        const V upper = S::add(S::load(maxima(b)), error(b));
        const unsigned reached = S::not_less(upper, S::broadcast(limit));
        hits()[b / S::lanes * plan.rows + r] = static_cast<uint16_t>(reached);
        codes += __builtin_popcount(reached) * plan.block_vectors;
      }
      return codes;
    };
    const int64_t codes = mark_from();
    if (!C::scaled || codes <= 2 * plan.block_vectors) return codes;
    // What bytes lost, half of the distance to the limit, is known for one block once it is read.
    int64_t top = 0;
    for (int64_t b = 1; b < plan.blocks; ++b) top = *maxima(b) > *maxima(top) ? b : top;
    const double rounding = bound.of_float32(block_norm()[top]);
    const float attained_limit = static_cast<float>(attained(z_row(first + r), top) - rounding);
    if (!(attained_limit > limit)) return codes;
    limit = attained_limit - std::fabs(attained_limit) * 0x1p-23f;
    return mark_from();
  }

  // Coarse scores of a chunk of rows and the blocks to rescore; whether those are worth it.
  template <class C>
  bool search(int64_t first, int64_t rows) const {
    prepare_rows<C>(first, rows);
    member.barrier();
    score<C>(rows);
    member.barrier();
    const auto share = member.share(rows);
    int64_t codes = 0;
    for (int64_t r = share.begin; r < share.end; ++r) codes += mark<C>(first, r);
    hit_codes()[member.index] = codes;
    member.barrier();
    if (!C::scaled) return true;
    codes = 0;
    for (int i = 0; i < member.size; ++i) codes += hit_codes()[i];
    member.barrier();
    const int64_t few = args.k / kCoarsePass, some = 4 * plan.block_vectors;
    return codes <= rows * (few > some ? few : some);
  }

  // By blocks, so that rows share the codes that they read.
  void rescore(int64_t first, int64_t rows) const {
    const auto supers = member.share(plan.blocks / plan.lanes);
    Best* found = best(member.index);
    for (int64_t r = 0; r < rows; ++r) found[r] = Best{};
    for (int64_t super = supers.begin; super < supers.end; ++super) {
      const uint16_t* marks = hits() + super * plan.rows;
      for (int64_t r = 0; r < rows; ++r) {
        for (unsigned left = marks[r]; left; left &= left - 1) {
          offer_block(r, z_row(first + r), super * S::lanes + __builtin_ctz(left), found[r]);
        }
      }
    }
    member.barrier();
    choose(first, rows);
  }

  // Of what each thread found.
  void choose(int64_t first, int64_t rows) const {
    const auto share = member.share(rows);
    for (int64_t r = share.begin; r < share.end; ++r) {
      Best chosen = best(0)[r];
      for (int i = 1; i < member.size; ++i) {
        const Best& other = best(i)[r];
        if (other.index >= 0) chosen.offer(other.score, other.index);
        chosen.offers += other.offers;
      }
      answer(first + r, chosen);
    }
  }

  void answer(int64_t row, const Best& best) const {
    const bool none = best.index < 0;  // a row with a NaN
    args.indices[row] = none ? 0 : best.index;
    if (args.distances) {
      args.distances[row] =
          none ? std::numeric_limits<float>::quiet_NaN() : distance(row, best.index, best.score);
    }
    if (args.rescored) args.rescored[row] = best.offers;
  }

  // Every code as it is, a few at a time, so that rows share what they read.
  template <Metric metric>
  void scan() const {
    constexpr int64_t kNear = 4 * S::lanes;
    Best* found = best(member.index);
    uint64_t none = 0;
    for (int64_t r = 0; r < args.n; ++r) {
      found[r] = Best{};
      none |= static_cast<uint64_t>(has_nan(z_row(r))) << r;
    }
    const auto codes = member.share(args.k, S::lanes);
    for (int64_t first = codes.begin; first < codes.end; first += kNear) {
      const int64_t end = first + kNear < codes.end ? first + kNear : codes.end;
      for (int64_t r = 0; r < args.n; ++r) {
        if (none >> r & 1) continue;
        offer_codes<metric, true>(z_row(r), first, end, 1, 0.0f, found[r]);
      }
    }
    member.barrier();
    choose(0, args.n);
  }

  // Scores of kSweepRows rows, centred at z(), and every code, in float32, and of each tile the
  // largest of its vectors.
  __attribute__((noinline)) void score_rows(int64_t tiles) const {
    for (int64_t t = 0; t < tiles; ++t) {
      const float* start = panel + t * (plan.panel_bytes / 4);
      V acc[kSweepRows][kTileVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kSweepRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = S::load(start + v * S::lanes);
      }
      const float* e = start + 2 * kTileCodes;
      for (int64_t i = 0; i < args.d; ++i, e += kTileCodes) {
        V codes[kTileVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) codes[v] = S::load(e + v * S::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kSweepRows; ++r) {
          const V value = S::broadcast(z()[r * plan.padded_depth + i]);
#pragma GCC unroll 8
          for (int v = 0; v < kTileVectors; ++v) acc[r][v] = S::fmadd(value, codes[v], acc[r][v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kSweepRows; ++r) {
        V top = acc[r][0];
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) {
          top = S::max(top, acc[r][v]);
          S::store(scores(r) + t * kTileCodes + v * S::lanes, acc[r][v]);
        }
        S::store(tops(r) + t * S::lanes, top);
      }
    }
  }

  // The best of the codes that the scores of row r of a sweep leave a chance.
  template <Metric metric>
  Best best_of(const T* row, int r, float length) const {
    Best best;
    if (length == kInfinity && has_nan(row)) return best;
    const Bound bound(args, length, 0.0);
    const auto error = [&](int64_t t) { return bound.error(S::load(block_norm() + t * S::lanes)); };
    const int64_t tiles = plan.blocks / S::lanes;
    V lower = S::broadcast(-kInfinity);
    for (int64_t t = 0; t < tiles; ++t) {
      // An infinite norm makes this NaN or -inf; max keeps its second operand then.
      lower = S::max(S::sub(S::load(tops(r) + t * S::lanes), error(t)), lower);
    }
    const V limit = S::broadcast(S::largest(lower));
    const auto reach = [&](const float* score, int64_t t) -> uint64_t {
      return S::not_less(S::add(S::load(score), error(t)), limit);
    };

    int64_t codes[8];
    int found = 0;
    const auto offer_found = [&]() __attribute__((noinline)) {
      offer<metric>(row, codes, found, best);
      best.offers += found;
      found = 0;
    };
    // Most rows have one code that is left, in a place that no branch foresees.
    for (int64_t some = 0; some < tiles; some += 64) {
      const int64_t end = some + 64 < tiles ? some + 64 : tiles;
      uint64_t reached = 0;
      for (int64_t t = some; t < end; ++t) {
        reached |= static_cast<uint64_t>(reach(tops(r) + t * S::lanes, t) != 0) << (t - some);
      }
      for (; reached; reached &= reached - 1) {
        const int64_t t = some + __builtin_ctzll(reached), first = t * kTileCodes;
        uint64_t left = 0;
        for (int v = 0; v < kTileVectors; ++v) {
          left |= reach(scores(r) + first + v * S::lanes, t) << (v * S::lanes);
        }
        if (args.k - first < kTileCodes) left &= (uint64_t{1} << (args.k - first)) - 1;
        for (; left; left &= left - 1) {
          if (found == 8) offer_found();
          codes[found++] = first + __builtin_ctzll(left);
        }
      }
    }
    if (found == 1 && best.offers == 0 && !args.distances) {
      best.index = codes[0];
      best.offers = 1;
    } else {
      offer_found();
    }
    return best;
  }

  // A small codebook: the float32 scores of a few rows and all codes at a time.
  template <Metric metric>
  void sweep(int64_t begin, int64_t end) const {
    const int64_t tiles = plan.blocks / S::lanes;
    for (int64_t t = 0; t < tiles; ++t) {
      float* norms = block_norm() + t * S::lanes;
      const Search tile{args, plan, member, workspace, panel + t * (plan.panel_bytes / 4)};
      tile.template pack<Singles>(t * kTileCodes, true, norms, nullptr);
      for (int l = 0; l < S::lanes; ++l) norms[l] = length_of(norms[l]);
    }
    for (int64_t first = begin; first < end; first += kSweepRows) {
      const int64_t rows = end - first < kSweepRows ? end - first : kSweepRows;
      float lengths[kSweepRows];
      for (int64_t r = 0; r < rows; ++r) {
        const T* row = z_row(first + r);
        const double length = norm(row);
        const bool coarse = length <= kLargestNorm;
        lengths[r] = coarse ? static_cast<float>(length * norm_margin()) : kInfinity;
        for (int64_t i = 0; i < args.d; i += S::lanes) {
          S::store(z() + r * plan.padded_depth + i, coarse ? centred(row, i) : S::broadcast(0.0f));
        }
      }
      score_rows(tiles);
      for (int r = 0; r < rows; ++r) {
        answer(first + r, best_of<metric>(z_row(first + r), r, lengths[r]));
      }
    }
  }

  void run(int64_t begin, int64_t end) const {
    if (plan.direct) {
      if (args.metric == Metric::l2) return scan<Metric::l2>();
      return args.metric == Metric::cosine ? scan<Metric::cosine>() : scan<Metric::dot>();
    }
    if (member.index == 0) find_center();
    if (plan.sweep) {
      if (args.metric == Metric::l2) return sweep<Metric::l2>(begin, end);
      return args.metric == Metric::cosine ? sweep<Metric::cosine>(begin, end)
                                           : sweep<Metric::dot>(begin, end);
    }
    [[maybe_unused]] const simd::Registers registers;
    member.barrier();
    bool bytes = kHasBytes && args.d <= kMostByteTerms;
    for (int64_t first = begin; first < end; first += plan.rows) {
      const int64_t rows = end - first < plan.rows ? end - first : plan.rows;
      if (bytes) bytes = search<Bytes>(first, rows);
      if (!bytes) search<Floats>(first, rows);
      rescore(first, rows);
      member.barrier();
    }
  }
};

void run(const NearestCodeArgs& args, const NearestCodePlan& plan, const Team::Member& member,
         Team::Member::Range rows, void* workspace) {
  simd::with_type(args.dtype, [&](auto x) {
    auto* panel = static_cast<char*>(workspace) + plan.panels + member.index * plan.panel_bytes;
    Search<decltype(x)>{args, plan, member, workspace, reinterpret_cast<float*>(panel)}.run(
        rows.begin, rows.end);
  });
}

constexpr NearestCodeKernels make_kernels() {
  return {kTileRows, kTileCodes, S::lanes, simd::kWordGroup, run};
}

}  // namespace
}  // namespace titok
