// Rows of polynomial attention by tiles of queries: what a state, keys beyond the limit and recent keys add up to, and
// the certificate.
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
  RowTile(const KeySide<T>& side, int64_t tokens, double rtol)
      : side_(side),
        in_(side.in),
        rtol_(rtol),
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
      to.exact[row] = !(low > 0 && d + kRoundingParts * slack <= rtol_ * low && z < kLargestNormalizer &&
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
  double rtol_;
  int64_t stride_;
  Buffer<A> panel_, sums_, scratch_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
