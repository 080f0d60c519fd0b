// Two bf16 neighbours as the word of 32 bits that they are: a shift or a mask makes a float of
// each, and what comes of them meets in a word again; widening would move them between registers.
#pragma once

#include "kimi/numeric.h"

namespace kimi::cpu {

struct Pair {
  float even, odd;
};

KIMI_INLINE Pair load_pair(const bf16* x) {
  uint32_t word;
  memcpy(&word, x, sizeof word);
  return {float_of(word << 16), float_of(word & 0xffff0000)};
}

// Rounded as from_narrow.
KIMI_INLINE void store_pair(bf16* x, Pair pair) {
  const uint32_t even = rounded_narrow(pair.even), odd = rounded_narrow(pair.odd);
  const uint32_t word = (even >> 16) | (odd & 0xffff0000);
  memcpy(x, &word, sizeof word);
}

}  // namespace kimi::cpu
