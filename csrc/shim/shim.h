// Runs a CUDA kernel on the CPU, block by block, for tests: the same source, a host compiler.
//
// Each thread of a block is a fiber. __syncthreads and warp collectives are real meetings: a
// fiber that reaches one gives way until the others have come, and a meeting that can never
// happen is reported, not waited for. Between meetings a warp runs ahead of the others as far as it
// can, in an order of warps and lanes that the seed permutes, and shared memory starts as NaN: a
// barrier that is missing lets a fiber read what nobody has written yet, or what the next round
// has overwritten. Not emulated: inline PTX, textures, clusters, memory order among blocks (they
// run one after another).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;

enum class State { runnable, at_barrier, at_collective, exited };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  uint3 index{};
  unsigned linear = 0;
  State state = State::runnable;
};

// One meeting place for each lane mask in use. A lane cannot come a second time before all have
// come once, so what was brought to two meetings in a row is all that must be kept.
struct Meeting {
  uint64_t came[kWarp] = {};
  uint64_t brought[2][kWarp] = {};
};

struct Warp {
  uint32_t lanes = 0;
  uint32_t exited = 0;
  std::map<uint32_t, Meeting> meetings;
};

// Shared memory: NaN as a float, and aligned for 16-byte packs.
struct alignas(16) Sixteen {
  unsigned char bytes[16];
};
using Poisoned = std::vector<Sixteen>;

struct Block {
  dim3 grid, size;
  uint3 index{};
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<std::pair<const char*, int>, Poisoned> shared;
  size_t dynamic_bytes = 0;
  unsigned alive = 0, waiting = 0;
  uint64_t barriers = 0;
  bool progress = false;
};

inline thread_local Block* block = nullptr;
inline thread_local Fiber* self = nullptr;
inline thread_local ucontext_t scheduler;
inline uint64_t seed = 0;  // 0: threads in the order of their number

inline void give_way(State state) {
  self->state = state;
  swapcontext(&self->context, &scheduler);
  self->state = State::runnable;
}

inline void open_barrier() {
  block->waiting = 0;
  block->barriers++;
  block->progress = true;
}

inline void barrier() {
  const uint64_t mine = block->barriers;
  block->progress = true;
  if (++block->waiting == block->alive) open_barrier();
  while (block->barriers == mine) give_way(State::at_barrier);
}

// Meets the live lanes of `mask`; what every lane brought, by lane.
inline const uint64_t* meet(uint32_t mask, uint64_t value) {
  Warp& warp = block->warps[self->linear / kWarp];
  const unsigned lane = self->linear % kWarp;
  if (!(mask >> lane & 1)) {
    std::fprintf(stderr, "simt: thread %u names mask %08x without itself\n", self->linear, mask);
    std::abort();
  }
  Meeting& meeting = warp.meetings[mask];
  const uint64_t round = meeting.came[lane]++;
  meeting.brought[round % 2][lane] = value;
  block->progress = true;
  const auto complete = [&] {
    for (unsigned i = 0; i < kWarp; i++) {
      const bool expected = (mask & warp.lanes & ~warp.exited) >> i & 1;
      if (expected && meeting.came[i] <= round) return false;
    }
    return true;
  };
  while (!complete()) give_way(State::at_collective);
  return meeting.brought[round % 2];
}

template <class T>
T from_lane(uint32_t mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  uint64_t mine = 0;
  std::memcpy(&mine, &value, sizeof value);
  const uint64_t* brought = meet(mask, mine);
  const Warp& warp = block->warps[self->linear / kWarp];
  if (source < kWarp && (warp.lanes & mask) >> source & 1)
    std::memcpy(&value, &brought[source], sizeof value);
  return value;
}

// The memory of the KIMI_SHARED at this line, the same for all threads of the block.
inline void* shared(const char* file, int line, size_t bytes) {
  Poisoned& memory = block->shared[{file, line}];
  if (memory.empty()) {
    memory.resize(bytes / sizeof(Sixteen) + 1);
    std::memset(memory.data(), 0xff, memory.size() * sizeof(Sixteen));
  }
  return memory.data();
}

inline void* dynamic_shared() { return shared("", 0, block->dynamic_bytes); }

inline void enter() {
  block->body();
  self->state = State::exited;
  block->warps[self->linear / kWarp].exited |= 1u << (self->linear % kWarp);
  block->progress = true;
  // From Volta on a barrier waits for the threads that have not exited.
  if (--block->alive && block->waiting == block->alive) open_barrier();
  setcontext(&scheduler);
}

inline void start(Fiber& fiber, unsigned number) {
  const dim3& size = block->size;
  fiber.linear = number;
  fiber.index = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
  fiber.state = State::runnable;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  block->warps[number / kWarp].lanes |= 1u << (number % kWarp);
}

[[noreturn]] inline void report_deadlock() {
  const auto count = [](State state) {
    return std::count_if(block->fibers.begin(), block->fibers.end(),
                         [state](const Fiber& fiber) { return fiber.state == state; });
  };
  std::fprintf(stderr,
               "simt: block (%u,%u,%u) cannot go on: %td threads at __syncthreads, %td at a warp "
               "collective, %td exited\n",
               block->index.x, block->index.y, block->index.z, count(State::at_barrier),
               count(State::at_collective), count(State::exited));
  std::abort();
}

// Runs the fibers of one warp for as long as any of them gets on.
inline void run_warp(unsigned warp, std::mt19937_64& random) {
  const unsigned first = warp * kWarp;
  const unsigned count = std::min<unsigned>(kWarp, unsigned(block->fibers.size()) - first);
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), first);
  do {
    block->progress = false;
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      self = &block->fibers[i];
      if (self->state != State::exited) swapcontext(&scheduler, &self->context);
    }
  } while (block->progress);
}

inline void run_block(std::mt19937_64& random) {
  const unsigned threads = unsigned(block->fibers.size());
  block->alive = threads;
  block->waiting = 0;
  block->shared.clear();
  block->warps.assign((threads + kWarp - 1) / kWarp, Warp());
  for (unsigned i = 0; i < threads; i++) start(block->fibers[i], i);
  std::vector<unsigned> order(block->warps.size());
  std::iota(order.begin(), order.end(), 0u);
  while (block->alive) {
    const auto before = std::make_pair(block->barriers, block->alive);
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned warp : order) run_warp(warp, random);
    // Warps touch only at barriers: a round in which none opened and none exited is the last.
    if (block->alive && before == std::make_pair(block->barriers, block->alive)) report_deadlock();
  }
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 size, size_t shared_bytes, Arguments... arguments) {
  const unsigned threads = size.x * size.y * size.z;
  if (threads == 0 || threads > 1024) {
    std::fprintf(stderr, "simt: a block of %u threads\n", threads);
    std::abort();
  }
  Block here;
  here.grid = grid;
  here.size = size;
  here.dynamic_bytes = shared_bytes;
  here.body = [&] { kernel(arguments...); };
  here.fibers = std::vector<Fiber>(threads);
  std::mt19937_64 random(seed);
  block = &here;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        here.index = {x, y, z};
        run_block(random);
      }
  block = nullptr;
}

}  // namespace simt

#define threadIdx (simt::self->index)
#define blockIdx (simt::block->index)
#define blockDim (simt::block->size)
#define gridDim (simt::block->grid)

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { simt::meet(mask, 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return simt::from_lane(mask, value, (simt::self->linear % simt::kWarp) ^ unsigned(with));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return simt::from_lane(mask, value, unsigned(source) % simt::kWarp);
}

using std::max;
using std::min;
