// The cut of top-k and top-p without a sort: the largest scores whose number, or mass, reaches a target.
//
// A sorted sample of the scores brackets the cut; one pass counts what lies above the bracket and collects what lies in
// it. The bracket is right almost always and leaves a fifth of the scores; where it is wrong the scores on the right
// side of it remain. The last few hundred are sorted. Blocks whose largest score is below the bracket are not read.
#pragma once

#include <cmath>

#include "common.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Kept are the scores above `value`, and those equal to it up to index `last`.
template <typename A>
struct Cut {
  A value = -std::numeric_limits<A>::infinity();
  int64_t last = std::numeric_limits<int64_t>::max();
};

// Scores, and for each block of kBlock of them a register with the largest at its place; null where nobody looked.
constexpr int64_t kBlock = 128;

template <typename A>
struct Scores {
  const A* z;
  int64_t count;
  const Lanes<A>* block_tops = nullptr;

  bool below(int64_t block, A low) const { return block_tops && !any(block_tops[block] >= low); }
};

// What a score counts for: one, or its probability beside that of the largest.
struct Unit {
  template <typename V>
  V operator()(V) const {
    return V{} + 1;
  }
};

template <typename A>
struct Probability {
  A top, inverse_temperature;
  Lanes<A> operator()(Lanes<A> z) const { return exp_nonpositive((z - top) * inverse_temperature); }
};

// Sorts n <= kFew scores upwards by counting for each how many are smaller: more comparisons than a sort makes, but a
// register at a time and without a branch to mispredict. A larger sample would narrow the bracket and cost more to
// sort.
constexpr int64_t kFew = 128;

template <typename A>
void sort_few(A* scores, int64_t n) {
  using V = Lanes<A>;
  alignas(64) A original[kFew];
  std::copy(scores, scores + n, original);
  std::fill(original + n, original + kFew, std::numeric_limits<A>::infinity());
  bool taken[kFew] = {};
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const V own = load(original + i, All{});
    decltype(own < own) smaller{};
    for (int64_t j = 0; j < n; ++j) smaller -= original[j] < own;
    for (int lane = 0; lane < kLanes<A> && i + lane < n; ++lane) {
      int64_t rank = smaller[lane];
      while (taken[rank]) ++rank;
      taken[rank] = true;
      scores[rank] = original[i + lane];
    }
  }
}

template <typename A, typename Weight>
void weigh_few(const A* scores, int64_t n, const Weight& weight, A* weights) {
  for_lanes<A>(0, n, [&](int64_t i, auto lanes) { store(weights + i, weight(load(scores + i, lanes)), lanes); });
}

// Sum of the weights of n scores, without those of -inf.
template <typename A, typename Weight>
double total_weight(const A* scores, int64_t n, const Weight& weight) {
  const A nothing = -std::numeric_limits<A>::infinity();
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    Lanes<A> part{};
    for_lanes<A>(begin, std::min(n, begin + kPiece), [&](int64_t i, auto lanes) {
      const Lanes<A> z = pad_with(load(scores + i, lanes), nothing, lanes);
      part += z > nothing ? weight(z) : Lanes<A>{};
    });
    total += sum<A>(part);
  }
  return total;
}

template <typename A>
struct Collected {
  int64_t count = 0;
  double above = 0, within = 0;
};

// Appends to `to` the scores in [low, high]; `to` has room for a register more. Adds up what is above and within.
template <typename A, typename Weight>
Collected<A> collect(const Scores<A>& scores, A low, A high, const Weight& weight, A* to) {
  using V = Lanes<A>;
  Collected<A> found;
  for (int64_t begin = 0; begin < scores.count; begin += kBlock) {
    if (scores.below(begin / kBlock, low)) continue;
    V above{};
    for_lanes<A>(begin, std::min(scores.count, begin + kBlock), [&](int64_t i, auto lanes) {
      const V z = pad_with(load(scores.z + i, lanes), -std::numeric_limits<A>::infinity(), lanes);
      const auto reached = (z >= low) & (z > -std::numeric_limits<A>::infinity());
      if (!any(reached)) return;
      const auto over = z > high, inside = reached & ~over;
      if (any(over)) above += over ? weight(z) : V{};
      if constexpr (std::is_same_v<A, float> && kCanCompress) {
        found.count += compress(to + found.count, z, inside);
      } else {
        for (int lane = 0; lane < kLanes<A>; ++lane) {
          to[found.count] = z[lane];
          found.count -= inside[lane];
        }
      }
    });
    found.above += sum<A>(above);
  }
  found.within = total_weight(to, found.count, weight);
  return found;
}

template <typename A, typename Weight>
Cut<A> select_cut(const Scores<A>& scores, const Weight& weight, double total, double target, A* buffer, A* other);

// A score that the cut cannot be below: where the largest of each lane of each block alone reach the target.
template <typename A, typename Weight>
A least_cut(const Scores<A>& scores, const Weight& weight, double target, A* buffer, A* other) {
  const A* tops = reinterpret_cast<const A*>(scores.block_tops);
  const int64_t count = (scores.count + kBlock - 1) / kBlock * kLanes<A>;
  const double total = total_weight(tops, count, weight);
  // With room for the rounding of either sum.
  if (!(total > target * (1 + 1e-5))) return -std::numeric_limits<A>::infinity();
  return select_cut(Scores<A>{tops, count}, weight, total, target * (1 + 1e-5), buffer, other).value;
}

// Cut of the scores, of which `total` is the weight of all, where the weight of those above reaches `target`. buffers:
// two of as many entries and a register each. The index of the cut counts within `scores`.
template <typename A, typename Weight>
Cut<A> select_cut(const Scores<A>& scores, const Weight& weight, double total, double target, A* buffer, A* other) {
  const A infinity = std::numeric_limits<A>::infinity();
  Scores<A> candidates = scores;
  double above = 0;
  bool split_at_one_value = false, all_equal = false;
  if (scores.block_tops && scores.count > 16 * kFew) {
    const A low = least_cut(scores, weight, target, buffer, other);
    if (low > -infinity) {
      const Collected<A> found = collect(scores, low, infinity, weight, buffer);
      total = found.within;
      candidates = {buffer, found.count};
      std::swap(buffer, other);
    }
  }
  while (candidates.count > kFew && !all_equal) {
    const int64_t count = candidates.count;
    A sample[kFew], weights[kFew];
    for (int64_t i = 0; i < kFew; ++i) sample[i] = candidates.z[i * count / kFew];
    sort_few(sample, kFew);
    weigh_few(sample, kFew, weight, weights);
    // From below, since a sample sees the many light scores and may miss the few heavy ones.
    const double below = total - (target - above), scale = static_cast<double>(count) / kFew;
    double mass = 0;
    int64_t rank = 0;
    while (rank < kFew && mass < below) mass += scale * weights[rank++];
    const double q = static_cast<double>(rank) / kFew;
    const int64_t margin = 2 + static_cast<int64_t>(3 * std::sqrt(kFew * q * (1 - q)));
    A low = rank - margin > 0 ? sample[std::min(rank - margin, kFew - 1)] : -infinity;
    A high = rank + margin < kFew ? sample[rank + margin] : infinity;
    if (split_at_one_value) low = high = sample[std::min(rank, kFew - 1)];

    Collected<A> found = collect(candidates, low, high, weight, buffer);
    if (above + found.above >= target) {
      found = collect(candidates, std::nextafter(high, infinity), infinity, weight, buffer);
      total = found.within;
    } else if (above + found.above + found.within >= target || low == -infinity) {
      above += found.above;
      total = found.within;
      all_equal = low == high;
    } else {
      above += found.above + found.within;
      found = collect(candidates, -infinity, std::nextafter(low, -infinity), weight, buffer);
      total = found.within;
    }
    // Many equal scores can fill a bracket; then only a pivot that leaves them out makes progress.
    split_at_one_value = found.count == count;
    candidates = {buffer, found.count};
    std::swap(buffer, other);
  }

  if (candidates.z == scores.z) {
    candidates.z = static_cast<A*>(std::memcpy(buffer, scores.z, candidates.count * sizeof(A)));
  }
  A* sorted = const_cast<A*>(candidates.z);
  const int64_t count = candidates.count;
  A weights[kFew];
  if (!all_equal) sort_few(sorted, count);
  weigh_few(sorted, std::min(count, kFew), weight, weights);
  Cut<A> cut;
  int64_t equals = 0, allowed = 0;
  for (int64_t i = count - 1; i >= 0; --i) {
    const bool kept = above < target || i == count - 1;
    if (!kept && sorted[i] != cut.value) break;
    if (sorted[i] != cut.value) equals = allowed = 0;
    cut.value = sorted[i];
    ++equals;
    allowed += kept;
    above += weights[all_equal ? 0 : i];
  }
  if (allowed < equals) {
    int64_t i = -1;
    while (allowed > 0) allowed -= scores.z[++i] == cut.value;
    cut.last = i;
  }
  return cut;
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
