// Exact attention whose scores depend on the distance t = i - j of query and key: tiles of queries against blocks of
// keys, forward and backward. What depends on the distance is read from a symbol at t: for one key and neighbouring
// queries that is a run of it, so no mask is ever built. Symbols as in llmkern/ops/toeplitz_attention/reference.py.
//
// Queries are lanes. A tile is exclusive to one task and sees its keys in order, so no result depends on the number of
// threads.
#pragma once

#include <vector>

#include "common.h"
#include "tiles.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Queries of one tile, and keys of one block: their logits (18 KiB of floats with AVX2) stay in the first-level cache.
template <typename A>
constexpr int64_t kRowTokens = 4 * kTileTokens<A>;
constexpr int64_t kBlockKeys = 48;

template <typename A>
inline int64_t whole_lanes(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Tasks of unequal length over threads, each to the next that is free.
template <typename Body>
inline void for_free_threads(int64_t tasks, Body body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) { body(next); });
}

// One head: rows of q, k and v contiguous; symbols[s * symbol_row + centre + i - j], with kRowTokens entries to spare
// at the end. Without support there is one symbol, which is added to q.k; with it entry s is the weight of
// q[support[2 s]] k[support[2 s + 1]].
template <typename A>
struct ToeplitzHead {
  int64_t queries, keys, dim, value_dim;
  const A *q, *k, *v;
  const A* symbols;
  int64_t symbol_count, symbol_row, centre;
  const int64_t* support;
  const A* key_bias;
  bool is_causal;
  A scale;

  // Keys that some of the queries [begin, end) see.
  int64_t visible(int64_t end) const { return is_causal ? std::min(keys, end) : keys; }
  const A* symbol(int64_t s, int64_t i, int64_t j) const { return symbols + s * symbol_row + centre + i - j; }
};

// Queries [begin, begin + count) under way: x holds them scaled, one row a variable. Rows of p and ds keep a register
// of zeros on either side of their tokens, for sums along diagonals.
template <typename A>
class ToeplitzTile {
 public:
  static constexpr int64_t kStride = kRowTokens<A> + 2 * kLanes<A>;

  ToeplitzTile(int64_t dim, int64_t value_dim, bool backward)
      : dim_pad(whole_lanes<A>(dim)),
        value_pad(whole_lanes<A>(value_dim)),
        numbers_((dim + value_dim + kBlockKeys * (backward ? 2 : 1) + 4 + (backward ? dim : 0)) * kStride +
                     (backward ? kRowTokens<A> * (dim_pad + value_pad) : 0),
                 A(0)) {
    A* at = numbers_.data() + kLanes<A>;
    const auto rows = [&](int64_t n) { return std::exchange(at, at + n * kStride); };
    x = rows(dim), sums = rows(value_dim), p = rows(kBlockKeys);
    top = rows(1), total = rows(1), slack = rows(1), highest = rows(1);
    if (!backward) return;
    ds = rows(kBlockKeys), dx = rows(dim);
    x_rows = at - kLanes<A>, slope_rows = x_rows + kRowTokens<A> * dim_pad;
  }

  void load(const ToeplitzHead<A>& in, int64_t begin_, int64_t count_) {
    begin = begin_, count = count_, tokens = whole_lanes<A>(count_);
    for (int64_t l = 0; l < in.dim; ++l) {
      for (int64_t t = 0; t < count; ++t) x[l * kStride + t] = in.scale * in.q[(begin + t) * in.dim + l];
      std::fill(x + l * kStride + count, x + l * kStride + tokens + kLanes<A>, A(0));
    }
  }

  int64_t begin = 0, count = 0, tokens = 0, dim_pad, value_pad;
  A *x, *sums, *p, *top, *total, *slack, *highest, *ds = nullptr, *dx = nullptr, *x_rows = nullptr,
                                                   *slope_rows = nullptr;

 private:
  std::vector<A> numbers_;
};

// What finishes a logit: key bias, and -inf where the query does not see the key.
template <typename A>
class Visibility {
 public:
  Visibility(const ToeplitzHead<A>& in, const ToeplitzTile<A>& tile, int64_t j0, int64_t keys)
      : in_(in), begin_(tile.begin), crosses_(in.is_causal && j0 + keys > tile.begin + 1) {
    for (int i = 0; i < kLanes<A>; ++i) lane_[i] = static_cast<A>(i);
  }
  Lanes<A> operator()(Lanes<A> logit, int64_t j, int64_t t) const {
    if (in_.key_bias) logit += in_.key_bias[j];
    if (!crosses_) return logit;
    const Lanes<A> behind = lane_ + static_cast<A>(begin_ + t - j);
    return behind < 0 ? fill(-std::numeric_limits<A>::infinity()) : logit;
  }

 private:
  const ToeplitzHead<A>& in_;
  int64_t begin_;
  bool crosses_;
  Lanes<A> lane_;
};

// emit(row m of the block, token t, logits) for all of keys [j0, j0 + keys).
template <typename A, typename Emit>
inline void toeplitz_logits(const ToeplitzHead<A>& in, const ToeplitzTile<A>& tile, int64_t j0, int64_t keys,
                            Emit emit) {
  constexpr int64_t stride = ToeplitzTile<A>::kStride;
  const Visibility<A> see(in, tile, j0, keys);
  if (!in.support) {
    outer(keys, in.dim, tile.tokens, in.k + j0 * in.dim, in.dim, 1, tile.x, stride,
          [&]<int M, int N>(int64_t m, int64_t t, const Tile<M, N, A>& product) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
              Lanes<A> row[M];
#pragma GCC unroll 8
              for (int i = 0; i < M; ++i) {
                const A* symbol = in.symbol(0, tile.begin, j0 + m + i) + t + n * kLanes<A>;
                row[i] = see(product.at[i][n] + load(symbol, All{}), j0 + m + i, t + n * kLanes<A>);
              }
              emit(m, t + n * kLanes<A>, row);
            }
          });
    return;
  }
  for_token_tiles<A>(tile.tokens, [&]<int N>(int64_t t) {
    for (int64_t m = 0; m < keys; ++m) {
      const A* k = in.k + (j0 + m) * in.dim;
      Lanes<A> sums[N] = {};
      for (int64_t s = 0; s < in.symbol_count; ++s) {
        const A* symbol = in.symbol(s, tile.begin, j0 + m) + t;
        const A *x = tile.x + in.support[2 * s] * stride + t, weight = k[in.support[2 * s + 1]];
        for (int n = 0; n < N; ++n)
          sums[n] += load(x + n * kLanes<A>, All{}) * load(symbol + n * kLanes<A>, All{}) * weight;
      }
      for (int n = 0; n < N; ++n) {
        const Lanes<A> row[1] = {see(sums[n], j0 + m, t + n * kLanes<A>)};
        emit(m, t + n * kLanes<A>, row);
      }
    }
  });
}

// Rows of one tile: out (queries, value_dim) and their log-sum-exp.
template <typename A>
inline void toeplitz_forward(const ToeplitzHead<A>& in, ToeplitzTile<A>& tile, A* out, A* lse) {
  constexpr int64_t stride = ToeplitzTile<A>::kStride;
  const Lanes<A> none = fill(-std::numeric_limits<A>::infinity());
  const int64_t end = in.visible(tile.begin + tile.count);
  for (int64_t c = 0; c < in.value_dim; ++c) std::fill_n(tile.sums + c * stride, tile.tokens, A(0));
  std::fill_n(tile.top, tile.tokens, -std::numeric_limits<A>::infinity());
  std::fill_n(tile.total, tile.tokens, A(0));
  for (int64_t j0 = 0; j0 < end; j0 += kBlockKeys) {
    const int64_t keys = std::min(kBlockKeys, end - j0);
    std::copy_n(tile.top, tile.tokens, tile.highest);
    toeplitz_logits(in, tile, j0, keys, [&]<int M>(int64_t m, int64_t t, const Lanes<A>(&row)[M]) {
      Lanes<A> highest = load(tile.highest + t, All{});
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        store(tile.p + (m + i) * stride + t, row[i], All{});
        highest = max(row[i], highest);
      }
      store(tile.highest + t, highest, All{});
    });
    for (int64_t t = 0; t < tile.tokens; t += kLanes<A>) {
      const Lanes<A> before = load(tile.top + t, All{}), highest = load(tile.highest + t, All{});
      const Lanes<A> base = highest == none ? Lanes<A>{} : highest;
      Lanes<A> total = load(tile.total + t, All{});
      if (any(before < highest)) {
        const Lanes<A> shrink = exp_nonpositive(before - base);
        total *= shrink;
        for (int64_t c = 0; c < in.value_dim; ++c) {
          A* at = tile.sums + c * stride + t;
          store(at, load(at, All{}) * shrink, All{});
        }
        store(tile.top + t, highest, All{});
      }
      for (int64_t j = 0; j < keys; ++j) {
        A* at = tile.p + j * stride + t;
        const Lanes<A> share = exp_nonpositive(load(at, All{}) - base);
        total += share;
        store(at, share, All{});
      }
      store(tile.total + t, total, All{});
    }
    outer(in.value_dim, keys, tile.tokens, in.v + j0 * in.value_dim, 1, in.value_dim, tile.p, stride,
          [&](int64_t m, int64_t t, const auto& sums) { add_tile(tile.sums + m * stride + t, stride, sums); });
  }
  for (int64_t t = 0; t < tile.count; ++t) {
    const A total = tile.total[t], inverse = total == 0 ? A(0) : 1 / total;
    lse[tile.begin + t] = tile.top[t] + std::log(total);
    for (int64_t c = 0; c < in.value_dim; ++c)
      out[(tile.begin + t) * in.value_dim + c] = tile.sums[c * stride + t] * inverse;
  }
}

// Upstream gradient and results of the forward pass of one head, and where its gradients go. dk and dv have rows of
// whole registers and are added to, as is dsymbols, laid out like the symbols; it may be null.
template <typename A>
struct ToeplitzGradients {
  const A *grad, *out, *lse;
  A *dq, *dk, *dv, *dsymbols;
};

// to[centre + i - j] += weight(j, t) ds over a block: for 8 neighbouring diagonals one load and addition a key.
template <typename A, typename Weigh>
inline void add_diagonals(const ToeplitzTile<A>& tile, int64_t keys, A* to, Weigh weigh) {
  constexpr int64_t stride = ToeplitzTile<A>::kStride;
  for (int64_t r = 1 - keys; r < tile.tokens; r += kLanes<A>) {
    int64_t j = std::max<int64_t>(0, 1 - kLanes<A> - r);
    const int64_t last = std::min(keys, tile.tokens - r);
    Lanes<A> sums[4] = {};
    const auto term = [&](int64_t at) { return weigh(at, r + at, load(tile.ds + at * stride + r + at, All{})); };
    for (; j + 4 <= last; j += 4) {
      for (int i = 0; i < 4; ++i) sums[i] += term(j + i);
    }
    for (; j < last; ++j) sums[0] += term(j);
    store(to + r, load(to + r, All{}) + ((sums[0] + sums[1]) + (sums[2] + sums[3])), All{});
  }
}

// dx, dk and dsymbols of one block where a support is given, from ds.
template <typename A>
inline void pull_back_support(const ToeplitzHead<A>& in, const ToeplitzTile<A>& tile, int64_t j0, int64_t keys,
                              const ToeplitzGradients<A>& to) {
  constexpr int64_t stride = ToeplitzTile<A>::kStride;
  for (int64_t s = 0; s < in.symbol_count; ++s) {
    const int64_t a = in.support[2 * s], b = in.support[2 * s + 1];
    const A* x = tile.x + a * stride;
    for (int64_t j = 0; j < keys; ++j) {
      const A *symbol = in.symbol(s, tile.begin, j0 + j), weight = in.k[(j0 + j) * in.dim + b];
      Lanes<A> sum{};
      for (int64_t t = 0; t < tile.tokens; t += kLanes<A>) {
        const Lanes<A> pull = load(tile.ds + j * stride + t, All{}) * load(symbol + t, All{});
        sum += pull * load(x + t, All{});
        A* dx = tile.dx + a * stride + t;
        store(dx, load(dx, All{}) + pull * weight, All{});
      }
      to.dk[(j0 + j) * tile.dim_pad + b] += llmkern::sum<A>(sum);
    }
    if (!to.dsymbols) continue;
    add_diagonals(
        tile, keys, to.dsymbols + s * in.symbol_row + in.centre + tile.begin - j0,
        [&](int64_t j, int64_t t, Lanes<A> ds) { return ds * load(x + t, All{}) * in.k[(j0 + j) * in.dim + b]; });
  }
}

// Gradients of one tile's rows: ds_ij = P_ij (do_i.v_j - do_i.o_i), P recomputed from the log-sum-exp.
template <typename A>
inline void toeplitz_backward(const ToeplitzHead<A>& in, ToeplitzTile<A>& tile, const ToeplitzGradients<A>& to) {
  constexpr int64_t stride = ToeplitzTile<A>::kStride;
  const int64_t end = in.visible(tile.begin + tile.count), width = in.value_dim;
  std::fill_n(tile.x_rows, kRowTokens<A> * (tile.dim_pad + tile.value_pad), A(0));
  std::fill_n(tile.dx, in.dim * stride - 2 * kLanes<A>, A(0));
  for (int64_t c = 0; c < width; ++c) std::fill_n(tile.sums + c * stride, tile.tokens, A(0));
  std::fill_n(tile.slack, tile.tokens, A(0));
  // What no row owns has no share in anything.
  std::fill_n(tile.top, tile.tokens, std::numeric_limits<A>::infinity());
  for (int64_t t = 0; t < tile.count; ++t) {
    const A *grad = to.grad + (tile.begin + t) * width, *out = to.out + (tile.begin + t) * width;
    A slack = 0;
    for (int64_t c = 0; c < width; ++c) {
      slack += grad[c] * out[c];
      tile.sums[c * stride + t] = tile.slope_rows[t * tile.value_pad + c] = grad[c];
    }
    tile.slack[t] = slack;
    const A lse = to.lse[tile.begin + t];
    tile.top[t] = lse == -std::numeric_limits<A>::infinity() ? A(0) : lse;
    for (int64_t l = 0; l < in.dim; ++l) tile.x_rows[t * tile.dim_pad + l] = tile.x[l * stride + t];
  }
  for (int64_t j0 = 0; j0 < end; j0 += kBlockKeys) {
    const int64_t keys = std::min(kBlockKeys, end - j0);
    toeplitz_logits(in, tile, j0, keys, [&]<int M>(int64_t m, int64_t t, const Lanes<A>(&row)[M]) {
      const Lanes<A> lse = load(tile.top + t, All{});
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) store(tile.p + (m + i) * stride + t, exp_nonpositive(row[i] - lse), All{});
    });
    outer(keys, width, tile.tokens, in.v + j0 * width, width, 1, tile.sums, stride,
          [&]<int M, int N>(int64_t m, int64_t t, const Tile<M, N, A>& pull) {
            for (int n = 0; n < N; ++n) {
              const Lanes<A> slack = load(tile.slack + t + n * kLanes<A>, All{});
              for (int i = 0; i < M; ++i) {
                const int64_t at = (m + i) * stride + t + n * kLanes<A>;
                store(tile.ds + at, load(tile.p + at, All{}) * (pull.at[i][n] - slack), All{});
              }
            }
          });
    A* dv = to.dv + j0 * tile.value_pad;
    outer(keys, tile.count, tile.value_pad, tile.p, stride, 1, tile.slope_rows, tile.value_pad,
          [&](int64_t m, int64_t c, const auto& sums) { add_tile(dv + m * tile.value_pad + c, tile.value_pad, sums); });
    if (in.support) {
      // Past the tokens, sums along diagonals read what the last tile left.
      for (int64_t j = 0; j < keys; ++j) std::fill_n(tile.ds + j * stride + tile.tokens, kLanes<A>, A(0));
      pull_back_support(in, tile, j0, keys, to);
      continue;
    }
    A* dk = to.dk + j0 * tile.dim_pad;
    outer(keys, tile.count, tile.dim_pad, tile.ds, stride, 1, tile.x_rows, tile.dim_pad,
          [&](int64_t m, int64_t l, const auto& sums) { add_tile(dk + m * tile.dim_pad + l, tile.dim_pad, sums); });
    outer(in.dim, keys, tile.tokens, in.k + j0 * in.dim, 1, in.dim, tile.ds, stride,
          [&](int64_t m, int64_t t, const auto& sums) { add_tile(tile.dx + m * stride + t, stride, sums); });
    if (!to.dsymbols) continue;
    for (int64_t j = 0; j < keys; ++j) std::fill_n(tile.ds + j * stride + tile.tokens, kLanes<A>, A(0));
    add_diagonals(tile, keys, to.dsymbols + in.centre + tile.begin - j0,
                  [](int64_t, int64_t, Lanes<A> ds) { return ds; });
  }
  for (int64_t t = 0; t < tile.count; ++t) {
    for (int64_t l = 0; l < in.dim; ++l) to.dq[(tile.begin + t) * in.dim + l] = in.scale * tile.dx[l * stride + t];
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
