// The CUDA kernels of all ops, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>

#include "fp8_tiles.cuh"
#include "kimi/glue.h"

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

  template <class... A>
  static void quantise_tiles(A... a) {
    kimi::cuda::quantise_tiles(a...);
  }
  template <class... A>
  static void dequantise_tiles(A... a) {
    kimi::cuda::dequantise_tiles(a...);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kimi_pretrain, CUDA, m) { kimi::implement<Cuda>(m); }
