// Turns tables of nodes and weights into the rules of ops.h.
#pragma once

#include <stdexcept>
#include <string>

#include "ops.h"

namespace flowbp {

// Calls launch(samples, rule) for as many samples at a time as fit one launch: for all, with tables on the device. A term
// whose weights are all zero is left out, unless its row is written (nodes null). A node outside [0, num_rows) throws.
template <int L, class Launch>
void for_each_launch(const Tables<L>& tables, int64_t batch, int64_t size, Launch launch) {
  if (tables.num_nodes > kMaxTerms) {
    throw std::invalid_argument("a kernel takes at most " + std::to_string(kMaxTerms) + " nodes, not " +
                                std::to_string(tables.num_nodes));
  }
  if (batch == 0 || size == 0) return;
  Rule<L> rule = {};
  if (tables.on_device) {
    rule.tables = tables;
    return launch(Samples{batch, size, 0, batch}, rule);
  }
  rule.shared = tables.nodes.columns == 1;
  for (const Table<double>& weights : tables.weights) rule.shared &= weights.columns == 1;
  for (int64_t first = 0, next = 0; first < batch; first = next) {
    int16_t used = 0;
    do {
      for (int64_t k = 0; k < tables.num_nodes; ++k) {
        const Term<L> term = tables.term(k, next);
        if (term.node < 0) {
          throw std::out_of_range("node " + std::to_string(tables.nodes.at(k, next)) + " is not in [0, " +
                                  std::to_string(tables.num_rows) + ")");
        }
        if (tables.takes_part(term)) rule.terms[used++] = term;
      }
      ++next;
      rule.first[next - first] = used;
    } while (!rule.shared && next < batch && next - first < kMaxSamples && used + tables.num_nodes <= kMaxTerms);
    if (rule.shared) next = batch;
    launch(Samples{batch, size, first, next - first}, rule);
  }
}

}  // namespace flowbp
