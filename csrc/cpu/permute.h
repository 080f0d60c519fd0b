// Between token order and expert order on the CPU; the slots of cuda/permute.cuh.
#pragma once

#include "prefetch.h"
#include "rms_norm.h"

namespace kimi::cpu {

// Columns: a token's rows lie anywhere, and so short a piece of each is read at a time that nothing
// but this looks ahead.
constexpr int64_t kAhead = 4 * kPart;

// Tokens [from, to); weights may be null.
template <class T>
struct WeightedRows {
  static KIMI_INLINE void part(const T* rows, const float* weights, const int64_t* inverse, T* y,
                               int64_t slots, int64_t width, int count) {
    float sum[kPart] = {};
    for (int64_t j = 0; j < slots; j++) {
      const T* in = rows + inverse[j] * width;
      const float weight = weights ? weights[j] : 1.0f;
      prefetch(in, kAhead, count);
      for (int i = 0; i < count; i++) sum[i] += weight * to_float(in[i]);
    }
    for (int i = 0; i < count; i++) y[i] = from_float<T>(sum[i]);
  }

  static KIMI_INLINE void run(const T* rows, const float* weights, const int64_t* inverse, T* y,
                              int64_t from, int64_t to, int64_t slots, int64_t width) {
    for (int64_t token = from; token < to; token++) {
      const float* weight = weights ? weights + token * slots : nullptr;
      const int64_t* at_row = inverse + token * slots;
      T* out = y + token * width;
      int64_t at = 0;
      for (; at + kPart <= width; at += kPart)
        part(rows + at, weight, at_row, out + at, slots, width, kPart);
      if (at < width) part(rows + at, weight, at_row, out + at, slots, width, int(width - at));
    }
  }
};

// Rows [from, to).
template <class T>
struct WeightedRowsBackward {
  static KIMI_INLINE void run(const T* grad, const T* rows, const float* weights,
                              const int64_t* order, T* grad_rows, float* grad_weights, int64_t from,
                              int64_t to, int64_t slots, int64_t width) {
    for (int64_t row = from; row < to; row++) {
      const int64_t slot = order[row];
      const T* dy = grad + slot / slots * width;
      const T* in = rows + row * width;
      T* out = grad_rows + row * width;
      const float weight = weights[slot];
      for (int64_t i = 0; i < width; i++) out[i] = from_float<T>(to_float(dy[i]) * weight);
      const auto product = [=](int64_t i) __attribute__((always_inline)) {
        return to_float(dy[i]) * to_float(in[i]);
      };
      grad_weights[slot] = row_sum(width, product);
    }
  }
};

}  // namespace kimi::cpu
