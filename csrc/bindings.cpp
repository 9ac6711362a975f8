// The compiled ops as operators of torch: torch.ops.flowbp_compiled.*, against LibTorch's stable ABI.
//
// They write into tensors that they are given and know no gradient: flowbp_kernels/<op>.py owns contract, fake and
// autograd, calls them from inside its own operator, and allocates what they write. What would lead out of bounds is
// checked here again. Coefficients are CPU tensors, which become part of the kernel's parameters, or lie with the others on
// the device, where the kernel reads them: the host never does, and no call waits for it.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <string>
#include <vector>

#include <dlfcn.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "rules.h"

#ifndef FLOWBP_CUDA_ARCHS
#define FLOWBP_CUDA_ARCHS ""
#endif

namespace {

using namespace flowbp;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kCacheBytes = 1 << 22;        // a write of more than this goes past the caches
constexpr int64_t kManyElements = 1 << 23;     // more of a cache than fits next to a core: worth a measurement
constexpr int64_t kElementsPerTask = 1 << 15;  // what one thread reads before a second one is worth waking

// -- arguments ---------------------------------------------------------------------------------------------------------

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Float8_e4m3fn: return Dtype::kFloat8;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, not ", toString(t.scalar_type()));
  }
}

// A contiguous tensor of `elements` elements where `like` lies.
void check(const Tensor& t, const char* name, const Tensor& like, int64_t elements, bool is_cache = false) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name,
                  " lies on another device");
  STD_TORCH_CHECK(t.numel() == elements, name, " has ", t.numel(), " elements, not ", elements);
  STD_TORCH_CHECK(is_cache || dtype_of(t, name) != Dtype::kFloat8, name, " must not be float8");
}

Input input(const Tensor& t, const char* name, const Tensor& like, int64_t elements, bool is_cache = false) {
  check(t, name, like, elements, is_cache);
  return {t.const_data_ptr(), dtype_of(t, name)};
}

Output output(const Tensor& t, const char* name, const Tensor& like, int64_t elements) {
  check(t, name, like, elements);
  return {t.mutable_data_ptr(), dtype_of(t, name)};
}

void check_same(Dtype a, Dtype b, const char* name, const char* other) {
  STD_TORCH_CHECK(a == b, name, " must have the dtype of ", other);
}

template <class T>
T* float32(const Tensor& t, const char* name, const Tensor& like, int64_t elements) {
  check(t, name, like, elements);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

int64_t samples_in(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, "a batch of samples has at least one dimension");
  return x.size(0);
}

int64_t rows_in(const Tensor& velocities, const Tensor& x) {
  STD_TORCH_CHECK(velocities.dim() == x.dim() + 1, "velocities must be [N, *x.shape]");
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(velocities.size(d + 1) == x.size(d), "velocities must be [N, *x.shape]; dimension ", d, " differs");
  }
  return velocities.size(0);
}

// What a rule is made of: on the CPU, or where `like` lies.
template <class T>
const T* numbers(const Tensor& t, const char* name, ScalarType type, const Tensor& like) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == type, name, " must be contiguous, of ", toString(type));
  STD_TORCH_CHECK(t.is_cpu() || t.get_device_index() == like.get_device_index(), name, " lies on another device");
  return static_cast<const T*>(t.const_data_ptr());
}

// [K, 1 or B]
template <class T>
Table<T> table(const Tensor& t, const char* name, ScalarType type, int64_t num_nodes, int64_t batch, const Tensor& like) {
  const T* const data = numbers<T>(t, name, type, like);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == num_nodes && (t.size(1) == 1 || t.size(1) == batch), name, " must be [",
                  num_nodes, ", 1 or ", batch, "]");
  return {data, t.size(1)};
}

int64_t rows_in_table(const Tensor& weights) {
  STD_TORCH_CHECK(weights.dim() == 2, "weights must be [K, 1 or B]");
  return weights.size(0);
}

// The rule of `weights`, L tensors, for x's samples. nodes null: node k is k.
template <int L>
Tables<L> tables_of(const Tensor* nodes, int64_t num_rows, const Tensor* const (&weights)[L], const Tensor& x) {
  const int64_t terms = rows_in_table(*weights[0]), batch = samples_in(x);
  Tables<L> tables = {terms, num_rows, {nullptr, 1}, {}, !weights[0]->is_cpu()};
  STD_TORCH_CHECK(terms == 0 || num_rows > 0, "the cache has no rows");
  if (nodes) tables.nodes = table<int64_t>(*nodes, "nodes", ScalarType::Long, terms, batch, x);
  STD_TORCH_CHECK(!nodes || nodes->is_cpu() != tables.on_device, "nodes and weights must lie in one place");
  for (int l = 0; l < L; ++l) {
    tables.weights[l] = table<double>(*weights[l], "weights", ScalarType::Double, terms, batch, x);
    STD_TORCH_CHECK(weights[l]->is_cpu() != tables.on_device, "weights must lie in one place");
  }
  return tables;
}

// -- where it runs -----------------------------------------------------------------------------------------------------

struct InstructionSet {
  const char* name;
  const CpuKernels* kernels;
  bool runs;
};

#if defined(__x86_64__)
bool has_f16c() {  // clang 14 does not know it in __builtin_cpu_supports
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Best first.
const auto& instruction_sets() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"avx512", &kAvx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
      {"avx2", &kAvx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()},
#endif
      {"baseline", &kBaseline, true},
  };
  return sets;
}

const InstructionSet& instruction_set() {
  const char* wanted = std::getenv("FLOWBP_ISA");
  for (const InstructionSet& set : instruction_sets()) {
    if (wanted && *wanted ? wanted == std::string(set.name) && set.runs : set.runs) return set;
  }
  STD_TORCH_CHECK(false, "FLOWBP_ISA=", wanted, " is not an instruction set of this processor and build (avx512, avx2 "
                  "or baseline); unset it to use the best there is");
}

double thread_seconds() {  // of work: not those in which another process had the core
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// The walk that is fastest on this machine, measured once by each process that needs it, on one thread, in 28 MB of its
// own: quadrature_update of SD3.5's latents at 512 px (batch 8, 25 rows, bfloat16) by each walk in turn, best of five.
Walk fastest_walk() {
  static const Walk fastest = [] {
    constexpr int kRows = 25;
    constexpr int64_t kBatch = 8, kSize = 16 * 64 * 64, kRow = kBatch * kSize;
    std::vector<bfloat16> memory((kRows + 2) * kRow);
    QuadratureUpdate op{};
    op.s = {kBatch, kSize, 0, kBatch};
    op.x = {memory.data(), Dtype::kBFloat16};
    op.out = {memory.data() + kRow, Dtype::kBFloat16};
    op.velocities = {memory.data() + 2 * kRow, Dtype::kBFloat16};
    op.rule.shared = true;
    op.rule.first[1] = kRows;
    for (int k = 0; k < kRows; ++k) op.rule.terms[k] = {k, {1.0f}};
    double best[] = {HUGE_VAL, HUGE_VAL};  // by walk
    for (int round = 0; round < 5; ++round) {
      for (const Walk walk : {kFewRows, kAllRows}) {
        op.walk = walk;
        const double start = thread_seconds();
        instruction_set().kernels->quadrature_update(op, 0, kBatch * chunks(kSize));
        best[walk] = std::min(best[walk], thread_seconds() - start);
      }
    }
    return best[kFewRows] <= best[kAllRows] ? kFewRows : kAllRows;
  }();
  return fastest;
}

// How to walk through `elements` of a cache: as FLOWBP_ROWS says, or the fastest way if they are many.
Walk walk(int64_t elements) {
  const char* const rows = std::getenv("FLOWBP_ROWS");
  const std::string wanted = rows ? rows : "";
  STD_TORCH_CHECK(wanted.empty() || wanted == "few" || wanted == "all", "FLOWBP_ROWS must be few or all, not ", wanted,
                  "; unset it to use what is fastest here");
  if (!wanted.empty()) return wanted == "few" ? kFewRows : kAllRows;
  return elements < kManyElements ? kFewRows : fastest_walk();
}

template <class Op>
void on_cpu(const Op& op, void (*kernel)(const Op&, int64_t, int64_t), int64_t tasks, int64_t reads_per_task) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / reads_per_task);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

// Torch's question for its current stream. Asked of the library that Python has loaded: to link against it would tie this
// binary to a torch built with CUDA, and a weak symbol stays null, for torch loads its libraries out of the linker's sight.
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);
CurrentStream current_stream() {
  static const auto found = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  return found;
}

template <class Op>
void on_cuda(const Op& op, const char* (*launch)(const Op&, void*), const Tensor& x) {
  STD_TORCH_CHECK(current_stream(), "libtorch_cuda.so is not loaded, or does not tell its current stream");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream()(x.get_device_index(), &stream) == 0, "no CUDA stream");
  const char* error = launch(op, stream);
  STD_TORCH_CHECK(error == nullptr, "CUDA: ", error);
}

// -- ops ---------------------------------------------------------------------------------------------------------------

template <bool kCuda>
void quadrature_update(const Tensor& x, const Tensor& velocities, const Tensor& nodes, const Tensor& weights,
                       const std::optional<Tensor>& scales, const Tensor& out) {
  const int64_t batch = samples_in(x), rows = rows_in(velocities, x), total = x.numel();
  QuadratureUpdate op{};
  op.x = input(x, "x", x, total);
  op.velocities = input(velocities, "velocities", x, rows * total, true);
  op.out = output(out, "out", x, total);
  check_same(op.out.dtype, op.x.dtype, "out", "x");
  if (scales) op.scales = float32<const float>(*scales, "scales", x, rows * batch);
  const int64_t size = batch ? total / batch : 0;
  const Tables<1> tables = tables_of<1>(&nodes, rows, {&weights}, x);
  for_each_launch(tables, batch, size, [&](Samples s, const Rule<1>& rule) {
    op.s = s;
    op.rule = rule;
    if constexpr (kCuda) {
      on_cuda(op, quadrature_update_cuda, x);
    } else {
      op.walk = walk(tables.num_nodes * total);
      on_cpu(op, instruction_set().kernels->quadrature_update, s.samples * chunks(size), kChunk * (tables.num_nodes + 1));
    }
  });
}

template <bool kCuda>
void leap_residuals(const Tensor& x_k, const Tensor& x_j, const Tensor& x_end, const Tensor& velocities,
                    const Tensor& nodes, const Tensor& first, const Tensor& second, const std::optional<Tensor>& scales,
                    const std::optional<Tensor>& predictions, const Tensor& partials, const Tensor& residuals) {
  const int64_t batch = samples_in(x_k), rows = rows_in(velocities, x_k), total = x_k.numel();
  const int64_t size = batch ? total / batch : 0;
  LeapResiduals op{};
  op.x_k = input(x_k, "x_k", x_k, total);
  op.x_j = input(x_j, "x_j", x_k, total);
  op.x_end = input(x_end, "x_end", x_k, total);
  check_same(op.x_j.dtype, op.x_k.dtype, "x_j", "x_k");
  check_same(op.x_end.dtype, op.x_k.dtype, "x_end", "x_k");
  op.velocities = input(velocities, "velocities", x_k, rows * total, true);
  if (scales) op.scales = float32<const float>(*scales, "scales", x_k, rows * batch);
  if (predictions) op.predictions = output(*predictions, "predictions", x_k, 2 * total);
  op.partials = float32<float>(partials, "partials", x_k, 2 * batch * chunks(size));
  op.residuals = float32<float>(residuals, "residuals", x_k, 2 * batch);
  const Tables<2> tables = tables_of<2>(&nodes, rows, {&first, &second}, x_k);
  for_each_launch(tables, batch, size, [&](Samples s, const Rule<2>& rule) {
    op.s = s;
    op.rule = rule;
    if constexpr (kCuda) {
      on_cuda(op, leap_residuals_cuda, x_k);
    } else {
      op.walk = walk(tables.num_nodes * total);
      on_cpu(op, instruction_set().kernels->leap_residuals, s.samples * chunks(size), kChunk * (tables.num_nodes + 3));
      sum_chunks(op);
    }
  });
}

template <bool kCuda>
void cfg_multistep_step(const Tensor& x, const Tensor& v_cond, const std::optional<Tensor>& v_uncond, double guidance,
                        double h, const std::optional<Tensor>& on_device, const std::optional<Tensor>& velocities,
                        const std::optional<Tensor>& nodes, const std::optional<Tensor>& weights,
                        const std::optional<Tensor>& velocity, const Tensor& out) {
  const int64_t total = x.numel();
  CfgMultistepStep op{};
  op.x = input(x, "x", x, total);
  op.v_cond = input(v_cond, "v_cond", x, total);
  if (v_uncond) {
    op.v_uncond = input(*v_uncond, "v_uncond", x, total);
    check_same(op.v_uncond.dtype, op.v_cond.dtype, "v_uncond", "v_cond");
  }
  op.velocity = velocity ? output(*velocity, "velocity", x, total) : Output{nullptr, op.v_cond.dtype};
  op.out = output(out, "out", x, total);
  check_same(op.out.dtype, op.x.dtype, "out", "x");
  op.guidance = static_cast<float>(guidance);
  op.h = static_cast<float>(h);
  if (on_device) {
    STD_TORCH_CHECK(kCuda && !on_device->is_cpu() && on_device->numel() == 2, "guidance and h must lie on the device, as 2 numbers");
    op.on_device = numbers<double>(*on_device, "guidance and h", ScalarType::Double, x);
  }
  Tables<1> tables = {0, 0, {nullptr, 1}, {{nullptr, 1}}, false};
  if (velocities) {
    STD_TORCH_CHECK(nodes && weights, "velocities need nodes and weights");
    const int64_t rows = rows_in(*velocities, x);
    op.velocities = input(*velocities, "velocities", x, rows * total, true);
    tables = tables_of<1>(&*nodes, rows, {&*weights}, x);
  }
  // Where samples do not differ, all elements are one sample's, in fewer chunks.
  const bool apart = tables.nodes.columns > 1 || tables.weights[0].columns > 1;
  const int64_t batch = apart ? x.size(0) : 1, size = total / std::max<int64_t>(1, batch);
  for_each_launch(tables, batch, size, [&](Samples s, const Rule<1>& rule) {
    op.s = s;
    op.rule = rule;
    if constexpr (kCuda) {
      on_cuda(op, cfg_multistep_step_cuda, x);
    } else {
      on_cpu(op, instruction_set().kernels->cfg_multistep_step, s.samples * chunks(size), kChunk * (tables.num_nodes + 3));
    }
  });
}

template <bool kCuda>
void bridge_cotangents(const Tensor& g, const Tensor& g_x, const Tensor& weights, const Tensor& alphas, const Tensor& out) {
  const int64_t batch = samples_in(g), total = g.numel(), num_nodes = rows_in_table(weights);
  const Tables<2> tables = tables_of<2>(nullptr, num_nodes, {&weights, &alphas}, g);
  BridgeCotangents op{};
  op.g = input(g, "g", g, total);
  op.g_x = input(g_x, "g_x", g, total);
  op.out = output(out, "out", g, num_nodes * total);
  op.past_cache = num_nodes * total * (op.out.dtype == Dtype::kFloat32 ? 4 : 2) > kCacheBytes;
  const int64_t size = batch ? total / batch : 0;
  for_each_launch(tables, batch, size, [&](Samples s, const Rule<2>& rule) {
    op.s = s;
    op.rule = rule;
    if constexpr (kCuda) {
      on_cuda(op, bridge_cotangents_cuda, g);
    } else {
      on_cpu(op, instruction_set().kernels->bridge_cotangents, s.samples * chunks(size), kChunk * (num_nodes + 2));
    }
  });
}

// [B, T, H, d] with d contiguous, of like's B, H and d.
Heads heads_of(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && like.dim() == 4, name, " must be [B, T, H, d] on the CPU");
  for (int d : {0, 2, 3}) STD_TORCH_CHECK(t.size(d) == like.size(d), name, " has another size in dimension ", d);
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) <= 1, name, " must have contiguous heads");
  check_same(dtype_of(t, name), dtype_of(like, "queries"), name, "the queries");
  return {t.const_data_ptr(), {t.stride(0), t.stride(1), t.stride(2)}, dtype_of(t, name) == Dtype::kFloat32 ? 4 : 2};
}

// What forward and backward take alike: queries, keys, then those of a second stream, or null; their weights, of which
// `floats` holds the numbers, ones where a weight is null.
QkNorm qk_norm_of(const Tensor* const (&x)[4], const Tensor* const (&weights)[4], const Tensor* cos, const Tensor* sin,
                  double eps, std::vector<float>& floats) {
  const Tensor& like = *x[0];
  QkNorm op{};
  op.dtype = dtype_of(like, "queries");
  STD_TORCH_CHECK(like.dim() == 4 && op.dtype != Dtype::kFloat8, "queries must be [B, T, H, d], and not float8");
  op.batch = like.size(0), op.heads = like.size(2), op.width = like.size(3), op.eps = static_cast<float>(eps);
  op.num_streams = x[2] ? 4 : 2;
  floats.assign(4 * op.width, 1.0f);
  for (int i = 0; i < op.num_streams; ++i) {
    STD_TORCH_CHECK(x[i] && (x[i]->size(1) == x[i & ~1]->size(1)), "a stream has as many keys as queries");
    HeadStream& stream = op.streams[i];
    stream.x = heads_of(*x[i], "a stream", like);
    stream.tokens = x[i]->size(1), stream.first = i < 2 ? 0 : op.streams[0].tokens;
    float* const numbers = floats.data() + i * op.width;
    stream.weight = numbers;
    if (weights[i]) {
      const Input weight = input(*weights[i], "a weight", like, op.width);
      with_type(weight.dtype, [&](auto type) {
        for (int64_t e = 0; e < op.width; ++e) numbers[e] = to_float(static_cast<const decltype(type)*>(weight.data)[e]);
      });
    }
  }
  op.total = op.streams[op.num_streams - 1].first + op.streams[op.num_streams - 1].tokens;
  if (cos) {
    const int64_t angles = op.total * op.width;
    STD_TORCH_CHECK(op.width % 2 == 0 && (cos->numel() == angles || (!sin && cos->numel() == op.batch * angles)),
                    "cos must hold one number an element of a token, and so d must be even");
    op.cos = float32<const float>(*cos, "cos", like, cos->numel());
    if (sin) op.sin = float32<const float>(*sin, "sin", like, angles);
    op.rope_stride = cos->numel() == angles ? 0 : angles;
  }
  return op;
}

const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

int64_t tasks_of(const QkNorm& op) {
  int64_t tasks = 0;
  for (int i = 0; i < op.num_streams; ++i) tasks += op.batch * token_chunks(op.streams[i].tokens);
  return op.heads * op.width > 0 ? tasks : 0;
}

void on_cpu_by_head(const QkNorm& op, void (*kernel)(const QkNorm&, int64_t, int64_t), int64_t reads) {
  if (const int64_t tasks = tasks_of(op)) on_cpu(op, kernel, tasks, reads * kTokens * op.heads * op.width);
}

void qk_norm(const Tensor& queries, const Tensor& keys, const std::optional<Tensor>& queries_2,
             const std::optional<Tensor>& keys_2, const std::optional<Tensor>& weight_q,
             const std::optional<Tensor>& weight_k, const std::optional<Tensor>& weight_q_2,
             const std::optional<Tensor>& weight_k_2, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
             double eps, const Tensor& q, const Tensor& k) {
  std::vector<float> floats;
  QkNorm op = qk_norm_of({&queries, &keys, pointer(queries_2), pointer(keys_2)},
                         {pointer(weight_q), pointer(weight_k), pointer(weight_q_2), pointer(weight_k_2)}, pointer(cos),
                         pointer(sin), eps, floats);
  const int64_t elements = op.batch * op.total * op.heads * op.width;
  for (int i = 0; i < op.num_streams; ++i) {
    const Output joint = output(i % 2 ? k : q, i % 2 ? "k" : "q", queries, elements);
    check_same(joint.dtype, op.dtype, "q and k", "the queries");
    op.streams[i].joint = joint.data;
  }
  on_cpu_by_head(op, instruction_set().kernels->qk_norm, 1);
}

// sums [4, d]: the weights' gradients, of a scratch of one row a task; both null where they are not wanted.
void qk_norm_backward(const Tensor& g_q, const Tensor& g_k, const Tensor& queries, const Tensor& keys,
                      const std::optional<Tensor>& queries_2, const std::optional<Tensor>& keys_2,
                      const std::optional<Tensor>& weight_q, const std::optional<Tensor>& weight_k,
                      const std::optional<Tensor>& weight_q_2, const std::optional<Tensor>& weight_k_2,
                      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double eps,
                      const Tensor& of_queries, const Tensor& of_keys, const std::optional<Tensor>& of_queries_2,
                      const std::optional<Tensor>& of_keys_2, const std::optional<Tensor>& parts,
                      const std::optional<Tensor>& sums) {
  std::vector<float> floats;
  QkNorm op = qk_norm_of({&queries, &keys, pointer(queries_2), pointer(keys_2)},
                         {pointer(weight_q), pointer(weight_k), pointer(weight_q_2), pointer(weight_k_2)}, pointer(cos),
                         pointer(sin), eps, floats);
  const Tensor* const gradients[4] = {&of_queries, &of_keys, pointer(of_queries_2), pointer(of_keys_2)};
  for (int i = 0; i < op.num_streams; ++i) {
    HeadStream& stream = op.streams[i];
    stream.g = heads_of(i % 2 ? g_k : g_q, i % 2 ? "g_k" : "g_q", queries);
    STD_TORCH_CHECK((i % 2 ? g_k : g_q).size(1) == op.total, "g_q and g_k must have the tokens of all streams");
    STD_TORCH_CHECK(gradients[i], "each stream needs room for its gradient");
    const Output of_x = output(*gradients[i], "a gradient", queries, op.batch * stream.tokens * op.heads * op.width);
    check_same(of_x.dtype, op.dtype, "a gradient", "the queries");
    stream.of_x = of_x.data;
  }
  const int64_t tasks = tasks_of(op);
  STD_TORCH_CHECK(!!parts == !!sums, "parts and sums belong together");
  if (parts) op.parts = float32<float>(*parts, "parts", queries, tasks * op.width);
  on_cpu_by_head(op, instruction_set().kernels->qk_norm_backward, 2);
  if (!sums) return;
  float* const totals = float32<float>(*sums, "sums", queries, 4 * op.width);
  std::vector<double> total(op.width);
  const float* part = op.parts;
  for (int i = 0; i < 4; ++i) {
    std::fill(total.begin(), total.end(), 0.0);
    const int64_t rows = tasks && i < op.num_streams ? op.batch * token_chunks(op.streams[i].tokens) : 0;
    for (int64_t row = 0; row < rows; ++row, part += op.width) {
      for (int64_t e = 0; e < op.width; ++e) total[e] += part[e];
    }
    for (int64_t e = 0; e < op.width; ++e) totals[i * op.width + e] = static_cast<float>(total[e]);
  }
}

// [R, M] with M contiguous, of op's rows and dtype, or absent.
Rows rows_of(const Activation& op, const Tensor* t, const char* name, int64_t width) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 2 && t->size(0) == op.rows && t->size(1) == width, name, " must be [",
                  op.rows, ", ", width, "] on the CPU");
  STD_TORCH_CHECK(t->stride(1) == 1 || width <= 1, name, " must have contiguous rows");
  check_same(dtype_of(*t, name), op.dtype, name, "x");
  return {t->const_data_ptr(), t->stride(0)};
}

Activation activation_of(const Tensor& x, const Tensor* value) {
  Activation op{};
  op.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && op.dtype != Dtype::kFloat8, "x must be [R, M], and not float8");
  op.rows = x.size(0), op.width = x.size(1);
  op.x = rows_of(op, &x, "x", op.width), op.value = rows_of(op, value, "value", op.width);
  return op;
}

void* rows_into(const Activation& op, const Tensor& t, const char* name, const Tensor& x, int64_t width) {
  const Output out = output(t, name, x, op.rows * width);
  check_same(out.dtype, op.dtype, name, "x");
  return out.data;
}

void activations(const Tensor& x, const std::optional<Tensor>& value, const std::optional<Tensor>& prefix, const Tensor& out) {
  Activation op = activation_of(x, pointer(value));
  op.before = prefix ? prefix->size(1) : 0;
  op.prefix = rows_of(op, pointer(prefix), "prefix", op.before);
  op.out = rows_into(op, out, "out", x, op.before + op.width);
  const int64_t elements = op.before + op.width;
  if (elements > 0) on_cpu(op, instruction_set().kernels->activation, op.rows * row_chunks(op.width), 4 * elements);
}

void activations_backward(const Tensor& g, const Tensor& x, const std::optional<Tensor>& value, const Tensor& of_x,
                          const std::optional<Tensor>& of_value) {
  Activation op = activation_of(x, pointer(value));
  op.g = rows_of(op, &g, "g", op.width);
  op.of_x = rows_into(op, of_x, "of_x", x, op.width);
  STD_TORCH_CHECK(!!value == !!of_value, "value and of_value belong together");
  if (of_value) op.of_value = rows_into(op, *of_value, "of_value", x, op.width);
  if (op.width > 0) {
    on_cpu(op, instruction_set().kernels->activation_backward, op.rows * row_chunks(op.width), 4 * op.width);
  }
}

// [B, T, D] of the shape of `like`, or absent.
Tokens tokens_of(const std::optional<Tensor>& t, const char* name, const Tensor& like) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 3 && like.dim() == 3, name, " must be [B, T, D] on the CPU");
  for (int d = 0; d < 3; ++d) STD_TORCH_CHECK(t->size(d) == like.size(d), name, " has another shape in dimension ", d);
  STD_TORCH_CHECK(t->stride(2) == 1 || t->size(2) <= 1, name, " must have contiguous rows");
  const Dtype dtype = dtype_of(*t, name);
  STD_TORCH_CHECK(dtype == dtype_of(like, name) && dtype != Dtype::kFloat8, name, " must have the dtype of the others");
  return {{t->const_data_ptr(), dtype}, t->stride(0), t->stride(1)};
}

// [B, D], [1, D], [B, 1, D] or [1, 1, D] for `like` [B, T, D], or absent.
BySample by_sample(const std::optional<Tensor>& t, const char* name, const Tensor& like) {
  if (!t) return {};
  const int64_t dims = t->dim(), batch = dims ? t->size(0) : 0;
  STD_TORCH_CHECK(t->is_cpu() && (dims == 2 || (dims == 3 && t->size(1) == 1)) && (batch == 1 || batch == like.size(0)) &&
                      t->size(dims - 1) == like.size(2),
                  name, " must be [B or 1, D] or [B or 1, 1, D] on the CPU");
  STD_TORCH_CHECK(t->stride(dims - 1) == 1 || like.size(2) <= 1, name, " must have contiguous rows");
  const Dtype dtype = dtype_of(*t, name);
  STD_TORCH_CHECK(dtype != Dtype::kFloat8, name, " must not be float8");
  return {{t->const_data_ptr(), dtype}, batch == 1 ? 0 : t->stride(0)};
}

Output written(const std::optional<Tensor>& t, const char* name, const Tensor& like) {
  if (!t) return {};
  check_same(dtype_of(*t, name), dtype_of(like, "the input"), name, "the input");
  return output(*t, name, like, like.numel());
}

template <class Op>
void on_cpu_by_token(const Op& op, void (*kernel)(const Op&, int64_t, int64_t), int64_t rows) {
  on_cpu(op, kernel, op.batch * token_chunks(op.tokens), kTokens * op.size * rows);
}

void modulation(const Tensor& x, const std::optional<Tensor>& gate, const std::optional<Tensor>& y,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& shift,
                const std::optional<Tensor>& scale, const std::optional<Tensor>& shift_2,
                const std::optional<Tensor>& scale_2, bool is_layer, double eps, const std::optional<Tensor>& total,
                const std::optional<Tensor>& out, const std::optional<Tensor>& out_2) {
  Modulation op{};
  op.x = tokens_of(x, "x", x);
  op.batch = x.size(0), op.tokens = x.size(1), op.size = x.size(2);
  op.is_layer = is_layer, op.eps = eps;
  op.y = tokens_of(y, "y", x);
  op.gate = by_sample(gate, "gate", x);
  op.shift = by_sample(shift, "shift", x), op.scale = by_sample(scale, "scale", x);
  op.shift_2 = by_sample(shift_2, "shift_2", x), op.scale_2 = by_sample(scale_2, "scale_2", x);
  if (weight) op.weight = input(*weight, "weight", x, op.size);
  op.total = written(total, "total", x), op.out = written(out, "out", x), op.out_2 = written(out_2, "out_2", x);
  STD_TORCH_CHECK(!!gate == !!y && !!gate == !!total, "gate, y and total belong together");
  STD_TORCH_CHECK((!shift || scale) && !!shift_2 == !!scale_2 && !!scale_2 == !!out_2 && (!out_2 || out),
                  "a shift needs a scale, and a second one needs both and an output");
  if (x.numel() > 0) on_cpu_by_token(op, instruction_set().kernels->modulation, 2 + !!gate + !!out_2);
}

void modulation_backward(const std::optional<Tensor>& g_total, const std::optional<Tensor>& g,
                         const std::optional<Tensor>& g_2, const std::optional<Tensor>& s,
                         const std::optional<Tensor>& gate, const std::optional<Tensor>& y,
                         const std::optional<Tensor>& weight, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& scale_2, bool is_layer, double eps, bool of_modulation,
                         const std::optional<Tensor>& of_x, const std::optional<Tensor>& of_y,
                         const std::optional<Tensor>& parts) {
  STD_TORCH_CHECK(g_total || g, "there is no gradient");
  const Tensor& like = g_total ? *g_total : *g;
  ModulationBackward op{};
  op.g_total = tokens_of(g_total, "g_total", like), op.g = tokens_of(g, "g", like);
  op.batch = like.size(0), op.tokens = like.size(1), op.size = like.size(2);
  op.is_layer = is_layer, op.of_modulation = of_modulation, op.eps = eps;
  op.g_2 = tokens_of(g_2, "g_2", like), op.s = tokens_of(s, "s", like), op.y = tokens_of(y, "y", like);
  op.gate = by_sample(gate, "gate", like);
  op.scale = by_sample(scale, "scale", like), op.scale_2 = by_sample(scale_2, "scale_2", like);
  if (weight) op.weight = input(*weight, "weight", like, op.size);
  op.of_x = written(of_x, "of_x", like), op.of_y = written(of_y, "of_y", like);
  STD_TORCH_CHECK(!!s == !!g && !!s == !!of_x && !!g_2 == !!scale_2 && (!g_2 || s), "s, g and of_x belong together, and "
                  "g_2 and scale_2");
  STD_TORCH_CHECK(!!gate == !!of_y && (!of_modulation || s), "gate and of_y belong together; only a norm is modulated");
  const int64_t sums = (of_modulation ? (1 + is_layer) * (1 + !!g_2) : 0) + !!y;
  STD_TORCH_CHECK(!!parts == (sums > 0), "sums go into parts");
  if (parts) op.parts = float32<float>(*parts, "parts", like, sums * op.batch * token_chunks(op.tokens) * op.size);
  if (like.numel() > 0) on_cpu_by_token(op, instruction_set().kernels->modulation_backward, 3 + !!g_total + !!y + !!gate);
}

std::string isa() { return instruction_set().name; }
std::string isas() {  // those that run here, best first
  std::string names;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.runs) names += (names.empty() ? "" : " ") + std::string(set.name);
  }
  return names;
}
std::string rows() { return walk(kManyElements) == kFewRows ? "few" : "all"; }  // of a large cache, read side by side
std::string cuda_archs() { return FLOWBP_CUDA_ARCHS; }  // empty: built without CUDA

#ifdef FLOWBP_CUDA
std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
std::string cuda_error(int64_t device) {  // empty: the kernels run there
  const torch::stable::accelerator::DeviceGuard guard(static_cast<torch::stable::accelerator::DeviceIndex>(device));
  const CudaVerdict verdict = cuda_verdict();
  if (!verdict.error) return "";
  return std::string(verdict.error) + "; the driver knows CUDA " + cuda_version(verdict.driver) +
         ", the kernels were built by " + cuda_version(verdict.runtime);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(flowbp_compiled, m) {
  m.def("quadrature_update(Tensor x, Tensor velocities, Tensor nodes, Tensor weights, Tensor? scales, Tensor(a!) out)"
        " -> ()");
  m.def("leap_residuals(Tensor x_k, Tensor x_j, Tensor x_end, Tensor velocities, Tensor nodes, Tensor first,"
        " Tensor second, Tensor? scales, Tensor(a!)? predictions, Tensor(b!) partials, Tensor(c!) residuals) -> ()");
  m.def("cfg_multistep_step(Tensor x, Tensor v_cond, Tensor? v_uncond, float guidance, float h, Tensor? on_device,"
        " Tensor? velocities, Tensor? nodes, Tensor? weights, Tensor(a!)? velocity, Tensor(b!) out) -> ()");
  m.def("bridge_cotangents(Tensor g, Tensor g_x, Tensor weights, Tensor alphas, Tensor(a!) out) -> ()");
  m.def("qk_norm(Tensor queries, Tensor keys, Tensor? queries_2, Tensor? keys_2, Tensor? weight_q, Tensor? weight_k,"
        " Tensor? weight_q_2, Tensor? weight_k_2, Tensor? cos, Tensor? sin, float eps, Tensor(a!) q, Tensor(b!) k) -> ()");
  m.def("qk_norm_backward(Tensor g_q, Tensor g_k, Tensor queries, Tensor keys, Tensor? queries_2, Tensor? keys_2,"
        " Tensor? weight_q, Tensor? weight_k, Tensor? weight_q_2, Tensor? weight_k_2, Tensor? cos, Tensor? sin, float eps,"
        " Tensor(a!) of_queries, Tensor(b!) of_keys, Tensor(c!)? of_queries_2, Tensor(d!)? of_keys_2, Tensor(e!)? parts,"
        " Tensor(f!)? sums) -> ()");
  m.def("activations(Tensor x, Tensor? value, Tensor? prefix, Tensor(a!) out) -> ()");
  m.def("activations_backward(Tensor g, Tensor x, Tensor? value, Tensor(a!) of_x, Tensor(b!)? of_value) -> ()");
  m.def("modulation(Tensor x, Tensor? gate, Tensor? y, Tensor? weight, Tensor? shift, Tensor? scale, Tensor? shift_2,"
        " Tensor? scale_2, bool is_layer, float eps, Tensor(a!)? total, Tensor(b!)? out, Tensor(c!)? out_2) -> ()");
  m.def("modulation_backward(Tensor? g_total, Tensor? g, Tensor? g_2, Tensor? s, Tensor? gate, Tensor? y, Tensor? weight,"
        " Tensor? scale, Tensor? scale_2, bool is_layer, float eps, bool of_modulation, Tensor(a!)? of_x,"
        " Tensor(b!)? of_y, Tensor(c!)? parts) -> ()");
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("rows() -> str");
  m.def("cuda_archs() -> str");
  m.def("cuda_error(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flowbp_compiled, CPU, m) {
  m.impl("quadrature_update", TORCH_BOX(&quadrature_update<false>));
  m.impl("leap_residuals", TORCH_BOX(&leap_residuals<false>));
  m.impl("cfg_multistep_step", TORCH_BOX(&cfg_multistep_step<false>));
  m.impl("bridge_cotangents", TORCH_BOX(&bridge_cotangents<false>));
  m.impl("activations", TORCH_BOX(&activations));
  m.impl("activations_backward", TORCH_BOX(&activations_backward));
  m.impl("qk_norm", TORCH_BOX(&qk_norm));
  m.impl("qk_norm_backward", TORCH_BOX(&qk_norm_backward));
  m.impl("modulation", TORCH_BOX(&modulation));
  m.impl("modulation_backward", TORCH_BOX(&modulation_backward));
}

STABLE_TORCH_LIBRARY_IMPL(flowbp_compiled, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("rows", TORCH_BOX(&rows));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
#ifdef FLOWBP_CUDA
  m.impl("cuda_error", TORCH_BOX(&cuda_error));
#endif
}

#ifdef FLOWBP_CUDA
STABLE_TORCH_LIBRARY_IMPL(flowbp_compiled, CUDA, m) {
  m.impl("quadrature_update", TORCH_BOX(&quadrature_update<true>));
  m.impl("leap_residuals", TORCH_BOX(&leap_residuals<true>));
  m.impl("cfg_multistep_step", TORCH_BOX(&cfg_multistep_step<true>));
  m.impl("bridge_cotangents", TORCH_BOX(&bridge_cotangents<true>));
}
#endif
