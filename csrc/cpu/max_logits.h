// The largest scaled logit of a head on the CPU: 4 queries against 64 keys at a time, in registers.
#pragma once

#include <cmath>
#include <vector>

#include "rms_norm.h"

namespace kimi::cpu {

constexpr int kLogitQueries = 4;
constexpr int kLogitKeys = 64;
constexpr int kLogitGroups = kLogitKeys / kLanes;

// A NaN is larger than every number.
KIMI_INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }

// Of one sequence and head: queries [from, to) of q, k [length, width]. documents may be null.
template <class T>
struct MaxLogits {
  static KIMI_INLINE void run(const T* q, const T* k, const int64_t* documents, float scale,
                              float* largest, int64_t from, int64_t to, int64_t width) {
    std::vector<float> columns(size_t(width) * kLogitKeys);  // of 64 keys: [width, 64]
    *largest = -INFINITY;
    for (int64_t first = 0; first < to; first += kLogitKeys) {
      const int64_t count = std::min<int64_t>(kLogitKeys, to - first);
      for (int64_t d = 0; d < width; d++)
        for (int64_t j = 0; j < kLogitKeys; j++)
          columns[d * kLogitKeys + j] = j < count ? to_float(k[(first + j) * width + d]) : 0.0f;
      // Rows above `first` see none of these keys.
      for (int64_t row = std::max(from, first); row < to; row += kLogitQueries)
        rows(q, columns.data(), documents, scale, largest, row,
             int(std::min<int64_t>(kLogitQueries, to - row)), first, width);
    }
  }

 private:
  static KIMI_INLINE void rows(const T* q, const float* columns, const int64_t* documents,
                               float scale, float* largest, int64_t row, int count, int64_t first,
                               int64_t width) {
    const T* query[kLogitQueries];  // past the end, the last one again
    for (int i = 0; i < kLogitQueries; i++) query[i] = q + (row + std::min(i, count - 1)) * width;
    Lanes sum[kLogitQueries][kLogitGroups] = {};
    for (int64_t d = 0; d < width; d++) {
      Lanes key[kLogitGroups];
      memcpy(key, columns + d * kLogitKeys, sizeof key);
      for (int i = 0; i < kLogitQueries; i++) {
        const float value = to_float(query[i][d]);
        for (int g = 0; g < kLogitGroups; g++) sum[i][g] += value * key[g];
      }
    }
    for (int i = 0; i < count; i++) {
      float logit[kLogitKeys];
      memcpy(logit, sum[i], sizeof logit);
      const int64_t seen = std::min<int64_t>(kLogitKeys, row + i + 1 - first);
      for (int64_t j = 0; j < seen; j++)
        if (!documents || documents[first + j] == documents[row + i])
          *largest = larger(*largest, logit[j] * scale);
    }
  }
};

}  // namespace kimi::cpu
