// The products of the highest degree of polynomial.h as pairs of bfloat16 with sums in float: twice the products a
// second where the processor has them. Every operand is rounded once, to half a unit in 2^-8; what that does to a
// result is the business of who asks for it.
#pragma once

#include "gemm.h"
#include "polynomial.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

using Pair = uint32_t;

// to[i] = (a_i, b_i) as bfloat16.
template <typename Entries>
inline void store_pairs(Pair* to, Floats a, Floats b, Entries entries) {
  auto* numbers = reinterpret_cast<c10::BFloat16*>(to);
  if constexpr (std::is_same_v<Entries, All>)
    store_couple(numbers, {a, b}, All{});
  else
    store_couple(numbers, {a, b}, First{2 * entries.count});
}

// Rows of a panel in bfloat16, neighbouring tokens a pair.
inline void pair_tokens(const Monomials& tables, const float* panel, int64_t tokens, int64_t stride, Pair* to) {
  auto* numbers = reinterpret_cast<c10::BFloat16*>(to);
  for (int64_t p = 0; p < tables.panel(); ++p) {
    for (int64_t t = p * stride; t < p * stride + tokens; t += kLanes<float>)
      store(numbers + t, load(panel + t, All{}), All{});
  }
}

// Pairs (2 p, 2 p + 1) of the rows of a panel, zero beyond its last.
inline void pair_rows(const Monomials& tables, const float* panel, int64_t tokens, int64_t stride, Pair* to) {
  for (int64_t p = 0; p < tables.panel(); p += 2, to += stride) {
    const float *first = panel + p * stride, *second = first + stride;
    for (int64_t t = 0; t < tokens; t += kLanes<float>)
      store_pairs(to + t, load(first + t, All{}), p + 1 < tables.panel() ? load(second + t, All{}) : Floats{}, All{});
  }
}

// Rows of a state that are products with a variable, by pairs of rows which fit those of a panel: [pair][column].
class PairedState {
 public:
  struct Block {
    int64_t dim, first, count, at;
    int degree;
  };

  PairedState(const Monomials& tables, int64_t columns) : tables_(tables), columns_(columns) {
    int64_t pairs = 0;
    for (const auto& block : tables.blocks) {
      if (block.dim < 0) continue;
      const int64_t first = block.start / 2, count = (block.start + block.count + 1) / 2 - first;
      blocks_.push_back({block.dim, first, count, pairs, block.degree});
      pairs += count;
    }
    numbers_.resize(pairs * columns);
  }

  void fill(const float* state, int64_t width) {
    auto paired = blocks_.begin();
    for (const auto& block : tables_.blocks) {
      if (block.dim < 0) continue;
      const auto row = [&](int64_t p, int64_t c, auto lanes) {
        p -= block.start;
        return p < 0 || p >= block.count ? Floats{} : load(state + (block.row + p) * width + c, lanes);
      };
      for (int64_t p = 0; p < paired->count; ++p) {
        for_lanes<float>(0, columns_, [&](int64_t c, auto lanes) {
          const int64_t first = 2 * (paired->first + p);
          store_pairs(numbers_.data() + (paired->at + p) * columns_ + c, row(first, c, lanes), row(first + 1, c, lanes),
                      lanes);
        });
      }
      ++paired;
    }
  }

  const std::vector<Block>& blocks() const { return blocks_; }
  const Pair* pairs(const Block& block, int64_t column) const { return numbers_.data() + block.at * columns_ + column; }
  int64_t columns() const { return columns_; }

 private:
  const Monomials& tables_;
  int64_t columns_;
  std::vector<Block> blocks_;
  std::vector<Pair> numbers_;
};

#if defined(CPU_CAPABILITY_AVX512)

// acc.at[m][n] += sum over k of the products of pairs a[m * a_row + k * a_depth] and b[k * b_depth + lane].
template <int M, int N>
[[gnu::target("avx512bf16"), gnu::always_inline]] inline void add_pair_products(Tile<M, N, float>& acc, int64_t depth,
                                                                                const Pair* a, int64_t a_row,
                                                                                int64_t a_depth, const Pair* b,
                                                                                int64_t b_depth) {
  for (int64_t k = 0; k < depth; ++k, a += a_depth, b += b_depth) {
    __m512bh row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + n * kLanes<float>));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[m * a_row])));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc.at[m][n] = _mm512_dpbf16_ps(acc.at[m][n], x, row[n]);
    }
  }
}

// to[m][lane] += weights[m] times the products.
template <int M, int N>
[[gnu::target("avx512bf16"), gnu::noinline]] inline void add_pair_moments(int64_t depth, const Pair* a, int64_t a_row,
                                                                          const Pair* b, int64_t b_depth,
                                                                          const float* weights, float* to,
                                                                          int64_t to_row) {
  Tile<M, N, float> acc{};
  add_pair_products<M, N>(acc, depth, a, a_row, 1, b, b_depth);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* at = to + m * to_row + n * kLanes<float>;
      store(at, load(at, All{}) + weights[m] * acc.at[m][n], All{});
    }
  }
}

// out[m][token] += over all blocks the products times by_degree and the variable, of columns m and tokens of a panel.
template <int M, int N>
[[gnu::target("avx512bf16"), gnu::noinline]] inline void apply_pair_tile(const PairedState& state, int64_t column,
                                                                         const Pair* paired, const float* panel,
                                                                         int64_t stride, const float* by_degree,
                                                                         float* out) {
  for (const auto& block : state.blocks()) {
    Tile<M, N, float> acc{};
    add_pair_products<M, N>(acc, block.count, state.pairs(block, column), 1, state.columns(),
                            paired + block.first * stride, stride);
    const float* by = variable_row(panel, block.dim, stride);
    Floats x[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = by_degree[block.degree] * load(by + n * kLanes<float>, All{});
    update_tile(out, stride, acc, [&](Floats old, Floats sums, int n) { return old + x[n] * sums; });
  }
}

#else

template <int M, int N>
inline void add_pair_moments(int64_t, const Pair*, int64_t, const Pair*, int64_t, const float*, float*, int64_t) {}
template <int M, int N>
inline void apply_pair_tile(const PairedState&, int64_t, const Pair*, const float*, int64_t, const float*, float*) {}

#endif

// What add_moments leaves out of the whole columns, scratch as there.
inline void add_moments_of_pairs(const Monomials& tables, const Pair* features, const float* panel,
                                 const float* columns, int64_t width, int64_t tokens, int64_t stride,
                                 const float* weights, float* scratch, float* state, int64_t row_begin,
                                 int64_t row_end) {
  const int64_t whole = whole_columns<float>(width - 1);
  float* values = scratch;
  Pair* scaled = reinterpret_cast<Pair*>(scratch + whole * tokens);
  rows_over_tokens([&](int64_t c) { return columns + c * stride; }, whole, tokens, whole, whole, values);
  int64_t held = -1;
  for (const auto& block : tables.blocks) {
    const int64_t begin = std::max(row_begin, block.row), end = std::min(row_end, block.row + block.count);
    if (block.dim < 0 || begin >= end) continue;
    const float* by = variable_row(panel, block.dim, stride);
    for (int64_t t = 0; block.dim != held && t < tokens; t += 2) {
      const float *first = values + t * whole, *second = first + whole;
      for (int64_t c = 0; c < whole; c += kLanes<float>)
        store_pairs(scaled + t / 2 * whole + c, load(first + c, All{}) * by[t], load(second + c, All{}) * by[t + 1],
                    All{});
    }
    held = block.dim;
    const Pair* of_block = features + (block.start + begin - block.row) * stride / 2;
    for_token_tiles<float>(whole, [&]<int N>(int64_t c) {
      for_row_tiles<kTokenTileRows>(end - begin, [&]<int M>(int64_t m) {
        add_pair_moments<M, N>(tokens / 2, of_block + m * stride / 2, stride / 2, scaled + c, whole,
                               weights + begin + m, state + (begin + m) * width + c, width);
      });
    });
  }
}

// What apply_state leaves out of the first columns of ``out``: those of the paired state.
inline void apply_pairs(const PairedState& state, const Pair* paired, const float* panel, int64_t tokens,
                        int64_t stride, const float* by_degree, float* out) {
  for_token_tiles<float>(tokens, [&]<int N>(int64_t t) {
    for_row_tiles<kTokenTileRows>(state.columns(), [&]<int M>(int64_t c) {
      apply_pair_tile<M, N>(state, c, paired + t, panel + t, stride, by_degree, out + c * stride + t);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
