// Runs every kernel, emulated and on the CPU, over small problems under a sanitizer, and compares the two bit for bit.
// The CPU's: AVX2 on x86-64, elsewhere the baseline, where that fuses multiply and add as CUDA does (aarch64).
// PLANT_OUT_OF_BOUNDS makes x one element shorter than the kernels are told: AddressSanitizer must find it.
#include <cstdio>
#include <vector>

#include "rules.h"

using namespace flowbp;

namespace {

#if defined(__x86_64__)
const CpuKernels& kHere = kAvx2;
#else
const CpuKernels& kHere = kBaseline;
#endif

#ifdef PLANT_OUT_OF_BOUNDS
constexpr int64_t kMissing = 1;
#else
constexpr int64_t kMissing = 0;
#endif

std::vector<float> ramp(int64_t count, float scale) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = scale * static_cast<float>(i % 97 - 48);
  return values;
}

}  // namespace

int main() {
  bool good = true;
  for (const int64_t size : {41, 2056}) {  // one element at a time in one chunk, and eight in two
    const int64_t batch = 2, rows = 4, total = batch * size;
    const auto x = ramp(total - kMissing, 0.1f), y = ramp(total, 0.2f), cache = ramp(rows * total, 0.01f);
    const std::vector<int64_t> nodes = {3, 0, 1};
    const std::vector<double> weights = {-0.5, 0.0, 0.25, 0.0, -0.75, 0.125};
    const auto input = [](const std::vector<float>& v) { return Input{v.data(), Dtype::kFloat32}; };

    const Table<int64_t> read = {nodes.data(), 1}, written = {nullptr, 1};
    const Table<double> first = {weights.data(), 1}, second = {weights.data() + 3, 1};
    std::vector<float> update(total), residuals(2 * batch), seeds(3 * total);  // of the CPU, to which a rule travels by value
    for (const bool on_device : {false, true}) {
      for_each_launch(Tables<1>{3, rows, read, {first}, on_device}, batch, size, [&](Samples s, const Rule<1>& rule) {
        std::vector<float> out(total);
        QuadratureUpdate op = {s, input(x), input(cache), nullptr, {out.data(), Dtype::kFloat32}, rule};
        quadrature_update_cuda(op, nullptr);
        op.out.data = update.data();
        for (const Walk walk : {kFewRows, kAllRows}) {
          op.walk = walk;
          if (!on_device) kHere.quadrature_update(op, 0, s.samples * chunks(size));
          good &= out == update;
        }
      });
      for_each_launch(Tables<2>{3, rows, read, {first, second}, on_device}, batch, size, [&](Samples s, const Rule<2>& rule) {
        std::vector<float> partials(2 * batch * chunks(size)), out(2 * batch), landings(2 * total);
        LeapResiduals op = {s, input(x), input(y), input(y), input(cache), nullptr, {landings.data(), Dtype::kFloat32},
                            partials.data(), out.data(), rule};
        leap_residuals_cuda(op, nullptr);
        op.residuals = residuals.data();
        for (const Walk walk : {kFewRows, kAllRows}) {
          op.walk = walk;
          if (!on_device) kHere.leap_residuals(op, 0, s.samples * chunks(size)), sum_chunks(op);
          good &= out == residuals;
        }
      });
      for_each_launch(Tables<2>{3, 3, written, {first, second}, on_device}, batch, size, [&](Samples s, const Rule<2>& rule) {
        std::vector<float> out(3 * total);
        BridgeCotangents op = {s, input(y), input(x), {out.data(), Dtype::kFloat32}, size > 41, rule};
        bridge_cotangents_cuda(op, nullptr);
        op.out.data = seeds.data();
        if (!on_device) kHere.bridge_cotangents(op, 0, s.samples * chunks(size));
        good &= out == seeds;
      });
    }
    const std::vector<int64_t> nowhere = {rows, -1, int64_t{1} << 40};  // nothing may be read for them
    for_each_launch(Tables<1>{3, rows, {nowhere.data(), 1}, {first}, true}, batch, size, [&](Samples s, const Rule<1>& rule) {
      std::vector<float> out(total);
      quadrature_update_cuda({s, input(x), input(cache), nullptr, {out.data(), Dtype::kFloat32}, rule}, nullptr);
      for (const float v : out) good &= v != v;
    });
    const std::vector<double> coefficients = {4.5, -0.04};
    std::vector<float> other(total);  // of the CPU, to which a rule travels by value
    for (const int64_t terms : {0, 3}) {  // an Euler step, and one over the rows of a cache
      for (const bool on_device : {false, true}) {
        const Tables<1> rule_of = {terms, rows, read, {first}, on_device && terms};
        for_each_launch(rule_of, batch, size, [&](Samples s, const Rule<1>& rule) {
          std::vector<float> out(total), velocity(total);
          CfgMultistepStep op = {s, input(x), input(y), input(cache), terms ? input(cache) : Input{}, 4.5f, -0.04f, nullptr,
                                 {velocity.data(), Dtype::kFloat32}, {out.data(), Dtype::kFloat32}, rule};
          if (on_device) op.on_device = coefficients.data();
          cfg_multistep_step_cuda(op, nullptr);
          op.out.data = other.data();
          if (!on_device) kHere.cfg_multistep_step(op, 0, s.samples * chunks(size));
          good &= out == other;
        });
      }
    }
  }
  std::puts(good ? "equal" : "the emulated kernels and the CPU's differ");
  return good ? 0 : 1;
}
