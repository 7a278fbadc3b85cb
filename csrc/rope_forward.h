// Forward pass of polynomial attention: states by panels of keys, rows by tiles of queries, and rows whose certificate
// fails once more, exactly.
#pragma once

#include "rope_causal.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

template <typename T, typename A = Acc<T>>
inline void forward_full(const KeySide<T>& side, double rtol, const ForwardOutput<T>& to) {
  const Problem<T>& in = side.in;
  const int64_t tokens = kTileTokens<A>;
  const double weight = sum_keys(side, in.keys, to.state);
  const GatheredKeys<T> heavy(side, side.heavy_keys.size(), [&](int64_t i) { return side.heavy_keys[i]; });
  RowStates<T> states(in);
  const RowState<A> state = states.of(to.state);
  for (int64_t g = 0; g < in.group; ++g) {
    const HeadWeights<T> head(in, g);
    at::parallel_for(0, (in.queries + tokens - 1) / tokens, 1, [&](int64_t first, int64_t last) {
      RowTile<T> tile(side, tokens, rtol);
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task * tokens;
        tile.run(g, begin, std::min(tokens, in.queries - begin), head, state, weight, heavy.block(), in.keys, {}, to);
      }
    });
  }
}

template <typename T, typename A = Acc<T>>
inline void forward_problem(const Problem<T>& in, double rtol, const ForwardOutput<T>& to) {
  KeySide<T> side(in);
  side.find_mean();
  if (in.options.is_causal)
    CausalScan<T>(side, rtol, to).run();
  else
    forward_full(side, rtol, to);
  A* last = to.state + in.tables.count() * in.width();
  std::copy_n(side.mean.data(), in.value_dim, last);
  last[in.value_dim] = side.top;
  const bool* flags = to.exact;
  std::vector<std::vector<int64_t>> failed(in.group);
  bool any = false;
  for (int64_t g = 0; g < in.group; ++g, flags += to.head_rows) {
    for (int64_t i = 0; i < in.queries; ++i) {
      if (flags[i]) failed[g].push_back(i);
    }
    any = any || !failed[g].empty();
  }
  if (!any) return;
  const ExactRows<T> exact(in);
  for (int64_t g = 0; g < in.group; ++g) {
    exact.run(g, failed[g].size(), [&](int64_t i) { return failed[g][i]; }, to);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
