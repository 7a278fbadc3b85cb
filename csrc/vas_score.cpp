// vas_score and the second moment on the CPU.
//
// x^T S x takes the upper triangle of S + S^T alone, so panel j of the product needs the first j panels' worth of k:
// half of the work. The second moment sums integers in float64, which is exact, see llmkern/ops/vas_score/moment.py.
#include <ATen/ops/add.h>
#include <torch/library.h>

#include <vector>

#include "gram.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

#define LLMKERN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "vas_score", __VA_ARGS__)

// sigma as panels: the triangle where `fold`, in which panel p has (p + 1) kTileColumns steps, else the whole.
template <typename A>
class SigmaPanels {
 public:
  SigmaPanels(const Rows<A>& sigma, bool fold) : depth_(padded_depth<A>(sigma.width)), fold_(fold) {
    const int64_t panels = count_panels<A>(sigma.width);
    packed_ = at::empty({start(panels)}, c10::CppTypeToScalarType<A>::value);
    A* to = packed_.template mutable_data_ptr<A>();
    at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        pack_matrix(sigma, 0, std::min(depth(p), sigma.width), depth(p), p * kTileColumns<A>, to + start(p));
        if (fold) fold_panel(sigma, p, to + start(p));
      }
    });
  }
  int64_t depth(int64_t p) const { return fold_ ? (p + 1) * kTileColumns<A> : depth_; }
  const A* panel(int64_t p) const { return packed_.template const_data_ptr<A>() + start(p); }

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

template <typename T>
void score_rows(const Rows<T>& x, const Rows<T>* y, const Rows<Acc<T>>& sigma, int64_t n, Acc<T>* out) {
  using A = Acc<T>;
  using V = Lanes<A>;
  const int64_t d = x.width, stride = left_stride<A>(d);
  const SigmaPanels<A> right(sigma, y == nullptr);
  const PerThread<A> scratch((y ? 2 : 1) * kBlockRows * stride + kBlockRows * kTileColumns<A>);
  at::parallel_for(0, count_blocks(n), 1, [&](int64_t first_block, int64_t last_block) {
    A* left = scratch.get();
    A* factors = y ? left + kBlockRows * stride : left;
    A* c = factors + kBlockRows * stride;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * kBlockRows, count = std::min<int64_t>(kBlockRows, n - first);
      widen_rows(x, first, count, stride, left);
      if (y) widen_rows(*y, first, count, stride, factors);
      V totals[kBlockRows] = {};
      for (int64_t p = 0; p < count_panels<A>(d); ++p) {
        panel_product(Left<A>{left, stride}, padded_rows(count), right.panel(p), right.depth(p), c);
        // Columns beyond the last carry zero, or NaN where the row is not finite, as the score has to be then.
        for (int64_t r = 0; r < count; ++r) {
          const A* z = c + r * kTileColumns<A>;
          const A* f = factors + r * stride + p * kTileColumns<A>;
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
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const auto left = rows_of<scalar_t>(rows, bf16);
    const auto s = rows_of<A>(matrix, bf16);
    A* scores = out.mutable_data_ptr<A>();
    if (!y) return score_rows<scalar_t>(left, nullptr, s, x.size(0), scores);
    const at::Tensor partner = unit_stride(*y);
    const auto right = rows_of<scalar_t>(partner, bf16);
    score_rows<scalar_t>(left, &right, s, x.size(0), scores);
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

// Second moment ------------------------------------------------------------------------------------------------------

// The integers up to which float64 is exact, and the largest entry.
constexpr double kExact = 0x1p53, kLargest = 1.25 * 0x1p24;
static_assert(kTileColumns<double> * kLargest * kLargest <= kExact, "a step of rows must fit");
constexpr int64_t kLimb = int64_t{1} << 32;

template <typename T>
class Moment {
 public:
  Moment(const Rows<T>& x, int64_t n, int exponent, int64_t* limbs)
      : x_(x), n_(n), d_(x.width), scale_(std::ldexp(1.0, -exponent)), limbs_(limbs), gram_(d_, d_, true) {
    integers_ = at::empty({kRows, padded_depth<double>(d_)}, at::kDouble);
    tops_.resize(kRows), panel_tops_.resize(kRows * gram_.panels()), bounds_.resize(gram_.panels());
  }

  // First row that holds what it must not, or -1.
  int64_t run() {
    for (int64_t first = 0; first < n_; first += kRows) {
      const int64_t count = std::min(kRows, n_ - first);
      at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) tops_[r] = read(first + r, r);
      });
      for (int64_t r = 0; r < count; ++r)
        if (!(tops_[r] <= kLargest)) return first + r;
      const Rows<double> a{integers_.const_data_ptr<double>(), padded_depth<double>(d_), d_};
      const int64_t depth = gram_.pack(a, a, 0, count, static_cast<const double*>(nullptr));
      at::parallel_for(0, gram_.panels(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) add_to_panel(p, count, depth);
      });
    }
    for (int64_t p = 0; p < gram_.panels(); ++p) flush(p);
    mirror();
    return -1;
  }

 private:
  static constexpr int64_t kRows = Gram<double>::kRows, kStep = kTileColumns<double>;

  // One row as integers, and the largest magnitude of each panel; returns that of all, NaN where there is one.
  double read(int64_t row, int64_t r) {
    // Adding 1.5 * 2^52 rounds to the nearest integer, ties to even.
    constexpr double kRounder = 0x1.8p52;
    const T* from = x_(row);
    // A register of floats is as many numbers as two of doubles: a panel.
    double* to = integers_.mutable_data_ptr<double>() + r * padded_depth<double>(d_);
    double top = 0, odd = 0;
    for (int64_t k = 0; k < d_; k += kStep) {
      const Floats x = load(from + k, First{static_cast<int>(std::min<int64_t>(kStep, d_ - k))});
      double largest = 0;
      for (int i = 0; i < kStep; ++i) {
        const double a = (static_cast<double>(x[i]) * scale_ + kRounder) - kRounder;
        to[k + i] = a;
        largest = std::max(largest, std::fabs(a));
        // NaN where a is NaN or infinite, else zero.
        odd += a * 0.0;
      }
      panel_tops_[r * gram_.panels() + k / kStep] = largest;
      top = std::max(top, largest);
    }
    return top + odd;
  }

  // The rows in hand; before the sum of any entry could leave the exact range, what is there goes to the limbs.
  void add_to_panel(int64_t p, int64_t count, int64_t depth) {
    int64_t begin = 0;
    for (int64_t k = 0; k < depth; k += kStep) {
      double bound = 0;
      for (int64_t r = k; r < std::min(count, k + kStep); ++r) bound += tops_[r] * panel_tops_[r * gram_.panels() + p];
      if (bounds_[p] + bound > kExact) {
        gram_.accumulate(p, begin, k);
        flush(p);
        begin = k;
      }
      bounds_[p] += bound;
    }
    gram_.accumulate(p, begin, depth);
  }

  void flush(int64_t p) {
    for (int64_t i = 0; i < gram_.live_rows(p); ++i) {
      double* line = gram_.line(p, i);
      for (int64_t c = 0, j = p * kStep; c < kStep && j < d_; ++c, ++j) {
        if (j < i) continue;
        const auto whole = static_cast<int64_t>(line[c]) + limbs_[i * d_ + j];
        limbs_[i * d_ + j] = whole & (kLimb - 1);
        limbs_[d_ * d_ + i * d_ + j] += whole >> 32;
      }
      std::fill(line, line + kStep, 0.0);
    }
    bounds_[p] = 0;
  }

  void mirror() {
    for (int64_t limb = 0; limb < 2; ++limb)
      for (int64_t i = 0; i < d_; ++i)
        for (int64_t j = 0; j < i; ++j) limbs_[(limb * d_ + i) * d_ + j] = limbs_[(limb * d_ + j) * d_ + i];
  }

  Rows<T> x_;
  int64_t n_, d_;
  double scale_;
  int64_t* limbs_;
  Gram<double> gram_;
  at::Tensor integers_;
  std::vector<double> tops_, panel_tops_, bounds_;
};

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
  library.impl("gram", &gram);
  library.impl("second_moment_sum", &second_moment_sum);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
