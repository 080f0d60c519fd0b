// The largest scaled logit of a head on the CPU: 8 queries against 32 keys at a time, in registers.
#pragma once

#include <cmath>
#include <vector>

#include "rms_norm.h"

namespace kimi::cpu {

constexpr int kLogitQueries = 8;
constexpr int kLogitKeys = 32;  // of K2's width they stay in the first cache
constexpr int kLogitGroups = kLogitKeys / kLanes;

// A NaN is larger than every number.
KIMI_INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }
KIMI_INLINE void raise(Lanes& largest, const Lanes& x) {
  largest = (x > largest) | (x != x) ? x : largest;
}

// Lanes anywhere in memory.
typedef float Loaded __attribute__((vector_size(sizeof(Lanes)), aligned(sizeof(float)), may_alias));

// sum + value * x, fused by name as in exponential.h: fast where there is the instruction, the same
// bytes where there is none. Products of bf16 are exact either way.
KIMI_INLINE void add_product(Lanes& sum, float value, const Loaded& x) {
  const Lanes lanes = x;
  Lanes result;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) result[i] = __builtin_fmaf(value, lanes[i], sum[i]);
  sum = result;
}

// Of one sequence and head: queries [from, to) of q, k [length, width]. documents may be null.
template <class T>
struct MaxLogits {
  static KIMI_INLINE void run(const T* q, const T* k, const int64_t* documents, float scale,
                              float* largest, int64_t from, int64_t to, int64_t width) {
    const int64_t groups = (to - from + kLogitQueries - 1) / kLogitQueries;
    std::vector<float> queries(size_t(groups * width * kLogitQueries));
    for (int64_t g = 0; g < groups; g++)
      columns<kLogitQueries>(queries.data() + g * width * kLogitQueries, q,
                             from + g * kLogitQueries, to, width);
    std::vector<float> keys(size_t(width * kLogitKeys));
    Lanes found[kLogitGroups];
    for (Lanes& lanes : found) lanes = Lanes{} - INFINITY;
    for (int64_t first = 0; first < to; first += kLogitKeys) {
      columns<kLogitKeys>(keys.data(), k, first, to, width);
      // Queries before the first of these keys see none of them.
      for (int64_t g = std::max<int64_t>(0, (first - from) / kLogitQueries); g < groups; g++)
        tile(found, queries.data() + g * width * kLogitQueries, keys.data(), documents, scale,
             from + g * kLogitQueries, to, first, width);
    }
    *largest = -INFINITY;
    for (const Lanes& lanes : found)
      for (int i = 0; i < kLanes; i++) *largest = larger(*largest, lanes[i]);
  }

 private:
  // Rows [first, first + N) of x [end, width] as [width, N] floats, zero past the end.
  template <int N>
  static KIMI_INLINE void columns(float* to, const T* x, int64_t first, int64_t end,
                                  int64_t width) {
    for (int i = 0; i < N; i++) {
      const T* row = x + (first + i) * width;
      for (int64_t d = 0; d < width; d++) to[d * N + i] = first + i < end ? to_float(row[d]) : 0;
    }
  }

  static KIMI_INLINE void tile(Lanes (&found)[kLogitGroups], const float* queries,
                               const float* keys, const int64_t* documents, float scale,
                               int64_t row, int64_t end, int64_t first, int64_t width) {
    Lanes sum[kLogitQueries][kLogitGroups] = {};
    for (int64_t d = 0; d < width; d++) {
      const Loaded* key = reinterpret_cast<const Loaded*>(keys + d * kLogitKeys);
#pragma GCC unroll 8
      for (int i = 0; i < kLogitQueries; i++) {
        const float value = queries[d * kLogitQueries + i];
#pragma GCC unroll 2
        for (int g = 0; g < kLogitGroups; g++) add_product(sum[i][g], value, key[g]);
      }
    }
    // Out of the registers of the sums, once: memory that is indexed would hold them all along.
    float logit[kLogitQueries][kLogitKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kLogitQueries; i++)
#pragma GCC unroll 2
      for (int g = 0; g < kLogitGroups; g++) {
        const Lanes scaled = sum[i][g] * scale;
        memcpy(logit[i] + g * kLanes, &scaled, sizeof scaled);
      }
    const int count = int(std::min<int64_t>(kLogitQueries, end - row));
    for (int i = 0; i < count; i++) {
      const int64_t seen = row + i + 1 - first;  // keys of the tile that are not in the future
      if (seen < kLogitKeys || documents) hide(logit[i], documents, row + i, seen, first);
      for (int g = 0; g < kLogitGroups; g++) {
        Lanes lanes;
        memcpy(&lanes, logit[i] + g * kLanes, sizeof lanes);
        raise(found[g], lanes);
      }
    }
  }

  static KIMI_INLINE void hide(float (&logit)[kLogitKeys], const int64_t* documents, int64_t row,
                               int64_t seen, int64_t first) {
    for (int64_t j = 0; j < kLogitKeys; j++) {
      const bool visible = j < seen && (!documents || documents[first + j] == documents[row]);
      if (!visible) logit[j] = -INFINITY;
    }
  }
};

}  // namespace kimi::cpu
