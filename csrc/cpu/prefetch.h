// Asks for what is read next. Processors look ahead by themselves, but only to a page's end: a row
// of an expert's gate is one page, and its up another.
#pragma once

#include <algorithm>

#include "kimi/numeric.h"

namespace kimi::cpu {

constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kMostAhead = 2 << 12;  // bytes: what is asked for must stay until it is read

// What lies one row, or so many bytes, behind x[0 .. count); an address past the end is ignored.
template <class T>
KIMI_INLINE void prefetch(const T* x, int64_t row_width, int count) {
  const int64_t ahead = std::min(row_width * int64_t(sizeof(T)), kMostAhead);
  const uintptr_t first = reinterpret_cast<uintptr_t>(x) + uintptr_t(ahead);
  for (int64_t at = 0; at < count * int64_t(sizeof(T)); at += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(first + uintptr_t(at)));
}

}  // namespace kimi::cpu
