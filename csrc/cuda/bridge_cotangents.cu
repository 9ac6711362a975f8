// bridge_cotangents on CUDA: g and g_x are read once and every node's seed is written from registers.
#include "launch.cuh"

namespace flowbp {

template <class G, class GX, bool kWide, bool kOnDevice>
__global__ void __launch_bounds__(kThreads) seeds(const __grid_constant__ BridgeCotangents op) {
  const Place at(op.s);
  const Terms<2> terms = terms_of<kOnDevice>(op.rule, at);
  if (at.left <= 0) return;
  const int64_t element = at.b * op.s.size + at.i;
  float g[kWidth], g_x[kWidth], seed[kWidth];
  load<G, kWide>(op.g.data, element, at.left, g);
  load<GX, kWide>(op.g_x.data, element, at.left, g_x);
  for (int t = terms.begin; t < terms.end; ++t) {
    const float weight = terms.data[t].weight[0], alpha = terms.data[t].weight[1];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float c = alpha != 0 ? fmaf(alpha, g_x[e], g[e]) : g[e];
      seed[e] = weight != 0 ? weight * c : 0;
    }
    store<kWide>(op.out, terms.data[t].node * op.s.batch * op.s.size + element, at.left, seed);
  }
}

const char* bridge_cotangents_cuda(const BridgeCotangents& op, void* stream) {
  with_type(op.g.dtype, [&](auto g) {
    with_type(op.g_x.dtype, [&](auto g_x) {
      with_fact(wide(op.s.size, op.g.data, op.g_x.data, op.out.data), [&](auto is_wide) {
        with_fact(op.rule.tables.on_device, [&](auto on_device) {
          FLOWBP_LAUNCH((seeds<decltype(g), decltype(g_x), decltype(is_wide)::value, decltype(on_device)::value>),
                        blocks(op.s), stream, op);
        });
      });
    });
  });
  return FLOWBP_LAUNCH_ERROR();
}

}  // namespace flowbp
