// All pairs of two sets of rows, a tile at a time, and the gradient of any weighting of the pairs.
#pragma once

#include <ATen/ops/zeros.h>

#include <vector>

#include "gemm.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Right rows that are packed at once: 3 MiB of 768 floats, which the third-level cache holds.
constexpr int64_t kRightRows = 1024;
// What the weights of one right block may take in the backward pass, where they are kept for the second product.
constexpr int64_t kWeightBytes = int64_t{24} << 20;
// Right rows at once there: the weights of one left block (144 KiB) stay in the second-level cache too.
constexpr int64_t kWeightedRows = 512;

// rows x kTileColumns similarities, c[r * kTileColumns + j] of left row `row` + r and right row `column` + j. Only
// `columns` of them are live; rows up to padded_rows(rows) are there, of zeros.
template <typename A>
struct PairTile {
  A* c;
  int64_t row, rows, column, columns, block;
};

// Panels of right rows, packed by all threads.
template <typename T, typename P>
void pack_right(const Rows<T>& right, int64_t first, int64_t count, P* to) {
  using A = Acc<T>;
  const int64_t depth = padded_depth<A>(right.width);
  const auto wide = wide_panels<P>(depth);
  at::parallel_for(0, count_panels<A>(count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      pack_panel(wide, depth, to + p * depth * kTileColumns<A>, [&](A* panel) {
        pack_rows_as_columns(right, first + p * kTileColumns<A>, count - p * kTileColumns<A>, panel);
      });
  });
}

template <typename P, typename T, typename Reduce, typename Joined>
void for_packed_pairs(const Rows<T>& left, int64_t n, const Rows<T>& right, int64_t m, Reduce reduce, Joined joined) {
  using A = Acc<T>;
  const int64_t depth = padded_depth<A>(left.width), stride = left_stride<A>(left.width);
  const int64_t at_once = std::min(kRightRows, count_panels<A>(m) * kTileColumns<A>);
  const at::Tensor panels = at::empty({at_once * depth}, c10::CppTypeToScalarType<P>::value);
  const PerThread<P> blocks(kBlockRows * stride);
  const PerThread<A> tiles(kBlockRows * kTileColumns<A>);
  for (int64_t column = 0; column < m; column += at_once) {
    const int64_t columns = std::min(at_once, m - column);
    P* packed = panels.mutable_data_ptr<P>();
    pack_right(right, column, columns, packed);
    at::parallel_for(0, count_blocks(n), 1, [&](int64_t first_block, int64_t last_block) {
      P* a = blocks.get();
      A* c = tiles.get();
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t row = block * kBlockRows, rows = std::min<int64_t>(kBlockRows, n - row);
        widen_rows(left, row, rows, stride, a);
        for (int64_t j = 0; j < columns; j += kTileColumns<A>) {
          panel_product(Left<P>{a, stride}, padded_rows(rows), packed + j * depth, depth, c);
          reduce(PairTile<A>{c, row, rows, column + j, std::min<int64_t>(kTileColumns<A>, columns - j), block});
        }
      }
    });
    joined(column, columns);
  }
}

// Calls reduce(tile) for all tiles, by any thread but for the tiles of one left block in order, and after each block of
// right rows, alone, joined(first right row, count).
template <typename T, typename Reduce, typename Joined>
void for_pairs(const Rows<T>& left, int64_t n, const Rows<T>& right, int64_t m, Reduce reduce, Joined joined) {
  with_operands<T>(left.bf16, [&]<typename P>() { for_packed_pairs<P>(left, n, right, m, reduce, joined); });
}

template <typename T, typename Reduce>
void for_pairs(const Rows<T>& left, int64_t n, const Rows<T>& right, int64_t m, Reduce reduce) {
  for_pairs(left, n, right, m, reduce, [](int64_t, int64_t) {});
}

// Across the lanes by halves: a few shuffles, where lane after lane would wait for each other.
template <typename A, typename Join>
inline A fold_lanes(Lanes<A> x, Join join) {
#pragma GCC unroll 4
  for (int apart = kLanes<A> / 2; apart > 0; apart /= 2) {
    Lanes<std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>> from;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) from[i] = i ^ apart;
    x = join(x, __builtin_shuffle(x, from));
  }
  return x[0];
}

template <typename A>
inline A fold_sum(Lanes<A> x) {
  return fold_lanes<A>(x, [](Lanes<A> a, Lanes<A> b) { return a + b; });
}

template <typename A>
inline A fold_top(Lanes<A> x) {
  return fold_lanes<A>(x, [](Lanes<A> a, Lanes<A> b) { return a > b ? a : b; });
}

// Gradients ----------------------------------------------------------------------------------------------------------

// Where the gradients of the left and right rows go. For half types the left one is summed in a buffer of fp32.
struct PairGradients {
  PairGradients(const at::Tensor& left, const at::Tensor& right, bool need_left, bool need_right)
      : left_type(left.scalar_type()), right_type(right.scalar_type()) {
    const auto options = left.options().dtype(left_type == at::kDouble ? at::kDouble : at::kFloat);
    if (need_left) dleft = at::zeros(left.sizes(), options);
    if (need_right) dright = at::empty(right.sizes(), right.options());
    none = at::empty({0}, options);
  }
  std::vector<at::Tensor> finish() const {
    return {dleft.defined() ? dleft.to(left_type) : none, dright.defined() ? dright : none};
  }
  at::ScalarType left_type, right_type;
  at::Tensor dleft, dright, none;
};

// dleft_i = sum_j w_ij right_j and dright_j = sum_i w_ij left_i, w from the similarities by weight(tile, &total): the
// similarities of all left rows with a block of right rows, made and weighted once, serve both products. Returns the
// sum of what weight adds to its total, in the order of the blocks.
template <typename T, typename Weight>
double pair_gradients(const Rows<T>& left, int64_t n, const Rows<T>& right, int64_t m, const Weight& weight,
                      const PairGradients& grads) {
  using A = Acc<T>;
  constexpr int64_t kColumns = kTileColumns<A>;
  const int64_t d = left.width, depth = padded_depth<A>(d), stride = left_stride<A>(d), d_panels = count_panels<A>(d);
  const int64_t tall = (padded_rows(n) + kBlockRows + kColumns - 1) / kColumns * kColumns;
  const int64_t fitting = kWeightBytes / static_cast<int64_t>(sizeof(A)) / tall / kColumns * kColumns;
  const int64_t at_once = std::min(std::clamp(fitting, kColumns, kWeightedRows), count_panels<A>(m) * kColumns);
  const auto type = c10::CppTypeToScalarType<A>::value;
  const at::Tensor weights = at::zeros({at_once / kColumns, tall, kColumns}, type);
  const at::Tensor by_depth = at::empty({at_once * depth}, type),
                   by_row = at::empty({d_panels, at_once, kColumns}, type);
  const PerThread<A> scratch(kBlockRows * (std::max(stride, left_stride<A>(2 * kSlice)) + kColumns) +
                             kBlockRows * at_once);
  std::vector<double> totals(count_blocks(n), 0.0);
  A* w = weights.mutable_data_ptr<A>();

  for (int64_t column = 0; column < m; column += at_once) {
    const int64_t columns = std::min(at_once, m - column), panels = count_panels<A>(columns);
    A *by_d = by_depth.mutable_data_ptr<A>(), *by_r = by_row.mutable_data_ptr<A>();
    pack_right(right, column, columns, by_d);
    if (grads.dleft.defined()) {
      at::parallel_for(0, d_panels, 1, [&](int64_t first, int64_t last) {
        for (int64_t e = first; e < last; ++e)
          pack_matrix(right, column, columns, panels * kColumns, e * kColumns, by_r + e * at_once * kColumns);
      });
    }
    at::parallel_for(0, count_blocks(n), 1, [&](int64_t first_block, int64_t last_block) {
      A* a = scratch.get();
      A* c = a + kBlockRows * std::max(stride, left_stride<A>(2 * kSlice));
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t row = block * kBlockRows, rows = std::min<int64_t>(kBlockRows, n - row);
        widen_rows(left, row, rows, stride, a);
        for (int64_t p = 0; p < panels; ++p) {
          A* tile_weights = w + (p * tall + row) * kColumns;
          panel_product(Left<A>{a, stride}, padded_rows(rows), by_d + p * kColumns * depth, depth, tile_weights);
          PairTile<A> tile{tile_weights, row, rows, column + p * kColumns, std::min(kColumns, columns - p * kColumns),
                           block};
          weight(tile, &totals[block]);
          if (tile.columns < kColumns) clear_beyond(tile_weights, rows, tile.columns);
          std::fill(tile_weights + rows * kColumns, tile_weights + padded_rows(rows) * kColumns, A(0));
        }
        if (!grads.dleft.defined()) continue;
        A* to = grads.dleft.template mutable_data_ptr<A>() + row * d;
        for (int64_t e = 0; e < d_panels; ++e) {
          panel_product(Left<A>{w + row * kColumns, kColumns, tall * kColumns}, padded_rows(rows),
                        by_r + e * at_once * kColumns, panels * kColumns, c);
          const int64_t live = std::min(kColumns, d - e * kColumns);
          for (int64_t r = 0; r < rows; ++r)
            for_lanes<A>(0, live, [&](int64_t j, auto lanes) {
              A* sum = to + r * d + e * kColumns + j;
              store(sum, load(sum, lanes) + load(c + r * kColumns + j, All{}), lanes);
            });
        }
      }
    });
    if (!grads.dright.defined()) continue;
    // Blocks of features times the weights: the transposed gradient, over all left rows, 2 kSlice at a time.
    T* dright = grads.dright.template mutable_data_ptr<T>() + column * d;
    at::parallel_for(0, count_blocks(d), 1, [&](int64_t first_block, int64_t last_block) {
      A* a = scratch.get();
      A* sums = a + kBlockRows * (std::max(stride, left_stride<A>(2 * kSlice)) + kColumns);
      const int64_t a_stride = left_stride<A>(2 * kSlice);
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t feature = block * kBlockRows, features = std::min<int64_t>(kBlockRows, d - feature);
        for (int64_t k = 0; k < n; k += 2 * kSlice) {
          const int64_t steps = std::min(2 * kSlice, padded_depth<A>(n - k));
          widen_transposed(left, feature, features, k, steps, n, a_stride, a);
          for (int64_t p = 0; p < panels; ++p)
            panel_product(Left<A>{a, a_stride}, padded_rows(features), w + (p * tall + k) * kColumns, steps,
                          sums + p * kBlockRows * kColumns, k > 0);
        }
        for (int64_t j = 0; j < columns; ++j) {
          const A* from = sums + j / kColumns * kBlockRows * kColumns + j % kColumns;
          for (int64_t e = 0; e < features; ++e) dright[j * d + feature + e] = n ? from[e * kColumns] : A(0);
        }
      }
    });
  }
  double total = 0;
  for (double part : totals) total += part;
  return total;
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
