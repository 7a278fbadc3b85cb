// Log-sum-exp of all pairs along rows and columns, and the weights of its gradient: llmkern/ops/pairwise_scores/
// two_way_lse.py has the formulas.
#pragma once

#include "pairwise.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// One exponential serves rows and columns where one shift can serve all entries of a tile: where the largest entry of
// every row and column lies within this of it, so that what drops out is below rounding and nothing overflows.
template <typename A>
constexpr A kCommonShift = std::is_same_v<A, double> ? 300 : 40;
// What sums of exponentials against a shift taken from other tiles lie between: not so faint that terms drop out, and
// not so loud that one term is most of its row, whose shift it has to be for its exponential to be one exactly.
template <typename A>
constexpr A kFaint = std::is_same_v<A, double> ? 1e-130 : 1e-17;
template <typename A>
constexpr A kLoud = 1e4;
template <typename A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

// A log-sum-exp as two numbers, the second what rounding took from the first: where one term outweighs all others, the
// rest of them is a difference of which a single number would keep nothing.
template <typename A>
struct TwoParts {
  A *first, *rest;

  void set(int64_t i, A top, double sum) const {
    const double log = std::log(sum), whole = top + log;
    first[i] = static_cast<A>(whole);
    const double left = (static_cast<double>(top) - first[i]) + log;
    rest[i] = std::isfinite(left) ? static_cast<A>(left) : A(0);
  }
};

// Takes tiles of scaled similarities. A row holds its own shift and a register of sums; beside them a left block offers
// one shift for all its rows, with sums of their own, so that most tiles need no look for their largest entries.
template <typename A>
class TwoWaySums {
  using V = Lanes<A>;
  static constexpr int kWidth = kLanes<A>, kColumns = kTileColumns<A>;

 public:
  TwoWaySums(int64_t n, int64_t m)
      : n_(n),
        blocks_(count_blocks(n)),
        tops_(n, kLowest<A>),
        sums_(n * kWidth, A(0)),
        offered_(blocks_, kLowest<A>),
        offered_sums_(n * kWidth, A(0)),
        at_once_(std::min(kRightRows, count_panels<A>(m) * kColumns)),
        column_tops_(blocks_ * at_once_),
        column_sums_(column_tops_.size()) {}

  void add(const PairTile<A>& tile) {
    const A offered = offered_[tile.block];
    if (offered == kLowest<A> || tile.columns < kColumns || !add_with(tile, offered)) add_any(tile);
  }

  // Log-sum-exp of the columns [first, first + count), over the left blocks in their order.
  void join_columns(int64_t first, int64_t count, const TwoParts<A>& columns) const {
    at::parallel_for(0, (count + kWidth - 1) / kWidth, 4, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * kWidth; j < end * kWidth; j += kWidth) {
        V best = fill(kLowest<A>);
        for (int64_t at = j; at < blocks_ * at_once_; at += at_once_) {
          const V top = load(column_tops_.data() + at, All{});
          best = top > best ? top : best;
        }
        double totals[kWidth] = {};
        for (int64_t at = j; at < blocks_ * at_once_; at += at_once_) {
          const V shifted = exp_nonpositive(load(column_tops_.data() + at, All{}) - best);
          const V part = load(column_sums_.data() + at, All{}) * shifted;
          for (int lane = 0; lane < kWidth; ++lane) totals[lane] += part[lane];
        }
        for (int64_t i = 0; i < std::min<int64_t>(kWidth, count - j); ++i)
          columns.set(first + j + i, best[i], totals[i]);
      }
    });
  }

  void finish_rows(const TwoParts<A>& rows) const {
    at::parallel_for(0, n_, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A offered = offered_[i / kBlockRows], best = std::max(tops_[i], offered);
        const double total = sum_lanes(sums_, i) * std::exp(static_cast<double>(tops_[i]) - best) +
                             sum_lanes(offered_sums_, i) * std::exp(static_cast<double>(offered) - best);
        rows.set(i, best, total);
      }
    });
  }

 private:
  static double sum_lanes(const std::vector<A>& sums, int64_t row) {
    double total = 0;
    for (int lane = 0; lane < kWidth; ++lane) total += sums[row * kWidth + lane];
    return total;
  }

  // Takes a whole tile with this shift for all, unless a row or column turns out to need another.
  bool add_with(const PairTile<A>& tile, A shift) {
    alignas(64) A partial[kBlockRows * kWidth];
    V column[2] = {};
    bool fit = true;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const A* c = tile.c + r * kColumns;
      const V e0 = exp(load(c, All{}) - shift), e1 = exp(load(c + kWidth, All{}) - shift), row = e0 + e1;
      column[0] += e0, column[1] += e1;
      store(partial + r * kWidth, row, All{});
      fit &= any(reinterpret<Ints>(row > kFaint<A>));
    }
    // A column is at least as loud as its entries, and NaN is neither.
    for (const V& sum : column) fit &= !any(reinterpret<Ints>(~((sum > kFaint<A>)&(sum < kLoud<A>))));
    if (!fit) return false;
    A* held = offered_sums_.data() + tile.row * kWidth;
    for (int64_t i = 0; i < tile.rows * kWidth; i += kWidth)
      store(held + i, load(held + i, All{}) + load(partial + i, All{}), All{});
    leave_columns(tile, fill(shift), fill(shift), column);
    return true;
  }

  void add_any(const PairTile<A>& tile) {
    alignas(64) A row_tops[kBlockRows];
    V column_top[2] = {fill(kLowest<A>), fill(kLowest<A>)}, column_sum[2] = {};
    A highest = kLowest<A>, lowest = std::numeric_limits<A>::max();
    for (int64_t r = 0; r < tile.rows; ++r) {
      A* c = tile.c + r * kColumns;
      for (int64_t j = tile.columns; j < kColumns; ++j) c[j] = -std::numeric_limits<A>::infinity();
      const V z0 = load(c, All{}), z1 = load(c + kWidth, All{});
      // NaN on the right of this comparison does not get in; it reaches the sums through the exponential.
      column_top[0] = z0 > column_top[0] ? z0 : column_top[0];
      column_top[1] = z1 > column_top[1] ? z1 : column_top[1];
      const A best = std::max(kLowest<A>, fold_top<A>(z0 > z1 ? z0 : z1));
      row_tops[r] = best;
      highest = std::max(highest, best), lowest = std::min(lowest, best);
    }
    alignas(64) A column_tops[kColumns];
    store(column_tops, column_top[0], All{}), store(column_tops + kWidth, column_top[1], All{});
    for (int64_t j = 0; j < tile.columns; ++j) lowest = std::min(lowest, column_tops[j]);

    for (int64_t r = 0; r < tile.rows; ++r) {
      const A* c = tile.c + r * kColumns;
      const V z0 = load(c, All{}), z1 = load(c + kWidth, All{});
      column_sum[0] += exp_nonpositive(z0 - column_top[0]), column_sum[1] += exp_nonpositive(z1 - column_top[1]);
      const A top = row_tops[r];
      add_to_row(tile.row + r, top, exp_nonpositive(z0 - top) + exp_nonpositive(z1 - top));
    }
    if (lowest > highest - kCommonShift<A>) offer(tile, highest);
    leave_columns(tile, column_top[0], column_top[1], column_sum);
  }

  // What the rows hold under the shift that was offered before becomes their own.
  void offer(const PairTile<A>& tile, A shift) {
    for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) {
      A* held = offered_sums_.data() + row * kWidth;
      if (offered_[tile.block] != kLowest<A>) add_to_row(row, offered_[tile.block], load(held, All{}));
      store(held, V{}, All{});
    }
    offered_[tile.block] = shift;
  }

  void add_to_row(int64_t row, A top, V part) {
    A* held = sums_.data() + row * kWidth;
    const A best = std::max(tops_[row], top);
    store(held, load(held, All{}) * exp_nonpositive(fill(tops_[row] - best)) + part * exp_nonpositive(fill(top - best)),
          All{});
    tops_[row] = best;
  }

  void leave_columns(const PairTile<A>& tile, V shift0, V shift1, const V* sums) {
    const int64_t at = tile.block * at_once_ + tile.column % at_once_;
    store(column_tops_.data() + at, shift0, All{}), store(column_tops_.data() + at + kWidth, shift1, All{});
    store(column_sums_.data() + at, sums[0], All{}), store(column_sums_.data() + at + kWidth, sums[1], All{});
  }

  int64_t n_, blocks_;
  std::vector<A> tops_, sums_;
  // A shift a left block, the lowest number before there is one.
  std::vector<A> offered_, offered_sums_;
  int64_t at_once_;
  // What each left block leaves for the columns of the right block in hand.
  std::vector<A> column_tops_, column_sums_;
};

// w_ij = r_i exp(z_ij - rows_i) + c_j exp(z_ij - columns_j), plus p_i for the pair itself; a tile gets scale w.
template <typename A>
struct LseWeight {
  TwoParts<const A> rows, columns;
  const A *drows, *dcolumns, *dpairs;
  A scale;
  int64_t offset, m;

  void operator()(PairTile<A>& tile, double* weighted_similarity) const {
    using V = Lanes<A>;
    V lse[2], lse_rest[2], upstream[2];
    for (int half = 0; half < 2; ++half) {
      const First live{static_cast<int>(std::clamp<int64_t>(tile.columns - half * kLanes<A>, 0, kLanes<A>))};
      const int64_t j = std::min(tile.column + half * kLanes<A>, m);
      lse[half] = load(columns.first + j, live), lse_rest[half] = load(columns.rest + j, live);
      upstream[half] = load(dcolumns + j, live);
    }
    // Logits in memory first: the forward pass rounded them too, and a fused product and difference would not.
    alignas(64) A logits[kBlockRows * kTileColumns<A>];
    for (int64_t i = 0; i < tile.rows * kTileColumns<A>; i += kLanes<A>)
      store(logits + i, load(tile.c + i, All{}) * scale, All{});
    V part{};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.row + r, own = i + offset - tile.column;
      for (int half = 0; half < 2; ++half) {
        const int64_t at = r * kTileColumns<A> + half * kLanes<A>, lane = own - half * kLanes<A>;
        const V s = load(tile.c + at, All{}), z = load(logits + at, All{});
        V w =
            drows[i] * exp((z - rows.first[i]) - rows.rest[i]) + upstream[half] * exp((z - lse[half]) - lse_rest[half]);
        if (lane >= 0 && lane < kLanes<A> && own < tile.columns) w[lane] = own_weight(i, i + offset, z[lane]);
        part += w * s;
        store(tile.c + at, w * scale, All{});
      }
    }
    *weighted_similarity += fold_sum<A>(part);
  }

  // The same where p nearly cancels the rest: the sum of r, c and p apart from what exp takes off one.
  A own_weight(int64_t i, int64_t j, A z) const {
    const A in_row = std::expm1((z - rows.first[i]) - rows.rest[i]);
    const A in_column = std::expm1((z - columns.first[j]) - columns.rest[j]);
    return drows[i] * in_row + dcolumns[j] * in_column + ((drows[i] + dcolumns[j]) + dpairs[i]);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
