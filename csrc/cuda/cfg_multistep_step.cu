// cfg_multistep_step on CUDA: guidance, the sum over earlier rows, the step and both cache writes by one thread for kWidth
// neighbours.
#include <type_traits>

#include "launch.cuh"

namespace flowbp {

struct NoRows {};  // the cache of an Euler step

__device__ __forceinline__ float rounded(Dtype dtype, float v) {
  switch (dtype) {
    case Dtype::kBFloat16: return to_float(from_float<bfloat16>(v));
    case Dtype::kFloat16: return to_float(from_float<float16>(v));
    default: return v;
  }
}

// v = v_uncond + guidance (v_cond - v_uncond), both of type V.
template <class V, bool kWide>
__device__ __forceinline__ void guide(const CfgMultistepStep& op, float guidance, int64_t i, int64_t left, float (&v)[kWidth]) {
  load<V, kWide>(op.v_cond.data, i, left, v);
  if (op.v_uncond.data) {
    float u[kWidth];
    load<V, kWide>(op.v_uncond.data, i, left, u);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] = fmaf(guidance, v[e] - u[e], u[e]);
  }
}

template <class X, class Cache, bool kWide, bool kOnDevice>
__global__ void __launch_bounds__(kThreads, kBlocks) step(const __grid_constant__ CfgMultistepStep op) {
  const Place at(op.s);
  const Terms<1> terms = terms_of<kOnDevice>(op.rule, at);
  if (at.left <= 0) return;
  const int64_t i = at.b * op.s.size + at.i;
  const float guidance = op.on_device ? static_cast<float>(op.on_device[0]) : op.guidance;
  const float h = op.on_device ? static_cast<float>(op.on_device[1]) : op.h;
  float sum[1][kWidth], v[kWidth];
  load<X, kWide>(op.x.data, i, at.left, sum[0]);
  switch (op.v_cond.dtype) {  // at run time, so that a type of v does not multiply the kernels
    case Dtype::kFloat32: guide<float, kWide>(op, guidance, i, at.left, v); break;
    case Dtype::kBFloat16: guide<bfloat16, kWide>(op, guidance, i, at.left, v); break;
    default: guide<float16, kWide>(op, guidance, i, at.left, v);
  }
  if constexpr (!std::is_same<Cache, NoRows>::value) {
    accumulate<Cache, kWide>(op.velocities, nullptr, terms, op.s, at, sum);
  }
  if (op.velocity.data) store<kWide>(op.velocity, i, at.left, v);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sum[0][e] = fmaf(h, rounded(op.velocity.dtype, v[e]), sum[0][e]);
  store<kWide>(op.out, i, at.left, sum[0]);
}

const char* cfg_multistep_step_cuda(const CfgMultistepStep& op, void* stream) {
  const bool is_wide = wide(op.s.size, op.x.data, op.v_cond.data, op.v_uncond.data, op.velocities.data, op.velocity.data,
                            op.out.data);
  with_type(op.v_cond.dtype, [](auto) {});  // aborts at what no kernel takes
  with_type(op.x.dtype, [&](auto x) {
    with_fact(is_wide, [&](auto width) {
      using X = decltype(x);
      if (!op.velocities.data) {
        FLOWBP_LAUNCH((step<X, NoRows, decltype(width)::value, false>), blocks(op.s), stream, op);
        return;
      }
      with_cache_type(op.velocities.dtype, [&](auto cache) {
        with_fact(op.rule.tables.on_device, [&](auto on_device) {
          FLOWBP_LAUNCH((step<X, decltype(cache), decltype(width)::value, decltype(on_device)::value>), blocks(op.s),
                        stream, op);
        });
      });
    });
  });
  return FLOWBP_LAUNCH_ERROR();
}

}  // namespace flowbp
