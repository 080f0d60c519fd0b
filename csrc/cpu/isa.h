// One loop, compiled for each instruction set; the machine says at run time which one runs.
//
// A loop is a struct with an always-inlined static `run`. Loops are written so that the compiler
// can vectorise them without changing the order of any sum, so the set changes speed, not bytes.
// Where AVX-512 has a shorter way to the same bytes, the loop has a `run_avx512` beside it.
#pragma once

#include "kimi/numeric.h"

namespace kimi::cpu {

enum class Isa { baseline, avx2, avx512 };

inline Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// The set in use; tests ask for less than the machine has.
inline Isa& isa() {
  static Isa chosen = widest_isa();
  return chosen;
}

#if defined(__x86_64__)
template <class Loop, class... A>
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) void run_avx512(A... a) {
  if constexpr (requires { Loop::run_avx512(a...); })
    Loop::run_avx512(a...);
  else
    Loop::run(a...);
}

template <class Loop, class... A>
__attribute__((target("arch=x86-64-v3"))) void run_avx2(A... a) {
  Loop::run(a...);
}
#endif

template <class Loop, class... A>
void run(A... a) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return run_avx512<Loop>(a...);
  if (isa() == Isa::avx2) return run_avx2<Loop>(a...);
#endif
  Loop::run(a...);
}

}  // namespace kimi::cpu
