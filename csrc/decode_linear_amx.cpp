#include "decode_linear_simd.h"

namespace titok {
namespace {
namespace decode {

using simd::BFloat16;

// Tiles of weights as they lie, 16 rows of 32, against 16 rows of x: a product takes less time than
// its weights from memory, whatever the batch.
struct Tiled {
  static constexpr int64_t kTileRows = amx::kRows, kDepth = 2 * amx::kWords;
  static_assert(kChunk % kTileRows == 0);
  using Sums = float[kChunk][kTileRows];  // of weights and rows of x

  const DecodeLinearArgs& args;
  const DecodeLinearPlan& plan;
  const Team::Member& member;

  char* own() const {
    return static_cast<char*>(args.workspace) +
           static_cast<std::size_t>(member.index) * plan.thread_bytes;
  }
  // Words of 16 rows of x from row b on, [padded width / 2][16].
  float* tiles(int64_t b) const {
    return reinterpret_cast<float*>(own() + plan.tiles) + b * plan.padded_width / 2;
  }

  void pack_rows() const {
    auto* rows = reinterpret_cast<BFloat16*>(own());
    const int64_t padded = plan.padded_width;
    for (int64_t b = 0; b < args.batch; ++b)
      normalise<BFloat16>(args, b, padded, rows + b * padded);
    for (int64_t b = 0; b < args.batch; b += kTileRows) {
      for (int64_t w = 0; w < padded / 2; w += S::lanes) {
        V words[S::lanes];
        for (int64_t r = 0; r < kTileRows; ++r) {
          const auto* row = reinterpret_cast<const float*>(rows + (b + r) * padded);
          words[r] = b + r < args.batch ? S::load(row + w) : S::broadcast(0.0f);
        }
        S::transpose(words);
        for (int64_t i = 0; i < S::lanes; ++i) S::store(tiles(b) + (w + i) * kTileRows, words[i]);
      }
    }
  }

  // `count` rows of weights from column k on, zeros past the last of either.
  void load_weights(const BFloat16* weights, int64_t stride, int64_t count, int64_t k) const {
    if (count >= kTileRows && k + kDepth <= args.width) {
      return amx::load<1>(weights + k, 2 * stride);
    }
    alignas(64) BFloat16 part[kTileRows][kDepth] = {};
    const int64_t depth = args.width - k < kDepth ? args.width - k : kDepth;
    for (int64_t r = 0; r < count && r < kTileRows; ++r) {
      std::memcpy(part[r], weights + r * stride + k, static_cast<std::size_t>(depth) * 2);
    }
    amx::load<1>(part, sizeof part[0]);
  }

  void multiply(const DecodeRows& weight, int64_t n, int64_t count, int64_t b, Sums& out) const {
    for (int64_t r = 0; r < count; r += kTileRows) {
      const BFloat16* weights = row<BFloat16>(weight, n + r);
      // The next rows are asked for one after the other, as memory gives them fastest, not as a
      // tile takes them.
      const BFloat16* ahead = weights + kTileRows * weight.stride;
      const BFloat16* end = ahead + args.width;
      const float* x = tiles(b);
      amx::zero<0>();
      for (int64_t k = 0; k < args.width; k += kDepth, x += amx::kWords * kTileRows) {
        for (int64_t line = 0; line < kTileRows; ++line) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += kDepth;
          if (ahead < end) continue;
          ahead = end - args.width + weight.stride;
          end += weight.stride;
        }
        load_weights(weights, weight.stride, count - r, k);
        amx::load<2>(x, 4 * kTileRows);
        amx::dot<0, 1, 2>();
      }
      amx::store<0>(out[r], sizeof out[0]);
    }
  }

  void run() const {
    const amx::Registers registers;
    pack_rows();
    alignas(64) Sums y, up;
    const auto share = member.share(args.size, kTileRows);
    for (int64_t n = share.begin; n < share.end; n += kChunk) {
      const int64_t count = share.end - n < kChunk ? share.end - n : kChunk;
      for (int64_t b = 0; b < args.batch; b += kTileRows) {
        multiply(args.weight, n, count, b, y);
        if (args.up_weight.data) {
          multiply(args.up_weight, n, count, b, up);
          gate(y[0], up[0], round_up(count, kTileRows) * kTileRows);
        }
        for (int64_t r = 0; r < kTileRows && b + r < args.batch; ++r) {
          float of_row[kChunk];
          for (int64_t i = 0; i < kChunk; ++i) of_row[i] = y[i][r];
          finish<BFloat16>(args, b + r, n, count, of_row);
        }
      }
    }
  }
};

void run_tiled(const DecodeLinearArgs& args, const DecodeLinearPlan& plan,
               const Team::Member& member) {
  Tiled{args, plan, member}.run();
}

}  // namespace decode
}  // namespace

const DecodeLinearRun decode_linear_amx = decode::run_tiled;

}  // namespace titok
