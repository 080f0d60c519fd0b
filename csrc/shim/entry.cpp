// Plain C doors for tests: the CUDA kernels through the shim, and the CPU loops of a chosen set.
#include "fp8_tiles.cuh"
#include "../cpu/fp8_tiles.h"

using namespace kimi;

#define DOOR extern "C" __attribute__((visibility("default"))) void

DOOR simt_seed(int64_t seed) { simt::seed = uint64_t(seed); }

// 0 baseline, 1 AVX2, 2 AVX-512; what the machine lacks is not asked for.
DOOR cpu_isa(int64_t wanted) { cpu::isa() = cpu::Isa(std::min<int64_t>(wanted, int(cpu::widest_isa()))); }

#define FP8_DOORS(T, suffix)                                                                       \
  DOOR quantise_tiles_cuda_##suffix(const T* x, uint8_t* q, float* scale, int64_t rows,            \
                                    int64_t width) {                                               \
    cuda::quantise_tiles(x, q, scale, rows, width, nullptr);                                       \
  }                                                                                                \
  DOOR quantise_tiles_cpu_##suffix(const T* x, uint8_t* q, float* scale, int64_t rows,             \
                                   int64_t width) {                                                \
    cpu::run<cpu::QuantiseTiles<T>>(x, q, scale, rows, width);                                     \
  }                                                                                                \
  DOOR dequantise_tiles_cuda_##suffix(const uint8_t* q, const float* scale, T* x, int64_t rows,    \
                                      int64_t width) {                                             \
    cuda::dequantise_tiles(q, scale, x, rows, width, nullptr);                                     \
  }                                                                                                \
  DOOR dequantise_tiles_cpu_##suffix(const uint8_t* q, const float* scale, T* x, int64_t rows,     \
                                     int64_t width) {                                              \
    cpu::run<cpu::DequantiseTiles<T>>(q, scale, x, rows, width);                                   \
  }

FP8_DOORS(bf16, bf16)
FP8_DOORS(float, fp32)
