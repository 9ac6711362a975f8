// The emulated CUDA kernels as a Python module: NumPy arrays in, written into NumPy arrays. A dtype is its number in
// ops.h and an array its bytes; nodes and weights are tables as in ops.h, read by the host or, on_device, by the kernel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "rules.h"

namespace py = pybind11;
using namespace flowbp;

namespace {

using Tensor = std::pair<py::array, int>;  // bytes, dtype
using Nodes = py::array_t<int64_t, py::array::c_style>;
using Weights = py::array_t<double, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

Input input(const std::optional<Tensor>& t) {
  return t ? Input{t->first.data(), static_cast<Dtype>(t->second)} : Input{};
}
Output output(const std::optional<Tensor>& t, int dtype = 0) {
  return t ? Output{const_cast<void*>(t->first.data()), static_cast<Dtype>(t->second)} : Output{nullptr, static_cast<Dtype>(dtype)};
}
const float* data(const std::optional<Floats>& t) { return t ? t->data() : nullptr; }
float* written(const Floats& t) { return const_cast<float*>(t.data()); }

template <int L>  // nodes [K, columns], or null; weights [L, K, columns]
Tables<L> tables(const Nodes* nodes, const Weights& weights, int64_t rows, bool on_device) {
  Tables<L> tables = {weights.shape(1), rows, {nodes ? nodes->data() : nullptr, nodes ? nodes->shape(1) : 1}, {}, on_device};
  for (int l = 0; l < L; ++l) tables.weights[l] = {weights.data(l), weights.shape(2)};
  return tables;
}

void quadrature_update(Tensor x, Tensor velocities, Nodes nodes, Weights weights, std::optional<Floats> scales, Tensor out,
                       int64_t rows, int64_t batch, int64_t size, bool on_device) {
  QuadratureUpdate op = {{}, input(x), input(velocities), data(scales), output(out), {}};
  for_each_launch(tables<1>(&nodes, weights, rows, on_device), batch, size, [&](Samples s, const Rule<1>& rule) {
    op.s = s, op.rule = rule;
    quadrature_update_cuda(op, nullptr);
  });
}

void leap_residuals(Tensor x_k, Tensor x_j, Tensor x_end, Tensor velocities, Nodes nodes, Weights weights,
                    std::optional<Floats> scales, std::optional<Tensor> predictions, Floats partials, Floats residuals,
                    int64_t rows, int64_t batch, int64_t size, bool on_device) {
  LeapResiduals op = {{}, input(x_k), input(x_j), input(x_end), input(velocities), data(scales), output(predictions),
                      written(partials), written(residuals), {}};
  for_each_launch(tables<2>(&nodes, weights, rows, on_device), batch, size, [&](Samples s, const Rule<2>& rule) {
    op.s = s, op.rule = rule;
    leap_residuals_cuda(op, nullptr);
  });
}

void cfg_multistep_step(Tensor x, Tensor v_cond, std::optional<Tensor> v_uncond, Weights guidance_and_h,
                        std::optional<Tensor> velocities, std::optional<Nodes> nodes, std::optional<Weights> weights,
                        std::optional<Tensor> velocity, Tensor out, int64_t rows, int64_t batch, int64_t size, bool on_device) {
  CfgMultistepStep op = {{}, input(x), input(v_cond), input(v_uncond), input(velocities)};
  if (on_device) {
    op.on_device = guidance_and_h.data();
  } else {
    op.guidance = static_cast<float>(guidance_and_h.at(0)), op.h = static_cast<float>(guidance_and_h.at(1));
  }
  op.velocity = output(velocity, v_cond.second), op.out = output(out);
  const Tables<1> none = {0, 0, {nullptr, 1}, {{nullptr, 1}}, false};
  for_each_launch(nodes ? tables<1>(&*nodes, *weights, rows, on_device) : none, batch, size, [&](Samples s, const Rule<1>& rule) {
    op.s = s, op.rule = rule;
    cfg_multistep_step_cuda(op, nullptr);
  });
}

void bridge_cotangents(Tensor g, Tensor g_x, Weights weights, Tensor out, int64_t batch, int64_t size, bool on_device) {
  BridgeCotangents op = {{}, input(g), input(g_x), output(out), false, {}};
  for_each_launch(tables<2>(nullptr, weights, weights.shape(1), on_device), batch, size, [&](Samples s, const Rule<2>& rule) {
    op.s = s, op.rule = rule;
    bridge_cotangents_cuda(op, nullptr);
  });
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  m.def("quadrature_update", &quadrature_update);
  m.def("leap_residuals", &leap_residuals);
  m.def("cfg_multistep_step", &cfg_multistep_step);
  m.def("bridge_cotangents", &bridge_cotangents);
  m.attr("chunk") = kChunk;
}
