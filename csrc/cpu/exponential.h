// The sigmoid as loops can vectorise it: the C library's exp is a call a number.
#pragma once

#include "kimi/numeric.h"

namespace kimi::cpu {

// 1 + exp(-x). The exponential is within 0.9 units in the last place for |x| <= 87, and held at
// those ends beyond and for NaN. The multiply-adds are fused by name: a machine without the
// instruction calls the C library, slowly, for the same bytes.
KIMI_INLINE float one_plus_exp_of_minus(float x) {
  // As an integer |x| is held by one instruction; a comparison of floats is four, for NaN's sake.
  const uint32_t bound = 0x42ae0000, size = bits_of(x) & 0x7fffffff;  // 87
  const float minus = float_of((~bits_of(x) & 0x80000000) | (size < bound ? size : bound));
  // minus = n ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, which then
  // stands in the low bits of the sum: with 127 beside it as the exponent of 2^n.
  const float round = 12582912.0f + 127.0f;
  const float shifted = __builtin_fmaf(minus, 1.44269504f, round);
  const float n = shifted - round;
  float r = __builtin_fmaf(n, -0.693359375f, minus);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  // exp(r) by a polynomial of least relative error: 0.05 units in the last place.
  float p = 1.3814597845e-3f;
  p = __builtin_fmaf(p, r, 8.3687169546e-3f);
  p = __builtin_fmaf(p, r, 4.1668388062e-2f);
  p = __builtin_fmaf(p, r, 1.6666520631e-1f);
  p = __builtin_fmaf(p, r, 4.9999993448e-1f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  return __builtin_fmaf(p, float_of(bits_of(shifted) << 23), 1.0f);
}

KIMI_INLINE float sigmoid(float x) { return 1.0f / one_plus_exp_of_minus(x); }

}  // namespace kimi::cpu
