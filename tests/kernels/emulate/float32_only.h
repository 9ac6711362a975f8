// Included before a source of kernels: they are compiled for float32 tensors alone, and abort at any other.
// sanitize.cpp runs no others, and the other instances are most of what a compiler would work on.
#pragma once
#include <cstdlib>

#include "ops.h"

namespace flowbp {

template <class F>
void with_float32(Dtype dtype, F f) {
  if (dtype != Dtype::kFloat32) std::abort();
  f(float{});
}

}  // namespace flowbp

#define with_type with_float32
#define with_cache_type with_float32
