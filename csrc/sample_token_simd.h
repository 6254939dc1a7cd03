// Tokens drawn with one instruction set. Everything here is local to the including file, so that
// code compiled for one set is never linked into the path of another.
#pragma once

#include <cmath>
#include <type_traits>

#include "draw_simd.h"
#include "sample_token.h"

namespace titok {
namespace {

using draw::kChunk;
using draw::kLastBin;
using draw::S;
using draw::V;

// Draws rows with a team of threads, or with one. Every member follows the same path: what the
// members do not share out, each of them computes.
template <class T>
struct Sampler {
  const SampleTokenArgs& args;
  const SampleTokenPlan& plan;
  const Team::Member member;
  char* const workspace;  // of the team's first member

  const float* logits = nullptr;  // the row's first `whole` chunks; the rest is in row()
  int64_t whole = 0;
  float top = 0.0f, factor = 0.0f;
  int bin = kLastBin;  // tokens of the bins before it stay, and in it those
  uint32_t cut = 0;    // whose ordered() logit is not below this

  char* memory(int index) const { return workspace + index * plan.thread_bytes; }
  SampleTokenHead& head(int index) const {
    return *reinterpret_cast<SampleTokenHead*>(memory(index));
  }
  draw::Listed* list(int index) const {
    return reinterpret_cast<draw::Listed*>(memory(index) + plan.list);
  }
  draw::Bin* bins(int index) const {
    return reinterpret_cast<draw::Bin*>(memory(index) + plan.bins);
  }
  float* row() const { return reinterpret_cast<float*>(workspace + plan.row); }
  uint64_t* sums() const { return reinterpret_cast<uint64_t*>(workspace + plan.sums); }

  void barrier() const {
    if (member.size > 1) member.barrier();
  }

  const float* chunk(int64_t c) const {
    return c < whole ? logits + c * kChunk : row() + (c - whole) * kChunk;
  }

  // Makes the combined logits readable by chunk(); the largest, NaN apart.
  float combine(int64_t b) {
    const auto guidance = draw::guidance_of(args);
    const float scale = args.guidance_scale.get();
    const T* cond = static_cast<const T*>(args.cond) + b * args.cond_stride;
    const T* uncond = static_cast<const T*>(args.uncond);
    if (uncond) uncond += b * args.uncond_stride;
    whole = 0;
    if constexpr (std::is_same_v<T, float>) {
      if (guidance == draw::Guidance::none) {
        logits = cond;
        whole = args.vocabulary / kChunk;
      }
    }
    const auto range = member.share(plan.chunks);
    const auto take = [&](int64_t begin, int64_t end, float* out) {
      const int64_t first = begin * kChunk, padded = (end - begin) * kChunk;
      const int64_t left = args.vocabulary - first;
      return draw::combine_row(guidance, cond + first, uncond ? uncond + first : nullptr, scale,
                               left < padded ? left : padded, out, padded);
    };
    float largest = draw::negative_infinity();
    const int64_t read = range.end < whole ? range.end : whole;
    if (range.begin < read) largest = take(range.begin, read, nullptr);
    const int64_t kept = range.begin > whole ? range.begin : whole;
    if (kept < range.end) {
      const float x = take(kept, range.end, row() + (kept - whole) * kChunk);
      largest = x > largest ? x : largest;
    }
    head(member.index).largest = largest;
    barrier();
    for (int m = 0; m < member.size; ++m) {
      largest = head(m).largest > largest ? head(m).largest : largest;
    }
    return largest;
  }

  int64_t first_largest(float largest) const {
    if (largest == draw::negative_infinity()) return 0;
    for (int64_t c = 0;; ++c) {
      const int64_t i = draw::first_equal(chunk(c), kChunk, largest);
      if (i < kChunk) return c * kChunk + i;
    }
  }

  V exponents(const float* x) const {
    return draw::exponents(S::load(x), S::broadcast(top), S::broadcast(factor), draw::kWideLowest);
  }

  // The least exponent that is in a bin before `bin`.
  static float before(int bin) {
    return std::nextafter(-static_cast<float>(bin) / draw::kBinsPerOctave, 1.0f);
  }

  // Where S::store(uint64_t*, S::Wide) puts lane i.
  static constexpr int lane(int i) { return i % 2 * (S::lanes / 2) + i / 2; }

  void fill_bins() const {
    draw::Bin* const mine = bins(member.index);
    std::memset(mine, 0, (kLastBin + 1) * sizeof *mine);
    const float weighty = before(kLastBin);
    const V scale = S::broadcast(-draw::kBinsPerOctave);
    const auto range = member.share(plan.chunks);
    for (int64_t c = range.begin; c < range.end; ++c) {
      const float* x = chunk(c);
      uint64_t weights[kChunk];
      int32_t at[kChunk];
      int64_t count = 0;
      for (int64_t v = 0; v < kChunk; v += S::lanes) {
        const V t = exponents(x + v);
        if (!S::not_less(t, S::broadcast(weighty))) continue;
        S::store(weights + count, draw::wide_weights(t, weighty));
        S::store_truncated(at + count, S::mul(t, scale));
        count += S::lanes;
      }
      for (int64_t v = 0; v < count; v += S::lanes) {
        for (int i = 0; i < S::lanes; ++i) {
          draw::Bin& bin = mine[at[v + i]];
          bin.value[draw::by_weight] += weights[v + lane(i)];
          ++bin.value[draw::by_count];
        }
      }
    }
  }

  // Sums the weights of each chunk's tokens in the bins before `bin`, and lists those of `bin`.
  void weigh() const {
    const float kept = before(bin), listed = bin == kLastBin ? kept : before(bin + 1);
    draw::Listed* const mine = list(member.index);
    int64_t count = 0;
    const auto range = member.share(plan.chunks);
    for (int64_t c = range.begin; c < range.end; ++c) {
      const float* x = chunk(c);
      S::Sum sum{};
      for (int64_t v = 0; v < kChunk; v += S::lanes) {
        const V t = exponents(x + v);
        const unsigned inside = S::not_less(t, S::broadcast(kept));
        if (inside) S::add(sum, draw::wide_weights(t, kept));
        unsigned at = S::not_less(t, S::broadcast(listed)) & ~inside;
        if (!at) continue;
        uint64_t weights[S::lanes];
        S::store(weights, draw::wide_weights(t, listed));
        for (; at; at &= at - 1) {
          const int i = __builtin_ctz(at);
          mine[count++] = {weights[lane(i)], draw::ordered(x[v + i]),
                           static_cast<uint32_t>(c * kChunk + v + i)};
        }
      }
      sums()[c] = S::total(sum);
    }
    head(member.index).listed = count;
    barrier();
  }

  template <class Visit>
  void visit_listed(const Visit& visit) const {
    if (bin == kLastBin) return;
    for (int m = 0; m < member.size; ++m) {
      for (int64_t i = 0; i < head(m).listed; ++i) {
        if (list(m)[i].key >= cut) visit(list(m)[i]);
      }
    }
  }

  uint64_t in_bin(int b, draw::Measure measure) const {
    uint64_t sum = 0;
    for (int m = 0; m < member.size; ++m) sum += bins(m)[b].value[measure];
    return sum;
  }

  uint64_t kept_weight() const {
    uint64_t sum = 0;
    for (int b = 0; b < bin; ++b) sum += in_bin(b, draw::by_weight);
    visit_listed([&](const draw::Listed& x) { sum += x.weight; });
    return sum;
  }

  // Of the tokens kept so far, keeps those before which, from the largest logit down, no more
  // than `limit` is measured.
  void narrow(draw::Measure measure, uint64_t limit) {
    for (int b = 0; b < bin; ++b) {
      const uint64_t here = in_bin(b, measure);
      if (here > limit) {
        if (bin < kLastBin) barrier();  // others may still read what is listed
        bin = b;
        cut = 0;
        weigh();
        break;
      }
      limit -= here;
    }
    if (bin < kLastBin) cut = select(measure, limit);
  }

  // The key, among those listed, with which the measure passes `limit`: a byte a round.
  uint32_t select(draw::Measure measure, uint64_t limit) const {
    uint32_t key = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      draw::Bin digits[256] = {};
      visit_listed([&](const draw::Listed& x) {
        if ((uint64_t{x.key ^ key} >> shift) >> 8) return;
        draw::Bin& digit = digits[x.key >> shift & 0xff];
        digit.value[draw::by_weight] += x.weight;
        ++digit.value[draw::by_count];
      });
      uint32_t digit = 255;
      for (; digit > 0 && digits[digit].value[measure] <= limit; --digit) {
        limit -= digits[digit].value[measure];
      }
      key |= digit << shift;
    }
    return key;
  }

  // The first kept token where the running sum of weights passes a uniform share of their total.
  int64_t find(draw::Words words) const {
    visit_listed([&](const draw::Listed& x) { sums()[x.token / kChunk] += x.weight; });
    uint64_t total = 0;
    for (int64_t c = 0; c < plan.chunks; ++c) total += sums()[c];
    if (total == 0) return 0;
    uint64_t target = draw::scaled_uniform(words.w[0], words.w[1], total);
    int64_t c = 0;
    for (; target >= sums()[c]; ++c) target -= sums()[c];
    for (int64_t v = 0;; ++v) {
      const float x = chunk(c)[v];
      if (draw::ordered(x) < cut) continue;  // a NaN has no weight either way
      const uint64_t w = draw::wide_weight(draw::exponent(x, top, factor, draw::kWideLowest));
      if (target < w) return c * kChunk + v;
      target -= w;
    }
  }

  void sample(int64_t b) {
    const float largest = combine(b), temperature = args.temperature.get();
    int64_t token = 0;
    if (temperature == 0.0f) {
      if (member.index == 0) token = first_largest(largest);
    } else {
      top = draw::finite_largest(largest);
      factor = draw::sharpness(temperature);
      bin = kLastBin;
      cut = 0;
      const bool top_k = draw::has_top_k(args), top_p = draw::has_top_p(args);
      if (top_k || top_p) {
        fill_bins();
        barrier();
      }
      if (top_k) narrow(draw::by_count, static_cast<uint64_t>(args.top_k.get()) - 1);
      if (top_p) narrow(draw::by_weight, draw::top_p_limit(args, kept_weight()));
      if (bin == kLastBin) weigh();
      if (member.index == 0) token = find(draw::words_of(args, b));
    }
    if (member.index == 0) args.tokens[b] = token;
  }
};

template <class T>
void sample_rows(const SampleTokenArgs& args, const SampleTokenPlan& plan,
                 const Team::Member& member) {
  char* const workspace = static_cast<char*>(args.workspace);
  const auto share = member.share(plan.alone);
  Sampler<T> alone{args, plan, {member.team, 0, 1}, workspace + member.index * plan.thread_bytes};
  for (int64_t b = share.begin; b < share.end; ++b) alone.sample(b);
  Sampler<T> together{args, plan, member, workspace};
  for (int64_t b = plan.alone; b < args.batch; ++b) {
    if (b > 0) member.barrier();  // the row before may still be read
    together.sample(b);
  }
}

void run(const SampleTokenArgs& args, const SampleTokenPlan& plan, const Team::Member& member) {
  simd::with_type(args.dtype, [&](auto x) { sample_rows<decltype(x)>(args, plan, member); });
}

}  // namespace
}  // namespace titok
