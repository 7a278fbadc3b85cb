// Gradients of pairs that count exactly: within a chunk, with keys beyond the limit, and all pairs of exact rows.
// Shares are recomputed from the normaliser.
#pragma once

#include "rope_exact.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Results of the forward pass, its upstream gradient, and where the gradients go (one problem; heads of the group lie
// ``head_rows`` rows apart). All gradients are added to.
template <typename T>
struct Backward {
  using A = Acc<T>;
  const T *grad, *out;
  const A* normalizer;
  const bool* exact;
  const A* state;
  int64_t head_rows;
  A* dq;
  A *dk, *dv, *dbias;

  int64_t row_of(int64_t g, int64_t i) const { return g * head_rows + i; }
};

template <typename T>
class ExactGradients {
  using A = Acc<T>;

 public:
  ExactGradients(const KeySide<T>& side, const Backward<T>& io)
      : side_(side), in_(side.in), io_(io), width_(in_.width()) {}

  // G of rows index(t), t < count: do, scaled by 1 / Z where wanted, and -do.(o - mean); zero for rows of the other
  // kind.
  template <typename Index>
  void slopes(int64_t g, int64_t count, Index index, int64_t stride, bool exact, bool over_z, A* to) const {
    const auto row = [&](int64_t t) { return io_.row_of(g, index(t)); };
    const int64_t dim = in_.value_dim;
    // Scales first, then -do.(o - mean).
    A* last = to + dim * stride;
    rows_over_tokens([&](int64_t t) { return io_.grad + row(t) * dim; }, count, dim, stride, stride, to);
    const auto live = [&](int64_t t) { return t < count && io_.exact[row(t)] == exact; };
    for (int64_t t = 0; t < stride; ++t) last[t] = !live(t) ? A(0) : over_z ? 1 / io_.normalizer[row(t)] : A(1);
    for (int64_t c = 0; c < dim; ++c) {
      for (int64_t t = 0; t < stride; t += kLanes<A>) {
        A* at = to + c * stride + t;
        const Lanes<A> by = load(last + t, All{});
        store(at, by == Lanes<A>{} ? Lanes<A>{} : load(at, All{}) * by, All{});
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      if (!live(t)) continue;
      last[t] = exact && !unrounded_.empty() ? -unrounded_[index(t)] : -last[t] * pull(row(t));
    }
  }

  // Pairs of queries [begin, end) with the keys of their own chunk. numbers: pairs_size(stride) of scratch.
  void chunk(int64_t begin, int64_t end, int64_t stride, A* numbers) const {
    const int64_t key_end = std::min(end, in_.keys);
    if (begin >= key_end) return;
    const GatheredKeys<T> keys(side_, key_end - begin, [&](int64_t i) { return begin + i; });
    PairGradients<A> to = key_gradients(begin);
    for (int64_t g = 0; g < in_.group; ++g) {
      pairs(
          g, end - begin, [&](int64_t t) { return begin + t; }, stride, false, [](int64_t i) { return i + 1; },
          keys.block(), to, true, numbers);
    }
  }

  int64_t pairs_size(int64_t stride) const { return (2 * in_.dim + width_ + 2 * kKeyBlock + 2) * stride; }

  // Keys beyond the limit with the rows that are not exact: all of them, or under a causal mask those of later chunks.
  void heavy_keys(int64_t g) const {
    if (side_.heavy_keys.empty()) return;
    const int64_t chunk = in_.options.chunk;
    sweep(
        g, in_.queries, [](int64_t t) { return t; }, false,
        [&](int64_t i) { return in_.options.is_causal ? i / chunk * chunk : in_.keys; }, side_.heavy_keys.size(),
        [&](int64_t i) { return side_.heavy_keys[i]; });
  }

  void exact_rows(int64_t g) {
    std::vector<int64_t> failed;
    for (int64_t i = 0; i < in_.queries; ++i) {
      if (io_.exact[io_.row_of(g, i)]) failed.push_back(i);
    }
    if (failed.empty()) return;
    const auto seen = [&](int64_t i) { return in_.options.is_causal ? i + 1 : in_.keys; };
    if (!std::is_same_v<T, A>) unrounded_ = unrounded_pulls(g, failed, seen);
    sweep(g, failed.size(), [&](int64_t t) { return failed[t]; }, true, seen, in_.keys, [](int64_t j) { return j; });
    unrounded_.clear();
  }

 private:
  // do.(o - mean) of a row.
  A pull(int64_t row) const {
    const T *grad = io_.grad + row * in_.value_dim, *out = io_.out + row * in_.value_dim;
    const A* mean = side_.mean.data();
    const int64_t whole = whole_columns<A>(in_.value_dim);
    Lanes<A> total{};
    for (int64_t c = 0; c < whole; c += kLanes<A>)
      total += load(grad + c, All{}) * (load(out + c, All{}) - load(mean + c, All{}));
    A rest = 0;
    for (int64_t c = whole; c < in_.value_dim; ++c)
      rest += static_cast<A>(grad[c]) * (static_cast<A>(out[c]) - mean[c]);
    return sum<A>(total) + rest;
  }

  PairGradients<A> key_gradients(int64_t begin) const {
    return {nullptr, io_.dk + begin * in_.dim, io_.dv + begin * in_.value_dim, io_.dbias ? io_.dbias + begin : nullptr};
  }

  // Columns x, offsets and limits of rows index(t) of the kind ``exact``; offset and limit follow x.
  template <typename Index, typename Limit>
  QueryTile<A> query_tile(int64_t g, int64_t count, Index index, int64_t stride, bool exact, Limit limit_of,
                          A* x) const {
    A *offset = x + in_.dim * stride, *limit = offset + stride;
    rows_over_tokens([&](int64_t t) { return in_.query(g, index(t)); }, count, in_.dim, stride, stride, x);
    for (int64_t t = 0; t < stride; ++t) {
      const bool live = t < count && io_.exact[io_.row_of(g, index(t))] == exact;
      // What is infinite here must not meet a zero.
      for (int64_t l = 0; !live && l < in_.dim; ++l) x[l * stride + t] = 0;
      const A z = live ? io_.normalizer[io_.row_of(g, index(t))] : A(1);
      offset[t] = exact ? (z == -std::numeric_limits<A>::infinity() ? A(0) : z) : side_.top + std::log(z);
      limit[t] = static_cast<A>(live ? std::min(limit_of(index(t)), in_.keys) : 0);
    }
    return {x, in_.dim, stride, stride, offset, limit};
  }

  // Gradients of the pairs of rows index(t) (of the kind ``exact``) with keys below limit(row): those of keys go to
  // ``to``, those of queries, where wanted, to dq.
  template <typename Index, typename Limit>
  void pairs(int64_t g, int64_t count, Index index, int64_t stride, bool exact, Limit limit_of, const KeyBlock<A>& keys,
             PairGradients<A> to, bool want_queries, A* numbers) const {
    A *x = numbers, *dx = x + (in_.dim + 2) * stride, *slope = dx + in_.dim * stride, *p = slope + width_ * stride,
      *ds = p + kKeyBlock * stride;
    slopes(g, count, index, stride, exact, false, slope);
    const QueryTile<A> tile = query_tile(g, count, index, stride, exact, limit_of, x);
    if (want_queries) {
      std::fill(dx, dx + in_.dim * stride, A(0));
      to.dx = dx;
    }
    pull_back_pairs(keys, tile, slope, width_, p, ds, to);
    if (!want_queries) return;
    rows_of_tokens(dx, stride, count, in_.dim, [&](int64_t t, int64_t l, auto x) LLMKERN_INLINE {
      add_at(io_.dq + io_.row_of(g, index(t)) * in_.dim + l, x);
    });
  }

  // do.o of rows, with o summed once more: rounded to a short type, as it was returned, it errs by more than what is
  // left of the gradient of a row that looks at one key.
  template <typename Limit>
  std::vector<A> unrounded_pulls(int64_t g, const std::vector<int64_t>& rows, Limit limit) const {
    constexpr int64_t kTokens = 4 * kTileTokens<A>;
    std::vector<A> pulls(in_.queries);
    const int64_t count = rows.size();
    for_tasks((count + kTokens - 1) / kTokens, [&](int64_t task) {
      const int64_t begin = task * kTokens, size = std::min(kTokens, count - begin);
      const auto index = [&](int64_t t) { return rows[begin + t]; };
      const Buffer<A> numbers((in_.dim + 2 + width_ + kKeyBlock) * kTokens);
      A *sums = numbers.get() + (in_.dim + 2) * kTokens, *p = sums + width_ * kTokens;
      std::fill(sums, sums + width_ * kTokens, A(0));
      const QueryTile<A> tile = query_tile(g, size, index, kTokens, true, limit, numbers.get());
      const int64_t end = std::min(in_.keys, limit(index(size - 1)));
      for (int64_t j = 0; j < end; j += kKeyBlock) {
        const GatheredKeys<T> keys(side_, std::min(kKeyBlock, end - j), [&](int64_t i) { return j + i; });
        add_pairs(keys.block(), tile, width_, p, sums);
      }
      for (int64_t t = 0; t < size; ++t) {
        const T* grad = io_.grad + io_.row_of(g, index(t)) * in_.value_dim;
        A total = 0;
        for (int64_t c = 0; c < in_.value_dim; ++c) total += static_cast<A>(grad[c]) * sums[c * kTokens + t];
        pulls[index(t)] = total;
      }
    });
    return pulls;
  }

  // All rows index(t) with all keys key(i): queries and keys in turn are split over threads, so that each gradient has
  // one writer.
  template <typename Index, typename Limit, typename Key>
  void sweep(int64_t g, int64_t count, Index index, bool exact, Limit limit, int64_t key_count, Key key) const {
    constexpr int64_t kTokens = 4 * kTileTokens<A>;
    const int64_t size = pairs_size(kTokens);
    const int64_t tiles = (count + kTokens - 1) / kTokens, key_blocks = (key_count + kKeyBlock - 1) / kKeyBlock;
    const auto one = [&](int64_t tile, int64_t block, const PairGradients<A>& to, A* numbers) {
      const int64_t begin = tile * kTokens, first = block * kKeyBlock;
      const GatheredKeys<T> keys(side_, std::min(kKeyBlock, key_count - first),
                                 [&](int64_t i) { return key(first + i); });
      pairs(
          g, std::min(kTokens, count - begin), [&](int64_t t) { return index(begin + t); }, kTokens, exact, limit,
          keys.block(), to, !to.dk, numbers);
    };
    at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {
      const Buffer<A> numbers(size);
      for (int64_t tile = from; tile < to; ++tile) {
        for (int64_t block = 0; block < key_blocks; ++block) one(tile, block, {}, numbers.get());
      }
    });
    at::parallel_for(0, key_blocks, 1, [&](int64_t from, int64_t to) {
      const Buffer<A> numbers(size + kKeyBlock * (in_.dim + width_));
      // Keys need not lie side by side: each goes to its own place.
      A *dk = numbers.get() + size, *dv = dk + kKeyBlock * in_.dim, *dbias = dv + kKeyBlock * in_.value_dim;
      for (int64_t block = from; block < to; ++block) {
        std::fill(dk, dk + kKeyBlock * (in_.dim + width_), A(0));
        for (int64_t tile = 0; tile < tiles; ++tile) one(tile, block, {nullptr, dk, dv, dbias}, numbers.get());
        for (int64_t i = 0; i < std::min(kKeyBlock, key_count - block * kKeyBlock); ++i) {
          const PairGradients<A> own = key_gradients(key(block * kKeyBlock + i));
          for (int64_t l = 0; l < in_.dim; ++l) own.dk[l] += dk[i * in_.dim + l];
          for (int64_t c = 0; c < in_.value_dim; ++c) own.dv[c] += dv[i * in_.value_dim + c];
          if (own.dbias) *own.dbias += dbias[i];
        }
      }
    });
  }

  const KeySide<T>& side_;
  const Problem<T>& in_;
  const Backward<T>& io_;
  int64_t width_;
  // do.o of exact rows of the head under way, where the result was rounded to a short type; else empty.
  std::vector<A> unrounded_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
