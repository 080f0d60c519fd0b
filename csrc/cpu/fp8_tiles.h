// FP8 storage in 1x128 tiles on the CPU; the bytes of cuda/fp8_tiles.cuh.
#pragma once

#include <algorithm>
#include <type_traits>

#include "isa.h"

namespace kimi::cpu {

// One instruction works on 32 words, or on as many bits of other numbers.
constexpr int kWords = 32;
typedef uint16_t Words __attribute__((vector_size(2 * kWords)));
typedef uint16_t HalfWords __attribute__((vector_size(kWords)));
typedef uint32_t Ints __attribute__((vector_size(2 * kWords)));
typedef float Floats __attribute__((vector_size(2 * kWords)));
typedef uint8_t Bytes __attribute__((vector_size(kWords)));

template <class T>
struct QuantiseTiles {
  static KIMI_INLINE void run(const T* x, uint8_t* q, float* scale, int64_t rows, int64_t width) {
    rows_by(x, q, scale, rows, width, codes);
  }

  static KIMI_INLINE void run_avx512(const bf16* x, uint8_t* q, float* scale, int64_t rows,
                                     int64_t width)
    requires std::is_same_v<T, bf16>
  {
    rows_by(x, q, scale, rows, width, codes_by_words);
  }

 private:
  // Tiles whose scales are found before any of them is written: a scale waits for a maximum over
  // its tile and for a division, which then overlap with those of the next tile.
  static constexpr int kGroup = 8;

  template <class Codes>
  static KIMI_INLINE void rows_by(const T* x, uint8_t* q, float* scale, int64_t rows,
                                  int64_t width, Codes write) {
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t left = width; left > 0; left -= kGroup * kTile) {
        const int64_t count = std::min<int64_t>(left, kGroup * kTile);
        group(x, q, scale, count, write);
        x += count;
        q += count;
        scale += tiles_of(count);
      }
    }
  }

  template <class Codes>
  static KIMI_INLINE void group(const T* x, uint8_t* q, float* scale, int64_t count, Codes write) {
    const int full = int(count / kTile), ragged = int(count % kTile);
    TileScale of[kGroup];
    for (int t = 0; t < full; t++) of[t] = tile_scale(float_bits(largest(x + t * kTile, kTile)));
    if (ragged) of[full] = tile_scale(float_bits(largest(x + full * kTile, ragged)));
    for (int t = 0; t < full + (ragged > 0); t++) scale[t] = of[t].scale;
    for (int t = 0; t < full; t++) {
      if (of[t].finite)
        write(x + t * kTile, q + t * kTile, of[t].inverse, kTile);
      else
        memset(q + t * kTile, kE4M3NaN, kTile);
    }
    if (!ragged) return;
    if (of[full].finite)
      codes(x + full * kTile, q + full * kTile, of[full].inverse, ragged);
    else
      memset(q + full * kTile, kE4M3NaN, size_t(ragged));
  }

  static KIMI_INLINE auto largest(const T* x, int count) {
    auto size = magnitude(T{});
    for (int i = 0; i < count; i++) size = std::max(size, magnitude(x[i]));
    return size;
  }

  static KIMI_INLINE void codes(const T* x, uint8_t* q, float inverse, int count) {
    for (int i = 0; i < count; i++) {
      const float size = float_of(float_bits(magnitude(x[i])));
      q[i] = e4m3_from_magnitude(size * inverse) | e4m3_sign(x[i]);
    }
  }

  // The same for whole tiles of bf16: a word in the upper half of 32 bits is a float already, so
  // that even and odd neighbours need no widening, and their codes meet again in one word each.
  static KIMI_INLINE void codes_by_words(const bf16* x, uint8_t* q, float inverse, int) {
    for (int i = 0; i < kTile; i += kWords) {
      Words words;
      memcpy(&words, x + i, sizeof words);
      Ints even, odd;
      e4m3_from_magnitudes((Ints(words) << 16) & 0x7fff0000u, inverse, even);
      e4m3_from_magnitudes(Ints(words) & 0x7fff0000u, inverse, odd);
      const Words both = Words((even & 0xffffu) | (odd << 16)) | ((words >> 8) & 0x80);
      const Bytes bytes = __builtin_convertvector(both, Bytes);
      memcpy(q + i, &bytes, sizeof bytes);
    }
  }

  // e4m3_from_magnitude of size * inverse, in the low byte of each code. (An argument, not a result:
  // how wide vectors are returned depends on the instruction set.)
  static KIMI_INLINE void e4m3_from_magnitudes(const Ints& size, float inverse, Ints& code) {
    const Floats x = Floats(size) * inverse;
    const Ints exponent = Ints(x) & 0x7f800000u, least = Ints{} + (121u << 23);
    const Ints e = exponent > least ? exponent : least;
    code = Ints(x + Floats(e + ((20u << 23) + 56))) + (e >> 20);
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
      while (left > 0) {
        int64_t count = left;
        bool done = false;
        if (left >= kGroup * kTile) {
          count = kGroup * kTile;
          done = tiles_by_mantissa<kGroup>(q, scale, x);
        } else if (left >= kTile) {
          count = kTile;
          done = tiles_by_mantissa<1>(q, scale, x);
        }
        if (!done) run(q, scale, x, 1, count);
        q += count;
        scale += tiles_of(count);
        x += count;
        left -= count;
      }
    }
  }

 private:
  // Tiles that are looked through for NaN together.
  static constexpr int kGroup = 8;

  // All of a tile's numbers come of 16 products, scale times E4M3's mantissas 0 to 7 (subnormal)
  // and 8 to 15; the exponent then adds to bf16's own. False, and nothing written, where bf16 would
  // overflow or become subnormal on the way, and for NaN: those take the long way.
  template <int kTiles>
  static KIMI_INLINE bool tiles_by_mantissa(const uint8_t* q, const float* scale, bf16* x) {
    uint8_t nan = 0;
    for (int i = 0; i < kTiles * kTile; i++) nan |= uint8_t((q[i] & 0x7f) == kE4M3NaN);
    bool plain = !nan;
    for (int t = 0; t < kTiles; t++) plain &= scale[t] > 0x1p-100f && scale[t] < 0x1p+100f;
    if (!plain) return false;
    for (int t = 0; t < kTiles; t++) tile_by_mantissa(q + t * kTile, scale[t], x + t * kTile);
    return true;
  }

  static KIMI_INLINE void tile_by_mantissa(const uint8_t* q, float scale, bf16* x) {
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
      // The mantissa: three bits, and 8 where the exponent is not 0.
      const Bytes size = bytes & 0x7f;
      const Bytes leading = (size < 8 ? size : Bytes{} + 8) & 8;
      const Words mantissa = __builtin_convertvector((bytes & 7) | leading, Words);
      const Words words = __builtin_convertvector(bytes, Words);
      const Words result = (__builtin_shuffle(table, mantissa) + ((words & 0x78) << 4)) |
                           ((words & 0x80) << 8);
      memcpy(x + i, &result, sizeof result);
    }
  }
};

}  // namespace kimi::cpu
