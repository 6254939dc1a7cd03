// Products of matrices in a tile of registers, for the instruction set of the including file.
#pragma once

#include <type_traits>

#include "simd.h"

namespace titok {
namespace {
namespace simd {

constexpr int kTileRows = Native::tile_rows, kTileVectors = Native::tile_vectors;
constexpr int kTileColumns = kTileVectors * Native::lanes;
using Tile = Native::V[kTileRows][kTileVectors];

// fn(vectors of a panel), a constant of the type, for 1 to kTileVectors.
template <int vectors = kTileVectors, class Fn>
void with_vectors(int64_t columns, const Fn& fn) {
  if constexpr (vectors > 1) {
    if (columns <= (vectors - 1) * Native::lanes) return with_vectors<vectors - 1>(columns, fn);
  }
  fn(std::integral_constant<int, vectors>());
}

// To and from `out`, rows `stride` apart.
inline void load_tile(Tile& acc, const float* out, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      acc[r][v] = Native::load(out + r * stride + v * Native::lanes);
    }
  }
}
template <int vectors>
inline void add_tile(Native::V (&acc)[kTileRows][vectors], const float* in, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = Native::add(Native::load(in + r * stride + v * Native::lanes), acc[r][v]);
    }
  }
}
template <int vectors>
inline void store_tile(const Native::V (&acc)[kTileRows][vectors], float* out, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      Native::store(out + r * stride + v * Native::lanes, acc[r][v]);
    }
  }
}

#if defined(__AMX_BF16__)
// Sums are in memory, and in registers for the time of a product, always of pairs of bfloat16. The
// functions are those of the other sets, but that `step` is between words of 16: rows whose words
// are next to each other have 1, as there, and packed tiles 16.
using Registers = amx::Registers;
constexpr int64_t kWordGroup = amx::kWords;

using PackedRow = std::integral_constant<int64_t, amx::kWords>;
constexpr int64_t kPackedStep = amx::kRows;
constexpr int64_t packed_word(int64_t r, int64_t w) {
  return w / kWordGroup * kWordGroup * kTileRows + r * kWordGroup + w % kWordGroup;
}

template <class Set, int vectors>
inline void product_to(float* out, int64_t stride, const float* a, int64_t row_stride, int64_t step,
                       const float* b, int64_t steps) {
  using Sums = amx::Sums<vectors>;
  Sums::clear();
  Sums::multiply(a, row_stride, step * kWordGroup, b, vectors * Native::lanes, steps);
  Sums::store(out, 4 * stride);
}

template <class Set, int vectors>
inline void add_product_to(float* out, int64_t stride, const float* a, int64_t row_stride,
                           int64_t step, const float* b, int64_t steps) {
  using Sums = amx::Sums<vectors>;
  Sums::load(out, 4 * stride);
  Sums::multiply(a, row_stride, step * kWordGroup, b, vectors * Native::lanes, steps);
  Sums::store(out, 4 * stride);
}

template <class Set, int vectors>
inline void multiply(Native::V (&acc)[kTileRows][vectors], const float* a, int64_t row_stride,
                     int64_t step, const float* b, int64_t steps) {
  add_product_to<Set, vectors>(reinterpret_cast<float*>(acc), vectors * Native::lanes, a,
                               row_stride, step, b, steps);
}

template <class Set, int vectors>
inline void product(Native::V (&acc)[kTileRows][vectors], const float* a, int64_t row_stride,
                    int64_t step, const float* b, int64_t steps) {
  product_to<Set, vectors>(reinterpret_cast<float*>(acc), vectors * Native::lanes, a, row_stride,
                           step, b, steps);
}
#else
// Where a thread multiplies there must be one of these.
struct Registers {
  Registers() {}
};
// The words of a product must be a multiple of it, the last of them zeros.
constexpr int64_t kWordGroup = 1;

// Rows that are packed tile by tile, for multiply(): strides, and where a word of a row of a tile
// is.
using PackedRow = std::integral_constant<int64_t, 1>;
constexpr int64_t kPackedStep = kTileRows;
constexpr int64_t packed_word(int64_t r, int64_t w) { return w * kTileRows + r; }

// acc += A B: A[r][i] at a[r * row_stride + i * step], B[i] a row of the tile's columns; a
// value is a word of `Set::terms` products.
template <class Set, int vectors, class Stride>
__attribute__((always_inline)) inline void multiply(Native::V (&acc)[kTileRows][vectors],
                                                    const float* a, Stride row_stride, int64_t step,
                                                    const float* b, int64_t steps) {
  for (int64_t i = 0; i < steps; ++i, a += step, b += vectors * Native::lanes) {
    Native::V columns[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) columns[v] = Native::load(b + v * Native::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Native::V value = Native::broadcast(a[r * row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] = Set::dot(value, columns[v], acc[r][v]);
    }
  }
}

// acc = A B.
template <class Set, int vectors, class Stride>
__attribute__((always_inline)) inline void product(Native::V (&acc)[kTileRows][vectors],
                                                   const float* a, Stride row_stride, int64_t step,
                                                   const float* b, int64_t steps) {
  for (auto& row : acc) {
    for (Native::V& v : row) v = Native::broadcast(0.0f);
  }
  multiply<Set>(acc, a, row_stride, step, b, steps);
}
// out += A B.
template <class Set, int vectors, class Stride>
inline void add_product_to(float* out, int64_t stride, const float* a, Stride row_stride,
                           int64_t step, const float* b, int64_t steps) {
  Tile acc;
  static_assert(vectors == kTileVectors);
  load_tile(acc, out, stride);
  multiply<Set>(acc, a, row_stride, step, b, steps);
  store_tile(acc, out, stride);
}

// out = A B.
template <class Set, int vectors, class Stride>
inline void product_to(float* out, int64_t stride, const float* a, Stride row_stride, int64_t step,
                       const float* b, int64_t steps) {
  Native::V acc[kTileRows][vectors];
  product<Set>(acc, a, row_stride, step, b, steps);
  store_tile(acc, out, stride);
}
#endif

}  // namespace simd
}  // namespace
}  // namespace titok
