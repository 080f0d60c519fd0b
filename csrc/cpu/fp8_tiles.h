// FP8 storage in 1x128 tiles on the CPU; the bytes of cuda/fp8_tiles.cuh.
#pragma once

#include <algorithm>

#include "isa.h"

namespace kimi::cpu {

template <class T>
struct QuantiseTiles {
  static KIMI_INLINE void tile(const T* x, uint8_t* q, float* scale, int count) {
    auto largest = magnitude(T{});
    for (int i = 0; i < count; i++) largest = std::max(largest, magnitude(x[i]));
    const TileScale of = tile_scale(float_bits(largest));
    *scale = of.scale;
    if (of.finite) {
      for (int i = 0; i < count; i++) q[i] = e4m3_from_float(to_float(x[i]) * of.inverse);
    } else {
      memset(q, kE4M3NaN, size_t(count));
    }
  }

  static KIMI_INLINE void run(const T* x, uint8_t* q, float* scale, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++) {
      int64_t left = width;
      for (; left >= kTile; left -= kTile, x += kTile, q += kTile) tile(x, q, scale++, kTile);
      if (left) tile(x, q, scale++, int(left));
      x += left;
      q += left;
    }
  }
};

template <class T>
struct DequantiseTiles {
  static KIMI_INLINE void tile(const uint8_t* q, float scale, T* x, int count) {
    for (int i = 0; i < count; i++) x[i] = from_float<T>(float_from_e4m3(q[i]) * scale);
  }

  static KIMI_INLINE void run(const uint8_t* q, const float* scale, T* x, int64_t rows,
                              int64_t width) {
    for (int64_t row = 0; row < rows; row++) {
      int64_t left = width;
      for (; left >= kTile; left -= kTile, x += kTile, q += kTile) tile(q, *scale++, x, kTile);
      if (left) tile(q, *scale++, x, int(left));
      x += left;
      q += left;
    }
  }
};

}  // namespace kimi::cpu
