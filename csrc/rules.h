// Turns tables of nodes and weights into the rules of ops.h.
#pragma once

#include <stdexcept>
#include <string>

#include "ops.h"

namespace flowbp {

// [K, columns], with 1 column or one a sample.
template <class T>
struct Table {
  const T* data;
  int64_t columns;

  T at(int64_t k, int64_t sample) const { return data[k * columns + (columns == 1 ? 0 : sample)]; }
};

// The rows of L sums over K = num_nodes terms. nodes.data null: node k is k.
template <int L>
struct Tables {
  int64_t num_nodes;
  Table<int64_t> nodes;
  Table<double> weights[L];
};

// Calls launch(samples, rule) for as many samples at a time as fit one launch. A term whose weights are all zero is
// left out, unless its row is written (nodes null). A node outside [0, num_rows) throws.
template <int L, class Launch>
void for_each_launch(const Tables<L>& tables, int64_t batch, int64_t size, int64_t num_rows, Launch launch) {
  if (tables.num_nodes > kMaxTerms) {
    throw std::invalid_argument("at most " + std::to_string(kMaxTerms) + " nodes fit a kernel's parameters, not " +
                                std::to_string(tables.num_nodes));
  }
  if (batch == 0 || size == 0) return;
  Rule<L> rule = {};
  rule.shared = tables.nodes.columns == 1;
  for (const Table<double>& weights : tables.weights) rule.shared &= weights.columns == 1;
  for (int64_t first = 0, next = 0; first < batch; first = next) {
    int16_t used = 0;
    do {
      for (int64_t k = 0; k < tables.num_nodes; ++k) {
        const int64_t node = tables.nodes.data ? tables.nodes.at(k, next) : k;
        if (node < 0 || node >= num_rows) {
          throw std::out_of_range("node " + std::to_string(node) + " is not in [0, " + std::to_string(num_rows) + ")");
        }
        Term<L> term = {static_cast<int32_t>(node), {}};
        bool takes_part = tables.nodes.data == nullptr;
        for (int l = 0; l < L; ++l) {
          term.weight[l] = static_cast<float>(tables.weights[l].at(k, next));
          takes_part |= term.weight[l] != 0;
        }
        if (takes_part) rule.terms[used++] = term;
      }
      ++next;
      rule.first[next - first] = used;
    } while (!rule.shared && next < batch && next - first < kMaxSamples && used + tables.num_nodes <= kMaxTerms);
    if (rule.shared) next = batch;
    launch(Samples{batch, size, first, next - first}, rule);
  }
}

}  // namespace flowbp
