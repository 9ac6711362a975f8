// cfg_euler_step on CUDA: guidance, Euler update and both cache writes, elementwise.
#include "launch.cuh"

namespace flowbp {

__device__ __forceinline__ float rounded(Dtype dtype, float v) {
  switch (dtype) {
    case Dtype::kBFloat16: return to_float(from_float<bfloat16>(v));
    case Dtype::kFloat16: return to_float(from_float<float16>(v));
    default: return v;
  }
}

template <class X, class V, bool kWide>
__global__ void __launch_bounds__(kThreads) step(const __grid_constant__ CfgEulerStep op) {
  const int64_t i = blockIdx.x * kChunk + threadIdx.x * kWidth, left = op.elements - i;
  if (left <= 0) return;
  const float guidance = op.on_device ? static_cast<float>(op.on_device[0]) : op.guidance;
  const float h = op.on_device ? static_cast<float>(op.on_device[1]) : op.h;
  float x[kWidth], v[kWidth];
  load<X, kWide>(op.x.data, i, left, x);
  load<V, kWide>(op.v_cond.data, i, left, v);
  if (op.v_uncond.data) {
    float u[kWidth];
    load<V, kWide>(op.v_uncond.data, i, left, u);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] = fmaf(guidance, v[e] - u[e], u[e]);
  }
  if (op.velocity.data) store<kWide>(op.velocity, i, left, v);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) x[e] = fmaf(h, rounded(op.velocity.dtype, v[e]), x[e]);
  store<kWide>(op.out, i, left, x);
}

const char* cfg_euler_step_cuda(const CfgEulerStep& op, void* stream) {
  const bool is_wide =
      wide(op.elements, op.x.data, op.v_cond.data, op.v_uncond.data, op.velocity.data, op.out.data);
  with_type(op.x.dtype, [&](auto x) {
    with_type(op.v_cond.dtype, [&](auto v) {
      with_fact(is_wide, [&](auto width) {
        FLOWBP_LAUNCH((step<decltype(x), decltype(v), decltype(width)::value>), chunks(op.elements), stream, op);
      });
    });
  });
  return FLOWBP_LAUNCH_ERROR();
}

}  // namespace flowbp
