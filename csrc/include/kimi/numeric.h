// Number formats and roundings, one definition for the CPU, CUDA and the shim.
//
// What decides the bytes of a result is here and takes no reduction order and no fused
// multiply-add, so that every backend gives the same bytes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define KIMI_INLINE __host__ __device__ __forceinline__
#else
#define KIMI_INLINE inline __attribute__((always_inline))
#endif

namespace kimi {

KIMI_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

KIMI_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- bfloat16: the upper half of a float ----------------------------------------------------

struct bf16 {
  uint16_t bits;
};

KIMI_INLINE float to_float(float x) { return x; }
KIMI_INLINE float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

// |x| as an integer of x's own width, which orders as |x| does, NaN above all; and that integer as
// a float's bits.
KIMI_INLINE uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }
KIMI_INLINE uint16_t magnitude(bf16 x) { return x.bits & 0x7fff; }
KIMI_INLINE uint32_t float_bits(uint32_t magnitude) { return magnitude; }
KIMI_INLINE uint32_t float_bits(uint16_t magnitude) { return uint32_t(magnitude) << 16; }

// Round to nearest, ties to even; a NaN stays one.
template <class T>
KIMI_INLINE T from_float(float x);

template <>
KIMI_INLINE float from_float<float>(float x) {
  return x;
}

template <>
KIMI_INLINE bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
#endif
}

// A float's bits with bf16's rounding in their upper half, for what was computed from bf16 numbers
// and tiles alone. A NaN that comes of those has zeros in its lower half, so that rounding cannot
// carry out of it, and no check is needed.
KIMI_INLINE uint32_t rounded_narrow(float x) {
  const uint32_t bits = bits_of(x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// from_float of the same.
template <class T>
KIMI_INLINE T from_narrow(float x) {
#if !defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(bf16)) return {uint16_t(rounded_narrow(x) >> 16)};
#endif
  return from_float<T>(x);
}

// ---- E4M3: sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity -----------------

constexpr float kE4M3Max = 448.0f;
constexpr uint8_t kE4M3NaN = 0x7f;

// The sign bit of x as E4M3's.
KIMI_INLINE uint8_t e4m3_sign(float x) { return (bits_of(x) >> 24) & 0x80; }
KIMI_INLINE uint8_t e4m3_sign(bf16 x) { return (x.bits >> 8) & 0x80; }

// Of x >= 0, rounded to nearest even. x is at most 448 but for a rounding of its own (a tile's scale
// sees to that), so that nothing overflows.
KIMI_INLINE uint8_t e4m3_from_magnitude(float x) {
  // Adding 2^20 times its power of two rounds x to three bits of mantissa: the sum's last places
  // count eighths of that power (E4M3's subnormals, those of 2^-6). Eight codes a power lie below,
  // which are the exponent's bits; 56 completes their 8 * 121 to a multiple of 256.
  const uint32_t exponent = bits_of(x) & 0x7f800000, least = 121u << 23;
  const uint32_t e = exponent > least ? exponent : least;
  return uint8_t(bits_of(x + float_of(e + (20u << 23) + 56)) + (e >> 20));
}

// Of any x within +-448, as e4m3_from_magnitude.
KIMI_INLINE uint8_t e4m3_from_float(float x) {
#if defined(__CUDA_ARCH__)
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#else
  return e4m3_sign(x) | e4m3_from_magnitude(float_of(bits_of(x) & 0x7fffffff));
#endif
}

KIMI_INLINE float float_from_e4m3(uint8_t q) {
#if defined(__CUDA_ARCH__)
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(q, __NV_E4M3)));
#else
  const uint32_t magnitude = q & 0x7f;
  const float normal = float_of((magnitude << 20) + (120u << 23));
  const float subnormal = normal + (normal - 0x1p-6f);  // no leading 1, exponent one higher
  const float finite = magnitude < 8 ? subnormal : normal;
  const float value = magnitude == kE4M3NaN ? float_of(0x7fc00000) : finite;
  return float_of(bits_of(value) | (uint32_t(q & 0x80) << 24));
#endif
}

// ---- one 1x128 tile: 128 neighbours of a row share a scale ----------------------------------

constexpr int kTile = 128;

KIMI_INLINE int64_t tiles_of(int64_t width) { return (width + kTile - 1) / kTile; }

struct TileScale {
  float scale;    // what dequantising multiplies by; NaN marks a tile with a NaN or an infinity
  float inverse;  // what quantising multiplies by
  bool finite;
};

// From the largest |x| of a tile as bits: integers order as magnitudes do, and NaN is the largest.
// A largest |x| under 2^-117 (zero too) counts as 2^-117, so that scale is a normal number and
// inverse finite.
KIMI_INLINE TileScale tile_scale(uint32_t largest_bits) {
  const float floor = 0x1p-117f;
  const float largest = float_of(largest_bits);
  const float a = largest > floor ? largest : floor;
  const bool finite = largest_bits < 0x7f800000;
  return {finite ? a / kE4M3Max : float_of(0x7fc00000), kE4M3Max / a, finite};
}

}  // namespace kimi
