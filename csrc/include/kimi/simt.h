// What a kernel source includes first: CUDA's own words, or the shim's under a host compiler.
#pragma once

#include "kimi/numeric.h"

#if defined(__CUDACC__)
#define KIMI_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                     \
  kernel<<<dim3(blocks), dim3(threads), (shared_bytes), static_cast<cudaStream_t>(stream)>>>( \
      __VA_ARGS__)
// Shared memory of a block, aligned for packs. Macros, so that the shim can poison it before each
// block.
#define KIMI_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define KIMI_DYNAMIC_SHARED(type, name)                   \
  extern __shared__ __align__(16) unsigned char name##_[]; \
  type* const name = reinterpret_cast<type*>(name##_)
#else
#include "shim.h"
#define KIMI_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  ((void)(stream), simt::launch(kernel, dim3(blocks), dim3(threads), shared_bytes, __VA_ARGS__))
#define KIMI_SHARED(type, name, count) \
  type* const name = static_cast<type*>(simt::shared(__FILE__, __LINE__, sizeof(type) * (count)))
#define KIMI_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(simt::dynamic_shared())
#endif

namespace kimi {

// N neighbouring elements that travel together; up to 16 bytes of them in one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& values) {
  *reinterpret_cast<Pack<T, N>*>(p) = values;
}

// Elements of T in 16 bytes.
template <class T>
constexpr int kWide = 16 / int(sizeof(T));

// Whether packs may be read and written at all of these.
template <class... P>
inline bool aligned(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  return unsigned((work + per_block - 1) / per_block);
}

}  // namespace kimi
