// vas_score and the second moment on the CPU.
//
// x^T S x takes the upper triangle of S + S^T alone, so panel j of the product needs the first j panels' worth of k:
// half of the work. The second moment sums integers in float64, which is exact, see llmkern/ops/vas_score/moment.py.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "gemm.h"

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

// Second moment ------------------------------------------------------------------------------------------------------

// Rows that are transposed and packed at once, and the integers up to which float64 is exact.
constexpr int64_t kChunkRows = kSlice;
constexpr double kExact = 0x1p53, kLargest = 0x1p26;
constexpr int64_t kLimb = int64_t{1} << 32;

template <typename T>
class Moment {
 public:
  Moment(const Rows<T>& x, int64_t n, int exponent, int64_t* limbs)
      : x_(x),
        n_(n),
        d_(x.width),
        panels_(count_panels<double>(d_)),
        scale_(std::ldexp(1.0, -exponent)),
        limbs_(limbs) {
    const int64_t rows = kBlockRows * count_blocks(d_);
    integers_ = at::empty({kChunkRows, padded_depth<double>(d_)}, at::kDouble);
    left_ = at::empty({rows, left_stride<double>(kChunkRows)}, at::kDouble);
    right_ = at::empty({panels_, kChunkRows * kTileColumns<double>}, at::kDouble);
    total_ = at::zeros({panels_, rows, kTileColumns<double>}, at::kDouble);
  }

  // First row that holds what it must not, or -1.
  int64_t run() {
    double bound = 0;
    int64_t pending = 0;
    for (int64_t row = 0; row < n_; ++row) {
      const double top = read(row, integers_.mutable_data_ptr<double>() + pending * padded_depth<double>(d_));
      if (!(top <= kLargest)) return row;
      if (bound + top * top > kExact) {
        add_chunk(pending);
        flush();
        std::memmove(integers_.mutable_data_ptr<double>(),
                     integers_.mutable_data_ptr<double>() + pending * padded_depth<double>(d_),
                     padded_depth<double>(d_) * sizeof(double));
        pending = 0, bound = 0;
      }
      bound += top * top;
      if (++pending == kChunkRows) add_chunk(pending), pending = 0;
    }
    add_chunk(pending);
    flush();
    mirror();
    return -1;
  }

 private:
  // One row as integers; returns the largest magnitude, NaN where there is one.
  double read(int64_t row, double* to) {
    const T* from = x_(row);
    double top = 0;
    for (int64_t k = 0; k < d_; ++k) {
      const double a = std::nearbyint(static_cast<double>(static_cast<float>(from[k])) * scale_);
      to[k] = a;
      const double size = std::fabs(a);
      top = size <= top ? top : size;
      if (size != size) return size;
    }
    std::fill(to + d_, to + padded_depth<double>(d_), 0.0);
    return top;
  }

  // total += a^T a over the pending rows: the blocks on and above the diagonal.
  void add_chunk(int64_t rows) {
    if (rows == 0) return;
    const int64_t depth = padded_depth<double>(rows), stride = left_stride<double>(kChunkRows);
    const Rows<double> a{integers_.const_data_ptr<double>(), padded_depth<double>(d_), d_};
    double* left = left_.mutable_data_ptr<double>();
    double* right = right_.mutable_data_ptr<double>();
    at::parallel_for(0, count_blocks(d_) + panels_, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t p = i - count_blocks(d_);
        if (p >= 0) {
          pack_matrix(a, 0, rows, depth, p * kTileColumns<double>, right + p * kChunkRows * kTileColumns<double>);
        } else {
          const int64_t row = i * kBlockRows;
          widen_transposed(a, row, std::min<int64_t>(kBlockRows, d_ - row), 0, depth, rows, stride,
                           left + row * stride);
        }
      }
    });
    double* total = total_.mutable_data_ptr<double>();
    at::parallel_for(0, panels_, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        for (int64_t row = 0; row < std::min(d_, (p + 1) * kTileColumns<double>); row += kBlockRows) {
          const int64_t wanted = std::min<int64_t>({kBlockRows, d_ - row, (p + 1) * kTileColumns<double> - row});
          panel_product(Left<double>{left + row * stride, stride}, padded_rows(wanted),
                        right + p * kChunkRows * kTileColumns<double>, depth,
                        total + (p * total_.size(1) + row) * kTileColumns<double>, true);
        }
      }
    });
  }

  // The totals, integers below 2^53, to the limbs.
  void flush() {
    double* total = total_.mutable_data_ptr<double>();
    at::parallel_for(0, panels_, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        for (int64_t i = 0; i < std::min(d_, (p + 1) * kTileColumns<double>); ++i) {
          double* line = total + (p * total_.size(1) + i) * kTileColumns<double>;
          for (int64_t c = 0, j = p * kTileColumns<double>; c < kTileColumns<double> && j < d_; ++c, ++j) {
            if (j < i) continue;
            const auto whole = static_cast<int64_t>(line[c]) + limbs_[i * d_ + j];
            limbs_[i * d_ + j] = whole & (kLimb - 1);
            limbs_[d_ * d_ + i * d_ + j] += whole >> 32;
          }
          std::fill(line, line + kTileColumns<double>, 0.0);
        }
      }
    });
  }

  void mirror() {
    for (int64_t limb = 0; limb < 2; ++limb)
      for (int64_t i = 0; i < d_; ++i)
        for (int64_t j = 0; j < i; ++j) limbs_[(limb * d_ + i) * d_ + j] = limbs_[(limb * d_ + j) * d_ + i];
  }

  Rows<T> x_;
  int64_t n_, d_, panels_;
  double scale_;
  int64_t* limbs_;
  at::Tensor integers_, left_, right_, total_;
};

at::Tensor second_moment_sum(const at::Tensor& x, int64_t exponent) {
  const at::Tensor rows = unit_stride(x);
  at::Tensor limbs = at::zeros({2, x.size(1), x.size(1)}, at::kLong);
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    const int64_t bad = Moment<scalar_t>(rows_of<scalar_t>(rows), x.size(0), static_cast<int>(exponent),
                                         limbs.mutable_data_ptr<int64_t>())
                            .run();
    TORCH_CHECK_VALUE(bad < 0,
                      "second_moment: expected finite rows with entries of at most 4 times the bound of the "
                      "accumulator, got others in row ",
                      bad, "; drop or normalise that row, or pass a larger bound");
  });
  return limbs;
}

}  // namespace

void register_vas_score(torch::Library& library) {
  library.impl("vas_score_fwd", &vas_score_fwd);
  library.impl("second_moment_sum", &second_moment_sum);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
