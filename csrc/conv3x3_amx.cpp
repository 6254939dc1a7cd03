#include "conv3x3_simd.h"

namespace titok {
namespace {
namespace conv {

// bfloat16 as it is written down, of nine shifted products: tiles multiply so fast that Winograd's
// transforms would take longer than the products that they save.
struct Direct : Inputs<simd::BFloat16> {
  static constexpr int64_t kPixels = amx::kRows, kOutputs = 32;

  int64_t pixel_stride() const { return plan.pixel_stride; }
  int64_t row_stride() const { return plan.strip_columns * pixel_stride(); }
  // Pixel x of row y of the strip, from -1 on each.
  simd::BFloat16* pixel(int64_t y, int64_t x) const {
    return own<simd::BFloat16>(plan.inputs) + (y + 1) * row_stride() + (x + 1) * pixel_stride();
  }

  struct Strip {
    int64_t image, y, rows;
  };
  Strip strip(int64_t number) const {
    const int64_t y = number % plan.strips * plan.strip_rows, left = plan.height - y;
    return {number / plan.strips, y, left < plan.strip_rows ? left : plan.strip_rows};
  }

  // Row `to` of the strip, row y of the normalised map, zeros outside.
  void load_row(const Strip& strip, int64_t to, int64_t y) const {
    const auto zero = [&](int64_t from, int64_t pixels) {
      std::memset(pixel(to, from), 0, static_cast<std::size_t>(pixels * pixel_stride()) * 2);
    };
    if (y < 0 || y >= plan.height) return zero(-1, plan.strip_columns);
    zero(-1, 1);
    zero(plan.width, plan.strip_columns - 1 - plan.width);
    const simd::BFloat16* in = x(strip.image, y >> args.upsample);
    for (int64_t i = 0; i < plan.width; i += args.upsample ? 2 : 1) {
      simd::BFloat16* out = pixel(to, i);
      for (int64_t c = 0; c < plan.padded_channels; c += S::lanes) {
        const V v = normalise(in + c, args.channels - c, scale(strip.image, c));
        simd::Words::store(out + c, v);
        if (args.upsample) simd::Words::store(out + pixel_stride() + c, v);
      }
      in += args.channels;
    }
  }

  // `before`: the strip that lies there already, null for none.
  void load(const Strip& strip, const Strip* before) const {
    int64_t first = -1;
    if (before && before->image == strip.image && before->y + before->rows == strip.y) {
      std::memmove(pixel(-1, -1), pixel(before->rows - 1, -1),
                   static_cast<std::size_t>(2 * row_stride()) * 2);
      first = 1;
    }
    for (int64_t r = first; r <= strip.rows; ++r) load_row(strip, r, strip.y + r);
  }

  // The strip's outputs [o, o + kOutputs), the channels in groups whose weights stay in the first
  // cache.
  void multiply(const Strip& strip, int64_t o) const {
    const int64_t stride = pixel_stride() / 2, groups = plan.padded_channels / 2 / amx::kWords;
    constexpr int64_t kTile = kPixels * kOutputs, kWeights = amx::kWords * kOutputs;
    const auto* weight =
        static_cast<const float*>(args.weight) + o / kOutputs * groups * 9 * kWeights;
    const int64_t across = (plan.width + kPixels - 1) / kPixels, tiles = strip.rows * across;
    auto* sums = own<float>(plan.products);
    for (int64_t group = 0; group < groups; ++group, weight += 9 * kWeights) {
      for (int64_t tile = 0; tile < tiles; tile += 2) {
        // The last may be alone: then it is multiplied twice, and the second sums are not read.
        const auto corner = [&](int64_t t) {
          if (t == tiles) --t;
          return reinterpret_cast<const float*>(pixel(t / across - 1, t % across * kPixels - 1)) +
                 group * amx::kWords;
        };
        const float *a = corner(tile), *other_a = corner(tile + 1);
        if (group == 0) {
          amx::Square::clear();
        } else {
          amx::Square::load(sums + tile * kTile);
        }
#pragma GCC unroll 9
        for (int position = 0; position < 9; ++position) {
          const int64_t at = position / 3 * row_stride() / 2 + position % 3 * stride;
          amx::Square::multiply(a + at, other_a + at, stride, weight + position * kWeights);
        }
        amx::Square::store(sums + tile * kTile);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      finish_tile(strip, tile / across, tile % across * kPixels, o, sums + tile * kTile);
    }
  }

  void finish_tile(const Strip& strip, int64_t y, int64_t x, int64_t o, const float* sums) const {
    const int64_t pixels = plan.width - x < kPixels ? plan.width - x : kPixels;
    const int64_t outputs = args.outputs - o < kOutputs ? args.outputs - o : kOutputs;
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t v = 0; v < outputs; v += S::lanes) {
        finish(S::add(S::load(sums + i * kOutputs + v), bias(o + v, outputs - v)), strip.image,
               strip.y + y, x + i, o + v, outputs - v);
      }
    }
  }

  void run() const {
    const amx::Registers registers;
    prepare();
    const int64_t panels = (args.outputs + kOutputs - 1) / kOutputs;
    const auto mine = member.share(args.batch * plan.strips * plan.parts);
    int64_t loaded = -1;
    Strip now{}, before{};
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t number = item / plan.parts, part = item % plan.parts;
      if (number != loaded) {
        before = now;
        now = strip(number);
        load(now, loaded < 0 ? nullptr : &before);
      }
      loaded = number;
      const int64_t end = panels * (part + 1) / plan.parts;
      for (int64_t panel = panels * part / plan.parts; panel < end; ++panel) {
        multiply(now, panel * kOutputs);
      }
    }
  }
};

void run(const Conv3x3Args& args, const Conv3x3Plan& plan, const Team::Member& member) {
  Direct{{args, plan, member}}.run();
}

}  // namespace conv
}  // namespace

const Conv3x3Kernel conv3x3_amx = {Conv3x3Method::direct, conv::Direct::kOutputs, 32, true,
                                   conv::run};

}  // namespace titok
