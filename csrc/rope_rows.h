// Rows of polynomial attention by tiles of queries: what a state, keys beyond the limit and recent keys add up to, and
// the certificate.
#pragma once

#include <optional>

#include "rope_exact.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// What a head multiplies sums over a state's rows with, by their degree: its coefficients in p and in the certificate.
template <typename T>
struct HeadWeights {
  using A = Acc<T>;

  HeadWeights(const Problem<T>& in, int64_t g) : value(by_degree(in, g)), error(value.size(), A(0)) {
    error[in.options.contact] = static_cast<A>(in.coefficients(g).error);
  }

  std::vector<A> value, error;
};

// Sums over keys as rows want them: all, and where the highest degree goes by pairs those once more.
template <typename A>
struct RowState {
  const A* rows = nullptr;
  const PairedState* top = nullptr;
};

template <typename T, typename A = Acc<T>>
class RowStates {
 public:
  explicit RowStates(const Problem<T>& in) : width_(in.width()) {
    if (in.top_in_bf16()) top_.emplace(in.tables, in.value_dim);
  }

  RowState<A> of(const A* rows) {
    if constexpr (std::is_same_v<A, float>) {
      if (top_ && rows) top_->fill(rows, width_);
    }
    return {rows, top_ && rows ? &*top_ : nullptr};
  }

 private:
  int64_t width_;
  std::optional<PairedState> top_;
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
        scratch_((kKeyBlock + 2) * stride_),
        paired_(in_.top_in_bf16() ? (panel_rows(in_.tables) + 1) / 2 * stride_ : 0) {}

  // Rows [begin, begin + count) of head g. ``state``: of the keys that come before, or none; ``weight``: the sum of its
  // weights; ``heavy``: keys beyond the limit, of which those before ``heavy_end`` count; ``recent``: the keys of this
  // chunk, or empty.
  void run(int64_t g, int64_t begin, int64_t count, const HeadWeights<T>& head, const RowState<A>& state, double weight,
           const KeyBlock<A>& heavy, int64_t heavy_end, const KeyBlock<A>& recent, const ForwardOutput<T>& to) {
    const int64_t width = in_.width();
    const A* q = in_.query(g, begin);
    build_panel(in_.tables, q, in_.dim, count, stride_, panel_.get(), stride_);
    sums_.zero();
    if (state.rows) {
      // Two more rows of sums: the certificate, and the tail's moment.
      A *errors = sums_.get() + width * stride_, *tails = errors + stride_;
      const auto certify = [&](const Monomials::Block& block, int64_t t, Lanes<A> x) {
        if (const A error = head.error[block.degree]) store(errors + t, load(errors + t, All{}) + error * x, All{});
        if (block.tail) store(tails + t, load(tails + t, All{}) + x, All{});
      };
      apply_state(in_.tables, panel_.get(), stride_, stride_, state.rows, width, head.value.data(), sums_.get(),
                  certify, state.top ? in_.value_dim : 0);
      if constexpr (std::is_same_v<A, float>) {
        if (state.top) {
          pair_rows(in_.tables, panel_.get(), stride_, stride_, paired_.get());
          apply_pairs(*state.top, paired_.get(), panel_.get(), stride_, stride_, head.value.data(), sums_.get());
        }
      }
    }
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
    finish(g, begin, count, state.rows != nullptr, weight, to);
  }

 private:
  void finish(int64_t g, int64_t begin, int64_t count, bool has_state, double weight, const ForwardOutput<T>& to) {
    const Coefficients<A> c = in_.coefficients(g);
    const int64_t width = in_.width();
    A* sums = sums_.get();
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
      sums[in_.value_dim * stride_ + t] = static_cast<A>(1 / z);
    }
    for (int64_t v = 0; v < in_.value_dim; ++v) {
      const Lanes<A> middle = fill(side_.mean[v]);
      A* row = sums + v * stride_;
      for (int64_t t = 0; t < stride_; t += kLanes<A>)
        store(row + t, load(row + t, All{}) * load(sums + in_.value_dim * stride_ + t, All{}) + middle, All{});
    }
    T* out = to.out + (g * to.head_rows + begin) * in_.value_dim;
    rows_of_tokens(sums, stride_, count, in_.value_dim,
                   [&](int64_t t, int64_t v, auto x) LLMKERN_INLINE { store_at(out + t * in_.value_dim + v, x); });
  }

  const KeySide<T>& side_;
  const Problem<T>& in_;
  double rtol_;
  int64_t stride_;
  Buffer<A> panel_, sums_, scratch_;
  Buffer<Pair> paired_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
