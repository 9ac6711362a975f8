// The CPU kernels for processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include "../ops.h"

#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace flowbp {
namespace {

constexpr int kLanes = 16, kAccumulators = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// In one instruction, where g++ 12 makes four of __builtin_convertvector.
inline Floats load(const bfloat16* p) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
}
inline Floats load(const float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float16* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// By way of float16, whose exponent is one bit longer: as such the bits are 2^-8 of the value, but those of NaN 480.
inline Floats load(const float8* p) {
  const __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
  const Floats value = 256.0f * _mm512_cvtph_ps(_mm256_and_si256(bits, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
  const __mmask16 nan = _mm512_cmp_ps_mask(_mm512_abs_ps(value), Floats{} + 480.0f, _CMP_EQ_OQ);
  return _mm512_mask_mov_ps(value, nan, Floats{} + __builtin_nanf(""));
}

inline void stream(void* to, const void* from, int64_t bytes) {
  if (bytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
inline void finish_stream() { _mm_sfence(); }

#include "kernels.inc"
#include "activations.inc"
#include "qk_norm.inc"
#include "modulation.inc"

}  // namespace

const CpuKernels kAvx512 = {quadrature_update, leap_residuals, cfg_multistep_step,
                               bridge_cotangents, qk_norm, qk_norm_backward, modulation, modulation_backward,
                               activation, activation_backward};

}  // namespace flowbp
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
