// Bounds of quadratic forms by a few of their eigenvectors: llmkern/ops/vas_score/screen.py has the formula.
#pragma once

#include "gemm.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

struct ScoreBounds {
  // The eigenvalues left out lie within `half` of `middle`; `slack` |x|^2 is for rounding.
  double middle, half, slack;
};

// Lower bounds of n rows to `out`, upper ones behind them.
template <typename T>
void screen_rows(const Rows<T>& x, int64_t n, const Rows<Acc<T>>& basis, const Acc<T>* weights,
                 const ScoreBounds& bounds, double* out) {
  using A = Acc<T>;
  using V = Lanes<A>;
  constexpr int64_t kColumns = kTileColumns<A>;
  const int64_t depth = padded_depth<A>(x.width), stride = left_stride<A>(x.width);
  const int64_t panels = count_panels<A>(basis.width);
  const auto type = c10::CppTypeToScalarType<A>::value;
  const at::Tensor packed = at::empty({panels, depth * kColumns}, type), padded = at::zeros({panels * kColumns}, type);
  std::copy(weights, weights + basis.width, padded.mutable_data_ptr<A>());
  for (int64_t p = 0; p < panels; ++p)
    pack_matrix(basis, 0, x.width, depth, p * kColumns, packed.mutable_data_ptr<A>() + p * depth * kColumns);
  const PerThread<A> scratch(kBlockRows * (stride + kColumns));
  at::parallel_for(0, count_blocks(n), 1, [&](int64_t first_block, int64_t last_block) {
    A* left = scratch.get();
    A* c = left + kBlockRows * stride;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * kBlockRows, count = std::min<int64_t>(kBlockRows, n - first);
      widen_rows(x, first, count, stride, left);
      V values[kBlockRows] = {}, squares[kBlockRows] = {};
      for (int64_t p = 0; p < panels; ++p) {
        const A* lambda = padded.const_data_ptr<A>() + p * kColumns;
        panel_product(Left<A>{left, stride}, padded_rows(count), packed.const_data_ptr<A>() + p * depth * kColumns,
                      depth, c);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t j = 0; j < kColumns; j += kLanes<A>) {
            const V z = load(c + r * kColumns + j, All{}), square = z * z;
            squares[r] += square;
            values[r] += square * load(lambda + j, All{});
          }
      }
      for (int64_t r = 0; r < count; ++r) {
        V parts{};
        for (int64_t k = 0; k < depth; k += kLanes<A>) {
          const V f = load(left + r * stride + k, All{});
          parts += f * f;
        }
        const double size = sum<A>(parts), rest = size - sum<A>(squares[r]);
        const double score = bounds.middle * size + sum<A>(values[r]);
        // NaN stays: it is not below zero.
        const double error = bounds.half * (rest < 0 ? 0 : rest) + bounds.slack * size;
        out[first + r] = score - error;
        out[n + first + r] = score + error;
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
