// The ops as their kernels see them: plain structs, no torch. bindings.cpp fills them, cpu/ and cuda/ compute them.
//
// A batch of B samples, each of `size` elements in a row; a cache holds row n of sample b at (n * B + b) * size.
// Sums run in float32 by fused multiply-add in the order of the terms, and are rounded once, at the store.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "convert.h"

namespace flowbp {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kFloat8 };

struct Input {
  const void* data;  // null: absent
  Dtype dtype;
};
struct Output {
  void* data;  // null: not wanted
  Dtype dtype;
};

// One cached row and its weight in each of L sums.
template <int L>
struct Term {
  int32_t node;
  float weight[L];
};

// [K, columns], with 1 column or one a sample.
template <class T>
struct Table {
  const T* data;
  int64_t columns;

  FLOWBP_HD T at(int64_t k, int64_t sample) const { return data[k * columns + (columns == 1 ? 0 : sample)]; }
};

// The rows of L sums over K = num_nodes terms. nodes.data null: node k is k, and its row is written, not read.
template <int L>
struct Tables {
  int64_t num_nodes, num_rows;
  Table<int64_t> nodes;
  Table<double> weights[L];
  bool on_device;  // the kernel reads them, each time it runs; else the host reads them and a rule holds their numbers

  // Term k of a sample. A node outside [0, num_rows) is node -1.
  FLOWBP_HD Term<L> term(int64_t k, int64_t sample) const {
    const int64_t node = nodes.data ? nodes.at(k, sample) : k;
    Term<L> term = {node >= 0 && node < num_rows ? static_cast<int32_t>(node) : -1, {}};
    for (int l = 0; l < L; ++l) term.weight[l] = static_cast<float>(weights[l].at(k, sample));
    return term;
  }

  // Whether a kernel does anything for a term: a row whose weights are all zero is not read.
  FLOWBP_HD bool takes_part(const Term<L>& term) const {
    bool weighs = false;
    for (int l = 0; l < L; ++l) weighs |= term.weight[l] != 0;
    return weighs || !nodes.data;
  }
};

constexpr int kMaxTerms = 256;    // of one launch; Python's backend.MAX_NODES
constexpr int kMaxSamples = 128;  // of one launch with a rule a sample that travels by value

// What each sample sums, as a kernel parameter: no copy to the device, no synchronisation. Either its terms, or the addresses
// of tables on the device, so that a launch captured in a CUDA graph reads at each replay what lies there by then.
template <int L>
struct Rule {
  Term<L> terms[kMaxTerms];
  int16_t first[kMaxSamples + 1];  // sample s has the terms first[s] .. first[s + 1]
  bool shared;                     // all samples have those of sample 0
  Tables<L> tables;

  FLOWBP_HD int begin(int64_t sample) const { return first[shared ? 0 : sample]; }
  FLOWBP_HD int end(int64_t sample) const { return first[shared ? 1 : sample + 1]; }
};

// The samples of one launch: first_sample .. first_sample + samples of a batch. rule's sample s is first_sample + s.
struct Samples {
  int64_t batch, size, first_sample, samples;
};

// How the CPU walks through the rows of a cache: see cpu/kernels.inc. Every walk gives the same bits.
enum Walk { kFewRows, kAllRows };

// out = x + sum over terms of weight * scales[node, b] * velocities[node, b]
struct QuadratureUpdate {
  Samples s;
  Input x, velocities;
  const float* scales;  // [N, B], or null for ones
  Output out;           // x's dtype
  Rule<1> rule;
  Walk walk;  // on the CPU
};

// The same sum twice, from x_k (weight[0]) and from x_j (weight[1]), and its mean distance from x_j and from x_end.
struct LeapResiduals {
  Samples s;
  Input x_k, x_j, x_end, velocities;  // the latents share a dtype
  const float* scales;
  Output predictions;  // [2, B, size], or null
  float* partials;     // [2, B, chunks]
  float* residuals;    // [2, B]
  Rule<2> rule;
  Walk walk;  // on the CPU
};

// v = v_uncond + guidance (v_cond - v_uncond), or v_cond;  velocity = v
// out = x + sum over terms of weight * velocities[node, b] + h velocity, as velocity was rounded
// An Euler step is the one without velocities, on one sample of all elements.
struct CfgMultistepStep {
  Samples s;
  Input x, v_cond, v_uncond, velocities;  // v_uncond of v_cond's dtype, or null; velocities null: there are no terms
  float guidance, h;
  const double* on_device;  // guidance, then h, which the kernel reads instead when it runs; or null
  Output velocity, out;  // velocity.dtype rounds v even if velocity.data is null; out of x's dtype
  Rule<1> rule;
};

// out[node, b] = weight[0] (g + weight[1] g_x); a weight of zero cuts what it multiplies
struct BridgeCotangents {
  Samples s;
  Input g, g_x;
  Output out;  // [K, B, size]
  bool past_cache;  // on the CPU: too much is written for it to be in the cache when it is read
  Rule<2> rule;
};

// A tensor [B, T, D]: `sample` and `token` are its strides, and a row is contiguous.
struct Tokens {
  Input rows;
  int64_t sample, token;
};
// [B, D], or one row for all samples, whose stride is 0.
struct BySample {
  Input rows;
  int64_t sample;
};

constexpr int64_t kTokens = 16;  // of one task, and of one partial sum; Python's modulation.CHUNK
FLOWBP_HD int64_t token_chunks(int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }

// s = x + gate y;  n = norm(s) weight;  out = n (1 + scale) + shift, and the same with scale_2 and shift_2
// What is null takes no part; out null: there is no norm.
struct Modulation {
  int64_t batch, tokens, size;
  bool is_layer;  // LayerNorm, else RMS
  double eps;
  Tokens x, y;  // of one dtype, and the outputs of it too
  BySample gate, shift, scale, shift_2, scale_2;
  Input weight;
  Output total, out, out_2;  // [B, T, D] contiguous; total holds s
};

// With u = weight (g (1 + scale) + g_2 (1 + scale_2)) and n = norm(s):
// of_x = d = g_total + rstd (u - mean u - n mean(u n)), without mean u for RMS;  of_y = gate d;  without s, d = g_total
// parts[:, b, chunk] = the chunk's sums of g n, g, g_2 n, g_2 (of_modulation; without g and g_2 for RMS), then d y
struct ModulationBackward {
  int64_t batch, tokens, size;
  bool is_layer, of_modulation;
  double eps;
  Tokens g_total, g, g_2, s, y;  // of one dtype, and the outputs of it too
  BySample gate, scale, scale_2;
  Input weight;
  Output of_x, of_y;  // [B, T, D] contiguous
  float* parts;       // [R, B, chunks, D], or null
};

// The order in which a residual is summed, on every backend: the gaps of a chunk by kThreads threads, kWidth
// neighbours each, then by halves across the threads; the chunks by kThreads threads in float64, then by halves.
constexpr int kThreads = 256, kWidth = 8;
constexpr int64_t kChunk = kThreads * kWidth;
FLOWBP_HD int64_t chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

// [B, T, H, d] with d contiguous.
struct Heads {
  const void* data;
  int64_t stride[3], element_size;

  const void* at(int64_t b, int64_t t) const {
    return static_cast<const char*>(data) + (b * stride[0] + t * stride[1]) * element_size;
  }
};

// One stream of queries or of keys, and where its token 0 lies in the joint sequence.
struct HeadStream {
  int64_t tokens, first;
  Heads x;
  const float* weight;  // [d]
  void* joint;          // [B, total, H, d]; of the forward
  Heads g;              // of joint; of the backward, as is
  void* of_x;           // [B, tokens, H, d]
};

// joint[b, first + t, h] = R[b, first + t] (weight x / rms) with x = x[b, t, h], rms = sqrt(mean x^2 + eps)
// With v = R^T g and n = x / rms: of_x = (v weight - n mean(v weight n)) / rms,  parts[chunk] = sum over t, h of v n
struct QkNorm {
  int64_t batch, total, heads, width, rope_stride;  // rope_stride: between samples, 0 where they share their angles
  Dtype dtype;
  float eps;
  const float *cos, *sin;  // [1 or B, total, d]; sin null: cos holds pairs (cosine, sine); both null: no rotation
  int num_streams;
  HeadStream streams[4];
  float* parts;  // [chunks of all streams, d], or null
};

// [R, M] with M contiguous.
struct Rows {
  const void* data;  // null: absent
  int64_t stride;

  template <class T>
  const T* at(int64_t row) const {
    return static_cast<const T*>(data) + row * stride;
  }
};

// out = [prefix, silu(x) value], or [prefix, gelu(x)] where value is null; and their gradients from g
struct Activation {
  int64_t rows, before, width;
  Dtype dtype;
  Rows prefix, x, value, g;
  void* out;               // [R, before + width]; of the forward
  void *of_x, *of_value;   // [R, width]; of the backward
};

// gelu(x) = x (1 + tanh(u / 2)) / 2 = x sigmoid(u) with u = slope (x + cubic x^3)
constexpr float kGeluSlope = 1.5957691216057308f, kGeluCubic = 0.044715f;  // 2 sqrt(2 / pi)
FLOWBP_HD int64_t row_chunks(int64_t width) { return width > 0 ? chunks(width) : 1; }  // a prefix needs one

template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(bfloat16{});
    case Dtype::kFloat16: return f(float16{});
    case Dtype::kFloat8: break;  // only caches hold it: with_cache_type
  }
  std::abort();  // a caller let through what no kernel takes: to return would leave the output unwritten
}

template <class F>
void with_cache_type(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat8) return f(float8{});
  with_type(dtype, f);
}

// The CPU kernels of one instruction set. A task is a chunk of one sample.
struct CpuKernels {
  void (*quadrature_update)(const QuadratureUpdate&, int64_t first_task, int64_t last_task);
  void (*leap_residuals)(const LeapResiduals&, int64_t first_task, int64_t last_task);
  void (*cfg_multistep_step)(const CfgMultistepStep&, int64_t first_task, int64_t last_task);
  void (*bridge_cotangents)(const BridgeCotangents&, int64_t first_task, int64_t last_task);
  // A task is a chunk of one sample's tokens of one stream.
  void (*qk_norm)(const QkNorm&, int64_t first_task, int64_t last_task);
  void (*qk_norm_backward)(const QkNorm&, int64_t first_task, int64_t last_task);
  // A task is a chunk of one sample's tokens.
  void (*modulation)(const Modulation&, int64_t first_task, int64_t last_task);
  void (*modulation_backward)(const ModulationBackward&, int64_t first_task, int64_t last_task);
  // A task is a chunk of one row.
  void (*activation)(const Activation&, int64_t first_task, int64_t last_task);
  void (*activation_backward)(const Activation&, int64_t first_task, int64_t last_task);
};
extern const CpuKernels kAvx512, kAvx2, kBaseline;

// The second stage of leap_residuals on the CPU.
void sum_chunks(const LeapResiduals&);

static_assert(sizeof(LeapResiduals) <= 4096, "the parameters of a CUDA kernel");

// Whether the CUDA kernels run on the current device: error is null, or why they do not. Versions are as CUDA counts
// them, 13000 for 13.0: the newest that the driver knows, and the runtime's own.
struct CudaVerdict {
  const char* error;
  int driver, runtime;
};
CudaVerdict cuda_verdict();

// The CUDA kernels; each returns null or what went wrong. `stream` is a cudaStream_t.
const char* quadrature_update_cuda(const QuadratureUpdate&, void* stream);
const char* leap_residuals_cuda(const LeapResiduals&, void* stream);
const char* cfg_multistep_step_cuda(const CfgMultistepStep&, void* stream);
const char* bridge_cotangents_cuda(const BridgeCotangents&, void* stream);

}  // namespace flowbp
