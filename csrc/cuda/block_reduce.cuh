// One number a thread of a block, brought together and known to all of its threads.
#pragma once

#include "kimi/simt.h"

namespace kimi::cuda {

constexpr int kWarpSize = 32;

// Every thread of the block calls it; combine(a, b) is an operator that may be regrouped. The order
// is fixed.
template <int kThreadCount, class Combine>
__device__ __forceinline__ float block_reduce(float value, Combine combine) {
  constexpr int kWarps = kThreadCount / kWarpSize;
  KIMI_SHARED(float, partial, kWarps);
#pragma unroll
  for (int with = kWarpSize / 2; with; with /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, with));
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();  // all partial results are written
  float result = partial[0];
#pragma unroll
  for (int i = 1; i < kWarps; i++) result = combine(result, partial[i]);
  __syncthreads();  // all have been read: the next call may write
  return result;
}

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// A NaN is larger than every number.
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return a > b || a != a ? a : b;
  }
};

template <int kThreadCount>
__device__ __forceinline__ float block_sum(float value) {
  return block_reduce<kThreadCount>(value, Sum());
}

}  // namespace kimi::cuda
