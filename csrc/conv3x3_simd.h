// conv3x3 for one instruction set: GroupNorm, and Winograd's products. A patch of 4x4 normalised
// inputs becomes 16 others, each of which all patches of a block multiply by a matrix of their own;
// 16 products give 2x2 outputs.
#pragma once

#include <type_traits>

#include "conv3x3.h"
#include "tile.h"

namespace titok {
namespace {
namespace conv {

using S = simd::Native;
using V = S::V;
using simd::Double8;
using simd::kTileColumns;
using simd::kTileRows;

// v (4 values of a row or a column) to B^T v; and 4 to 2 by A^T.
inline void transform_inputs(V& a, V& b, V& c, V& d) {
  const V first = S::sub(a, c), sum = S::add(b, c), difference = S::sub(c, b), last = S::sub(b, d);
  a = first, b = sum, c = difference, d = last;
}
inline void transform_products(V& a, V& b, V c, V d) {
  const V sum = S::add(b, c), difference = S::sub(b, c);
  a = S::add(a, sum), b = S::sub(difference, d);
}

// The inputs of a convolution, and GroupNorm's scales.
template <class T>
struct Inputs {
  const Conv3x3Args& args;
  const Conv3x3Plan& plan;
  const Team::Member& member;

  template <class U>
  U* at(std::size_t offset) const {
    return reinterpret_cast<U*>(static_cast<char*>(args.workspace) + offset);
  }
  template <class U>
  U* own(std::size_t offset) const {
    return at<U>(offset + static_cast<std::size_t>(member.index) * plan.thread_bytes);
  }
  const T* x(int64_t image, int64_t row) const {
    return static_cast<const T*>(args.x) + (image * args.height + row) * args.width * args.channels;
  }
  // GroupNorm is (x - center) factor + term, for each channel.
  float* center(int64_t image) const {
    return at<float>(plan.scales) + image * 3 * plan.padded_channels;
  }
  float* factor(int64_t image) const { return center(image) + plan.padded_channels; }
  float* term(int64_t image) const { return factor(image) + plan.padded_channels; }
  double* sums(int64_t row, int64_t group) const {
    return at<double>(plan.sums) + 2 * (row * args.groups + group);
  }
  // Sums of x and x^2 over a row's pixels, of the channels from c on, up to kSummed of them.
  static constexpr int64_t kSummed = 32;
  template <class Left>
  void sum_pixels(const T* pixels, int64_t c, const Left& left, double* out) const {
    Double8 sum[kSummed / 8], squares[kSummed / 8];
    for (auto& v : sum) v = Double8::zero();
    for (auto& v : squares) v = Double8::zero();
    for (int64_t i = 0; i < args.width; ++i, pixels += args.channels) {
      __builtin_prefetch(pixels + 16 * args.channels + c);
      for (int64_t v = 0; v < kSummed / 8; ++v) {
        const Double8 value = simd::widen8(pixels + c + 8 * v, left(8 * v));
        sum[v] = sum[v] + value;
        squares[v] = squares[v] + value * value;
      }
    }
    for (int64_t v = 0; v < kSummed / 8; ++v) {
      sum[v].store(out + c + 8 * v);
      squares[v].store(out + plan.summed_channels + c + 8 * v);
    }
  }

  // Of each row and group.
  void sum_rows() const {
    auto* of_channel = own<double>(plan.pixels);
    const int64_t group = args.channels / args.groups;
    const auto mine = member.share(args.batch * args.height);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const T* pixels = x(0, row);
      int64_t c = 0;
      for (; c + kSummed <= args.channels; c += kSummed) {
        sum_pixels(pixels, c, [](int64_t) { return 8; }, of_channel);
      }
      if (c < args.channels) {
        const int64_t rest = args.channels - c;
        const auto left = [=](int64_t from) { return rest > from ? rest - from : 0; };
        sum_pixels(pixels, c, left, of_channel);
      }
      for (int64_t g = 0; g < args.groups; ++g) {
        double* out = sums(row, g);
        out[0] = out[1] = 0.0;
        for (int64_t c = g * group; c < (g + 1) * group; ++c) {
          out[0] += of_channel[c];
          out[1] += of_channel[plan.summed_channels + c];
        }
      }
    }
  }

  void scale_channels() const {
    const int64_t group = args.channels / args.groups;
    const auto mine = member.share(args.batch * args.groups);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t image = i / args.groups, g = i % args.groups;
      double sum = 0.0, squares = 0.0;
      for (int64_t row = 0; row < args.height; ++row) {
        sum += sums(image * args.height + row, g)[0];
        squares += sums(image * args.height + row, g)[1];
      }
      const double count = static_cast<double>(group * args.height * args.width);
      const double mean = sum / count, variance = squares / count - mean * mean;
      const double scale = 1.0 / std::sqrt((variance < 0.0 ? 0.0 : variance) + args.norm_eps);
      const auto rounded_mean = static_cast<float>(mean);
      for (int64_t c = g * group; c < (g + 1) * group; ++c) {
        const double weight = simd::widen(static_cast<const T*>(args.norm)[c]) * scale;
        const double bias = simd::widen(static_cast<const T*>(args.norm_bias)[c]);
        center(image)[c] = rounded_mean;
        factor(image)[c] = static_cast<float>(weight);
        term(image)[c] = static_cast<float>(bias - (mean - rounded_mean) * weight);
      }
    }
    if (member.index > 0) return;
    for (int64_t image = 0; image < args.batch; ++image) {
      for (int64_t c = args.channels; c < plan.padded_channels; ++c) {
        center(image)[c] = factor(image)[c] = term(image)[c] = 0.0f;
      }
    }
  }

  // For normalise(): to be called by every member.
  void prepare() const {
    if (args.groups == 0) return;
    sum_rows();
    member.barrier();
    scale_channels();
    member.barrier();
  }

  // The scales of a vector of channels of an image.
  struct Scale {
    V mean, weight, bias;
  };
  Scale scale(int64_t image, int64_t c) const {
    const V zero = S::broadcast(0.0f);
    if (args.groups == 0) return {zero, zero, zero};
    return {S::load(center(image) + c), S::load(factor(image) + c), S::load(term(image) + c)};
  }

  // The vector of channels that begins at `pixel`, of which `left` exist.
  V normalise(const T* pixel, int64_t left, const Scale& scale) const {
    const V v = simd::load_row(pixel, left);
    if (args.groups == 0) return v;
    return simd::silu(S::fmadd(S::sub(v, scale.mean), scale.weight, scale.bias));
  }

  // One vector of an output pixel from channel o on, where `left` have room.
  void finish(V sum, int64_t image, int64_t y, int64_t x, int64_t o, int64_t left) const {
    const int64_t to = ((image * plan.height + y) * plan.width + x) * args.outputs + o;
    if (args.residual) {
      sum = S::add(sum, simd::load_row(static_cast<const T*>(args.residual) + to, left));
    }
    simd::store_row(static_cast<T*>(args.out) + to, sum, left);
  }
  V bias(int64_t o, int64_t left) const {
    return args.bias ? simd::load_row(static_cast<const T*>(args.bias) + o, left)
                     : S::broadcast(0.0f);
  }
};

template <class T>
struct Winograd : Inputs<T> {
  static_assert(kTileRows == 16 || kConv3x3Patches / 2 % kTileRows == 0, "a block is whole tiles");
  using Words = std::conditional_t<std::is_same_v<T, simd::BFloat16>, simd::Words, simd::Single>;
  using Value = typename Words::Value;
  using Inputs<T>::args;
  using Inputs<T>::plan;
  using Inputs<T>::member;

  // Patches [y, y + rows) by [x, x + columns) of an image.
  struct Block {
    int64_t image, y, x, rows, columns;
    int64_t patches() const { return rows * columns; }
  };

  Value* inputs(int64_t position, int64_t patch) const {
    auto* all = this->template own<Value>(plan.inputs);
    return all + (position * plan.block_patches + patch) * plan.padded_channels;
  }
  float* products(int64_t position, int64_t patch) const {
    auto* all = this->template own<float>(plan.products);
    return all + (position * plan.block_patches + patch) * kTileColumns;
  }

  // The block's pixels and those around it, of a vector of channels: normalised, zeros outside.
  void load_pixels(const Block& block, int64_t c, float* out) const {
    const int64_t columns = 2 * block.columns + 2, left = args.channels - c;
    const int64_t first = 2 * block.x - 1;
    const int64_t begin = first < 0 ? 1 : 0;
    const int64_t end = first + columns > plan.width ? plan.width - first : columns;
    const V zero = S::broadcast(0.0f);
    const auto scale = this->scale(block.image, c);
    for (int64_t r = 0; r < 2 * block.rows + 2; ++r, out += columns * S::lanes) {
      const int64_t y = 2 * block.y - 1 + r;
      if (y < 0 || y >= plan.height) {
        for (int64_t i = 0; i < columns; ++i) S::store(out + i * S::lanes, zero);
        continue;
      }
      const T* row = this->x(block.image, y >> args.upsample) + c;
      if (begin > 0) S::store(out, zero);
      for (int64_t i = begin; i < end; ++i) {
        const T* pixel = row + ((first + i) >> args.upsample) * args.channels;
        __builtin_prefetch(pixel + 2 * S::lanes);
        S::store(out + i * S::lanes, this->normalise(pixel, left, scale));
      }
      for (int64_t i = end; i < columns; ++i) S::store(out + i * S::lanes, zero);
    }
  }

  void transform(const Block& block) const {
    auto* pixels = this->template own<float>(plan.pixels);
    const int64_t columns = 2 * block.columns + 2;
    for (int64_t c = 0; c < plan.padded_channels; c += S::lanes) {
      load_pixels(block, c, pixels);
      for (int64_t i = 0; i < block.patches(); ++i) {
        const float* corner =
            pixels + 2 * (i / block.columns * columns + i % block.columns) * S::lanes;
        V d[4][4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
          for (int s = 0; s < 4; ++s) d[r][s] = S::load(corner + (r * columns + s) * S::lanes);
        }
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) transform_inputs(d[0][s], d[1][s], d[2][s], d[3][s]);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          transform_inputs(d[r][0], d[r][1], d[r][2], d[r][3]);
#pragma GCC unroll 4
          for (int s = 0; s < 4; ++s) Words::store(inputs(4 * r + s, i) + c, d[r][s]);
        }
      }
    }
  }

  // Of all patches and the outputs of a panel.
  void multiply(const Block& block, int64_t panel) const {
    const int64_t words = plan.padded_channels / Words::terms;
    const auto* weight =
        static_cast<const float*>(args.weight) + panel * kConv3x3Positions * words * kTileColumns;
    for (int64_t p = 0; p < kConv3x3Positions; ++p, weight += words * kTileColumns) {
      for (int64_t i = 0; i < block.patches(); i += kTileRows) {
        simd::product_to<Words, simd::kTileVectors>(products(p, i), kTileColumns,
                                                    reinterpret_cast<const float*>(inputs(p, i)),
                                                    words, 1, weight, words);
      }
    }
  }

  void finish(const Block& block, int64_t panel) const {
    for (int64_t i = 0; i < block.patches(); ++i) {
      const int64_t y = 2 * (block.y + i / block.columns), x = 2 * (block.x + i % block.columns);
      for (int64_t v = 0; v < kTileColumns; v += S::lanes) {
        const int64_t o = panel * kTileColumns + v, left = args.outputs - o;
        if (left <= 0) break;
        V d[4][4];
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) d[r][s] = S::load(products(4 * r + s, i) + v);
          transform_products(d[0][s], d[1][s], d[2][s], d[3][s]);
        }
        const V bias = this->bias(o, left);
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          transform_products(d[r][0], d[r][1], d[r][2], d[r][3]);
#pragma GCC unroll 2
          for (int s = 0; s < 2; ++s) {
            if (y + r >= plan.height || x + s >= plan.width) continue;
            Inputs<T>::finish(S::add(d[r][s], bias), block.image, y + r, x + s, o, left);
          }
        }
      }
    }
  }

  Block block(int64_t number) const {
    const int64_t across = number % plan.blocks_across, rest = number / plan.blocks_across;
    const auto size = [](int64_t from, int64_t most, int64_t end) {
      return end - from < most ? end - from : most;
    };
    Block b{rest / plan.blocks_down, rest % plan.blocks_down * plan.block_rows,
            across * plan.block_columns, 0, 0};
    b.rows = size(b.y, plan.block_rows, plan.patch_rows);
    b.columns = size(b.x, plan.block_columns, plan.patch_columns);
    return b;
  }

  void run() const {
    this->prepare();
    const int64_t panels = (args.outputs + kTileColumns - 1) / kTileColumns;
    const int64_t blocks = args.batch * plan.blocks_down * plan.blocks_across;
    const auto mine = member.share(blocks * plan.parts);
    int64_t transformed = -1;
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t number = item / plan.parts, part = item % plan.parts;
      const Block b = block(number);
      if (number != transformed) transform(b);
      transformed = number;
      const int64_t end = panels * (part + 1) / plan.parts;
      for (int64_t panel = panels * part / plan.parts; panel < end; ++panel) {
        multiply(b, panel);
        finish(b, panel);
      }
    }
  }
};

#if !defined(__AMX_BF16__)
void run(const Conv3x3Args& args, const Conv3x3Plan& plan, const Team::Member& member) {
  simd::with_type(args.dtype, [&](auto x) { Winograd<decltype(x)>{{args, plan, member}}.run(); });
}

constexpr Conv3x3Kernel make_kernel() {
  return {Conv3x3Method::winograd, kTileColumns, 16, simd::Words::terms == 2, run};
}
#endif

}  // namespace conv
}  // namespace
}  // namespace titok
