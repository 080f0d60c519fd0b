// FP8 storage in 1x128 tiles: bf16 or fp32 rows to E4M3 with an fp32 scale a tile, and back.
//
// Eight threads share a tile and each holds 16 elements, so that whole tiles are read and written
// 16 bytes at a time. Both kernels are bound by bandwidth.
#pragma once

#include "kimi/simt.h"

namespace kimi::cuda {

constexpr int kElements = 16;                 // of a thread
constexpr int kThreads = kTile / kElements;   // of a tile
constexpr int kTileBlock = 256;

// Where a thread's elements lie in rows of `width`, of which only whole tiles end on a tile's end.
struct Place {
  int64_t begin;
  int count;  // how many of the 16 exist
};

template <bool kWhole>
__device__ __forceinline__ Place place(int64_t tile, int part, int64_t width, int64_t row_tiles) {
  if (kWhole) return {tile * kTile + part * kElements, kElements};
  const int64_t column = (tile % row_tiles) * kTile + part * kElements;
  const int64_t left = max(int64_t(0), width - column);
  return {tile / row_tiles * width + column, int(min(left, int64_t(kElements)))};
}

// kWhole: width is a multiple of 128 and every pointer of 16 bytes.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kTileBlock)
    quantise_tiles_kernel(const T* __restrict__ x, uint8_t* __restrict__ q,
                          float* __restrict__ scale, int64_t tiles, int64_t width,
                          int64_t row_tiles) {
  const int64_t thread = int64_t(blockIdx.x) * kTileBlock + threadIdx.x;
  const int64_t tile = thread / kThreads;
  const int part = int(threadIdx.x) % kThreads;
  // Threads past the last tile stay for the shuffles, with nothing in hand.
  const bool here = tile < tiles;
  const Place at = here ? place<kWhole>(tile, part, width, row_tiles) : Place{0, 0};

  Pack<T, kElements> in{};
  if (kWhole) {
    if (here) in = load<kElements>(x + at.begin);
  } else {
    for (int i = 0; i < at.count; i++) in.at[i] = x[at.begin + i];
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kElements; i++) largest = max(largest, float_bits(magnitude(in.at[i])));
#pragma unroll
  for (int with = kThreads / 2; with; with /= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, with));

  const TileScale tile_of = tile_scale(largest);
  Pack<uint8_t, kElements> out;
#pragma unroll
  for (int i = 0; i < kElements; i++)
    out.at[i] = tile_of.finite ? e4m3_from_float(to_float(in.at[i]) * tile_of.inverse) : kE4M3NaN;
  if (kWhole) {
    if (here) store<kElements>(q + at.begin, out);
  } else {
    for (int i = 0; i < at.count; i++) q[at.begin + i] = out.at[i];
  }
  if (here && part == 0) scale[tile] = tile_of.scale;
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kTileBlock)
    dequantise_tiles_kernel(const uint8_t* __restrict__ q, const float* __restrict__ scale,
                            T* __restrict__ x, int64_t tiles, int64_t width, int64_t row_tiles) {
  const int64_t thread = int64_t(blockIdx.x) * kTileBlock + threadIdx.x;
  const int64_t tile = thread / kThreads;
  if (tile >= tiles) return;
  const Place at = place<kWhole>(tile, int(threadIdx.x) % kThreads, width, row_tiles);
  const float factor = scale[tile];
  if (kWhole) {
    const Pack<uint8_t, kElements> in = load<kElements>(q + at.begin);
    Pack<T, kElements> out;
#pragma unroll
    for (int i = 0; i < kElements; i++)
      out.at[i] = from_float<T>(float_from_e4m3(in.at[i]) * factor);
    store<kElements>(x + at.begin, out);
  } else {
    for (int i = 0; i < at.count; i++)
      x[at.begin + i] = from_float<T>(float_from_e4m3(q[at.begin + i]) * factor);
  }
}

// x, q: [rows, width]; scale: [rows, ceil(width / 128)].
template <class T>
void quantise_tiles(const T* x, uint8_t* q, float* scale, int64_t rows, int64_t width,
                    void* stream) {
  const int64_t row_tiles = (width + kTile - 1) / kTile, tiles = rows * row_tiles;
  const bool whole = width % kTile == 0 && aligned(x, q);
  KIMI_LAUNCH((whole ? quantise_tiles_kernel<T, true> : quantise_tiles_kernel<T, false>),
              blocks_for(tiles * kThreads, kTileBlock), kTileBlock, 0, stream, x, q, scale, tiles,
              width, row_tiles);
}

template <class T>
void dequantise_tiles(const uint8_t* q, const float* scale, T* x, int64_t rows, int64_t width,
                      void* stream) {
  const int64_t row_tiles = (width + kTile - 1) / kTile, tiles = rows * row_tiles;
  const bool whole = width % kTile == 0 && aligned(x, q);
  KIMI_LAUNCH((whole ? dequantise_tiles_kernel<T, true> : dequantise_tiles_kernel<T, false>),
              blocks_for(tiles * kThreads, kTileBlock), kTileBlock, 0, stream, q, scale, x, tiles,
              width, row_tiles);
}

}  // namespace kimi::cuda
