// exp and the sigmoid as loops can vectorise them: the C library's exp is a call a number.
#pragma once

#include "kimi/numeric.h"

namespace kimi::cpu {

// Within 2 units in the last place for |x| <= 87, held at those ends beyond and for NaN. The multiply-adds are
// fused by name: a machine without the instruction calls the C library, slowly, for the same bytes.
KIMI_INLINE float exponential(float x) {
  // As an integer |x| is held by one instruction; a comparison of floats is four, for NaN's sake.
  const uint32_t bound = 0x42ae0000, size = bits_of(x) & 0x7fffffff;  // 87
  x = float_of((bits_of(x) & 0x80000000) | (size < bound ? size : bound));
  // x = n ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, which then
  // stands in the low bits of the sum.
  const float round = 12582912.0f;
  const float shifted = __builtin_fmaf(x, 1.44269504f, round);
  const float n = shifted - round;
  float r = __builtin_fmaf(n, -0.693359375f, x);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  // exp(r) = 1 + r + r^2 p(r), p of least relative error: 0.05 units in the last place.
  float p = 1.3814597845e-3f;
  p = __builtin_fmaf(p, r, 8.3687169546e-3f);
  p = __builtin_fmaf(p, r, 4.1668388062e-2f);
  p = __builtin_fmaf(p, r, 1.6666520631e-1f);
  p = __builtin_fmaf(p, r, 4.9999993448e-1f);
  const float power = float_of((bits_of(shifted) << 23) + (127u << 23));  // 2^n
  return (__builtin_fmaf(p, r * r, r) + 1.0f) * power;
}

KIMI_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace kimi::cpu
