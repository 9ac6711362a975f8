// The CPU kernels for any processor, and what all instruction sets share. Where the processor has no fused multiply-add
// (baseline x86-64), a product is rounded before it is added: results differ from the others' in the last bits.
#include "../ops.h"

namespace flowbp {
namespace {

constexpr int kLanes = 4, kAccumulators = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats fma(Floats a, Floats b, Floats c) {
#ifdef __ARM_FEATURE_FMA
  for (int e = 0; e < kLanes; ++e) c[e] = __builtin_fmaf(a[e], b[e], c[e]);
  return c;
#else
  return a * b + c;
#endif
}
inline Floats load(const bfloat16* p) {
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  Halves halves;
  memcpy(&halves, p, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Bits) << 16);
}
inline Floats load(const float16* p) { return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline void store(float16* p, Floats v) {
  for (int e = 0; e < kLanes; ++e) p[e] = from_float<float16>(v[e]);
}

inline Floats load(const float8* p) { return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }

inline void stream(void* to, const void* from, int64_t bytes) {
  memcpy(to, from, bytes);
}
inline void finish_stream() {}

#include "kernels.inc"
#include "activations.inc"
#include "qk_norm.inc"
#include "modulation.inc"

}  // namespace

const CpuKernels kBaseline = {quadrature_update, leap_residuals, cfg_multistep_step,
                               bridge_cotangents, qk_norm, qk_norm_backward, modulation, modulation_backward,
                               activation, activation_backward};

void sum_chunks(const LeapResiduals& op) {
  const int64_t num_chunks = chunks(op.s.size);
  for (int l = 0; l < 2; ++l) {
    for (int64_t b = op.s.first_sample; b < op.s.first_sample + op.s.samples; ++b) {
      const int64_t row = l * op.s.batch + b;
      double sums[kThreads] = {};
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        sums[chunk % kThreads] += op.partials[row * num_chunks + chunk];
      }
      for (int half = kThreads / 2; half > 0; half /= 2) {
        for (int t = 0; t < half; ++t) sums[t] += sums[t + half];
      }
      op.residuals[row] = static_cast<float>(sums[0] / static_cast<double>(op.s.size));
    }
  }
}

}  // namespace flowbp
