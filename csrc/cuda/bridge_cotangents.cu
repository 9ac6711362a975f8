// bridge_cotangents on CUDA: g and g_x are read once and every node's seed is written from registers.
#include "launch.cuh"

namespace flowbp {

template <class G, class GX, bool kWide>
__global__ void __launch_bounds__(kThreads) seeds(const __grid_constant__ BridgeCotangents op) {
  const Place at(op.s);
  if (at.left <= 0) return;
  const int64_t element = at.b * op.s.size + at.i;
  float g[kWidth], g_x[kWidth], seed[kWidth];
  load<G, kWide>(op.g.data, element, at.left, g);
  load<GX, kWide>(op.g_x.data, element, at.left, g_x);
  const int end = op.rule.end(at.sample);
  for (int t = op.rule.begin(at.sample); t < end; ++t) {
    const float weight = op.rule.terms[t].weight[0], alpha = op.rule.terms[t].weight[1];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float c = alpha != 0 ? fmaf(alpha, g_x[e], g[e]) : g[e];
      seed[e] = weight != 0 ? weight * c : 0;
    }
    store<kWide>(op.out, op.rule.terms[t].node * op.s.batch * op.s.size + element, at.left, seed);
  }
}

const char* bridge_cotangents_cuda(const BridgeCotangents& op, void* stream) {
  with_type(op.g.dtype, [&](auto g) {
    with_type(op.g_x.dtype, [&](auto g_x) {
      with_width(wide(op.s.size, op.g.data, op.g_x.data, op.out.data), [&](auto is_wide) {
        FLOWBP_LAUNCH((seeds<decltype(g), decltype(g_x), decltype(is_wide)::value>), blocks(op.s), stream, op);
      });
    });
  });
  return FLOWBP_LAUNCH_ERROR();
}

}  // namespace flowbp
