// The CUDA kernels of all ops, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>

#include "fp8_tiles.cuh"
#include "kimi/glue.h"
#include "max_logits.cuh"
#include "permute.cuh"
#include "rms_norm.cuh"
#include "swiglu.cuh"

namespace {

struct Cuda {
  struct Scope {
    explicit Scope(int32_t device)
        : guard(device),
          stream(torch::stable::accelerator::getCurrentStream(device).nativeHandle()) {}
    void check() const {
      const cudaError_t error = cudaGetLastError();
      KIMI_CHECK(error == cudaSuccess, "a kernel was not launched: ", cudaGetErrorString(error));
    }
    torch::stable::accelerator::DeviceGuard guard;
    void* stream;
  };

  // Indices are on the device and trusted: reading them would stop the CPU until the GPU is there.
  static void check_index(const kimi::Tensor&, int64_t) {}

  static int64_t strips(int64_t rows) { return kimi::cuda::strips(rows); }
  static int64_t logit_blocks(int64_t length) { return kimi::cuda::logit_blocks(length); }

#define KIMI_FORWARD(op)              \
  template <class... A>               \
  static void op(A... a) {            \
    kimi::cuda::op(a...);             \
  }
  KIMI_FORWARD(quantise_tiles)
  KIMI_FORWARD(dequantise_tiles)
  KIMI_FORWARD(swiglu)
  KIMI_FORWARD(swiglu_backward)
  KIMI_FORWARD(swiglu_tiles)
  KIMI_FORWARD(swiglu_tiles_backward)
  KIMI_FORWARD(rms_norm)
  KIMI_FORWARD(rms_norm_backward)
  KIMI_FORWARD(take_rows)
  KIMI_FORWARD(weighted_rows)
  KIMI_FORWARD(weighted_rows_backward)
  KIMI_FORWARD(max_logits)
#undef KIMI_FORWARD
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kimi_pretrain, CUDA, m) { kimi::implement<Cuda>(m); }
