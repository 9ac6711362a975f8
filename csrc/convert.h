// The storage types of tensors and their exact meaning as float32, for the host and for CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define FLOWBP_HD __host__ __device__ __forceinline__
#else
#define FLOWBP_HD inline
#endif

namespace flowbp {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct float8 {  // e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7f and 0xff are NaN, there is no infinity
  uint8_t bits;
};

template <class To, class From>
FLOWBP_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FLOWBP_HD float to_float(float v) { return v; }
FLOWBP_HD float to_float(bfloat16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }
FLOWBP_HD float to_float(float16 v) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(v.bits));
#else
  const uint32_t sign = (v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  const float normal = bit_cast<float>((magnitude << 13) + (112u << 23));
  const float infinite = bit_cast<float>((magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00 ? 0x400000u : 0));
  const float value = magnitude >= 0x7c00 ? infinite : magnitude < 0x400 ? subnormal : normal;
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
#endif
}
FLOWBP_HD float to_float(float8 v) {
#ifdef __CUDA_ARCH__
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(v.bits, __NV_E4M3)));
#else
  const uint32_t sign = (v.bits & 0x80u) << 24, magnitude = v.bits & 0x7fu;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  const float normal = bit_cast<float>((magnitude << 20) + (120u << 23));
  const float value = magnitude == 0x7f ? bit_cast<float>(0x7fc00000u) : magnitude < 8 ? subnormal : normal;
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
#endif
}

// To the nearest value, ties to even.
template <class T>
FLOWBP_HD T from_float(float v);
template <>
FLOWBP_HD float from_float<float>(float v) {
  return v;
}
template <>
FLOWBP_HD bfloat16 from_float<bfloat16>(float v) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (v != v) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
FLOWBP_HD float16 from_float<float16>(float v) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(v))};
#else
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t nan = (magnitude >> 13 & 0x3ff) | 0x7e00;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;  // 0.5f has their unit
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t value = magnitude > 0x7f800000    ? nan
                         : magnitude >= 0x47800000 ? 0x7c00  // from 2^16 on; a lesser one may be rounded to it
                         : magnitude < 0x38800000  ? subnormal
                                                   : normal;
  return {static_cast<uint16_t>(sign | value)};
#endif
}

}  // namespace flowbp
