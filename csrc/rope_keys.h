// Sums over keys: panels of features, states, and the segments that share a long sequence.
#pragma once

#include "rope_problem.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Panel of keys [begin, begin + count). A key beyond the limit has weight zero, but its powers may be infinite: zeros.
template <typename T, typename A = Acc<T>>
inline void build_key_panel(const KeySide<T>& side, int64_t begin, int64_t count, int64_t stride, A* panel) {
  const Problem<T>& in = side.in;
  build_panel(in.tables, in.k + begin * in.dim, in.dim, count, stride, panel, stride);
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t p = 0; side.heavy[begin + t] && p < panel_rows(in.tables); ++p) panel[p * stride + t] = 0;
  }
}

// Features of keys under way, and their columns.
template <typename T>
class KeyPanel {
  using A = Acc<T>;

 public:
  KeyPanel(const KeySide<T>& side, int64_t tokens)
      : side_(side),
        stride_(token_stride<A>(std::min(kPanelTokens, tokens))),
        panel_(panel_rows(side.in.tables) * stride_),
        columns_(side.in.width() * stride_),
        features_(side.in.top_in_bf16() ? panel_rows(side.in.tables) * stride_ / 2 : 0),
        multiplicity_(side.in.tables.multiplicity.begin(), side.in.tables.multiplicity.end()) {}

  // Of keys [begin, begin + count); returns the sum of their weights.
  double build(int64_t begin, int64_t count) const {
    build_key_panel(side_, begin, count, stride_, panel_.get());
    if constexpr (std::is_same_v<A, float>) {
      if (side_.in.top_in_bf16()) pair_tokens(side_.in.tables, panel_.get(), stride_, stride_, features_.get());
    }
    return side_.columns(begin, count, stride_, true, columns_.get());
  }

  int64_t scratch_size() const { return moments_scratch(side_.in.width(), stride_); }

  // Rows [begin, end) of state (count, width) += moments times multiplicities.
  void add_to(A* state, int64_t begin, int64_t end, A* scratch) const {
    const Problem<T>& in = side_.in;
    add_moments(in.tables, panel_.get(), columns_.get(), in.width(), stride_, stride_, multiplicity_.data(), scratch,
                state, begin, end, !in.top_in_bf16());
    if constexpr (std::is_same_v<A, float>) {
      if (in.top_in_bf16())
        add_moments_of_pairs(in.tables, features_.get(), panel_.get(), columns_.get(), in.width(), stride_, stride_,
                             multiplicity_.data(), scratch, state, begin, end);
    }
  }

 private:
  const KeySide<T>& side_;
  int64_t stride_;
  Buffer<A> panel_, columns_;
  Buffer<Pair> features_;
  std::vector<A> multiplicity_;
};

// Runs body(begin, end, scratch) over rows of a state in parallel.
template <typename A, typename Body>
inline void for_state_rows(int64_t rows, int64_t scratch_size, Body body) {
  constexpr int64_t kRows = 32;
  at::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t first, int64_t last) {
    const Buffer<A> scratch(scratch_size);
    body(first * kRows, std::min(rows, last * kRows), scratch.get());
  });
}

// state (count, width) += moments of keys [begin, end), rows of the state in parallel; returns the sum of the weights.
template <typename T, typename A = Acc<T>>
inline double add_keys(const KeySide<T>& side, const KeyPanel<T>& panel, int64_t begin, int64_t end, A* state) {
  double total = 0;
  for (int64_t j = begin; j < end; j += kPanelTokens) {
    total += panel.build(j, std::min(kPanelTokens, end - j));
    for_state_rows<A>(side.in.tables.count(), panel.scratch_size(),
                      [&](int64_t low, int64_t high, A* scratch) { panel.add_to(state, low, high, scratch); });
  }
  return total;
}

template <typename T, typename A = Acc<T>>
inline double add_keys(const KeySide<T>& side, int64_t begin, int64_t end, A* state) {
  return add_keys(side, KeyPanel<T>(side, end - begin), begin, end, state);
}

// Segments do not depend on the number of threads, only who computes them: a thread each, or, where there are more, all
// threads one after the other, within.
template <typename Body>
inline void for_segments(Body body) {
  if (at::get_num_threads() <= kSegments) return for_tasks(kSegments, body);
  for (int64_t s = 0; s < kSegments; ++s) body(s);
}

// state = moments of keys [0, end); returns the sum of their weights.
template <typename T, typename A = Acc<T>>
inline double sum_keys(const KeySide<T>& side, int64_t end, A* state) {
  const int64_t size = side.in.tables.count() * side.in.width();
  std::fill(state, state + size, A(0));
  if (end < kSegments * kSegmentTokens) return end ? add_keys(side, 0, end, state) : 0.0;
  const Buffer<A> other(size);
  other.zero();
  const int64_t middle = round_up(end / kSegments, kPanelTokens);
  double totals[kSegments];
  for_segments(
      [&](int64_t s) { totals[s] = add_keys(side, s ? middle : 0, s ? end : middle, s ? other.get() : state); });
  for (int64_t i = 0; i < size; ++i) state[i] += other.get()[i];
  return totals[0] + totals[1];
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
