// Enough of CUDA to run csrc/cuda/*.cu unchanged on the CPU: one std::thread a CUDA thread, block after block.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "ops.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct Index {
  unsigned x;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline void __stcs(uint4* p, uint4 v) { memcpy(p, &v, sizeof(v)); }

inline thread_local Index threadIdx, blockIdx;
inline std::barrier<>* block;

inline void __syncthreads() {
#ifndef PLANT_NO_SYNCTHREADS  // the bug that ThreadSanitizer must find
  block->arrive_and_wait();
#endif
}

// What a misaligned 16-byte access does on a GPU.
template <class T>
T* aligned_or_abort(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) std::fprintf(stderr, "misaligned address\n"), std::abort();
  return p;
}

template <class Kernel, class Op>
void launch_on_cpu(Kernel kernel, int64_t blocks, const Op& op) {
  std::barrier barrier(flowbp::kThreads);
  block = &barrier;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < flowbp::kThreads; ++t) {
    threads.emplace_back([&, t] {
      threadIdx = {t};
      for (int64_t b = 0; b < blocks; ++b) {
        blockIdx = {static_cast<unsigned>(b)};
        kernel(op);
        barrier.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#define FLOWBP_LAUNCH(kernel, blocks, stream, op) launch_on_cpu(kernel, blocks, op)
#define FLOWBP_LAUNCH_ERROR() nullptr
#define FLOWBP_ALIGNED(pointer) aligned_or_abort(pointer)
