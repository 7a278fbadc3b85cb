// Forward pass of polynomial attention: states by panels of keys, rows by tiles of queries, and rows whose certificate
// fails once more, exactly.
#pragma once

#include "rope_problem.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Where a problem's results go; heads of the group lie ``rows`` apart.
template <typename T>
struct ForwardOutput {
  using A = Acc<T>;
  T* out;
  A* normalizer;
  bool* exact;
  int64_t head_rows;
  // (R + 1, width)
  A* state;
};

// Columns of a row's sums beside values and normaliser: the certificate, and the tail's moment.
template <typename T>
inline int64_t certificate_columns(const Problem<T>& in) {
  return in.tables.leading < in.dim ? 2 : 1;
}

// State of one head with its coefficients, ready for apply_state.
template <typename T, typename A = Acc<T>>
inline void pack_head(const Problem<T>& in, const Coefficients<A>& c, const A* state, int64_t begin, int64_t end,
                      A* packed) {
  const Monomials& tables = in.tables;
  const int64_t width = in.width();
  pack_state(tables.count(), width + certificate_columns(in), begin, end, packed, [&](int64_t row, int64_t column) {
    const double many = tables.multiplicity[row];
    const int degree = tables.degrees[row];
    if (column < width) return static_cast<A>(c.polynomial[degree] * many) * state[row * width + column];
    double weight = tables.tail[row] ? many : 0.0;
    if (column == width) {
      weight = c.error * many * (in.options.contact == 0 ? c.polynomial[degree] : degree == in.options.contact);
    }
    return weight == 0 ? A(0) : static_cast<A>(weight) * state[row * width + width - 1];
  });
}

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

// Softmax attention of the rows that index(i), i < count, names, by tiles in parallel.
template <typename T>
class ExactRows {
  using A = Acc<T>;

 public:
  static constexpr int64_t kTokens = 4 * kTileTokens<A>;

  explicit ExactRows(const Problem<T>& in) : in_(in) {}

  template <typename Index>
  void run(int64_t g, int64_t count, Index index, const ForwardOutput<T>& to) const {
    for_tasks((count + kTokens - 1) / kTokens, [&](int64_t task) {
      const int64_t begin = task * kTokens;
      tile(g, std::min(kTokens, count - begin), [&](int64_t t) { return index(begin + t); }, to);
    });
  }

 private:
  template <typename Index>
  void tile(int64_t g, int64_t count, Index index, const ForwardOutput<T>& to) const {
    const int64_t stride = token_stride<A>(count), width = in_.width();
    const Buffer<A> numbers((in_.dim + width + kKeyBlock + 2) * stride + kKeyBlock * (width + 1));
    A *x = numbers.get(), *sums = x + in_.dim * stride, *p = sums + width * stride, *top = p + kKeyBlock * stride,
      *limit = top + stride, *values = limit + stride, *position = values + kKeyBlock * width;
    int64_t last = 0;
    for (int64_t t = 0; t < stride; ++t) {
      for (int64_t l = 0; l < in_.dim; ++l) x[l * stride + t] = t < count ? in_.query(g, index(t))[l] : A(0);
      const int64_t seen = t >= count ? 0 : (in_.options.is_causal ? std::min(index(t) + 1, in_.keys) : in_.keys);
      limit[t] = static_cast<A>(seen);
      last = std::max(last, seen);
    }
    std::fill(sums, sums + width * stride, A(0));
    std::fill(top, top + stride, -std::numeric_limits<A>::infinity());
    const QueryTile<A> query{x, in_.dim, stride, stride, top, limit};
    for (int64_t j = 0; j < last; j += kKeyBlock) {
      const int64_t size = std::min(kKeyBlock, last - j);
      for (int64_t i = 0; i < size; ++i) {
        const T* v = in_.v + (j + i) * in_.value_dim;
        for (int64_t c = 0; c < in_.value_dim; ++c) values[i * width + c] = static_cast<A>(v[c]);
        values[i * width + in_.value_dim] = 1;
        position[i] = static_cast<A>(j + i);
      }
      const KeyBlock<A> keys{
          in_.k + j * in_.dim, in_.dim, values, width, in_.bias ? in_.bias + j : nullptr, position, size};
      add_pairs_online(keys, query, width, p, sums);
    }
    for (int64_t t = 0; t < count; ++t) {
      const A z = sums[in_.value_dim * stride + t];
      const int64_t row = g * to.head_rows + index(t);
      to.exact[row] = true;
      to.normalizer[row] = top[t] + std::log(z);
      T* out = to.out + row * in_.value_dim;
      for (int64_t c = 0; c < in_.value_dim; ++c) out[c] = static_cast<T>(z == 0 ? A(0) : sums[c * stride + t] / z);
    }
  }

  const Problem<T>& in_;
};

// state (count, width) += moments of keys [begin, end); returns the sum of their weights.
template <typename T, typename A = Acc<T>>
inline double add_keys(const KeySide<T>& side, int64_t begin, int64_t end, A* state) {
  const Problem<T>& in = side.in;
  const int64_t stride = token_stride<A>(std::min(kPanelTokens, end - begin)), width = in.width();
  const Buffer<A> panel(panel_rows(in.tables) * stride), columns(2 * width * stride);
  double total = 0;
  for (int64_t j = begin; j < end; j += kPanelTokens) {
    const int64_t count = std::min(kPanelTokens, end - j);
    build_panel(in.tables, in.k + j * in.dim, in.dim, count, stride, panel.get(), stride);
    // A key beyond the limit has weight zero, but its powers may be infinite.
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t p = 0; side.heavy[j + t] && p < panel_rows(in.tables); ++p) panel.get()[p * stride + t] = 0;
    }
    total += side.columns(j, count, stride, true, columns.get());
    add_moments(in.tables, panel.get(), columns.get(), width, stride, stride, columns.get() + width * stride, state, 0,
                in.tables.count());
  }
  return total;
}

template <typename T, typename A = Acc<T>>
inline double full_state(const KeySide<T>& side, A* state) {
  const Problem<T>& in = side.in;
  const int64_t size = in.tables.count() * in.width();
  std::fill(state, state + size, A(0));
  if (in.keys < kSegments * kSegmentTokens) return in.keys ? add_keys(side, 0, in.keys, state) : 0.0;
  const Buffer<A> other(size);
  other.zero();
  // The segments do not depend on the number of threads.
  const int64_t middle = round_up(in.keys / kSegments, kPanelTokens);
  double totals[kSegments];
  for_tasks(kSegments, [&](int64_t s) {
    totals[s] = add_keys(side, s ? middle : 0, s ? in.keys : middle, s ? other.get() : state);
  });
  for (int64_t i = 0; i < size; ++i) state[i] += other.get()[i];
  return totals[0] + totals[1];
}

template <typename T, typename A = Acc<T>>
inline void forward_full(const KeySide<T>& side, double rtol, const ForwardOutput<T>& to) {
  const Problem<T>& in = side.in;
  const double weight = full_state(side, to.state);
  const int64_t rows = in.tables.count(), tokens = kTileTokens<A>;
  const GatheredKeys<T> heavy(side, side.heavy_keys.size(), [&](int64_t i) { return side.heavy_keys[i]; });
  const Buffer<A> packed(packed_size(rows, in.width() + 2));
  for (int64_t g = 0; g < in.group; ++g) {
    pack_head(in, in.coefficients(g), to.state, 0, rows, packed.get());
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

template <typename T, typename A = Acc<T>>
inline void forward_causal(const KeySide<T>& side, double rtol, const ForwardOutput<T>& to) {
  const Problem<T>& in = side.in;
  const int64_t rows = in.tables.count(), width = in.width(), tokens = kTileTokens<A>;
  std::fill(to.state, to.state + rows * width, A(0));
  const GatheredKeys<T> heavy(side, side.heavy_keys.size(), [&](int64_t i) { return side.heavy_keys[i]; });
  const int64_t pack_size = packed_size(rows, width + 2);
  const Buffer<A> packed(in.group * pack_size);
  const int64_t stride = token_stride<A>(std::min(kPanelTokens, in.options.chunk));
  const Buffer<A> panel(panel_rows(in.tables) * stride), columns(width * stride);
  double weight = 0;
  for (int64_t begin = 0; begin < in.queries; begin += in.options.chunk) {
    const int64_t end = std::min(in.queries, begin + in.options.chunk), key_end = std::min(end, in.keys);
    const GatheredKeys<T> recent(side, std::max<int64_t>(0, key_end - begin), [&](int64_t i) { return begin + i; });
    const int64_t tiles = (end - begin + tokens - 1) / tokens;
    at::parallel_for(0, in.group * tiles, 1, [&](int64_t first, int64_t last) {
      RowTile<T> tile(side, tokens);
      tile.rtol = rtol;
      for (int64_t task = first; task < last; ++task) {
        const int64_t g = task / tiles, row = begin + task % tiles * tokens;
        tile.run(g, row, std::min(tokens, end - row), begin && in.keys ? packed.get() + g * pack_size : nullptr, weight,
                 heavy.block(), begin, recent.block(), to);
      }
    });
    for (int64_t j = begin; j < key_end; j += kPanelTokens) {
      const int64_t count = std::min(kPanelTokens, key_end - j);
      build_panel(in.tables, in.k + j * in.dim, in.dim, count, stride, panel.get(), stride);
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t p = 0; side.heavy[j + t] && p < panel_rows(in.tables); ++p) panel.get()[p * stride + t] = 0;
      }
      weight += side.columns(j, count, stride, true, columns.get());
      const bool last_part = j + count == key_end;
      at::parallel_for(0, (rows + 31) / 32, 1, [&](int64_t first, int64_t last) {
        const Buffer<A> scratch(width * stride);
        const int64_t row_begin = first * 32, row_end = std::min(rows, last * 32);
        add_moments(in.tables, panel.get(), columns.get(), width, stride, stride, scratch.get(), to.state, row_begin,
                    row_end);
        for (int64_t g = 0; last_part && g < in.group; ++g) {
          pack_head(in, in.coefficients(g), to.state, row_begin, row_end, packed.get() + g * pack_size);
        }
      });
    }
  }
  // Keys past the last query enter the state alone.
  if (in.keys > in.queries) add_keys(side, in.queries, in.keys, to.state);
}

template <typename T, typename A = Acc<T>>
inline void forward_problem(const Problem<T>& in, double rtol, const ForwardOutput<T>& to) {
  KeySide<T> side(in);
  side.find_mean();
  if (in.options.is_causal)
    forward_causal(side, rtol, to);
  else
    forward_full(side, rtol, to);
  A* last = to.state + in.tables.count() * in.width();
  std::copy_n(side.mean.data(), in.value_dim, last);
  last[in.value_dim] = side.top;
  const ExactRows<T> exact(in);
  for (int64_t g = 0; g < in.group; ++g) {
    std::vector<int64_t> failed;
    const bool* flags = to.exact + g * to.head_rows;
    for (int64_t i = 0; i < in.queries; ++i) {
      if (flags[i]) failed.push_back(i);
    }
    exact.run(g, failed.size(), [&](int64_t i) { return failed[i]; }, to);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
