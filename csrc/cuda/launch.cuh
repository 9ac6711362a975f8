// What the CUDA kernels share: where a thread works, wide loads and stores, the sum over a cache, and the launch.
// No torch header is included anywhere in here.
#pragma once

#include "../ops.h"

// Under nvcc a launch is a launch. The tests compile the same files with g++ and define these for the CPU.
#ifndef FLOWBP_LAUNCH
#include <cuda_runtime.h>
#define FLOWBP_LAUNCH(kernel, blocks, stream, op) \
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op)
#define FLOWBP_LAUNCH_ERROR() (cudaPeekAtLastError() == cudaSuccess ? nullptr : cudaGetErrorString(cudaGetLastError()))
#define FLOWBP_ALIGNED(pointer) (pointer)
#endif

namespace flowbp {

// Blocks of the sums on one SM: asking for no more keeps ptxas from spilling to fit four (seen on sm_80).
constexpr int kBlocks = 2;

// Where a thread works: kWidth neighbours of one sample. A block covers a chunk of it.
struct Place {
  int64_t sample, b, i, left;  // rule's sample, batch's sample, position in it, elements from there to its end

  __device__ explicit Place(const Samples& s) {
    const unsigned per_sample = static_cast<unsigned>(chunks(s.size));
    sample = blockIdx.x / per_sample;
    b = s.first_sample + sample;
    i = blockIdx.x % per_sample * kChunk + threadIdx.x * kWidth;
    left = s.size - i;
  }
};

inline int64_t blocks(const Samples& s) { return s.samples * chunks(s.size); }

template <class T>
struct alignas(kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) Pack {
  T v[kWidth];
};

// The i-th 32 bits of a pack.
template <class T>
__device__ __forceinline__ uint32_t word(const Pack<T>& pack, int i) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<uint32_t>(pack.v[i]);
  } else {
    return pack.v[2 * i].bits | static_cast<uint32_t>(pack.v[2 * i + 1].bits) << 16;
  }
}

// kWidth elements from data[i]: 16 bytes at a time if kWide, else one by one as far as `left` goes.
template <class T, bool kWide>
__device__ __forceinline__ Pack<T> load(const void* data, int64_t i, int64_t left) {
  const T* p = static_cast<const T*>(data) + i;
  if constexpr (kWide) {
    return *FLOWBP_ALIGNED(reinterpret_cast<const Pack<T>*>(p));
  } else {
    Pack<T> pack = {};
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (e < left) pack.v[e] = p[e];
    }
    return pack;
  }
}

template <class T, bool kWide>
__device__ __forceinline__ void load(const void* data, int64_t i, int64_t left, float (&values)[kWidth]) {
  const Pack<T> pack = load<T, kWide>(data, i, left);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) values[e] = to_float(pack.v[e]);
}

template <bool kWide>
__device__ __forceinline__ void store(Output to, int64_t i, int64_t left, const float (&values)[kWidth]) {
  const auto put = [&](auto type) {
    using T = decltype(type);
    T* p = static_cast<T*>(to.data) + i;
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) pack.v[e] = from_float<T>(values[e]);
    if constexpr (kWide) {
      uint4* const words = FLOWBP_ALIGNED(reinterpret_cast<uint4*>(p));
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {  // said outright: nvcc would store 16 bits at a time
        __stcs(words + i, make_uint4(word(pack, 4 * i), word(pack, 4 * i + 1), word(pack, 4 * i + 2), word(pack, 4 * i + 3)));
      }
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (e < left) p[e] = pack.v[e];
      }
    }
  };
  switch (to.dtype) {
    case Dtype::kFloat32: return put(float{});
    case Dtype::kBFloat16: return put(bfloat16{});
    default: return put(float16{});
  }
}

// The terms of one sample.
template <int L>
struct Terms {
  const Term<L>* data;
  int begin, end;
};

// Those of a block's sample. Tables on the device are fetched into shared memory by all threads of the block, one term each,
// without the terms that the host leaves out of a rule that travels by value. A node that is no row, which the host would
// have refused, gets the weight NaN: what comes of it shows, and nothing is read beyond the cache.
template <bool kOnDevice, int L>
__device__ __forceinline__ Terms<L> terms_of(const Rule<L>& rule, const Place& at) {
  if constexpr (!kOnDevice) {
    return {rule.terms, rule.begin(at.sample), rule.end(at.sample)};
  } else {
    static_assert(kMaxTerms <= kThreads);
    __shared__ Term<L> kept[kMaxTerms];
    __shared__ bool takes_part[kThreads];
    const int fetched = static_cast<int>(rule.tables.num_nodes), mine = static_cast<int>(threadIdx.x);
    Term<L> term = mine < fetched ? rule.tables.term(mine, at.b) : Term<L>{};
    if (term.node < 0) {
      term.node = 0;
      for (int l = 0; l < L; ++l) term.weight[l] = term.weight[l] == 0 ? 0 : bit_cast<float>(0x7fc00000u);
    }
    takes_part[mine] = mine < fetched && rule.tables.takes_part(term);
    __syncthreads();
    int before = 0, end = 0;
    for (int t = 0; t < fetched; ++t) {
      before += t < mine && takes_part[t];
      end += takes_part[t];
    }
    if (takes_part[mine]) kept[before] = term;
    __syncthreads();
    return {kept, 0, end};
  }
}

// sums[l] += sum over the terms of weight[l] * scale * velocity. Loads are issued kInFlight rows at a time before the
// first of them is used.
template <class V, bool kWide, int L>
__device__ __forceinline__ void accumulate(const Input& velocities, const float* scales, const Terms<L>& terms,
                                           const Samples& s, const Place& at, float (&sums)[L][kWidth]) {
  constexpr int kInFlight = sizeof(V) == 4 ? 4 : 8;
  for (int first = terms.begin; first < terms.end; first += kInFlight) {
    Pack<V> pack[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u < terms.end) {
        const int64_t row = terms.data[first + u].node * s.batch + at.b;
        pack[u] = load<V, kWide>(velocities.data, row * s.size + at.i, at.left);
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u < terms.end) {
        const Term<L>& term = terms.data[first + u];
        const float scale = scales ? scales[term.node * s.batch + at.b] : 1.0f;
#pragma unroll
        for (int l = 0; l < L; ++l) {
          if (term.weight[l] == 0) continue;
          const float weight = term.weight[l] * scale;
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sums[l][e] = fmaf(weight, to_float(pack[u].v[e]), sums[l][e]);
        }
      }
    }
  }
}

// Whether rows of this length, starting at these addresses, can be read kWidth elements at a time.
template <class... Data>
bool wide(int64_t size, const Data*... data) {
  return size % kWidth == 0 && (... && (reinterpret_cast<uintptr_t>(data) % 16 == 0));
}

// Turns a fact of run time, as of width, into a template argument.
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};
template <class F>
void with_fact(bool fact, F f) {
  fact ? f(Bool<true>{}) : f(Bool<false>{});
}

}  // namespace flowbp
