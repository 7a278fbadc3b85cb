// Register tiles of products whose long side is tokens, one token a lane. Two shapes make up all of attention here:
//
//   outer   C[m][token] = sum_k a[m, k] B[k][token]          weights, broadcast, times rows of tokens
//   dot     C[f][c]    += sum_token A[f][token] B[c][token]   sums over tokens
//
// Rows of tokens are contiguous, padded with zeros to full registers. Every sum runs in one order whatever the split of
// the work, so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "vec.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Registers: 12 accumulators of 16 (24 of 32 with AVX-512), and what they are fed from.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTokenTileRows = 8;
#else
constexpr int kTokenTileRows = 4;
#endif
constexpr int kTileRegisters = 3;
// Tokens of one tile.
template <typename A>
constexpr int64_t kTileTokens = kTileRegisters * kLanes<A>;

template <int M, int N, typename A>
struct Tile {
  Lanes<A> at[M][N];
};

// Tile of rows m < M and N registers of tokens; a[m * a_row + k * a_depth], b + k * b_depth.
template <int M, int N, typename A>
inline Tile<M, N, A> outer_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const A* b,
                                int64_t b_depth) {
  Tile<M, N, A> c{};
  for (int64_t k = 0; k < depth; ++k) {
    Lanes<A> row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes<A>, All{});
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Lanes<A> weight = fill(a[m * a_row]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) c.at[m][n] += weight * row[n];
    }
    a += a_depth;
    b += b_depth;
  }
  return c;
}

// Calls body.template operator()<left>(m), where left is at most M; none for no rows.
template <int M, typename Body>
inline void for_last_rows(int64_t left, int64_t m, Body body) {
  if (left == M) return body.template operator()<M>(m);
  if constexpr (M > 1) for_last_rows<M - 1>(left, m, body);
}

// Calls body.template operator()<M>(m) for tiles of rows m .. m + M - 1 that cover [0, rows): kMax rows each, and the
// last what is left, in one tile.
template <int kMax, typename Body>
inline void for_row_tiles(int64_t rows, Body body) {
  int64_t m = 0;
  for (; m + kMax <= rows; m += kMax) body.template operator()<kMax>(m);
  if constexpr (kMax > 1) for_last_rows<kMax - 1>(rows - m, m, body);
}

// Calls body.template operator()<N>(token) for tiles of N registers that cover [0, tokens), a multiple of the lanes.
// One register alone waits for its own sums: four of them go as two and two.
template <typename A, typename Body>
inline void for_token_tiles(int64_t tokens, Body body) {
  int64_t t = 0;
  for (; t + kTileTokens<A> <= tokens && t + 4 * kLanes<A> != tokens; t += kTileTokens<A>)
    body.template operator()<kTileRegisters>(t);
  for (; t + 2 * kLanes<A> <= tokens; t += 2 * kLanes<A>) body.template operator()<2>(t);
  for (; t < tokens; t += kLanes<A>) body.template operator()<1>(t);
}

// outer over all rows and tokens; finish(m, token, tile) takes each tile.
template <typename A, typename Finish>
inline void outer(int64_t rows, int64_t depth, int64_t tokens, const A* a, int64_t a_row, int64_t a_depth, const A* b,
                  int64_t b_depth, Finish finish) {
  for_token_tiles<A>(tokens, [&]<int N>(int64_t t) {
    for_row_tiles<kTokenTileRows>(rows, [&]<int M>(int64_t m) {
      finish(m, t, outer_tile<M, N, A>(depth, a + m * a_row, a_row, a_depth, b + t, b_depth));
    });
  });
}

template <int M, int N, typename A, typename Change>
inline void update_tile(A* to, int64_t stride, const Tile<M, N, A>& tile, Change change) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      A* p = to + m * stride + n * kLanes<A>;
      store(p, change(load(p, All{}), tile.at[m][n], n), All{});
    }
  }
}

template <int M, int N, typename A>
inline void add_tile(A* to, int64_t stride, const Tile<M, N, A>& tile) {
  update_tile(to, stride, tile, [](Lanes<A> old, Lanes<A> x, int) { return old + x; });
}

template <int M, int N, typename A>
inline void store_tile(A* to, int64_t stride, const Tile<M, N, A>& tile) {
  update_tile(to, stride, tile, [](Lanes<A>, Lanes<A> x, int) { return x; });
}

// F rows of a times C rows of b over tokens, times weight(f), added to out[f * out_row + c].
template <int F, int C, typename A, typename Weight>
inline void dot_tile(int64_t tokens, const A* a, const A* b, int64_t stride, A* out, int64_t out_row, Weight weight) {
  Lanes<A> acc[(F * C + 3) / 4 * 4] = {};
  for (int64_t t = 0; t < tokens; t += kLanes<A>) {
    Lanes<A> right[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) right[c] = load(b + c * stride + t, All{});
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
      const Lanes<A> left = load(a + f * stride + t, All{});
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[f * C + c] += left * right[c];
    }
  }
  A sums[(F * C + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int i = 0; i < F * C; i += 4) sum_four<A>(acc + i, sums + i);
#pragma GCC unroll 8
  for (int f = 0; f < F; ++f) {
    const A by = weight(f);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) out[f * out_row + c] += by * sums[f * C + c];
  }
}

// dot over all rows: out (f_rows, c_rows) += weight(f) a b^T; rows of tokens lie ``stride`` apart.
template <typename A, typename Weight>
inline void dot(int64_t f_rows, int64_t c_rows, int64_t tokens, const A* a, const A* b, int64_t stride, A* out,
                int64_t out_row, Weight weight) {
  for_row_tiles<kTokenTileRows>(f_rows, [&]<int F>(int64_t f) {
    const auto columns = [&]<int C>(int64_t c) {
      dot_tile<F, C, A>(tokens, a + f * stride, b + c * stride, stride, out + f * out_row + c, out_row,
                        [&](int64_t m) { return weight(f + m); });
    };
    int64_t c = 0;
    for (; c + 3 <= c_rows; c += 3) columns.template operator()<3>(c);
    if (c + 2 == c_rows)
      columns.template operator()<2>(c);
    else if (c < c_rows)
      columns.template operator()<1>(c);
  });
}

template <typename A>
inline void dot(int64_t f_rows, int64_t c_rows, int64_t tokens, const A* a, const A* b, int64_t stride, A* out,
                int64_t out_row) {
  dot(f_rows, c_rows, tokens, a, b, stride, out, out_row, [](int64_t) { return A(1); });
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
