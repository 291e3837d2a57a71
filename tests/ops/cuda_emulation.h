// Enough of CUDA to run one kernel on the host, a block at a time. Every thread of a block is a fiber; a fiber runs until
// it waits for others, and then the next one runs, in an order that the caller chooses. A kernel that lacks a barrier
// gives another result in another order; one whose threads wait for each other for ever is reported.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define SHARED_MEMORY(name) char* name = emulation::shared

using std::max;
using std::min;

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct Index { unsigned x; };
static Index threadIdx, blockIdx;

namespace emulation {
static char* shared;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool done;
};
struct Barrier {
  int arrived = 0, generation = 0;
};
static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static std::vector<float> slots;
static Barrier block;
static long long adds;  // to global memory
static ucontext_t scheduler;
static int passed;
static const std::function<void()>* body;

inline void wait(Barrier& barrier, int expected) {
  const int generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++passed;
    return;
  }
  const unsigned self = threadIdx.x;
  while (barrier.generation == generation) swapcontext(&fibers[self].context, &scheduler);
}

inline void enter() {
  (*body)();
  fibers[threadIdx.x].done = true;
  ++passed;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// Runs blocks times threads fibers; order is a step that is coprime to the number of threads.
inline void run(const std::function<void()>& kernel, int blocks, int threads, int shared_bytes, int order) {
  body = &kernel;
  fibers = std::vector<Fiber>(threads);
  slots.assign(threads, 0);
  std::vector<char> memory(shared_bytes + 16);
  shared = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  for (int b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    // Shared memory starts with what nobody should rely on: NaN.
    std::memset(shared, 0xff, shared_bytes);
    warps.assign(threads / 32, Barrier());
    block = Barrier();
    for (auto& fiber : fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    for (int running = threads; running > 0;) {
      passed = running = 0;
      for (int64_t i = 0; i < threads; ++i) {
        threadIdx.x = i * order % threads;
        if (fibers[threadIdx.x].done) continue;
        swapcontext(&scheduler, &fibers[threadIdx.x].context);
        if (!fibers[threadIdx.x].done) ++running;
      }
      if (running > 0 && passed == 0) {
        std::fprintf(stderr, "block %d: threads wait for each other for ever\n", b);
        std::abort();
      }
    }
  }
}

inline unsigned short to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block, static_cast<int>(emulation::fibers.size())); }

inline void __syncwarp() { emulation::wait(emulation::warps[threadIdx.x / 32], 32); }

template <class T> inline T __shfl_xor_sync(unsigned, T x, int step) {
  static_assert(sizeof(T) == sizeof(float), "32-bit values only");
  auto& warp = emulation::warps[threadIdx.x / 32];
  std::memcpy(&emulation::slots[threadIdx.x], &x, sizeof(T));
  emulation::wait(warp, 32);
  std::memcpy(&x, &emulation::slots[threadIdx.x ^ step], sizeof(T));
  emulation::wait(warp, 32);
  return x;
}

template <class T> inline T __ldg(const T* from) { return *from; }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
template <class T> inline void atomicAdd(T* to, T x) {
  *to += x;
  ++emulation::adds;
}
