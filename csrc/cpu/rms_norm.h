// RMSNorm on the CPU. Sums run in 16 lanes that are added at the end, whatever the machine's
// vectors hold, so that every instruction set gives the same bytes.
#pragma once

#include <cmath>

#include "isa.h"

namespace kimi::cpu {

constexpr int kLanes = 16;
constexpr int kPart = 128;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// Adds values of [0, 128); the caller has zeros where a row has ended.
KIMI_INLINE void add_part(Lanes& sum, const float (&value)[kPart]) {
  for (int i = 0; i < kPart; i += kLanes) {
    Lanes lanes;
    memcpy(&lanes, value + i, sizeof lanes);
    sum += lanes;
  }
}

KIMI_INLINE float total(const Lanes& lanes) {
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += lanes[i];
  return sum;
}

// The sum over columns of value(column), for a row of `width`.
template <class Value>
KIMI_INLINE float row_sum(int64_t width, Value value) {
  Lanes sum = {};
  float part[kPart];
  int64_t at = 0;
  for (; at + kPart <= width; at += kPart) {
    for (int i = 0; i < kPart; i++) part[i] = value(at + i);
    add_part(sum, part);
  }
  if (at < width) {
    for (int i = 0; i < kPart; i++) part[i] = 0;
    for (int i = 0; at + i < width; i++) part[i] = value(at + i);
    add_part(sum, part);
  }
  return total(sum);
}

template <class T>
struct RmsNorm {
  static KIMI_INLINE void run(const T* x, const T* weight, float eps, T* y, float* scale,
                              int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++, x += width, y += width) {
      const auto square = [x](int64_t i) __attribute__((always_inline)) {
        return to_float(x[i]) * to_float(x[i]);
      };
      const float mean = row_sum(width, square) / float(width);
      const float factor = 1.0f / std::sqrt(mean + eps);
      for (int64_t i = 0; i < width; i++)
        y[i] = from_narrow<T>(to_float(x[i]) * factor * to_float(weight[i]));
      scale[row] = factor;
    }
  }
};

// Adds the rows' part of the weight's gradient to sums [width].
template <class T>
struct RmsNormBackward {
  static KIMI_INLINE void run(const T* grad, const T* x, const T* weight, const float* scale,
                              T* grad_x, float* sums, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++, grad += width, x += width, grad_x += width) {
      const float factor = scale[row];
      const auto product = [=](int64_t i) __attribute__((always_inline)) {
        return to_float(grad[i]) * to_float(weight[i]) * (to_float(x[i]) * factor);
      };
      const float mean = row_sum(width, product) / float(width);
      for (int64_t i = 0; i < width; i++) {
        const float g = to_float(grad[i]), normal = to_float(x[i]) * factor;
        grad_x[i] = from_narrow<T>(factor * (g * to_float(weight[i]) - normal * mean));
        sums[i] += g * normal;
      }
    }
  }
};

}  // namespace kimi::cpu
