// Plain C doors for tests: the CUDA kernels through the shim, and the CPU loops of a chosen set.
#include "../cpu/fp8_tiles.h"
#include "../cpu/max_logits.h"
#include "../cpu/permute.h"
#include "../cpu/rms_norm.h"
#include "../cpu/swiglu.h"
#include "fp8_tiles.cuh"
#include "max_logits.cuh"
#include "permute.cuh"
#include "rms_norm.cuh"
#include "swiglu.cuh"

using namespace kimi;

#define DOOR extern "C" __attribute__((visibility("default")))

DOOR void simt_seed(int64_t seed) { simt::seed = uint64_t(seed); }

// 0 baseline, 1 AVX2, 2 AVX-512: the machine's widest where it lacks the one asked for.
DOOR void cpu_isa(int64_t wanted) {
  cpu::isa() = cpu::Isa(std::min<int64_t>(wanted, int(cpu::widest_isa())));
}

// A block in which half of a warp waits at a barrier and half at a shuffle.
__global__ void diverging_kernel(int* unused) {
  if (threadIdx.x < 16) __shfl_sync(0xffffffffu, 1, 0);
  else __syncthreads();
  *unused = 1;
}

DOOR void diverging() {
  int unused = 0;
  KIMI_LAUNCH(diverging_kernel, 1, 32, 0, nullptr, &unused);
}

// (a name, its parameters, what it does)
#define PAIR(op, suffix, parameters, on_cuda, on_cpu)                    \
  DOOR void op##_cuda_##suffix parameters { cuda::on_cuda; }             \
  DOOR void op##_cpu_##suffix parameters { on_cpu; }

#define DOORS(T, suffix)                                                                           \
  PAIR(quantise_tiles, suffix,                                                                     \
       (const T* x, uint8_t* q, float* scale, int64_t rows, int64_t width),                        \
       quantise_tiles(x, q, scale, rows, width, nullptr),                                          \
       cpu::run<cpu::QuantiseTiles<T>>(x, q, scale, rows, width))                                  \
  PAIR(dequantise_tiles, suffix,                                                                   \
       (const uint8_t* q, const float* scale, T* x, int64_t rows, int64_t width),                  \
       dequantise_tiles(q, scale, x, rows, width, nullptr),                                        \
       cpu::run<cpu::DequantiseTiles<T>>(q, scale, x, rows, width))                                \
  PAIR(swiglu, suffix, (const T* x, T* y, int64_t rows, int64_t width),                            \
       swiglu(x, y, rows, width, nullptr),                                                         \
       (cpu::run<cpu::Swiglu<cpu::DenseRows<T>, T>>(cpu::DenseRows<T>{x, 2 * width}, y,            \
                                                    int64_t(0), rows, width)))                     \
  PAIR(swiglu_tiles, suffix,                                                                       \
       (const uint8_t* q, const float* scale, T* y, int64_t rows, int64_t width),                  \
       swiglu_tiles(q, scale, y, rows, width, nullptr),                                            \
       (cpu::run<cpu::Swiglu<cpu::TileRows, T>>(cpu::TileRows{q, scale, 2 * width}, y, int64_t(0), \
                                                rows, width)))                                     \
  PAIR(swiglu_backward, suffix,                                                                    \
       (const T* grad, const T* x, T* grad_x, int64_t rows, int64_t width),                        \
       swiglu_backward(grad, x, grad_x, rows, width, nullptr),                                     \
       (cpu::run<cpu::SwigluBackward<cpu::DenseRows<T>, T>>(                                       \
           grad, cpu::DenseRows<T>{x, 2 * width}, grad_x, int64_t(0), rows, width)))               \
  PAIR(swiglu_tiles_backward, suffix,                                                              \
       (const T* grad, const uint8_t* q, const float* scale, T* grad_x, int64_t rows,              \
        int64_t width),                                                                            \
       swiglu_tiles_backward(grad, q, scale, grad_x, rows, width, nullptr),                        \
       (cpu::run<cpu::SwigluBackward<cpu::TileRows, T>>(                                           \
           grad, cpu::TileRows{q, scale, 2 * width}, grad_x, int64_t(0), rows, width)))            \
  PAIR(rms_norm, suffix,                                                                           \
       (const T* x, const T* weight, float eps, T* y, float* scale, int64_t rows, int64_t width),  \
       rms_norm(x, weight, eps, y, scale, rows, width, nullptr),                                   \
       cpu::run<cpu::RmsNorm<T>>(x, weight, eps, y, scale, rows, width))                           \
  PAIR(rms_norm_backward, suffix,                                                                  \
       (const T* grad, const T* x, const T* weight, const float* scale, T* grad_x,                 \
        float* partial, float* grad_weight, int64_t rows, int64_t width),                          \
       rms_norm_backward(grad, x, weight, scale, grad_x, partial, grad_weight, rows, width,        \
                         nullptr),                                                                 \
       ((void)partial, cpu::run<cpu::RmsNormBackward<T>>(grad, x, weight, scale, grad_x,           \
                                                         grad_weight, rows, width)))

#define PERMUTE_DOORS(T, suffix)                                                                   \
  DOOR void take_rows_cuda_##suffix(const T* x, const int64_t* order, T* rows, int64_t tokens,     \
                                    int64_t slots, int64_t width) {                                \
    cuda::take_rows(x, order, rows, tokens, slots, width, nullptr);                                \
  }                                                                                                \
  PAIR(weighted_rows, suffix,                                                                      \
       (const T* rows, const float* weights, const int64_t* inverse, T* y, int64_t tokens,         \
        int64_t slots, int64_t width),                                                             \
       weighted_rows(rows, weights, inverse, y, tokens, slots, width, nullptr),                    \
       cpu::run<cpu::WeightedRows<T>>(rows, weights, inverse, y, int64_t(0), tokens, slots,        \
                                      width))                                                      \
  PAIR(weighted_rows_backward, suffix,                                                             \
       (const T* grad, const T* rows, const float* weights, const int64_t* order, T* grad_rows,    \
        float* grad_weights, int64_t tokens, int64_t slots, int64_t width),                        \
       weighted_rows_backward(grad, rows, weights, order, grad_rows, grad_weights, tokens, slots,  \
                              width, nullptr),                                                     \
       cpu::run<cpu::WeightedRowsBackward<T>>(grad, rows, weights, order, grad_rows, grad_weights, \
                                              int64_t(0), tokens * slots, slots, width))

// The CPU's takes one sequence and head.
#define LOGIT_DOORS(T, suffix)                                                                     \
  DOOR void max_logits_cuda_##suffix(const T* q, const T* k, const int64_t* documents,             \
                                     const bool* chosen, float scale, float* partial,              \
                                     float* largest, int64_t sequences, int64_t heads,             \
                                     int64_t length, int64_t width) {                              \
    cuda::max_logits(q, k, documents, chosen, scale, partial, largest, sequences, heads, length,   \
                     width, nullptr);                                                              \
  }                                                                                                \
  DOOR void max_logits_cpu_##suffix(const T* q, const T* k, const int64_t* documents, float scale, \
                                    float* largest, int64_t from, int64_t to, int64_t width) {     \
    cpu::run<cpu::MaxLogits<T>>(q, k, documents, scale, largest, from, to, width);                 \
  }

DOORS(bf16, bf16)
DOORS(float, fp32)
PERMUTE_DOORS(bf16, bf16)
PERMUTE_DOORS(float, fp32)
LOGIT_DOORS(bf16, bf16)
LOGIT_DOORS(float, fp32)
