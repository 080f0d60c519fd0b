// exp and the sigmoid as loops can vectorise them: the C library's exp is a call a number.
#pragma once

#include "kimi/numeric.h"

namespace kimi::cpu {

// Within 2 units in the last place for |x| <= 87, held at those ends beyond.
KIMI_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  // x = n ln 2 + r with |r| <= ln(2) / 2; ln 2 in two parts, the first of few bits, so that its
  // product with n is exact. Adding 1.5 * 2^23 rounds to an integer.
  const float round = 12582912.0f;
  const float n = (x * 1.44269504f + round) - round;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // exp(r) = 1 + r + r^2 p(r), minimax (Cephes expf).
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * float_of(uint32_t(int32_t(n) + 127) << 23);
}

KIMI_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace kimi::cpu
