// The sum of one number a thread over a block, known to all of its threads.
#pragma once

#include "kimi/simt.h"

namespace kimi::cuda {

constexpr int kWarpSize = 32;

// Every thread of the block calls it. The order of additions is fixed.
template <int kThreadCount>
__device__ __forceinline__ float block_sum(float value) {
  constexpr int kWarps = kThreadCount / kWarpSize;
  KIMI_SHARED(float, partial, kWarps);
#pragma unroll
  for (int with = kWarpSize / 2; with; with /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, with);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();  // all partial sums are written
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; i++) sum += partial[i];
  __syncthreads();  // all have been read: the next call may write
  return sum;
}

}  // namespace kimi::cuda
