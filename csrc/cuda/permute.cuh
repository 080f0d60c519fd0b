// Between token order and expert order. A slot is one of the k choices of a token: slot t * k + j.
// order [tokens * k] holds the slot of each row; inverse [tokens, k] holds the row of each slot.
//
// A block takes a row (or a token), a thread 16 bytes of it at a time; sums run over j in order,
// without atomics.
#pragma once

#include "block_reduce.cuh"
#include "kimi/simt.h"

namespace kimi::cuda {

constexpr int kPermuteBlock = 256;

template <class T, int N>
__global__ void __launch_bounds__(kPermuteBlock)
    take_rows_kernel(const T* __restrict__ x, const int64_t* __restrict__ order,
                     T* __restrict__ rows, int slots, int64_t width) {
  const T* from = x + order[blockIdx.x] / slots * width;
  T* to = rows + int64_t(blockIdx.x) * width;
  for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kPermuteBlock * N)
    store(to + at, load<N>(from + at));
}

// y[t] = sum over j of weights[t, j] * rows[inverse[t, j]]; without weights, of the rows.
template <class T, int N>
__global__ void __launch_bounds__(kPermuteBlock)
    weighted_rows_kernel(const T* __restrict__ rows, const float* __restrict__ weights,
                         const int64_t* __restrict__ inverse, T* __restrict__ y, int slots,
                         int64_t width) {
  const int64_t first = int64_t(blockIdx.x) * slots;
  for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kPermuteBlock * N) {
    float sum[N] = {};
    for (int j = 0; j < slots; j++) {
      const Pack<T, N> in = load<N>(rows + inverse[first + j] * width + at);
      const float weight = weights ? weights[first + j] : 1.0f;
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] += weight * to_float(in.at[i]);
    }
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++) out.at[i] = from_float<T>(sum[i]);
    store(y + int64_t(blockIdx.x) * width + at, out);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kPermuteBlock)
    weighted_rows_backward_kernel(const T* __restrict__ grad, const T* __restrict__ rows,
                                  const float* __restrict__ weights,
                                  const int64_t* __restrict__ order, T* __restrict__ grad_rows,
                                  float* __restrict__ grad_weights, int slots, int64_t width) {
  const int64_t slot = order[blockIdx.x], row = int64_t(blockIdx.x) * width;
  const T* dy = grad + slot / slots * width;
  const float weight = weights[slot];
  float dot = 0;
  for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kPermuteBlock * N) {
    const Pack<T, N> g = load<N>(dy + at), in = load<N>(rows + row + at);
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++) {
      dot += to_float(g.at[i]) * to_float(in.at[i]);
      out.at[i] = from_float<T>(to_float(g.at[i]) * weight);
    }
    store(grad_rows + row + at, out);
  }
  const float sum = block_sum<kPermuteBlock>(dot);
  if (threadIdx.x == 0) grad_weights[slot] = sum;
}

// x: [tokens, width]; rows: [tokens * slots, width].
template <class T>
void take_rows(const T* x, const int64_t* order, T* rows, int64_t tokens, int64_t slots,
               int64_t width, void* stream) {
  const bool wide = width % kWide<T> == 0 && aligned(x, rows);
  KIMI_LAUNCH((wide ? take_rows_kernel<T, kWide<T>> : take_rows_kernel<T, 1>),
              unsigned(tokens * slots), kPermuteBlock, 0, stream, x, order, rows, int(slots),
              width);
}

// weights: [tokens, slots] fp32 or null; y: [tokens, width].
template <class T>
void weighted_rows(const T* rows, const float* weights, const int64_t* inverse, T* y,
                   int64_t tokens, int64_t slots, int64_t width, void* stream) {
  const bool wide = width % kWide<T> == 0 && aligned(rows, y);
  KIMI_LAUNCH((wide ? weighted_rows_kernel<T, kWide<T>> : weighted_rows_kernel<T, 1>),
              unsigned(tokens), kPermuteBlock, 0, stream, rows, weights, inverse, y, int(slots),
              width);
}

template <class T>
void weighted_rows_backward(const T* grad, const T* rows, const float* weights,
                            const int64_t* order, T* grad_rows, float* grad_weights,
                            int64_t tokens, int64_t slots, int64_t width, void* stream) {
  const bool wide = width % kWide<T> == 0 && aligned(grad, rows, grad_rows);
  KIMI_LAUNCH((wide ? weighted_rows_backward_kernel<T, kWide<T>>
                    : weighted_rows_backward_kernel<T, 1>),
              unsigned(tokens * slots), kPermuteBlock, 0, stream, grad, rows, weights, order,
              grad_rows, grad_weights, int(slots), width);
}

}  // namespace kimi::cuda
