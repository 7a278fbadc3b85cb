// Forward pass of polynomial attention: states by panels of keys, rows by tiles of queries, and rows whose certificate
// fails once more, exactly.
#pragma once

#include "rope_exact.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Columns of a row's sums beside values and normaliser: the certificate, and the tail's moment.
template <typename T>
inline int64_t certificate_columns(const Problem<T>& in) {
  return in.tables.leading < in.dim ? 2 : 1;
}

// What a head multiplies the state with, by state row: its coefficients in p, in the certificate and in the tail.
template <typename T>
class HeadWeights {
  using A = Acc<T>;

 public:
  HeadWeights(const Problem<T>& in, int64_t g)
      : width_(in.width()), columns_(width_ + certificate_columns(in)), rows_(in.tables.count()) {
    const Coefficients<A> c = in.coefficients(g);
    for (auto* weights : {&value_, &error_, &tail_}) weights->resize(rows_);
    for (int64_t row = 0; row < rows_; ++row) {
      const int degree = in.tables.degrees[row];
      const double many = in.tables.multiplicity[row];
      value_[row] = row_coefficient(in.tables, c, row);
      error_[row] = static_cast<A>(c.error * many *
                                   (in.options.contact == 0 ? c.polynomial[degree] : degree == in.options.contact));
      tail_[row] = in.tables.tail[row] ? static_cast<A>(many) : A(0);
    }
  }

  int64_t packed_size() const { return llmkern::packed_size(rows_, columns_); }

  // State rows [begin, end) with their weights, for apply_state.
  void pack(const A* state, int64_t begin, int64_t end, A* packed) const {
    for (int64_t c = 0; c < columns_; c += kTokenTileRows) {
      A* tile = packed + c * rows_;
      for (int64_t row = begin; row < end; ++row) {
        const A *from = state + row * width_, weight = value_[row];
        A* to = tile + row * kTokenTileRows;
        if (c + kTokenTileRows <= width_) {
          for (int m = 0; m < kTokenTileRows; ++m) to[m] = weight * from[c + m];
        } else {
          for (int m = 0; m < kTokenTileRows; ++m)
            to[m] = c + m < width_ ? weight * from[c + m] : other(c + m, row, from);
        }
      }
    }
  }

 private:
  // A row without part in a column may be infinite there.
  A other(int64_t column, int64_t row, const A* from) const {
    const A weight = column >= columns_ ? A(0) : (column == width_ ? error_[row] : tail_[row]);
    return weight == 0 ? A(0) : weight * from[width_ - 1];
  }

  int64_t width_, columns_, rows_;
  std::vector<A> value_, error_, tail_;
};

// Tokens of queries under way: panel, sums, limits. One per task.
template <typename T>
class RowTile {
  using A = Acc<T>;

 public:
  RowTile(const KeySide<T>& side, int64_t tokens)
      : side_(side),
        in_(side.in),
        stride_(token_stride<A>(tokens)),
        panel_(panel_rows(in_.tables) * stride_),
        sums_((in_.width() + 2) * stride_),
        scratch_((kKeyBlock + 2) * stride_) {}

  // Rows [begin, begin + count) of head g. ``packed``: the state of keys that come before, or null; ``weight``: the sum
  // of its weights; ``heavy``: keys beyond the limit, of which those before ``heavy_end`` count; ``recent``: the keys
  // of this chunk, or empty.
  void run(int64_t g, int64_t begin, int64_t count, const A* packed, double weight, const KeyBlock<A>& heavy,
           int64_t heavy_end, const KeyBlock<A>& recent, const ForwardOutput<T>& to) {
    const int64_t width = in_.width();
    const A* q = in_.query(g, begin);
    build_panel(in_.tables, q, in_.dim, count, stride_, panel_.get(), stride_);
    sums_.zero();
    if (packed)
      apply_state(in_.tables, panel_.get(), stride_, stride_, packed, width + certificate_columns(in_), sums_.get());
    A *p = scratch_.get(), *offset = p + kKeyBlock * stride_, *limit = offset + stride_;
    std::fill(offset, offset + stride_, side_.top);
    const QueryTile<A> tile{panel_.get() + stride_, in_.dim, stride_, stride_, offset, limit};
    if (heavy.count) {
      for (int64_t t = 0; t < stride_; ++t) limit[t] = static_cast<A>(t < count ? heavy_end : 0);
      add_pairs(heavy, tile, width, p, sums_.get());
    }
    if (recent.count) {
      for (int64_t t = 0; t < stride_; ++t) limit[t] = static_cast<A>(t < count ? begin + t + 1 : 0);
      add_pairs(recent, tile, width, p, sums_.get());
    }
    finish(g, begin, count, packed != nullptr, weight, to);
  }

 private:
  void finish(int64_t g, int64_t begin, int64_t count, bool has_state, double weight, const ForwardOutput<T>& to) {
    const Coefficients<A> c = in_.coefficients(g);
    const int64_t width = in_.width();
    const A* sums = sums_.get();
    const double slack = has_state ? c.rounding * weight : 0.0;
    for (int64_t t = 0; t < count; ++t) {
      const double z = sums[in_.value_dim * stride_ + t];
      double d = has_state ? std::max<double>(sums[width * stride_ + t], 0.0) : 0.0;
      if (has_state && in_.tables.leading < in_.dim) {
        const double tail = std::max<double>(sums[(width + 1) * stride_ + t], 0.0);
        d += c.tail1 * std::sqrt(d / c.error * tail) + c.tail0 * tail;
      }
      const double low = z - d - 2 * slack;
      const int64_t row = g * to.head_rows + begin + t;
      to.exact[row] = !(low > 0 && d + kRoundingParts * slack <= rtol * low && z < kLargestNormalizer &&
                        norm(in_.query(g, begin + t), in_.dim) <= c.q_limit);
      to.normalizer[row] = static_cast<A>(z);
      const A inverse = static_cast<A>(1 / z);
      T* out = to.out + row * in_.value_dim;
      for (int64_t v = 0; v < in_.value_dim; ++v)
        out[v] = static_cast<T>(sums[v * stride_ + t] * inverse + side_.mean[v]);
    }
  }

  const KeySide<T>& side_;
  const Problem<T>& in_;
  int64_t stride_;
  Buffer<A> panel_, sums_, scratch_;

 public:
  double rtol = 0;
};

// Features of keys under way, and their columns.
template <typename T>
class KeyPanel {
  using A = Acc<T>;

 public:
  KeyPanel(const KeySide<T>& side, int64_t tokens)
      : side_(side),
        stride_(token_stride<A>(std::min(kPanelTokens, tokens))),
        panel_(panel_rows(side.in.tables) * stride_),
        columns_(side.in.width() * stride_) {}

  // Of keys [begin, begin + count); returns the sum of their weights.
  double build(int64_t begin, int64_t count) const {
    const Problem<T>& in = side_.in;
    A* panel = panel_.get();
    build_panel(in.tables, in.k + begin * in.dim, in.dim, count, stride_, panel, stride_);
    // A key beyond the limit has weight zero, but its powers may be infinite.
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t p = 0; side_.heavy[begin + t] && p < panel_rows(in.tables); ++p) panel[p * stride_ + t] = 0;
    }
    return side_.columns(begin, count, stride_, true, columns_.get());
  }

  int64_t scratch_size() const { return side_.in.width() * stride_; }

  // Rows [begin, end) of state (count, width) += moments.
  void add_to(A* state, int64_t begin, int64_t end, A* scratch) const {
    add_moments(side_.in.tables, panel_.get(), columns_.get(), side_.in.width(), stride_, stride_, scratch, state,
                begin, end);
  }

 private:
  const KeySide<T>& side_;
  int64_t stride_;
  Buffer<A> panel_, columns_;
};

// state (count, width) += moments of keys [begin, end), rows of the state in parallel; returns the sum of the weights.
// done(row, row_end) follows the last keys.
template <typename T, typename Done, typename A = Acc<T>>
inline double add_keys(const KeySide<T>& side, const KeyPanel<T>& panel, int64_t begin, int64_t end, A* state,
                       Done done) {
  const int64_t rows = side.in.tables.count();
  double total = 0;
  for (int64_t j = begin; j < end; j += kPanelTokens) {
    total += panel.build(j, std::min(kPanelTokens, end - j));
    at::parallel_for(0, (rows + 31) / 32, 1, [&](int64_t first, int64_t last) {
      const Buffer<A> scratch(panel.scratch_size());
      const int64_t low = first * 32, high = std::min(rows, last * 32);
      panel.add_to(state, low, high, scratch.get());
      if (j + kPanelTokens >= end) done(low, high);
    });
  }
  return total;
}

template <typename T, typename A = Acc<T>>
inline double add_keys(const KeySide<T>& side, int64_t begin, int64_t end, A* state) {
  return add_keys(side, KeyPanel<T>(side, end - begin), begin, end, state, [](int64_t, int64_t) {});
}

// Segments do not depend on the number of threads, only who computes them: a thread each, or, where there are more, all
// threads one after the other, within.
template <typename Body>
inline void for_segments(Body body) {
  if (at::get_num_threads() <= kSegments) return for_tasks(kSegments, body);
  for (int64_t s = 0; s < kSegments; ++s) body(s);
}

// state = moments of keys [0, end); returns the sum of their weights. other: another state's room, where end is at
// least kSegments kSegmentTokens.
template <typename T, typename A = Acc<T>>
inline double sum_keys(const KeySide<T>& side, int64_t end, A* state, A* other) {
  const int64_t size = side.in.tables.count() * side.in.width();
  std::fill(state, state + size, A(0));
  if (end < kSegments * kSegmentTokens) return end ? add_keys(side, 0, end, state) : 0.0;
  std::fill(other, other + size, A(0));
  const int64_t middle = round_up(end / kSegments, kPanelTokens);
  double totals[kSegments];
  for_segments([&](int64_t s) { totals[s] = add_keys(side, s ? middle : 0, s ? end : middle, s ? other : state); });
  for (int64_t i = 0; i < size; ++i) state[i] += other[i];
  return totals[0] + totals[1];
}

template <typename T, typename A = Acc<T>>
inline void forward_full(const KeySide<T>& side, double rtol, const ForwardOutput<T>& to) {
  const Problem<T>& in = side.in;
  const int64_t rows = in.tables.count(), tokens = kTileTokens<A>;
  const Buffer<A> other(in.keys < kSegments * kSegmentTokens ? 0 : rows * in.width());
  const double weight = sum_keys(side, in.keys, to.state, other.get());
  const GatheredKeys<T> heavy(side, side.heavy_keys.size(), [&](int64_t i) { return side.heavy_keys[i]; });
  const Buffer<A> packed(packed_size(rows, in.width() + 2));
  for (int64_t g = 0; g < in.group; ++g) {
    HeadWeights<T>(in, g).pack(to.state, 0, rows, packed.get());
    at::parallel_for(0, (in.queries + tokens - 1) / tokens, 1, [&](int64_t first, int64_t last) {
      RowTile<T> tile(side, tokens);
      tile.rtol = rtol;
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task * tokens;
        tile.run(g, begin, std::min(tokens, in.queries - begin), packed.get(), weight, heavy.block(), in.keys, {}, to);
      }
    });
  }
}

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
      const Buffer<A> first(size);
      const double weight = sum_keys(side_, middle, to_.state, first.get());
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
    const int64_t chunk = in_.options.chunk, tokens = kTileTokens<A>, pack_size = heads_[0].packed_size();
    const Buffer<A> packed(in_.group * pack_size);
    const KeyPanel<T> panel(side_, chunk);
    const auto pack = [&](int64_t low, int64_t high) {
      for (int64_t g = 0; g < in_.group; ++g) heads_[g].pack(state, low, high, packed.get() + g * pack_size);
    };
    pack(0, begin ? in_.tables.count() : 0);
    for (int64_t at = begin; at < end; at += chunk) {
      const int64_t row_end = std::min(end, at + chunk), key_end = std::min(row_end, in_.keys);
      const GatheredKeys<T> recent(side_, std::max<int64_t>(0, key_end - at), [&](int64_t i) { return at + i; });
      const int64_t tiles = (row_end - at + tokens - 1) / tokens;
      at::parallel_for(0, in_.group * tiles, 1, [&](int64_t first, int64_t last) {
        RowTile<T> tile(side_, tokens);
        tile.rtol = rtol_;
        for (int64_t task = first; task < last; ++task) {
          const int64_t g = task / tiles, row = at + task % tiles * tokens;
          tile.run(g, row, std::min(tokens, row_end - row), at && in_.keys ? packed.get() + g * pack_size : nullptr,
                   weight, heavy_.block(), at, recent.block(), to_);
        }
      });
      weight += add_keys(side_, panel, at, key_end, state, pack);
    }
  }

  const KeySide<T>& side_;
  const Problem<T>& in_;
  double rtol_;
  const ForwardOutput<T>& to_;
  GatheredKeys<T> heavy_;
  std::vector<HeadWeights<T>> heads_;
};

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
