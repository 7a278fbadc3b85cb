// Norms of tokens, which set the limits of a plan: one pass over q or k as they lie, whatever the plan turns them into.
#pragma once

#include "rope_problem.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// to[i] = |(x_i - shift) map| of rows x_i (dim), i < count; shift and map (dim, dim) may be null.
template <typename T, typename A = Acc<T>>
inline void row_norms(const T* x, int64_t row, int64_t count, int64_t dim, const A* shift, const A* map, A* to) {
  if (!map) {
    for (int64_t i = 0; i < count; ++i, x += row) {
      Lanes<A> total{};
      for_lanes<A>(0, dim, [&](int64_t l, auto lanes) {
        Lanes<A> part = load(x + l, lanes);
        if (shift) part -= load(shift + l, lanes);
        total += part * part;
      });
      to[i] = std::sqrt(sum<A>(total));
    }
    return;
  }
  constexpr int64_t kTokens = 4 * kTileTokens<A>;
  const Buffer<A> columns((dim + 1) * kTokens);
  A* totals = columns.get() + dim * kTokens;
  for (int64_t begin = 0; begin < count; begin += kTokens) {
    const int64_t size = std::min(kTokens, count - begin);
    for (int64_t l = 0; l < dim; ++l) {
      A* column = columns.get() + l * kTokens;
      for (int64_t t = 0; t < size; ++t)
        column[t] = static_cast<A>(x[(begin + t) * row + l]) - (shift ? shift[l] : A(0));
      std::fill(column + size, column + kTokens, A(0));
    }
    std::fill(totals, totals + kTokens, A(0));
    outer(dim, dim, kTokens, map, 1, dim, columns.get(), kTokens, [&](int64_t, int64_t t, const auto& tile) {
      for (const auto& registers : tile.at) {
        for (int64_t n = 0; const auto& part : registers) {
          A* at = totals + t + n++ * kLanes<A>;
          store(at, load(at, All{}) + part * part, All{});
        }
      }
    });
    for (int64_t t = 0; t < size; ++t) to[begin + t] = std::sqrt(totals[t]);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
