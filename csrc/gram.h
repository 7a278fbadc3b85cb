// Sums of outer products over rows, sum_i w_i x_i y_i^T: chunks of rows as a product of the transposed left rows and
// the right rows, added to totals that stay in the cache. The order of the sum is that of the rows.
#pragma once

#include <ATen/ops/zeros.h>

#include "gemm.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

template <typename A>
class Gram {
 public:
  // Rows in a chunk.
  static constexpr int64_t kRows = kSlice;

  // With `triangle` only entries (i, j), j >= i, are sure to be there.
  Gram(int64_t left_width, int64_t right_width, bool triangle)
      : d_(left_width), panels_(count_panels<A>(right_width)), triangle_(triangle) {
    const auto type = c10::CppTypeToScalarType<A>::value;
    left_ = at::empty({kBlockRows * count_blocks(d_), kStride}, type);
    right_ = at::empty({panels_, kRows * kTileColumns<A>}, type);
    total_ = at::zeros({panels_, left_.size(0), kTileColumns<A>}, type);
  }

  // Takes rows [first, first + count), count <= kRows, in hand; weights, if any, are those of all rows. Returns the
  // steps.
  template <typename T>
  int64_t pack(const Rows<T>& x, const Rows<T>& y, int64_t first, int64_t count, const A* weights) {
    static_assert(std::is_same_v<A, Acc<T>>);
    const int64_t depth = padded_depth<A>(count);
    A *left = left_.template mutable_data_ptr<A>(), *right = right_.template mutable_data_ptr<A>();
    at::parallel_for(0, count_blocks(d_) + panels_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task - count_blocks(d_), row = task * kBlockRows;
        if (p < 0) {
          widen_transposed(x, row, std::min<int64_t>(kBlockRows, d_ - row), first, depth, first + count, kStride,
                           left + row * kStride);
          continue;
        }
        A* panel = right + p * kRows * kTileColumns<A>;
        pack_matrix(y, first, count, depth, p * kTileColumns<A>, panel);
        if (weights)
          for (int64_t k = 0; k < count * kTileColumns<A>; ++k) panel[k] *= weights[first + k / kTileColumns<A>];
      }
    });
    return depth;
  }

  // Adds the rows [begin, end) in hand, multiples of kTileColumns, to the totals of panel p.
  void accumulate(int64_t p, int64_t begin, int64_t end) {
    if (begin == end) return;
    const A* left = left_.template const_data_ptr<A>() + begin;
    const A* panel = right_.template const_data_ptr<A>() + (p * kRows + begin) * kTileColumns<A>;
    const int64_t rows = live_rows(p);
    for (int64_t row = 0; row < rows; row += kBlockRows)
      panel_product(Left<A>{left + row * kStride, kStride}, padded_rows(std::min<int64_t>(kBlockRows, rows - row)),
                    panel, end - begin, line(p, row), true);
  }

  template <typename T>
  void add(const Rows<T>& x, const Rows<T>& y, int64_t first, int64_t count, const A* weights) {
    const int64_t depth = pack(x, y, first, count, weights);
    at::parallel_for(0, panels_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) accumulate(p, 0, depth);
    });
  }

  int64_t panels() const { return panels_; }
  int64_t live_rows(int64_t p) const { return triangle_ ? std::min(d_, (p + 1) * kTileColumns<A>) : d_; }
  // Entries (i, p kTileColumns + c), c < kTileColumns.
  A* line(int64_t p, int64_t i) const {
    return total_.template mutable_data_ptr<A>() + (p * total_.size(1) + i) * kTileColumns<A>;
  }

 private:
  static constexpr int64_t kStride = kRows + kTileColumns<A>;

  int64_t d_, panels_;
  bool triangle_;
  at::Tensor left_, right_, total_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
