// SwiGLU on the CPU, dense rows or FP8 tiles, a tile's worth of columns at a time.
//
// `read` gives columns of a row as something to index; tiles are widened into its buffer first.
#pragma once

#include "exponential.h"
#include "fp8_tiles.h"
#include "pairs.h"
#include "prefetch.h"

namespace kimi::cpu {

template <class T>
struct DenseRows {
  const T* x;
  int64_t width;

  struct Part {
    const T* __restrict from;
    KIMI_INLINE float operator[](int i) const { return to_float(from[i]); }
  };

  KIMI_INLINE Part read(float*, int64_t row, int64_t column, int count) const {
    const T* from = x + row * width + column;
    prefetch(from, width, count);
    return {from};
  }
};

struct TileRows {
  const uint8_t* q;
  const float* scale;
  int64_t width;

  // The columns may begin within one tile and end in the next.
  KIMI_INLINE const float* read(float* value, int64_t row, int64_t column, int count) const {
    const float* of_row = scale + row * tiles_of(width);
    const int64_t next = (column / kTile + 1) * kTile;
    const int first = int(std::min<int64_t>(count, next - column));
    prefetch(q + row * width + column, width, count);
    DequantiseTiles<float>::tile(q + row * width + column, of_row[column / kTile], value, first);
    if (first < count)
      DequantiseTiles<float>::tile(q + row * width + next, of_row[next / kTile], value + first,
                                   count - first);
    return value;
  }
};

// Whether two neighbours go together: from bf16 rows to bf16 rows.
template <class Rows, class T>
constexpr bool kByPairs = std::is_same_v<Rows, DenseRows<bf16>> && std::is_same_v<T, bf16>;

template <class Rows, class T>
struct Swiglu {
  static KIMI_INLINE float value(float gate, float up) {
    return gate / one_plus_exp_of_minus(gate) * up;
  }

  static KIMI_INLINE void part(Rows rows, T* __restrict y, int64_t row, int64_t width, int64_t at,
                               int count) {
    float gates[kTile], ups[kTile];
    const auto gate = rows.read(gates, row, at, count);
    const auto up = rows.read(ups, row, width + at, count);
    int i = 0;
    if constexpr (kByPairs<Rows, T>)
      for (; i + 1 < count; i += 2) {
        const Pair a = load_pair(gate.from + i), b = load_pair(up.from + i);
        store_pair(y + i, {value(a.even, b.even), value(a.odd, b.odd)});
      }
    for (; i < count; i++) y[i] = from_narrow<T>(value(gate[i], up[i]));
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
  struct Gradients {
    float gate, up;
  };

  static KIMI_INLINE Gradients gradients(float grad, float gate, float up) {
    const float s = sigmoid(gate), silu = gate * s;
    return {grad * up * __builtin_fmaf(silu, 1.0f - s, s), grad * silu};
  }

  static KIMI_INLINE void part(const T* __restrict grad, Rows rows, T* __restrict grad_gate,
                               T* __restrict grad_up, int64_t row, int64_t width, int64_t at,
                               int count) {
    float gates[kTile], ups[kTile];
    const auto gate = rows.read(gates, row, at, count);
    const auto up = rows.read(ups, row, width + at, count);
    prefetch(grad, width, count);
    int i = 0;
    if constexpr (kByPairs<Rows, T>)
      for (; i + 1 < count; i += 2) {
        const Pair g = load_pair(grad + i);
        const Pair a = load_pair(gate.from + i), b = load_pair(up.from + i);
        const Gradients even = gradients(g.even, a.even, b.even);
        const Gradients odd = gradients(g.odd, a.odd, b.odd);
        store_pair(grad_gate + i, {even.gate, odd.gate});
        store_pair(grad_up + i, {even.up, odd.up});
      }
    for (; i < count; i++) {
      const Gradients of = gradients(to_float(grad[i]), gate[i], up[i]);
      grad_gate[i] = from_narrow<T>(of.gate);
      grad_up[i] = from_narrow<T>(of.up);
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
