// Scores over all pairs of two sets of rows: one blocked product, reduced where it is made. For each block of right
// rows (packed once, by all threads together) the blocks of left rows go in parallel; what a left block leaves for its
// own rows is carried from right block to right block, and what it leaves for columns is joined in the order of the
// left blocks.
#include <torch/library.h>

#include <tuple>

#include "two_way_lse.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

#define LLMKERN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "pairwise_scores", __VA_ARGS__)

at::ScalarType compute_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// norm_sim -----------------------------------------------------------------------------------------------------------

// Largest |s| a row and the first column that has it, over one panel; NaN wins and stays.
template <typename A>
void take_largest(const A* c, int64_t rows, int64_t column, A* best, int64_t* winners) {
  using V = Lanes<A>;
  for (int64_t r = 0; r < rows; ++r, c += kTileColumns<A>) {
    const V s0 = load(c, All{}), s1 = load(c + kLanes<A>, All{});
    const V m0 = s0 < 0 ? -s0 : s0, m1 = s1 < 0 ? -s1 : s1;
    const V held = fill(best[r]);
    // In the common case nothing of the panel is larger, and nothing is NaN.
    const auto news = ~((m0 <= held) & (m1 <= held));
    if (!any(reinterpret<Ints>(news))) continue;
    for (int j = 0; j < kTileColumns<A>; ++j) {
      const A size = std::fabs(c[j]);
      if (size > best[r] || (size != size && best[r] == best[r])) best[r] = size, winners[r] = column + j;
    }
  }
}

// Running p-norm of a row: top (sum q^p)^(1/p), q = |s| / top, so that no power leaves the range of the type.
template <typename A>
struct PowerSum {
  A top = 0, sum = 0;
};

template <typename A>
Lanes<A> power(Lanes<A> q, A p) {
  if (p == 1) return q;
  if (p == 2) return q * q;
  const Lanes<A> raised = exp_nonpositive(p * log(q));
  return q == 0 ? q : raised;
}

template <typename A>
void add_powers(const A* c, int64_t rows, A p, PowerSum<A>* sums) {
  using V = Lanes<A>;
  for (int64_t r = 0; r < rows; ++r, c += kTileColumns<A>) {
    const V s0 = load(c, All{}), s1 = load(c + kLanes<A>, All{});
    const V m0 = s0 < 0 ? -s0 : s0, m1 = s1 < 0 ? -s1 : s1;
    const A largest = fold_top<A>(max(m0, m1));
    PowerSum<A>& state = sums[r];
    if (largest > state.top) {
      state.sum *= std::pow(state.top / largest, p);
      state.top = largest;
    }
    // NaN is no larger than anything; it reaches the sum as itself.
    const A unit = state.top > 0 ? 1 / state.top : 1;
    state.sum += fold_sum<A>(power(m0 * unit, p) + power(m1 * unit, p));
  }
}

template <typename T>
void norm_sim_rows(const Rows<T>& x, int64_t n, const Rows<T>& target, int64_t m, double p, Acc<T>* out,
                   int64_t* winners) {
  using A = Acc<T>;
  const bool largest = std::isinf(p);
  std::vector<PowerSum<A>> sums(largest ? 0 : n);
  std::fill(out, out + n, A(-1));
  std::fill(winners, winners + n, int64_t{0});
  for_pairs<T>(x, n, target, m, [&](const PairTile<A>& tile) {
    if (tile.columns < kTileColumns<A>) clear_beyond(tile.c, tile.rows, tile.columns);
    if (largest) {
      take_largest(tile.c, tile.rows, tile.column, out + tile.row, winners + tile.row);
    } else {
      add_powers(tile.c, tile.rows, static_cast<A>(p), sums.data() + tile.row);
    }
  });
  if (largest) return;
  for (int64_t i = 0; i < n; ++i) {
    // An infinite similarity divided by itself is NaN, but the norm is known.
    out[i] = std::isinf(sums[i].top) ? sums[i].top : sums[i].top * static_cast<A>(std::pow(sums[i].sum, A(1 / p)));
    if (sums[i].top == 0 && sums[i].sum == sums[i].sum) out[i] = 0;
    if (sums[i].sum != sums[i].sum && !std::isinf(sums[i].top)) out[i] = sums[i].sum;
  }
}

std::tuple<at::Tensor, at::Tensor> norm_sim_fwd(const at::Tensor& x, const at::Tensor& target, double p, bool bf16) {
  const at::Tensor rows = unit_stride(x), goal = unit_stride(target);
  at::Tensor out = at::empty({x.size(0)}, x.options().dtype(compute_type(x)));
  at::Tensor winners = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    norm_sim_rows(rows_of<scalar_t>(rows, bf16), x.size(0), rows_of<scalar_t>(goal, bf16), goal.size(0), p,
                  out.mutable_data_ptr<Acc<scalar_t>>(), winners.mutable_data_ptr<int64_t>());
  });
  return {out, winners};
}

// dx = sum_t w_t g_t with w = dout sign(s) (|s| / out)^(p - 1); the largest alone counts for p = inf, elsewhere.
template <typename A>
struct NormWeight {
  const A *dout, *out;
  A p;

  void operator()(PairTile<A>& tile, double*) const {
    using V = Lanes<A>;
    for (int64_t r = 0; r < tile.rows; ++r) {
      A* c = tile.c + r * kTileColumns<A>;
      const A norm = out[tile.row + r], upstream = dout[tile.row + r];
      for (int j = 0; j < kTileColumns<A>; j += kLanes<A>) {
        const V s = load(c + j, All{}), size = s < 0 ? -s : s;
        const V share = p == 1 ? fill(A(1)) : (p == 2 ? size / norm : power<A>(size / norm, p - 1));
        store(c + j, s == 0 ? V{} : (s < 0 ? -upstream * share : upstream * share), All{});
      }
    }
  }
};

std::vector<at::Tensor> norm_sim_power_bwd(const at::Tensor& dout, const at::Tensor& x, const at::Tensor& target,
                                           const at::Tensor& out, double p, const c10::List<bool>& needs) {
  const at::Tensor rows = unit_stride(x), goal = unit_stride(target);
  const at::Tensor upstream = dout.contiguous(), norms = out.contiguous();
  PairGradients grads(x, target, needs.get(0), needs.get(1));
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const NormWeight<A> weight{upstream.const_data_ptr<A>(), norms.const_data_ptr<A>(), static_cast<A>(p)};
    pair_gradients(rows_of<scalar_t>(rows), x.size(0), rows_of<scalar_t>(goal), goal.size(0), weight, grads);
  });
  return grads.finish();
}

// Two-way log-sum-exp ------------------------------------------------------------------------------------------------

template <typename T>
void two_way_lse(const Rows<T>& image, int64_t n, const Rows<T>& text, int64_t m, Acc<T> scale, int64_t offset,
                 const TwoParts<Acc<T>>& rows, const TwoParts<Acc<T>>& columns, Acc<T>* pairs) {
  using A = Acc<T>;
  TwoWaySums<A> sums(n, m);
  for_pairs<T>(
      image, n, text, m,
      [&](const PairTile<A>& tile) {
        for (int64_t i = 0; i < tile.rows * kTileColumns<A>; i += kLanes<A>)
          store(tile.c + i, load(tile.c + i, All{}) * scale, All{});
        for (int64_t r = 0; pairs && r < tile.rows; ++r) {
          const int64_t j = tile.row + r + offset - tile.column;
          if (j >= 0 && j < tile.columns) pairs[tile.row + r] = tile.c[r * kTileColumns<A> + j];
        }
        sums.add(tile);
      },
      [&](int64_t first, int64_t count) { sums.join_columns(first, count, columns); });
  sums.finish_rows(rows);
}

// The two parts of log-sum-exps in a tensor (2, n).
template <typename A>
TwoParts<A> two_parts(const at::Tensor& x) {
  using Number = std::remove_const_t<A>;
  if constexpr (std::is_const_v<A>) {
    return {x.const_data_ptr<Number>(), x.const_data_ptr<Number>() + x.size(1)};
  } else {
    return {x.mutable_data_ptr<Number>(), x.mutable_data_ptr<Number>() + x.size(1)};
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> two_way_lse_fwd(const at::Tensor& image, const at::Tensor& text,
                                                               const at::Tensor& scale, int64_t offset, bool bf16) {
  const at::Tensor left = unit_stride(image), right = unit_stride(text);
  const auto options = scale.options();
  at::Tensor rows = at::empty({2, image.size(0)}, options), columns = at::empty({2, text.size(0)}, options);
  at::Tensor pairs = at::empty({image.size(0)}, options);
  LLMKERN_DISPATCH(image.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    two_way_lse(rows_of<scalar_t>(left, bf16), image.size(0), rows_of<scalar_t>(right, bf16), text.size(0),
                scale.item<A>(), offset, two_parts<A>(rows), two_parts<A>(columns), pairs.mutable_data_ptr<A>());
  });
  return {rows, columns, pairs};
}

std::vector<at::Tensor> two_way_lse_bwd(const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale,
                                        const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& drows,
                                        const at::Tensor& dcolumns, const at::Tensor& dpairs, int64_t offset,
                                        const c10::List<bool>& needs) {
  const at::Tensor left = unit_stride(image), right = unit_stride(text);
  const at::Tensor r = rows.contiguous(), c = columns.contiguous();
  const at::Tensor dr = drows.contiguous(), dc = dcolumns.contiguous(), dp = dpairs.contiguous();
  PairGradients grads(image, text, needs.get(0), needs.get(1));
  at::Tensor dscale = at::empty({needs.get(2) ? 1 : 0}, scale.options());
  LLMKERN_DISPATCH(image.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const LseWeight<A> weight{two_parts<const A>(r),
                              two_parts<const A>(c),
                              dr.const_data_ptr<A>(),
                              dc.const_data_ptr<A>(),
                              dp.const_data_ptr<A>(),
                              scale.item<A>(),
                              offset,
                              text.size(0)};
    const double total =
        pair_gradients(rows_of<scalar_t>(left), image.size(0), rows_of<scalar_t>(right), text.size(0), weight, grads);
    if (needs.get(2)) *dscale.mutable_data_ptr<A>() = static_cast<A>(total);
  });
  std::vector<at::Tensor> results = grads.finish();
  results.push_back(needs.get(2) ? dscale.reshape({}) : dscale);
  return results;
}

// rows + columns of the two-way log-sum-exp within each batch of a division, less 2 log of the size of the batch.
at::Tensor negatives(const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const at::Tensor& order,
                     at::IntArrayRef bounds, bool bf16) {
  const at::Tensor left = unit_stride(image), right = unit_stride(text), picked = order.contiguous();
  at::Tensor out = at::empty({image.size(0)}, scale.options());
  int64_t longest = 0;
  for (size_t b = 0; b + 1 < bounds.size(); ++b) longest = std::max(longest, bounds[b + 1] - bounds[b]);
  const at::Tensor row_sums = at::empty({2, longest}, scale.options()),
                   column_sums = at::empty({2, longest}, scale.options());
  LLMKERN_DISPATCH(image.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const auto f = rows_of<scalar_t>(left, bf16), g = rows_of<scalar_t>(right, bf16);
    const auto rows = two_parts<A>(row_sums), columns = two_parts<A>(column_sums);
    A* to = out.mutable_data_ptr<A>();
    for (size_t b = 0; b + 1 < bounds.size(); ++b) {
      const int64_t* index = picked.const_data_ptr<int64_t>() + bounds[b];
      const int64_t n = bounds[b + 1] - bounds[b];
      two_way_lse(f.picked_by(index), n, g.picked_by(index), n, scale.item<A>(), 0, rows, columns,
                  static_cast<A*>(nullptr));
      const A bias = static_cast<A>(2 * std::log(static_cast<double>(std::max<int64_t>(n, 1))));
      for (int64_t i = 0; i < n; ++i) to[index[i]] = rows.first[i] + columns.first[i] - bias;
    }
  });
  return out;
}

at::Tensor paired_dot(const at::Tensor& image, const at::Tensor& text) {
  const at::Tensor left = unit_stride(image), right = unit_stride(text);
  at::Tensor out = at::empty({image.size(0)}, image.options().dtype(compute_type(image)));
  LLMKERN_DISPATCH(image.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const auto f = rows_of<scalar_t>(left), g = rows_of<scalar_t>(right);
    A* to = out.mutable_data_ptr<A>();
    at::parallel_for(0, image.size(0), 256, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Lanes<A> total{};
        const scalar_t *a = f(i), *b = g(i);
        for_lanes<A>(0, f.width, [&](int64_t k, auto lanes) { total += load(a + k, lanes) * load(b + k, lanes); });
        to[i] = sum<A>(total);
      }
    });
  });
  return out;
}

}  // namespace

void register_pairwise_scores(torch::Library& library) {
  library.impl("norm_sim_fwd", &norm_sim_fwd);
  library.impl("norm_sim_power_bwd", &norm_sim_power_bwd);
  library.impl("two_way_lse_fwd", &two_way_lse_fwd);
  library.impl("two_way_lse_bwd", &two_way_lse_bwd);
  library.impl("negatives", &negatives);
  library.impl("paired_dot", &paired_dot);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
