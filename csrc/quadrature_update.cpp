// quadrature_update on the CPU:  out = x + sum_k weights[k(,b)] * velocities[nodes[k(,b)], b]
//
// The sum runs in float32, in the order of the nodes given; x and velocities may each be float32, bfloat16 or float16.
// The schema, the fake and the autograd formula stand beside the contract in flowbp_kernels/quadrature_update.py.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 256;                 // floats accumulated together: 1 KiB, stays in the nearest cache
constexpr int64_t kElementsPerTask = 1 << 15;  // what one thread reads before a second one is worth waking

// A table [K] (one for the batch) or [K, B] (one a sample), read by value.
template <class T>
struct Table {
  const T* data;
  int64_t node_stride, sample_stride;

  T operator()(int64_t k, int64_t b) const { return data[k * node_stride + b * sample_stride]; }
};

template <class T>
Table<T> table(const Tensor& t, ScalarType dtype, int64_t num_nodes, int64_t batch, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), name, " must be a contiguous CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", toString(dtype), ", not ", toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 1 || t.dim() == 2, name, " must be [K] or [K, B], not ", t.dim(), "-dimensional");
  STD_TORCH_CHECK(t.size(0) == num_nodes, name, " has ", t.size(0), " rows; nodes has ", num_nodes);
  STD_TORCH_CHECK(t.dim() == 1 || t.size(1) == batch, name, " has ", t.size(1), " columns; x has a batch of ", batch);
  return {t.const_data_ptr<T>(), t.dim() == 2 ? batch : 1, t.dim() == 2 ? 1 : 0};
}

template <class X, class V>
void update(const X* x, const V* velocities, Table<int64_t> nodes, Table<float> weights, X* out, int64_t num_nodes,
            int64_t batch, int64_t size) {
  const int64_t tiles = (size + kTile - 1) / kTile;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (kTile * (num_nodes + 1)));
  torch::stable::parallel_for(0, batch * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, first = task % tiles * kTile, count = std::min(kTile, size - first);
      float sum[kTile];
      for (int64_t i = 0; i < count; ++i) sum[i] = static_cast<float>(x[b * size + first + i]);
      for (int64_t k = 0; k < num_nodes; ++k) {
        const float weight = weights(k, b);
        if (weight == 0.0f) continue;  // a row that takes no part is not read: it may hold NaN
        const V* v = velocities + (nodes(k, b) * batch + b) * size + first;
        for (int64_t i = 0; i < count; ++i) sum[i] += weight * static_cast<float>(v[i]);
      }
      for (int64_t i = 0; i < count; ++i) out[b * size + first + i] = static_cast<X>(sum[i]);
    }
  });
}

// Calls f with a null pointer of the C++ type that `dtype` names.
template <class F>
void with_type(ScalarType dtype, const char* name, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<torch::headeronly::BFloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<torch::headeronly::Half*>(nullptr));
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, not ", toString(dtype));
  }
}

Tensor quadrature_update(const Tensor& x, const Tensor& velocities, const Tensor& nodes, const Tensor& weights) {
  STD_TORCH_CHECK(x.dim() >= 1 && velocities.dim() == x.dim() + 1, "velocities must be [N, *x.shape]");
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(velocities.size(d + 1) == x.size(d), "velocities must be [N, *x.shape]; dimension ", d, " differs");
  }
  STD_TORCH_CHECK(x.is_cpu() && velocities.is_cpu(), "x and velocities must be CPU tensors");
  STD_TORCH_CHECK(x.is_contiguous() && velocities.is_contiguous(), "x and velocities must be contiguous");
  STD_TORCH_CHECK(nodes.dim() >= 1, "nodes must be [K] or [K, B]");

  const int64_t batch = x.size(0), num_nodes = nodes.size(0);
  const auto node_table = table<int64_t>(nodes, ScalarType::Long, num_nodes, batch, "nodes");
  const auto weight_table = table<float>(weights, ScalarType::Float, num_nodes, batch, "weights");
  for (int64_t i = 0; i < nodes.numel(); ++i) {
    const int64_t node = node_table.data[i];
    STD_TORCH_CHECK(0 <= node && node < velocities.size(0), "node ", node, " is not in [0, ", velocities.size(0), ")");
  }

  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  with_type(x.scalar_type(), "x", [&](auto* x_type) {
    using X = std::remove_pointer_t<decltype(x_type)>;
    with_type(velocities.scalar_type(), "velocities", [&](auto* v_type) {
      using V = std::remove_pointer_t<decltype(v_type)>;
      update(static_cast<const X*>(x.const_data_ptr()), static_cast<const V*>(velocities.const_data_ptr()), node_table,
             weight_table, static_cast<X*>(out.mutable_data_ptr()), num_nodes, batch, x.numel() / batch);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowbp_kernels, CPU, m) { m.impl("quadrature_update", TORCH_BOX(&quadrature_update)); }
