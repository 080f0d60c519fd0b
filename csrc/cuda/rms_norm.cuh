// RMSNorm: y = weight * x / sqrt(mean(x^2) + eps) over rows, and its gradient.
//
// A block takes a row at a time and reads it twice, the second time from cache. Sums over rows
// (the weight's gradient) are taken strip by strip and then over strips, in a fixed order.
#pragma once

#include "block_reduce.cuh"
#include "kimi/simt.h"

namespace kimi::cuda {

constexpr int kNormBlock = 256;
// Two blocks for each of an H100's 132 multiprocessors; a constant, so that no other GPU rounds
// otherwise.
constexpr int64_t kStrips = 264;
// Of a block, on every GPU, less what its sums take beside the row of a strip.
constexpr size_t kSharedBytes = (48 << 10) - 256;

inline int64_t strips(int64_t rows) { return rows < kStrips ? rows : kStrips; }

template <class T, int N>
__global__ void __launch_bounds__(kNormBlock)
    rms_norm_kernel(const T* __restrict__ x, const T* __restrict__ weight, float eps,
                    T* __restrict__ y, float* __restrict__ scale, int64_t width) {
  const int64_t row = blockIdx.x;
  x += row * width;
  y += row * width;
  float squares = 0;
  for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kNormBlock * N) {
    const Pack<T, N> in = load<N>(x + at);
#pragma unroll
    for (int i = 0; i < N; i++) squares += to_float(in.at[i]) * to_float(in.at[i]);
  }
  const float mean = block_sum<kNormBlock>(squares) / float(width);
  const float factor = 1.0f / sqrtf(mean + eps);
  for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kNormBlock * N) {
    const Pack<T, N> in = load<N>(x + at), w = load<N>(weight + at);
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; i++)
      out.at[i] = from_float<T>(to_float(in.at[i]) * factor * to_float(w.at[i]));
    store(y + at, out);
  }
  if (threadIdx.x == 0) scale[row] = factor;
}

// With n = x * scale: dx = scale * (dy * w - n * mean(dy * w * n)), dw = sum over rows of dy * n.
// A thread has the same columns of every row, so its sums are its own: in shared memory, or for rows
// too wide for it where they end anyway.
template <class T, int N, bool kInShared>
__global__ void __launch_bounds__(kNormBlock)
    rms_norm_backward_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                             const T* __restrict__ weight, const float* __restrict__ scale,
                             T* __restrict__ grad_x, float* __restrict__ partial, int64_t rows,
                             int64_t width) {
  float* sums = partial + blockIdx.x * width;
  if constexpr (kInShared) {
    KIMI_DYNAMIC_SHARED(float, memory);
    sums = memory;
  }
  for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kNormBlock * N)
    store(sums + at, Pack<float, N>{});
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t begin = row * width;
    const float factor = scale[row];
    float dot = 0;
    for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kNormBlock * N) {
      const Pack<T, N> dy = load<N>(grad + begin + at), in = load<N>(x + begin + at);
      const Pack<T, N> w = load<N>(weight + at);
#pragma unroll
      for (int i = 0; i < N; i++)
        dot += to_float(dy.at[i]) * to_float(w.at[i]) * (to_float(in.at[i]) * factor);
    }
    const float mean = block_sum<kNormBlock>(dot) / float(width);
    // Unrolled, nvcc stores neighbours of fp32 one by one: it no longer sees that they may go together.
#pragma unroll 1
    for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kNormBlock * N) {
      const Pack<T, N> dy = load<N>(grad + begin + at), in = load<N>(x + begin + at);
      const Pack<T, N> w = load<N>(weight + at);
      Pack<float, N> sum = load<N>(sums + at);
      Pack<T, N> dx;
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float g = to_float(dy.at[i]), normal = to_float(in.at[i]) * factor;
        dx.at[i] = from_float<T>(factor * (g * to_float(w.at[i]) - normal * mean));
        sum.at[i] += g * normal;
      }
      store(grad_x + begin + at, dx);
      store(sums + at, sum);
    }
  }
  if constexpr (kInShared)
    for (int64_t at = int64_t(threadIdx.x) * N; at < width; at += kNormBlock * N)
      store(partial + blockIdx.x * width + at, load<N>(sums + at));
}

// total[column] = sum over strips of partial[strip, column]: 32 columns a block, N neighbours a
// thread, so that every group of threads has strips of its own.
constexpr int kSumColumns = 32;

template <int N>
__global__ void __launch_bounds__(kNormBlock)
    column_sums_kernel(const float* __restrict__ partial, float* __restrict__ total,
                       int64_t strip_count, int64_t width) {
  constexpr int kAcross = kSumColumns / N, kGroups = kNormBlock / kAcross;
  KIMI_SHARED(float, sums, kNormBlock * N);
  const int lane = int(threadIdx.x) % kAcross, group = int(threadIdx.x) / kAcross;
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + lane * N;
  Pack<float, N> sum{};
  const auto add = [&sum](const Pack<float, N>& other) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < N; i++) sum.at[i] += other.at[i];
  };
  if (column < width)
    for (int64_t strip = group; strip < strip_count; strip += kGroups)
      add(load<N>(partial + strip * width + column));
  store(sums + threadIdx.x * N, sum);
  __syncthreads();  // every group's sum is written
  if (group == 0 && column < width) {
    for (int other = 1; other < kGroups; other++)
      add(load<N>(sums + (other * kAcross + lane) * N));
    store(total + column, sum);
  }
}

// x, y: [rows, width]; weight: [width]; scale: [rows].
template <class T>
void rms_norm(const T* x, const T* weight, float eps, T* y, float* scale, int64_t rows,
              int64_t width, void* stream) {
  const bool wide = width % kWide<T> == 0 && aligned(x, weight, y);
  KIMI_LAUNCH((wide ? rms_norm_kernel<T, kWide<T>> : rms_norm_kernel<T, 1>), unsigned(rows),
              kNormBlock, 0, stream, x, weight, eps, y, scale, width);
}

// partial: [strips(rows), width] of working memory; grad_weight: [width] fp32.
template <class T>
void rms_norm_backward(const T* grad, const T* x, const T* weight, const float* scale, T* grad_x,
                       float* partial, float* grad_weight, int64_t rows, int64_t width,
                       void* stream) {
  const bool wide = width % kWide<T> == 0 && aligned(grad, x, weight, grad_x, partial);
  const unsigned blocks = unsigned(strips(rows));
  const size_t bytes = size_t(width) * sizeof(float);
  if (bytes <= kSharedBytes)
    KIMI_LAUNCH((wide ? rms_norm_backward_kernel<T, kWide<T>, true>
                      : rms_norm_backward_kernel<T, 1, true>),
                blocks, kNormBlock, bytes, stream, grad, x, weight, scale, grad_x, partial, rows,
                width);
  else
    KIMI_LAUNCH((wide ? rms_norm_backward_kernel<T, kWide<T>, false>
                      : rms_norm_backward_kernel<T, 1, false>),
                blocks, kNormBlock, 0, stream, grad, x, weight, scale, grad_x, partial, rows,
                width);
  const bool sums_wide = width % kWide<float> == 0 && aligned(partial, grad_weight);
  KIMI_LAUNCH((sums_wide ? column_sums_kernel<kWide<float>> : column_sums_kernel<1>),
              blocks_for(width, kSumColumns), kNormBlock, 0, stream, partial, grad_weight,
              int64_t(blocks), width);
}

}  // namespace kimi::cuda
