// vas_score and the second moment on the CPU.
//
// x^T S x takes the upper triangle of S + S^T alone, so panel j of the product needs the first j panels' worth of k:
// half of the work. The second moment sums integers in float64, which is exact, see llmkern/ops/vas_score/moment.py.
#include <ATen/ops/add.h>
#include <ATen/ops/equal.h>
#include <torch/library.h>

#include <vector>

#include "moment.h"
#include "vas_screen.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

#define LLMKERN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "vas_score", __VA_ARGS__)

// sigma as panels: the triangle where `fold`, in which panel p has (p + 1) kTileColumns steps, else the whole.
template <typename P>
class SigmaPanels {
  using A = Acc<P>;

 public:
  SigmaPanels(const Rows<A>& sigma, bool fold) : depth_(padded_depth<A>(sigma.width)), fold_(fold) {
    const int64_t panels = count_panels<A>(sigma.width);
    packed_ = at::empty({start(panels)}, c10::CppTypeToScalarType<P>::value);
    P* to = packed_.template mutable_data_ptr<P>();
    const auto wide = wide_panels<P>(depth_);
    at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        pack_panel(wide, depth(p), to + start(p), [&](A* panel) {
          pack_matrix(sigma, 0, std::min(depth(p), sigma.width), depth(p), p * kTileColumns<A>, panel);
          if (fold_) fold_panel(sigma, p, panel);
        });
    });
  }
  int64_t depth(int64_t p) const { return fold_ ? (p + 1) * kTileColumns<A> : depth_; }
  const P* panel(int64_t p) const { return packed_.template const_data_ptr<P>() + start(p); }

 private:
  int64_t start(int64_t p) const { return kTileColumns<A> * (fold_ ? p * (p + 1) / 2 * kTileColumns<A> : p * depth_); }
  static void fold_panel(const Rows<A>& sigma, int64_t p, A* to) {
    for (int64_t c = 0, j = p * kTileColumns<A>; c < kTileColumns<A> && j < sigma.width; ++c, ++j) {
      // S_jk for all k < j, along a row of sigma.
      for (int64_t k = 0; k < j; k += kLanes<A>) {
        const int64_t live = std::min<int64_t>(kLanes<A>, j - k);
        const Lanes<A> mirrored = widened(sigma, sigma(j) + k, First{static_cast<int>(live)});
        for (int64_t i = 0; i < live; ++i) to[(k + i) * kTileColumns<A> + c] += mirrored[i];
      }
      for (int64_t k = j + 1; k < (p + 1) * kTileColumns<A>; ++k) to[k * kTileColumns<A> + c] = 0;
    }
  }

  int64_t depth_;
  bool fold_;
  at::Tensor packed_;
};

// P: the type of packed operands.
template <typename P, typename T>
void score_rows(const Rows<T>& x, const Rows<T>* y, const Rows<Acc<T>>& sigma, int64_t n, Acc<T>* out) {
  using A = Acc<T>;
  using V = Lanes<A>;
  const int64_t d = x.width, stride = left_stride<A>(d);
  const SigmaPanels<P> right(sigma, y == nullptr);
  const PerThread<P> blocks((y ? 2 : 1) * kBlockRows * stride);
  const PerThread<A> tiles(kBlockRows * kTileColumns<A>);
  at::parallel_for(0, count_blocks(n), 1, [&](int64_t first_block, int64_t last_block) {
    P* left = blocks.get();
    P* factors = y ? left + kBlockRows * stride : left;
    A* c = tiles.get();
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * kBlockRows, count = std::min<int64_t>(kBlockRows, n - first);
      widen_rows(x, first, count, stride, left);
      if (y) widen_rows(*y, first, count, stride, factors);
      V totals[kBlockRows] = {};
      for (int64_t p = 0; p < count_panels<A>(d); ++p) {
        panel_product(Left<P>{left, stride}, padded_rows(count), right.panel(p), right.depth(p), c);
        // Columns beyond the last carry zero, or NaN where the row is not finite, as the score has to be then.
        for (int64_t r = 0; r < count; ++r) {
          const A* z = c + r * kTileColumns<A>;
          const P* f = factors + r * stride + p * kTileColumns<A>;
          totals[r] += load(z, All{}) * load(f, All{}) + load(z + kLanes<A>, All{}) * load(f + kLanes<A>, All{});
        }
      }
      for (int64_t r = 0; r < count; ++r) out[first + r] = sum<A>(totals[r]);
    }
  });
}

at::Tensor vas_score_fwd(const at::Tensor& x, const at::Tensor& sigma, const std::optional<at::Tensor>& y, bool bf16) {
  const at::Tensor rows = unit_stride(x), matrix = unit_stride(sigma);
  const auto accumulate = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = at::empty({x.size(0)}, x.options().dtype(accumulate));
  // What the fold adds up is no number of bf16, but for twice the same.
  const bool pack_bf16 = bf16 && multiplies_bf16() && (y || at::equal(matrix, matrix.t()));
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const at::Tensor partner = y ? unit_stride(*y) : rows;
    const auto left = rows_of<scalar_t>(rows, bf16), right = rows_of<scalar_t>(partner, bf16);
    with_operands<scalar_t>(pack_bf16, [&]<typename P>() {
      score_rows<P>(left, y ? &right : nullptr, rows_of<A>(matrix, bf16), x.size(0), out.mutable_data_ptr<A>());
    });
  });
  return out;
}

// Gradients ----------------------------------------------------------------------------------------------------------

// to_i = factor_i x_i^T matrix.
template <typename T>
void scaled_product(const Rows<T>& x, int64_t n, const Acc<T>* factors, const Rows<Acc<T>>& matrix, T* to) {
  using A = Acc<T>;
  const int64_t d = x.width, stride = left_stride<A>(d);
  const SigmaPanels<A> right(matrix, false);
  const PerThread<A> scratch(kBlockRows * (stride + kTileColumns<A>));
  at::parallel_for(0, count_blocks(n), 1, [&](int64_t first_block, int64_t last_block) {
    A* left = scratch.get();
    A* c = left + kBlockRows * stride;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * kBlockRows, count = std::min<int64_t>(kBlockRows, n - first);
      widen_rows(x, first, count, stride, left);
      for (int64_t p = 0; p < count_panels<A>(d); ++p) {
        panel_product(Left<A>{left, stride}, padded_rows(count), right.panel(p), right.depth(p), c);
        const int64_t column = p * kTileColumns<A>;
        for (int64_t r = 0; r < count; ++r)
          for_lanes<A>(0, std::min<int64_t>(kTileColumns<A>, d - column), [&](int64_t j, auto lanes) {
            const auto product = load(c + r * kTileColumns<A> + j, All{});
            store(to + (first + r) * d + column + j, factors[first + r] * product, lanes);
          });
      }
    }
  });
}

template <typename T>
void outer_products(const Rows<T>& x, const Rows<T>& y, int64_t n, const Acc<T>* weights, Acc<T>* to) {
  using A = Acc<T>;
  Gram<A> gram(x.width, y.width, false);
  for (int64_t first = 0; first < n; first += Gram<A>::kRows)
    gram.add(x, y, first, std::min(Gram<A>::kRows, n - first), weights);
  for (int64_t p = 0; p < gram.panels(); ++p)
    for (int64_t i = 0; i < x.width; ++i)
      for (int64_t c = 0, j = p * kTileColumns<A>; c < kTileColumns<A> && j < y.width; ++c, ++j)
        to[i * y.width + j] = gram.line(p, i)[c];
}

std::vector<at::Tensor> vas_score_bwd(const at::Tensor& dout, const at::Tensor& x, const at::Tensor& sigma,
                                      const std::optional<at::Tensor>& y, const c10::List<bool>& needs) {
  const at::Tensor left = unit_stride(x), right = y ? unit_stride(*y) : left, upstream = dout.contiguous();
  std::vector<at::Tensor> grads;
  for (int i = 0; i < 3; ++i) {
    const bool need = needs.get(i) && (i < 2 || y);
    const at::Tensor& like = i == 0 ? x : (i == 1 ? sigma : right);
    grads.push_back(need ? at::empty(like.sizes(), like.options()) : at::empty({0}, dout.options()));
  }
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const auto f = rows_of<scalar_t>(left), g = rows_of<scalar_t>(right);
    const A* weights = upstream.const_data_ptr<A>();
    if (needs.get(0)) {
      const at::Tensor matrix = (y ? sigma.t() : at::add(sigma, sigma.t())).contiguous();
      scaled_product(g, x.size(0), weights, rows_of<A>(matrix), grads[0].mutable_data_ptr<scalar_t>());
    }
    if (needs.get(1)) outer_products(f, g, x.size(0), weights, grads[1].mutable_data_ptr<A>());
    if (y && needs.get(2)) {
      const at::Tensor matrix = sigma.contiguous();
      scaled_product(f, x.size(0), weights, rows_of<A>(matrix), grads[2].mutable_data_ptr<scalar_t>());
    }
  });
  return grads;
}

at::Tensor gram(const at::Tensor& x) {
  const at::Tensor rows = unit_stride(x);
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = at::empty({x.size(1), x.size(1)}, x.options().dtype(type));
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const auto f = rows_of<scalar_t>(rows);
    outer_products(f, f, x.size(0), static_cast<const A*>(nullptr), out.mutable_data_ptr<A>());
  });
  return out;
}

at::Tensor vas_screen(const at::Tensor& x, const at::Tensor& basis, const at::Tensor& weights, double middle,
                      double half, double slack) {
  const at::Tensor rows = unit_stride(x), vectors = unit_stride(basis), values = weights.contiguous();
  at::Tensor out = at::empty({2, x.size(0)}, x.options().dtype(at::kDouble));
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    screen_rows(rows_of<scalar_t>(rows), x.size(0), rows_of<A>(vectors), values.const_data_ptr<A>(),
                ScoreBounds{middle, half, slack}, out.mutable_data_ptr<double>());
  });
  return out;
}

// Second moment ------------------------------------------------------------------------------------------------------

at::Tensor second_moment_sum(const at::Tensor& x, int64_t exponent) {
  const at::Tensor rows = unit_stride(x);
  at::Tensor limbs = at::zeros({2, x.size(1), x.size(1)}, at::kLong);
  const auto sum = [&]<typename T>(T) {
    const auto exponent_of_unit = static_cast<int>(exponent);
    const int64_t bad =
        Moment<T>(rows_of<T>(rows), x.size(0), exponent_of_unit, limbs.mutable_data_ptr<int64_t>()).run();
    TORCH_CHECK_VALUE(bad < 0,
                      "second_moment: expected finite rows with entries of at most 1.25 times the bound of the "
                      "accumulator, got others in row ",
                      bad, "; drop or normalise that row, or pass a larger bound");
  };
  if (x.scalar_type() == at::kHalf) {
    sum(c10::Half());
  } else if (x.scalar_type() == at::kBFloat16) {
    sum(c10::BFloat16());
  } else {
    sum(0.0f);
  }
  return limbs;
}

}  // namespace

void register_vas_score(torch::Library& library) {
  library.impl("vas_score_fwd", &vas_score_fwd);
  library.impl("vas_score_bwd", &vas_score_bwd);
  library.impl("vas_screen", &vas_screen);
  library.impl("gram", &gram);
  library.impl("second_moment_sum", &second_moment_sum);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
