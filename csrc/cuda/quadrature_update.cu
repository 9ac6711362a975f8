// quadrature_update on CUDA: one thread sums kWidth neighbours over all terms.
#include "launch.cuh"

namespace flowbp {

template <class X, class V, bool kWide, bool kOnDevice>
__global__ void __launch_bounds__(kThreads, kBlocks) update(const __grid_constant__ QuadratureUpdate op) {
  const Place at(op.s);
  const Terms<1> terms = terms_of<kOnDevice>(op.rule, at);
  if (at.left <= 0) return;
  const int64_t element = at.b * op.s.size + at.i;
  float sum[1][kWidth];
  load<X, kWide>(op.x.data, element, at.left, sum[0]);
  accumulate<V, kWide>(op.velocities, op.scales, terms, op.s, at, sum);
  store<kWide>(op.out, element, at.left, sum[0]);
}

const char* quadrature_update_cuda(const QuadratureUpdate& op, void* stream) {
  with_type(op.x.dtype, [&](auto x) {
    with_cache_type(op.velocities.dtype, [&](auto v) {
      with_fact(wide(op.s.size, op.x.data, op.velocities.data, op.out.data), [&](auto is_wide) {
        with_fact(op.rule.tables.on_device, [&](auto on_device) {
          FLOWBP_LAUNCH((update<decltype(x), decltype(v), decltype(is_wide)::value, decltype(on_device)::value>),
                        blocks(op.s), stream, op);
        });
      });
    });
  });
  return FLOWBP_LAUNCH_ERROR();
}

}  // namespace flowbp
