// Pairs of query and key that count exactly: within a chunk, with keys or queries that are too large for the
// polynomial, and all pairs of exact attention. Queries are lanes, keys go in blocks of up to kKeyBlock rows.
#pragma once

#include "tiles.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

constexpr int64_t kKeyBlock = 48;

// Rows of k (dim) and of values (width columns, of which the last holds ones), their biases (or null), and where they
// stand: a query sees the keys whose position is below its limit.
template <typename A>
struct KeyBlock {
  const A* k;
  int64_t k_row;
  const A* v;
  int64_t v_row;
  const A* bias;
  const A* position;
  int64_t count;

  KeyBlock from(int64_t begin, int64_t size) const {
    return {k + begin * k_row,
            k_row,
            v + begin * v_row,
            v_row,
            bias ? bias + begin : nullptr,
            position + begin,
            std::min(size, count - begin)};
  }
};

// Tokens of queries: x (dim rows), what is subtracted from their logits, and their limits.
template <typename A>
struct QueryTile {
  const A* x;
  int64_t dim, tokens, stride;
  A* offset;
  const A* limit;

  QueryTile from(int64_t begin) const {
    return {x + begin, dim, tokens - begin, stride, offset + begin, limit + begin};
  }
};

// p[j][token] = logits, -inf where not visible; keys that no token of a tile sees are left out: returns how many count.
template <typename A>
inline int64_t masked_logits(const KeyBlock<A>& keys, const QueryTile<A>& q, A* p) {
  A highest = 0;
  for (int64_t t = 0; t < q.tokens; ++t) highest = std::max(highest, q.limit[t]);
  int64_t count = keys.count;
  while (count > 0 && keys.position[count - 1] >= highest) --count;
  const Lanes<A> hidden = fill(-std::numeric_limits<A>::infinity());
  outer(count, q.dim, q.tokens, keys.k, keys.k_row, 1, q.x, q.stride,
        [&]<int M, int N>(int64_t m, int64_t t, const Tile<M, N, A>& tile) {
          for (int i = 0; i < M; ++i) {
            const Lanes<A> position = fill(keys.position[m + i]);
            const A bias = keys.bias ? keys.bias[m + i] : A(0);
            for (int n = 0; n < N; ++n) {
              const int64_t at = t + n * kLanes<A>;
              const Lanes<A> seen = tile.at[i][n] + bias;
              store(p + (m + i) * q.stride + at, position < load(q.limit + at, All{}) ? seen : hidden, All{});
            }
          }
        });
  return count;
}

// p[j] = exp(p[j] - offset), held at exp(88).
template <typename A>
inline void exponentials(int64_t count, const QueryTile<A>& q, A* p) {
  for (int64_t t = 0; t < q.tokens; t += kLanes<A>) {
    const Lanes<A> offset = load(q.offset + t, All{});
    for (int64_t j = 0; j < count; ++j) {
      A* at = p + j * q.stride + t;
      store(at, exp(load(at, All{}) - offset), All{});
    }
  }
}

// sums[c][token] += sum_j v[j][c] exp(logit - offset), width rows. p: kKeyBlock rows of scratch.
template <typename A>
inline void add_pairs(const KeyBlock<A>& all, const QueryTile<A>& q, int64_t width, A* p, A* sums) {
  for (int64_t begin = 0; begin < all.count; begin += kKeyBlock) {
    const KeyBlock<A> keys = all.from(begin, kKeyBlock);
    const int64_t count = masked_logits(keys, q, p);
    if (count == 0) continue;
    exponentials(count, q, p);
    outer(width, count, q.tokens, keys.v, 1, keys.v_row, p, q.stride,
          [&](int64_t m, int64_t t, const auto& tile) { add_tile(sums + m * q.stride + t, q.stride, tile); });
  }
}

// The same where the offset is the running maximum: it starts at -inf, and sums shrink when it rises.
template <typename A>
inline void add_pairs_online(const KeyBlock<A>& keys, const QueryTile<A>& q, int64_t width, A* p, A* sums) {
  const int64_t count = masked_logits(keys, q, p);
  if (count == 0) return;
  const Lanes<A> none = fill(-std::numeric_limits<A>::infinity());
  for (int64_t t = 0; t < q.tokens; t += kLanes<A>) {
    const Lanes<A> before = load(q.offset + t, All{});
    Lanes<A> highest = before;
    for (int64_t j = 0; j < count; ++j) highest = max(load(p + j * q.stride + t, All{}), highest);
    store(q.offset + t, highest, All{});
    const Lanes<A> base = highest == none ? Lanes<A>{} : highest;
    const Lanes<A> shrink = exp_nonpositive(before - base);
    for (int64_t j = 0; j < count; ++j) {
      A* at = p + j * q.stride + t;
      store(at, exp_nonpositive(load(at, All{}) - base), All{});
    }
    for (int64_t c = 0; c < width; ++c) {
      A* at = sums + c * q.stride + t;
      store(at, load(at, All{}) * shrink, All{});
    }
  }
  outer(width, count, q.tokens, keys.v, 1, keys.v_row, p, q.stride,
        [&](int64_t m, int64_t t, const auto& tile) { add_tile(sums + m * q.stride + t, q.stride, tile); });
}

// The size of logits up to which sums of their exponentials need no maximum: they stay far from both ends of a float.
constexpr double kBoundedLogit = 60;

// The same for logits of at most kBoundedLogit (or -inf), and offset 0: exponentials are taken while they are in
// registers. sums: value_dim rows, and one of the weights alone; ``masked``: some key is hidden from some token. p has
// a row more: weights are summed by block first, as values are, or many small ones would be lost beside a large one.
template <typename A>
inline void add_pairs_bounded(const KeyBlock<A>& keys, const QueryTile<A>& q, int64_t value_dim, bool masked, A* p,
                              A* sums) {
  A *z = sums + value_dim * q.stride, *block = p + kKeyBlock * q.stride;
  std::fill(block, block + q.tokens, A(0));
  outer(keys.count, q.dim, q.tokens, keys.k, keys.k_row, 1, q.x, q.stride,
        [&]<int M, int N>(int64_t m, int64_t t, const Tile<M, N, A>& tile) {
          Lanes<A> total[N];
          for (int n = 0; n < N; ++n) total[n] = load(block + t + n * kLanes<A>, All{});
#pragma GCC unroll 8
          for (int i = 0; i < M; ++i) {
            const A bias = keys.bias ? keys.bias[m + i] : A(0);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
              const int64_t at = t + n * kLanes<A>;
              Lanes<A> e = exp_nonpositive(tile.at[i][n] + bias);
              if (masked) e = fill(keys.position[m + i]) < load(q.limit + at, All{}) ? e : Lanes<A>{};
              total[n] += e;
              store(p + (m + i) * q.stride + at, e, All{});
            }
          }
          for (int n = 0; n < N; ++n) store(block + t + n * kLanes<A>, total[n], All{});
        });
  for (int64_t t = 0; t < q.tokens; t += kLanes<A>) store(z + t, load(z + t, All{}) + load(block + t, All{}), All{});
  outer(value_dim, keys.count, q.tokens, keys.v, 1, keys.v_row, p, q.stride,
        [&](int64_t m, int64_t t, const auto& tile) { add_tile(sums + m * q.stride + t, q.stride, tile); });
}

// Where gradients of pairs go; null where not wanted. dx: dim rows of tokens; dk (keys, dim), dv (keys, width - 1) and
// dbias (keys) of the block.
template <typename A>
struct PairGradients {
  A* dx;
  A *dk, *dv, *dbias;
};

// With P = exp(logit - offset), the share of the pair, and slope rows g (width, of which the last holds -do.o):
// pull = v.g, ds = P pull, dx += ds k, dk += ds x, dv += P g, dbias += ds. p, ds: kKeyBlock rows of scratch each.
template <typename A>
inline void pull_back_pairs(const KeyBlock<A>& all, const QueryTile<A>& tile, const A* slopes, int64_t width, A* p,
                            A* ds, const PairGradients<A>& to) {
  for (int64_t begin = 0; begin < all.count; begin += kKeyBlock) {
    const KeyBlock<A> keys = all.from(begin, kKeyBlock);
    // Under a causal mask early tokens see nothing of late keys.
    const A* seeing = std::find_if(tile.limit, tile.limit + tile.tokens, [&](A end) { return end > keys.position[0]; });
    const int64_t first = (seeing - tile.limit) / kTileTokens<A> * kTileTokens<A>;
    const QueryTile<A> q = tile.from(first);
    const A* g = slopes + first;
    const int64_t count = masked_logits(keys, q, p);
    if (count == 0) continue;
    exponentials(count, q, p);
    outer(count, width, q.tokens, keys.v, keys.v_row, 1, g, q.stride,
          [&]<int M, int N>(int64_t m, int64_t t, const Tile<M, N, A>& tile) {
            for (int i = 0; i < M; ++i) {
              for (int n = 0; n < N; ++n) {
                const int64_t at = (m + i) * q.stride + t + n * kLanes<A>;
                store(ds + at, load(p + at, All{}) * tile.at[i][n], All{});
              }
            }
          });
    if (to.dx) {
      outer(q.dim, count, q.tokens, keys.k, 1, keys.k_row, ds, q.stride, [&](int64_t m, int64_t t, const auto& sums) {
        add_tile(to.dx + first + m * q.stride + t, q.stride, sums);
      });
    }
    if (to.dk) dot(count, q.dim, q.tokens, ds, q.x, q.stride, to.dk + begin * q.dim, q.dim);
    if (to.dv) dot(count, width - 1, q.tokens, p, g, q.stride, to.dv + begin * (width - 1), width - 1);
    if (to.dbias) {
      for (int64_t j = 0; j < count; ++j) {
        Lanes<A> total{};
        for (int64_t t = 0; t < q.tokens; t += kLanes<A>) total += load(ds + j * q.stride + t, All{});
        to.dbias[begin + j] += sum<A>(total);
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
