// The CPU kernels for processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../ops.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace flowbp {
namespace {

constexpr int kLanes = 8, kAccumulators = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// In one instruction, where g++ 12 makes four of __builtin_convertvector.
inline Floats load(const bfloat16* p) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
}
inline Floats load(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(float16* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// By way of float16, whose exponent is one bit longer: as such the bits are 2^-8 of the value, but those of NaN 480.
inline Floats load(const float8* p) {
  const __m128i bits = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
  const Floats value = 256.0f * _mm256_cvtph_ps(_mm_and_si128(bits, _mm_set1_epi16(static_cast<int16_t>(0xbf80))));
  const Floats nan = _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), value), Floats{} + 480.0f, _CMP_EQ_OQ);
  return _mm256_blendv_ps(value, Floats{} + __builtin_nanf(""), nan);
}

inline void stream(void* to, const void* from, int64_t bytes) {
  if (bytes == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
}
inline void finish_stream() { _mm_sfence(); }

#include "kernels.inc"
#include "activations.inc"
#include "qk_norm.inc"
#include "modulation.inc"

}  // namespace

const CpuKernels kAvx2 = {quadrature_update, leap_residuals, cfg_multistep_step,
                               bridge_cotangents, qk_norm, qk_norm_backward, modulation, modulation_backward,
                               activation, activation_backward};

}  // namespace flowbp
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
