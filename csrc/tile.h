// Products of matrices in a tile of registers, for the instruction set of the including file.
#pragma once

#include "simd.h"

namespace titok {
namespace {
namespace simd {

constexpr int kTileRows = Native::tile_rows, kTileVectors = Native::tile_vectors;
constexpr int kTileColumns = kTileVectors * Native::lanes;
using Tile = Native::V[kTileRows][kTileVectors];

// acc += A B: A[r][i] at a[r * row_stride + i * step], B[i] a row of the tile's columns; a
// value is a word of `Set::terms` products.
template <class Set, int vectors, class Stride>
inline void multiply(Native::V (&acc)[kTileRows][vectors], const float* a, Stride row_stride,
                     int64_t step, const float* b, int64_t steps) {
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

template <int vectors>
inline void clear(Native::V (&acc)[kTileRows][vectors]) {
  for (auto& row : acc) {
    for (Native::V& v : row) v = Native::broadcast(0.0f);
  }
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

}  // namespace simd
}  // namespace
}  // namespace titok
