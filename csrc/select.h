// The cut of top-k and top-p without a sort: the smallest set of largest values whose mass (or number) reaches a
// target.
//
// A sorted sample of the candidates brackets the cut; one pass adds up what lies above the bracket and collects what
// lies in it. The bracket is right almost always and leaves a fifth of the candidates; where it is wrong the candidates
// on the right side of it remain. The last few hundred are sorted.
#pragma once

#include <cmath>

#include "common.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Kept are the entries above `value`, and those equal to it up to index `last`.
template <typename A>
struct Cut {
  A value = -1;
  int64_t last = std::numeric_limits<int64_t>::max();
};

// Sorts n <= 256 values upwards by counting for each how many are smaller: more comparisons than a sort makes, but
// sixteen at a time and without a branch to mispredict.
constexpr int64_t kFew = 256;

template <typename A>
void sort_few(A* values, int64_t n) {
  using V = Lanes<A>;
  alignas(64) A padded_values[kFew];
  std::copy(values, values + n, padded_values);
  std::fill(padded_values + n, padded_values + kFew, std::numeric_limits<A>::infinity());
  bool taken[kFew] = {};
  for (int64_t i = 0; i < n; ++i) {
    const A value = padded_values[i];
    decltype(V{} < V{}) smaller{};
    for (int64_t j = 0; j < n; j += kLanes<A>) smaller -= load(padded_values + j, All{}) < value;
    int64_t rank = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) rank += smaller[lane];
    while (taken[rank]) ++rank;
    taken[rank] = true;
    values[rank] = value;
  }
}

// Appends to `to` the entries of `from` in [low, high]; to has room for a register more. Adds up what is above and
// within.
template <typename A, bool kMass>
inline int64_t collect(const A* from, int64_t n, A low, A high, A* to, double* above, double* within) {
  using V = Lanes<A>;
  int64_t taken = 0;
  *above = *within = 0;
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    V above_part{}, within_part{};
    for_lanes<A>(begin, std::min(n, begin + kPiece), [&](int64_t i, auto lanes) {
      const V x = pad_with(load(from + i, lanes), A(-1), lanes);
      const V unit = kMass ? x : fill(A(1));
      above_part += x > high ? unit : V{};
      within_part += (x >= low) & (x <= high) ? unit : V{};
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (std::is_same_v<A, float>) {
        const __mmask16 inside =
            _mm512_cmp_ps_mask(x, fill(low), _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, fill(high), _CMP_LE_OQ);
        store(to + taken, static_cast<V>(_mm512_maskz_compress_ps(inside, x)), All{});
        taken += __builtin_popcount(inside);
        return;
      }
#endif
      for (int lane = 0; lane < kLanes<A>; ++lane) {
        to[taken] = x[lane];
        taken += x[lane] >= low && x[lane] <= high;
      }
    });
    *above += sum<A>(above_part);
    *within += sum<A>(within_part);
  }
  return taken;
}

// Cut of the n values of `from`, none of them negative, whose mass (kMass) or number in all is `total`, at `target`.
// buffers: two of n entries and a register each. The index of the cut counts within `from`.
template <typename A, bool kMass>
Cut<A> select_cut(const A* from, int64_t n, double total, double target, A* buffer, A* other) {
  const A infinity = std::numeric_limits<A>::infinity();
  const A* candidates = from;
  int64_t count = n;
  double above = 0;
  bool split_at_one_value = false, all_equal = false;
  while (count > kFew && !all_equal) {
    A sample[kFew];
    for (int64_t i = 0; i < kFew; ++i) sample[i] = candidates[i * count / kFew];
    sort_few(sample, kFew);
    // From below, since a sample sees the many small values and may miss the few large ones.
    const double below = total - (target - above), scale = static_cast<double>(count) / kFew;
    double mass = 0;
    int64_t rank = 0;
    while (rank < kFew && mass < below) mass += scale * (kMass ? sample[rank++] : (++rank, 1));
    const double q = static_cast<double>(rank) / kFew;
    const int64_t margin = 2 + static_cast<int64_t>(3 * std::sqrt(kFew * q * (1 - q)));
    A low = rank - margin > 0 ? sample[std::min(rank - margin, kFew - 1)] : A(0);
    A high = rank + margin < kFew ? sample[rank + margin] : infinity;
    if (split_at_one_value) low = high = sample[std::min(rank, kFew - 1)];

    double over, within;
    int64_t taken = collect<A, kMass>(candidates, count, low, high, buffer, &over, &within);
    if (above + over >= target) {
      double none;
      taken = collect<A, kMass>(candidates, count, std::nextafter(high, infinity), infinity, buffer, &none, &total);
    } else if (above + over + within >= target || low == 0) {
      above += over;
      total = within;
      all_equal = low == high;
    } else {
      above += over + within;
      double none;
      taken = collect<A, kMass>(candidates, count, A(0), std::nextafter(low, A(-1)), buffer, &none, &total);
    }
    // Many equal values can fill a bracket; then only a pivot that leaves them out makes progress.
    split_at_one_value = taken == count;
    candidates = buffer;
    count = taken;
    std::swap(buffer, other);
  }

  if (candidates == from) candidates = static_cast<A*>(std::memcpy(buffer, from, count * sizeof(A)));
  A* sorted = const_cast<A*>(candidates);
  if (!all_equal) sort_few(sorted, count);
  Cut<A> cut;
  int64_t equals = 0, allowed = 0;
  for (int64_t i = count - 1; i >= 0; --i) {
    const bool kept = above < target || i == count - 1;
    if (!kept && sorted[i] != cut.value) break;
    if (sorted[i] != cut.value) equals = allowed = 0;
    cut.value = sorted[i];
    ++equals;
    allowed += kept;
    above += kMass ? sorted[i] : 1;
  }
  if (allowed < equals) {
    int64_t i = -1;
    while (allowed > 0) allowed -= from[++i] == cut.value;
    cut.last = i;
  }
  return cut;
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
