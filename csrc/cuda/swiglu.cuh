// SwiGLU: silu(gate) * up of rows that hold gate and up side by side, and its gradient.
//
// A block takes one row, a thread 16 bytes of it at a time. The rows are dense, or FP8 tiles as
// they were stored: then the wide copy of them never exists.
#pragma once

#include "kimi/simt.h"

namespace kimi::cuda {

constexpr int kSwigluBlock = 256;

// Where gate_up [rows, 2 * width] comes from.
template <class T>
struct DenseRows {
  static constexpr int kElements = kWide<T>;
  const T* __restrict__ x;
  int64_t width;  // of gate and up together

  template <int N>
  __device__ __forceinline__ void read(float (&value)[N], int64_t row, int64_t column) const {
    const Pack<T, N> in = load<N>(x + row * width + column);
#pragma unroll
    for (int i = 0; i < N; i++) value[i] = to_float(in.at[i]);
  }
};

struct TileRows {
  static constexpr int kElements = 16;
  const uint8_t* __restrict__ q;
  const float* __restrict__ scale;
  int64_t width;

  template <int N>
  __device__ __forceinline__ void read(float (&value)[N], int64_t row, int64_t column) const {
    const Pack<uint8_t, N> in = load<N>(q + row * width + column);
    const float factor = scale[row * ((width + kTile - 1) / kTile) + column / kTile];
#pragma unroll
    for (int i = 0; i < N; i++) value[i] = float_from_e4m3(in.at[i]) * factor;
  }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class Rows, class T, int N>
__global__ void __launch_bounds__(kSwigluBlock)
    swiglu_kernel(Rows rows, T* __restrict__ y, int64_t width) {
  const int64_t row = blockIdx.x;
  for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kSwigluBlock * N) {
    float gate[N], up[N];
    rows.read(gate, row, at);
    rows.read(up, row, width + at);
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++) out.at[i] = from_float<T>(gate[i] * sigmoid(gate[i]) * up[i]);
    store(y + row * width + at, out);
  }
}

// d silu(g) / dg = s (1 + g (1 - s)) with s = sigmoid(g).
template <class Rows, class T, int N>
__global__ void __launch_bounds__(kSwigluBlock)
    swiglu_backward_kernel(const T* __restrict__ grad, Rows rows, T* __restrict__ grad_gate_up,
                           int64_t width) {
  const int64_t row = blockIdx.x;
  for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kSwigluBlock * N) {
    float gate[N], up[N];
    rows.read(gate, row, at);
    rows.read(up, row, width + at);
    const Pack<T, N> in = load<N>(grad + row * width + at);
    Pack<T, N> grad_gate, grad_up;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float g = to_float(in.at[i]), s = sigmoid(gate[i]);
      grad_gate.at[i] = from_float<T>(g * up[i] * (s * (1.0f + gate[i] * (1.0f - s))));
      grad_up.at[i] = from_float<T>(g * (gate[i] * s));
    }
    store(grad_gate_up + row * 2 * width + at, grad_gate);
    store(grad_gate_up + row * 2 * width + width + at, grad_up);
  }
}

template <class Rows, class T>
void swiglu_rows(Rows rows, T* y, int64_t count, int64_t width, bool aligned, void* stream) {
  constexpr int N = Rows::kElements;
  const bool wide = aligned && width % N == 0;
  KIMI_LAUNCH((wide ? swiglu_kernel<Rows, T, N> : swiglu_kernel<Rows, T, 1>), unsigned(count),
              kSwigluBlock, 0, stream, rows, y, width);
}

template <class Rows, class T>
void swiglu_backward_rows(const T* grad, Rows rows, T* grad_gate_up, int64_t count, int64_t width,
                          bool aligned, void* stream) {
  constexpr int N = Rows::kElements;
  const bool wide = aligned && width % N == 0;
  KIMI_LAUNCH((wide ? swiglu_backward_kernel<Rows, T, N> : swiglu_backward_kernel<Rows, T, 1>),
              unsigned(count), kSwigluBlock, 0, stream, grad, rows, grad_gate_up, width);
}

// gate_up: [rows, 2 * width]; y, grad: [rows, width].
template <class T>
void swiglu(const T* gate_up, T* y, int64_t rows, int64_t width, void* stream) {
  swiglu_rows(DenseRows<T>{gate_up, 2 * width}, y, rows, width, aligned(gate_up, y), stream);
}

template <class T>
void swiglu_backward(const T* grad, const T* gate_up, T* grad_gate_up, int64_t rows, int64_t width,
                     void* stream) {
  swiglu_backward_rows(grad, DenseRows<T>{gate_up, 2 * width}, grad_gate_up, rows, width,
                       aligned(grad, gate_up, grad_gate_up), stream);
}

// The same with gate_up as q [rows, 2 * width] and scale [rows, ceil(2 * width / 128)].
template <class T>
void swiglu_tiles(const uint8_t* q, const float* scale, T* y, int64_t rows, int64_t width,
                  void* stream) {
  swiglu_rows(TileRows{q, scale, 2 * width}, y, rows, width, aligned(q, y), stream);
}

template <class T>
void swiglu_tiles_backward(const T* grad, const uint8_t* q, const float* scale, T* grad_gate_up,
                           int64_t rows, int64_t width, void* stream) {
  swiglu_backward_rows(grad, TileRows{q, scale, 2 * width}, grad_gate_up, rows, width,
                       aligned(grad, q, grad_gate_up), stream);
}

}  // namespace kimi::cuda
