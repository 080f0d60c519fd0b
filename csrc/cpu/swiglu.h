// SwiGLU on the CPU, dense rows or FP8 tiles, a tile's worth of columns at a time.
//
// `read` gives columns of a row as something to index; tiles are widened into its buffer first.
#pragma once

#include "exponential.h"
#include "fp8_tiles.h"

namespace kimi::cpu {

template <class T>
struct DenseRows {
  const T* x;
  int64_t width;

  struct Part {
    const T* __restrict from;
    KIMI_INLINE float operator[](int i) const { return to_float(from[i]); }
  };

  KIMI_INLINE Part read(float*, int64_t row, int64_t column, int) const {
    return {x + row * width + column};
  }
};

struct TileRows {
  const uint8_t* q;
  const float* scale;
  int64_t width;

  // The columns may begin within one tile and end in the next.
  KIMI_INLINE const float* read(float* value, int64_t row, int64_t column, int count) const {
    const float* of_row = scale + row * ((width + kTile - 1) / kTile);
    const int64_t next = (column / kTile + 1) * kTile;
    const int first = int(std::min<int64_t>(count, next - column));
    DequantiseTiles<float>::tile(q + row * width + column, of_row[column / kTile], value, first);
    if (first < count)
      DequantiseTiles<float>::tile(q + row * width + next, of_row[next / kTile], value + first,
                                   count - first);
    return value;
  }
};

template <class Rows, class T>
struct Swiglu {
  static KIMI_INLINE void part(Rows rows, T* __restrict y, int64_t row, int64_t width, int64_t at,
                               int count) {
    float gates[kTile], ups[kTile];
    const auto gate = rows.read(gates, row, at, count);
    const auto up = rows.read(ups, row, width + at, count);
    for (int i = 0; i < count; i++)
      y[i] = from_narrow<T>(gate[i] / (1.0f + exponential(-gate[i])) * up[i]);
  }

  static KIMI_INLINE void run(Rows rows, T* y, int64_t from, int64_t to, int64_t width) {
    for (int64_t row = from; row < to; row++) {
      T* out = y + row * width;
      int64_t at = 0;
      for (; at + kTile <= width; at += kTile) part(rows, out + at, row, width, at, kTile);
      if (at < width) part(rows, out + at, row, width, at, int(width - at));
    }
  }
};

template <class Rows, class T>
struct SwigluBackward {
  static KIMI_INLINE void part(const T* __restrict grad, Rows rows, T* __restrict grad_gate,
                               T* __restrict grad_up, int64_t row, int64_t width, int64_t at,
                               int count) {
    float gates[kTile], ups[kTile];
    const auto gate = rows.read(gates, row, at, count);
    const auto up = rows.read(ups, row, width + at, count);
    for (int i = 0; i < count; i++) {
      const float g = to_float(grad[i]), s = sigmoid(gate[i]);
      grad_gate[i] = from_narrow<T>(g * up[i] * (s * (1.0f + gate[i] * (1.0f - s))));
      grad_up[i] = from_narrow<T>(g * (gate[i] * s));
    }
  }

  static KIMI_INLINE void run(const T* grad, Rows rows, T* grad_gate_up, int64_t from, int64_t to,
                              int64_t width) {
    for (int64_t row = from; row < to; row++) {
      const T* dy = grad + row * width;
      T* gate = grad_gate_up + 2 * row * width;
      T* up = gate + width;
      int64_t at = 0;
      for (; at + kTile <= width; at += kTile)
        part(dy + at, rows, gate + at, up + at, row, width, at, kTile);
      if (at < width) part(dy + at, rows, gate + at, up + at, row, width, at, int(width - at));
    }
  }
};

}  // namespace kimi::cpu
