// leap_residuals on CUDA: both sums and their gaps in one pass over the cache; partial sums of chunks, then their sum.
// No atomics: the order of every addition is that of csrc/ops.h.
#include "launch.cuh"

namespace flowbp {

// sums[0] becomes the sum of all threads' values, by halves.
template <class T>
__device__ __forceinline__ void sum_by_halves(T* sums) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
}

template <class X, class V, bool kWide, bool kOnDevice>
__global__ void __launch_bounds__(kThreads, kBlocks) leaps(const __grid_constant__ LeapResiduals op) {
  __shared__ float gaps[2][kThreads];
  const Place at(op.s);
  const Terms<2> terms = terms_of<kOnDevice>(op.rule, at);
  float gap[2] = {0, 0};
  if (at.left > 0) {
    const int64_t element = at.b * op.s.size + at.i;
    float sums[2][kWidth], targets[2][kWidth];
    load<X, kWide>(op.x_k.data, element, at.left, sums[0]);
    load<X, kWide>(op.x_j.data, element, at.left, sums[1]);
    accumulate<V, kWide>(op.velocities, op.scales, terms, op.s, at, sums);
    load<X, kWide>(op.x_j.data, element, at.left, targets[0]);  // where the first leap aims, the second started
    load<X, kWide>(op.x_end.data, element, at.left, targets[1]);
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      if (op.predictions.data) store<kWide>(op.predictions, l * op.s.batch * op.s.size + element, at.left, sums[l]);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (e < at.left) gap[l] += fabsf(sums[l][e] - targets[l][e]);
      }
    }
  }
#pragma unroll
  for (int l = 0; l < 2; ++l) {
    gaps[l][threadIdx.x] = gap[l];
    sum_by_halves(gaps[l]);
    if (threadIdx.x == 0) {
      const int64_t per_sample = chunks(op.s.size);
      op.partials[(l * op.s.batch + at.b) * per_sample + blockIdx.x % per_sample] = gaps[l][0];
    }
  }
}

// One block a leap and sample.
__global__ void __launch_bounds__(kThreads) sum_partials(const __grid_constant__ LeapResiduals op) {
  __shared__ double sums[kThreads];
  const int64_t row = blockIdx.x / op.s.samples * op.s.batch + op.s.first_sample + blockIdx.x % op.s.samples;
  const int64_t per_sample = chunks(op.s.size);
  double sum = 0;
  for (int64_t chunk = threadIdx.x; chunk < per_sample; chunk += kThreads) sum += op.partials[row * per_sample + chunk];
  sums[threadIdx.x] = sum;
  sum_by_halves(sums);
  if (threadIdx.x == 0) op.residuals[row] = static_cast<float>(sums[0] / static_cast<double>(op.s.size));
}

const char* leap_residuals_cuda(const LeapResiduals& op, void* stream) {
  const bool rows_are_wide =
      wide(op.s.size, op.x_k.data, op.x_j.data, op.x_end.data, op.velocities.data, op.predictions.data);
  with_type(op.x_k.dtype, [&](auto x) {
    with_cache_type(op.velocities.dtype, [&](auto v) {
      with_fact(rows_are_wide, [&](auto is_wide) {
        with_fact(op.rule.tables.on_device, [&](auto on_device) {
          FLOWBP_LAUNCH((leaps<decltype(x), decltype(v), decltype(is_wide)::value, decltype(on_device)::value>),
                        blocks(op.s), stream, op);
        });
      });
    });
  });
  FLOWBP_LAUNCH(sum_partials, 2 * op.s.samples, stream, op);
  return FLOWBP_LAUNCH_ERROR();
}

}  // namespace flowbp
