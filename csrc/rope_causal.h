// The causal forward pass.
#pragma once

#include "rope_keys.h"
#include "rope_rows.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Chunk by chunk: rows against the state of the chunks before and, pair by pair, their own. Long sequences go in two
// segments at once, the second of which begins with the moments of the first.
template <typename T>
class CausalScan {
  using A = Acc<T>;

 public:
  CausalScan(const KeySide<T>& side, double rtol, const ForwardOutput<T>& to)
      : side_(side), in_(side.in), rtol_(rtol), to_(to), heavy_(side, side.heavy_keys.size(), [&](int64_t i) {
          return side.heavy_keys[i];
        }) {
    for (int64_t g = 0; g < in_.group; ++g) heads_.emplace_back(in_, g);
  }

  void run() const {
    const int64_t size = in_.tables.count() * in_.width();
    const int64_t middle = round_up(in_.queries / kSegments, in_.options.chunk);
    if (in_.queries < kSegments * kSegmentTokens || in_.keys < middle || middle >= in_.queries) {
      std::fill(to_.state, to_.state + size, A(0));
      scan(0, in_.queries, to_.state, 0.0);
    } else {
      const double weight = sum_keys(side_, middle, to_.state);
      const Buffer<A> first(size);
      first.zero();
      for_segments(
          [&](int64_t s) { s ? scan(middle, in_.queries, to_.state, weight) : scan(0, middle, first.get(), 0.0); });
    }
    // Keys past the last query enter the state alone.
    if (in_.keys > in_.queries) add_keys(side_, in_.queries, in_.keys, to_.state);
  }

 private:
  // Rows [begin, end), state and weight those of the keys before them.
  void scan(int64_t begin, int64_t end, A* state, double weight) const {
    const int64_t chunk = in_.options.chunk, tokens = kTileTokens<A>;
    const KeyPanel<T> panel(side_, chunk);
    RowStates<T> states(in_);
    for (int64_t at = begin; at < end; at += chunk) {
      const int64_t row_end = std::min(end, at + chunk), key_end = std::min(row_end, in_.keys);
      const GatheredKeys<T> recent(side_, std::max<int64_t>(0, key_end - at), [&](int64_t i) { return at + i; });
      const RowState<A> before = states.of(at && in_.keys ? state : nullptr);
      const int64_t tiles = (row_end - at + tokens - 1) / tokens;
      at::parallel_for(0, in_.group * tiles, 1, [&](int64_t first, int64_t last) {
        RowTile<T> tile(side_, tokens, rtol_);
        for (int64_t task = first; task < last; ++task) {
          const int64_t g = task / tiles, row = at + task % tiles * tokens;
          tile.run(g, row, std::min(tokens, row_end - row), heads_[g], before, weight, heavy_.block(), at,
                   recent.block(), to_);
        }
      });
      weight += add_keys(side_, panel, at, key_end, state);
    }
  }

  const KeySide<T>& side_;
  const Problem<T>& in_;
  double rtol_;
  const ForwardOutput<T>& to_;
  GatheredKeys<T> heavy_;
  std::vector<HeadWeights<T>> heads_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
