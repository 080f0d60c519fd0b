// The largest scaled logit q k^T of each chosen head, over the pairs that attention sees (QK-Clip).
//
// A block takes 64 queries of one head against all keys that they may see, 64 at a time, in fp32:
// products of bf16 are exact there. It runs for the few heads whose log-sum-exp exceeds tau, so
// blocks of other heads leave at once and the CPU need not know which those are.
#pragma once

#include "block_reduce.cuh"
#include "kimi/simt.h"

namespace kimi::cuda {

constexpr int kLogitBlock = 256;  // threads: 16 x 16, each with 4 x 4 logits
constexpr int kLogitSide = 64;    // queries and keys of a tile
constexpr int kLogitDepth = 16;   // columns of q and k in shared memory
constexpr int kLogitStride = kLogitSide + 4;  // fewer bank conflicts where columns are written

inline int64_t logit_blocks(int64_t length) { return (length + kLogitSide - 1) / kLogitSide; }

// 64 rows x 16 columns of x [length, width] from (row, column) on, columns first; zero past its end.
template <class T, int N>
__device__ __forceinline__ void read_columns(float* to, const T* __restrict__ x, int64_t row,
                                             int64_t column, int64_t length, int64_t width) {
  constexpr int kOfThread = kLogitSide * kLogitDepth / kLogitBlock;
  constexpr int kPerRow = kLogitDepth / kOfThread;
  const int at_row = int(threadIdx.x) / kPerRow, first = int(threadIdx.x) % kPerRow * kOfThread;
  const T* from = x + (row + at_row) * width + column + first;
#pragma unroll
  for (int i = 0; i < kOfThread; i += N) {
    Pack<T, N> in{};
    if (row + at_row < length && column + first + i < width) in = load<N>(from + i);
#pragma unroll
    for (int j = 0; j < N; j++) to[(first + i + j) * kLogitStride + at_row] = to_float(in.at[j]);
  }
}

// N: 4 where width is a multiple of 4 and rows are aligned. blockIdx: (64 queries, sequence x head).
template <class T, int N>
__global__ void __launch_bounds__(kLogitBlock)
    max_logits_kernel(const T* __restrict__ q, const T* __restrict__ k,
                      const int64_t* __restrict__ documents, const bool* __restrict__ chosen,
                      float scale, float* __restrict__ partial, int heads, int64_t length,
                      int64_t width) {
  KIMI_SHARED(float, queries, kLogitDepth * kLogitStride);
  KIMI_SHARED(float, keys, kLogitDepth * kLogitStride);
  const int64_t pair = blockIdx.y, first_row = int64_t(blockIdx.x) * kLogitSide;
  if (!chosen[pair % heads]) return;
  q += pair * length * width;
  k += pair * length * width;
  const int64_t* ids = documents ? documents + pair / heads * length : nullptr;
  const int of_row = int(threadIdx.x) / 16 * 4, of_key = int(threadIdx.x) % 16 * 4;
  float largest = -INFINITY;
  for (int64_t first_key = 0; first_key <= first_row; first_key += kLogitSide) {
    float sum[4][4] = {};
    for (int64_t column = 0; column < width; column += kLogitDepth) {
      read_columns<T, N>(queries, q, first_row, column, length, width);
      read_columns<T, N>(keys, k, first_key, column, length, width);
      __syncthreads();  // the columns are there
#pragma unroll
      for (int d = 0; d < kLogitDepth; d++) {
        const Pack<float, 4> a = load<4>(queries + d * kLogitStride + of_row);
        const Pack<float, 4> b = load<4>(keys + d * kLogitStride + of_key);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) sum[i][j] += a.at[i] * b.at[j];
      }
      __syncthreads();  // they have been read: the next may be written
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t row = first_row + of_row + i;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int64_t key = first_key + of_key + j;
        if (row < length && key <= row && (!ids || ids[key] == ids[row]))
          largest = Larger()(largest, sum[i][j] * scale);
      }
    }
  }
  largest = block_reduce<kLogitBlock>(largest, Larger());
  if (threadIdx.x == 0) partial[pair * gridDim.x + blockIdx.x] = largest;
}

// largest[head] over partial [sequences, heads, blocks]; -inf for a head that is not chosen.
__global__ void __launch_bounds__(kLogitBlock)
    largest_logits_kernel(const float* __restrict__ partial, const bool* __restrict__ chosen,
                          float* __restrict__ largest, int64_t sequences, int64_t blocks) {
  const int64_t head = blockIdx.x, heads = gridDim.x;
  float found = -INFINITY;
  if (chosen[head])
    for (int64_t at = threadIdx.x; at < sequences * blocks; at += kLogitBlock)
      found = Larger()(found, partial[(at / blocks * heads + head) * blocks + at % blocks]);
  found = block_reduce<kLogitBlock>(found, Larger());
  if (threadIdx.x == 0) largest[head] = found;
}

// q, k: [sequences, heads, length, width]; documents: [sequences, length] or null; chosen, largest:
// [heads]; partial: [sequences, heads, logit_blocks(length)] of working memory.
template <class T>
void max_logits(const T* q, const T* k, const int64_t* documents, const bool* chosen, float scale,
                float* partial, float* largest, int64_t sequences, int64_t heads, int64_t length,
                int64_t width, void* stream) {
  const bool wide = width % 4 == 0 && aligned(q, k);
  const unsigned blocks = unsigned(logit_blocks(length));
  KIMI_LAUNCH((wide ? max_logits_kernel<T, 4> : max_logits_kernel<T, 1>),
              dim3(blocks, unsigned(sequences * heads)), kLogitBlock, 0, stream, q, k, documents,
              chosen, scale, partial, int(heads), length, width);
  KIMI_LAUNCH(largest_logits_kernel, unsigned(heads), kLogitBlock, 0, stream, partial, chosen,
              largest, sequences, int64_t(blocks));
}

}  // namespace kimi::cuda
