// FP8 storage in 1x128 tiles on the CPU; the bytes of cuda/fp8_tiles.cuh.
#pragma once

#include <algorithm>
#include <type_traits>

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
      for (int i = 0; i < count; i++) {
        const float size = float_of(float_bits(magnitude(x[i])));
        q[i] = e4m3_from_magnitude(size * of.inverse) | e4m3_sign(x[i]);
      }
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
    for (int i = 0; i < count; i++) x[i] = from_narrow<T>(float_from_e4m3(q[i]) * scale);
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

  static KIMI_INLINE void run_avx512(const uint8_t* q, const float* scale, bf16* x, int64_t rows,
                                     int64_t width)
    requires std::is_same_v<T, bf16>
  {
    for (int64_t row = 0; row < rows; row++) {
      int64_t left = width;
      for (; left >= kTile; left -= kTile, x += kTile, q += kTile) {
        if (!tile_by_mantissa(q, *scale, x)) tile(q, *scale, x, kTile);
        scale++;
      }
      if (left) tile(q, *scale++, x, int(left));
      x += left;
      q += left;
    }
  }

 private:
  // One instruction looks up 32 words of 32.
  static constexpr int kWords = 32;
  typedef uint16_t Words __attribute__((vector_size(2 * kWords)));
  typedef uint16_t HalfWords __attribute__((vector_size(kWords)));
  typedef uint8_t Bytes __attribute__((vector_size(kWords)));

  // All of a tile's numbers come of 16 products, scale times E4M3's mantissas 0 to 7 (subnormal)
  // and 8 to 15; the exponent then adds to bf16's own. False where bf16 would overflow or become
  // subnormal on the way, and for NaN: those take the long way.
  static KIMI_INLINE bool tile_by_mantissa(const uint8_t* q, float scale, bf16* x) {
    uint8_t nan = 0;
    for (int i = 0; i < kTile; i++) nan |= uint8_t((q[i] & 0x7f) == kE4M3NaN);
    if (nan || !(scale > 0x1p-100f && scale < 0x1p+100f)) return false;
    static constexpr float mantissas[16] = {
        0x0p-9f, 0x1p-9f,  0x2p-9f,  0x3p-9f,  0x4p-9f,  0x5p-9f,  0x6p-9f,  0x7p-9f,
        0x8p-10f, 0x9p-10f, 0xap-10f, 0xbp-10f, 0xcp-10f, 0xdp-10f, 0xep-10f, 0xfp-10f};
    bf16 product[16];
    for (int i = 0; i < 16; i++) product[i] = from_narrow<bf16>(mantissas[i] * scale);
    HalfWords products;
    memcpy(&products, product, sizeof products);
    const Words table = __builtin_shufflevector(
        products, products, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5,
        6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int i = 0; i < kTile; i += kWords) {
      Bytes bytes;
      memcpy(&bytes, q + i, sizeof bytes);
      const Words words = __builtin_convertvector(bytes, Words);
      const Words exponent = (words >> 3) & 15;
      const Words mantissa = (words & 7) | (Words(exponent != 0) & 8);
      const Words result =
          (__builtin_shuffle(table, mantissa) + (exponent << 7)) | ((words & 0x80) << 8);
      memcpy(x + i, &result, sizeof result);
    }
    return true;
  }
};

}  // namespace kimi::cpu
