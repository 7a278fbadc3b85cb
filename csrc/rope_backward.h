// Backward pass of polynomial attention. Nothing but states is kept: features and shares are computed again.
//
// With g_i = do_i / Z_i and G = [g, -g.(o - mean)] of a row that is not exact, and S the state with its coefficients,
//
//   dq_i = derivative of sum_r S[r] phi_r(q_i) . G_i            dS = coefficients sum_i phi(q_i) G_i^T
//   dk_j = derivative of sum_r dS[r] phi_r(k_j) . w_j [v_j, 1]   dv_j = w_j phi(k_j)^T dS,  dbias_j = w_j phi^T dS
//   [v_j, 1]
//
// and pairs that count exactly follow by themselves.
#pragma once

#include "rope_forward.h"

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
};

template <typename T>
class BackwardProblem {
  using A = Acc<T>;

 public:
  BackwardProblem(const KeySide<T>& side, const Backward<T>& io)
      : side_(side),
        in_(side.in),
        io_(io),
        rows_(in_.tables.count()),
        width_(in_.width()),
        heavy_(side, side.heavy_keys.size(), [&](int64_t i) { return side.heavy_keys[i]; }) {}

  void run() {
    bool any = false;
    for (int64_t g = 0; g < in_.group; ++g) {
      const bool* flags = io_.exact + g * io_.head_rows;
      any = any || std::find(flags, flags + in_.queries, false) != flags + in_.queries;
    }
    if (!any) {
      // Exact attention all over.
    } else if (in_.options.is_causal) {
      within_chunks();
      scan_forward();
      scan_back();
    } else {
      full();
    }
    for (int64_t g = 0; g < in_.group; ++g) {
      heavy_keys(g);
      exact_rows(g);
    }
  }

 private:
  // Queries [begin, begin + count) as panel or as plain rows, and G.
  struct Rows {
    Rows(const BackwardProblem& parent, int64_t tokens)
        : stride(token_stride<A>(tokens)),
          panel(panel_rows(parent.in_.tables) * stride),
          slope(panel_rows(parent.in_.tables) * stride),
          columns((2 * parent.width_ + parent.in_.dim) * stride),
          dx(columns.get() + 2 * parent.width_ * stride) {}

    int64_t stride;
    Buffer<A> panel, slope, columns;
    A* dx;
  };

  int64_t row_of(int64_t g, int64_t i) const { return g * io_.head_rows + i; }

  // G of rows index(t), t < count: do, scaled by 1 / Z where wanted, less the mean; zero for rows of the other kind.
  template <typename Index>
  void slopes(int64_t g, int64_t count, Index index, int64_t stride, bool exact, bool over_z, A* to) const {
    for (int64_t t = 0; t < stride; ++t) {
      const int64_t row = t < count ? row_of(g, index(t)) : 0;
      if (t >= count || io_.exact[row] != exact) {
        for (int64_t c = 0; c < width_; ++c) to[c * stride + t] = 0;
        continue;
      }
      const A scale = over_z ? 1 / io_.normalizer[row] : A(1);
      const T *grad = io_.grad + row * in_.value_dim, *out = io_.out + row * in_.value_dim;
      A total = 0;
      for (int64_t c = 0; c < in_.value_dim; ++c) {
        const A g_c = static_cast<A>(grad[c]) * scale;
        to[c * stride + t] = g_c;
        total += g_c * (static_cast<A>(out[c]) - side_.mean[c]);
      }
      to[in_.value_dim * stride + t] = exact && unrounded_ ? -unrounded_[index(t)] : -total;
    }
  }

  void scale_state(int64_t g, const A* state, A* to) const {
    const Coefficients<A> c = in_.coefficients(g);
    for (int64_t row = 0; row < rows_; ++row) {
      const A factor = row_coefficient(in_.tables, c, row);
      for (int64_t i = 0; i < width_; ++i) to[row * width_ + i] = factor * state[row * width_ + i];
    }
  }

  void add_scaled(int64_t g, const A* moments, A* to, int64_t begin, int64_t end) const {
    const Coefficients<A> c = in_.coefficients(g);
    for (int64_t row = begin; row < end; ++row) {
      const A factor = row_coefficient(in_.tables, c, row);
      for (int64_t i = 0; i < width_; ++i) to[row * width_ + i] += factor * moments[row * width_ + i];
    }
  }

  // dq of rows [begin, begin + count); leaves panel and G in ``rows``.
  void query_rows(int64_t g, int64_t begin, int64_t count, const A* weights, const Rows& rows) const {
    const int64_t stride = rows.stride;
    build_panel(in_.tables, in_.query(g, begin), in_.dim, count, stride, rows.panel.get(), stride);
    slopes(g, count, [&](int64_t t) { return begin + t; }, stride, false, true, rows.columns.get());
    if (!weights) return;
    pull_back(in_.tables, rows.panel.get(), stride, stride, weights, rows.columns.get(), width_, rows.slope.get(),
              rows.dx);
    add_rows(rows.dx, count, stride, in_.dim, io_.dq + row_of(g, begin) * in_.dim);
  }

  // to (count, dim) += transpose of x.
  static void add_rows(const A* x, int64_t count, int64_t stride, int64_t dim, A* to) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t l = 0; l < dim; ++l) to[t * dim + l] += x[l * stride + t];
    }
  }

  // dk, dv, dbias of keys [begin, begin + count) from dS, row-major and packed.
  void key_rows(int64_t begin, int64_t count, const A* ds, const A* packed, const Rows& rows) const {
    const int64_t stride = rows.stride;
    A *plain = rows.columns.get(), *sums = plain + width_ * stride;
    build_panel(in_.tables, in_.k + begin * in_.dim, in_.dim, count, stride, rows.panel.get(), stride);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t p = 0; side_.heavy[begin + t] && p < panel_rows(in_.tables); ++p)
        rows.panel.get()[p * stride + t] = 0;
    }
    std::fill(sums, sums + width_ * stride, A(0));
    apply_state(in_.tables, rows.panel.get(), stride, stride, packed, width_, sums);
    side_.columns(begin, count, stride, false, plain);
    for (int64_t t = 0; t < count; ++t) {
      const A w = side_.weight(begin + t);
      if (w == 0) {
        for (int64_t c = 0; c < width_; ++c) plain[c * stride + t] = 0;
        continue;
      }
      A dw = 0;
      for (int64_t c = 0; c < width_; ++c) {
        const A sum = w * sums[c * stride + t];
        dw += sum * plain[c * stride + t];
        if (c < in_.value_dim) io_.dv[(begin + t) * in_.value_dim + c] += sum;
        plain[c * stride + t] *= w;
      }
      if (io_.dbias) io_.dbias[begin + t] += dw;
    }
    pull_back(in_.tables, rows.panel.get(), stride, stride, ds, plain, width_, rows.slope.get(), rows.dx);
    add_rows(rows.dx, count, stride, in_.dim, io_.dk + begin * in_.dim);
  }

  void full() {
    const int64_t size = rows_ * width_;
    const Buffer<A> ds(size), parts(kSegments * size), weights(size);
    ds.zero();
    const bool split = in_.queries >= kSegments * kSegmentTokens;
    const int64_t middle = split ? round_up(in_.queries / kSegments, kPanelTokens) : in_.queries;
    for (int64_t g = 0; g < in_.group; ++g) {
      scale_state(g, io_.state, weights.get());
      parts.zero();
      for_tasks(split ? kSegments : 1, [&](int64_t s) {
        const Rows rows(*this, kPanelTokens);
        const int64_t end = s ? in_.queries : middle;
        for (int64_t i = s ? middle : 0; i < end; i += kPanelTokens) {
          query_rows(g, i, std::min(kPanelTokens, end - i), weights.get(), rows);
          add_moments(in_.tables, rows.panel.get(), rows.columns.get(), width_, rows.stride, rows.stride,
                      rows.columns.get() + width_ * rows.stride, parts.get() + s * size, 0, rows_);
        }
      });
      for (int64_t i = 0; split && i < size; ++i) parts.get()[i] += parts.get()[size + i];
      add_scaled(g, parts.get(), ds.get(), 0, rows_);
    }
    const Buffer<A> packed(packed_size(rows_, width_));
    pack_state(rows_, width_, 0, rows_, packed.get(), [&](int64_t r, int64_t c) { return ds.get()[r * width_ + c]; });
    at::parallel_for(0, (in_.keys + kPanelTokens - 1) / kPanelTokens, 1, [&](int64_t first, int64_t last) {
      const Rows rows(*this, kPanelTokens);
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task * kPanelTokens;
        key_rows(begin, std::min(kPanelTokens, in_.keys - begin), ds.get(), packed.get(), rows);
      }
    });
  }

  int64_t chunks() const { return (in_.queries + in_.options.chunk - 1) / in_.options.chunk; }

  // Pairs of one chunk: shares and their gradients are those of exact attention given the normaliser.
  void within_chunks() const {
    at::parallel_for(0, chunks(), 1, [&](int64_t first, int64_t last) {
      const int64_t stride = token_stride<A>(in_.options.chunk);
      const Buffer<A> numbers((2 * in_.dim + width_ + 2 * kKeyBlock + 2) * stride);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t begin = chunk * in_.options.chunk, end = std::min(in_.queries, begin + in_.options.chunk);
        if (begin >= in_.keys) continue;
        const GatheredKeys<T> keys(side_, std::min(end, in_.keys) - begin, [&](int64_t i) { return begin + i; });
        for (int64_t g = 0; g < in_.group; ++g) {
          pairs(
              g, end - begin, [&](int64_t t) { return begin + t; }, stride, false, [&](int64_t i) { return i + 1; },
              keys.block(), begin, true, numbers.get());
        }
      }
    });
  }

  // Columns x, offsets and limits of rows index(t) of the kind ``exact``; offset and limit follow x.
  template <typename Index, typename Limit>
  QueryTile<A> query_tile(int64_t g, int64_t count, Index index, int64_t stride, bool exact, Limit limit_of,
                          A* x) const {
    A *offset = x + in_.dim * stride, *limit = offset + stride;
    for (int64_t t = 0; t < stride; ++t) {
      const bool live = t < count && io_.exact[row_of(g, index(t))] == exact;
      for (int64_t l = 0; l < in_.dim; ++l) x[l * stride + t] = live ? in_.query(g, index(t))[l] : A(0);
      const A z = live ? io_.normalizer[row_of(g, index(t))] : A(1);
      offset[t] = exact ? (z == -std::numeric_limits<A>::infinity() ? A(0) : z) : side_.top + std::log(z);
      limit[t] = static_cast<A>(live ? std::min(limit_of(index(t)), in_.keys) : 0);
    }
    return {x, in_.dim, stride, stride, offset, limit};
  }

  // Gradients of the pairs of rows index(t) (of the kind ``exact``) with keys below limit(row). Key gradients go to
  // rows from key_begin on; without ``want_keys`` those of queries are taken instead, with key_begin >= 0 both.
  template <typename Index, typename Limit>
  void pairs(int64_t g, int64_t count, Index index, int64_t stride, bool exact, Limit limit_of, const KeyBlock<A>& keys,
             int64_t key_begin, bool want_queries, A* numbers) const {
    A *x = numbers, *dx = x + (in_.dim + 2) * stride, *slope = dx + in_.dim * stride, *p = slope + width_ * stride,
      *ds = p + kKeyBlock * stride;
    slopes(g, count, index, stride, exact, false, slope);
    const QueryTile<A> tile = query_tile(g, count, index, stride, exact, limit_of, x);
    PairGradients<A> to{};
    if (want_queries) {
      std::fill(dx, dx + in_.dim * stride, A(0));
      to.dx = dx;
    }
    if (key_begin >= 0) {
      to.dk = io_.dk + key_begin * in_.dim;
      to.dv = io_.dv + key_begin * in_.value_dim;
      to.dbias = io_.dbias ? io_.dbias + key_begin : nullptr;
    }
    pull_back_pairs(keys, tile, slope, width_, p, ds, to);
    for (int64_t t = 0; want_queries && t < count; ++t) {
      A* row = io_.dq + row_of(g, index(t)) * in_.dim;
      for (int64_t l = 0; l < in_.dim; ++l) row[l] += dx[l * stride + t];
    }
  }

  // Forward over chunks: dq against the state of the chunks before.
  void scan_forward() const {
    const int64_t size = rows_ * width_, tokens = kTileTokens<A>;
    const Buffer<A> state(size), weights(in_.group * size);
    state.zero();
    const int64_t stride = token_stride<A>(std::min(kPanelTokens, in_.options.chunk));
    const Buffer<A> panel(panel_rows(in_.tables) * stride), columns(width_ * stride);
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      const int64_t begin = chunk * in_.options.chunk, end = std::min(in_.queries, begin + in_.options.chunk);
      const int64_t tiles = (end - begin + tokens - 1) / tokens;
      at::parallel_for(0, begin && in_.keys ? in_.group * tiles : 0, 1, [&](int64_t first, int64_t last) {
        const Rows rows(*this, tokens);
        for (int64_t task = first; task < last; ++task) {
          const int64_t g = task / tiles, row = begin + task % tiles * tokens;
          query_rows(g, row, std::min(tokens, end - row), weights.get() + g * size, rows);
        }
      });
      for (int64_t j = begin; j < std::min(end, in_.keys); j += kPanelTokens) {
        const int64_t count = std::min(kPanelTokens, std::min(end, in_.keys) - j);
        build_panel(in_.tables, in_.k + j * in_.dim, in_.dim, count, stride, panel.get(), stride);
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t p = 0; side_.heavy[j + t] && p < panel_rows(in_.tables); ++p) panel.get()[p * stride + t] = 0;
        }
        side_.columns(j, count, stride, true, columns.get());
        at::parallel_for(0, (rows_ + 31) / 32, 1, [&](int64_t first, int64_t last) {
          const Buffer<A> scratch(width_ * stride);
          const int64_t low = first * 32, high = std::min(rows_, last * 32);
          add_moments(in_.tables, panel.get(), columns.get(), width_, stride, stride, scratch.get(), state.get(), low,
                      high);
          for (int64_t g = 0; g < in_.group; ++g) {
            const Coefficients<A> c = in_.coefficients(g);
            for (int64_t row = low; row < high; ++row) {
              const A factor = row_coefficient(in_.tables, c, row);
              for (int64_t i = row * width_; i < (row + 1) * width_; ++i)
                weights.get()[g * size + i] = factor * state.get()[i];
            }
          }
        });
      }
    }
  }

  // Backward over chunks: dk and dv against the queries of the chunks after.
  void scan_back() const {
    const int64_t size = rows_ * width_, tokens = kTileTokens<A>;
    const Buffer<A> ds(size), packed(packed_size(rows_, width_)), moments(size);
    ds.zero();
    bool any = false;
    for (int64_t chunk = chunks() - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * in_.options.chunk, end = std::min(in_.queries, begin + in_.options.chunk);
      const int64_t key_end = std::min(end, in_.keys),
                    tiles = (std::max<int64_t>(0, key_end - begin) + tokens - 1) / tokens;
      at::parallel_for(0, any ? tiles : 0, 1, [&](int64_t first, int64_t last) {
        const Rows rows(*this, tokens);
        for (int64_t task = first; task < last; ++task) {
          const int64_t key = begin + task * tokens;
          key_rows(key, std::min(tokens, key_end - key), ds.get(), packed.get(), rows);
        }
      });
      if (begin == 0) break;
      any = true;
      for (int64_t g = 0; g < in_.group; ++g) {
        for (int64_t i = begin; i < end; i += kPanelTokens) {
          const int64_t count = std::min(kPanelTokens, end - i);
          const Rows rows(*this, count);
          query_rows(g, i, count, nullptr, rows);
          at::parallel_for(0, (rows_ + 31) / 32, 1, [&](int64_t first, int64_t last) {
            const Buffer<A> scratch(width_ * rows.stride);
            const int64_t low = first * 32, high = std::min(rows_, last * 32);
            std::fill(moments.get() + low * width_, moments.get() + high * width_, A(0));
            add_moments(in_.tables, rows.panel.get(), rows.columns.get(), width_, rows.stride, rows.stride,
                        scratch.get(), moments.get(), low, high);
            add_scaled(g, moments.get(), ds.get(), low, high);
            pack_state(rows_, width_, low, high, packed.get(),
                       [&](int64_t r, int64_t c) { return ds.get()[r * width_ + c]; });
          });
        }
      }
    }
  }

  // Keys beyond the limit with the rows that are not exact: all of them, or under a causal mask those of later chunks.
  void heavy_keys(int64_t g) const {
    const KeyBlock<A> keys = heavy_.block();
    if (keys.count == 0) return;
    const int64_t chunk = in_.options.chunk;
    sweep(
        g, in_.queries, [](int64_t t) { return t; }, false,
        [&](int64_t i) { return in_.options.is_causal ? i / chunk * chunk : in_.keys; }, keys.count,
        [&](int64_t i) { return side_.heavy_keys[i]; });
  }

  void exact_rows(int64_t g) {
    std::vector<int64_t> failed;
    for (int64_t i = 0; i < in_.queries; ++i) {
      if (io_.exact[row_of(g, i)]) failed.push_back(i);
    }
    if (failed.empty()) return;
    const auto seen = [&](int64_t i) { return in_.options.is_causal ? i + 1 : in_.keys; };
    std::vector<A> unrounded;
    if (!std::is_same_v<T, A>) {
      unrounded = unrounded_pulls(g, failed, seen);
      unrounded_ = unrounded.data();
    }
    sweep(g, failed.size(), [&](int64_t t) { return failed[t]; }, true, seen, in_.keys, [](int64_t j) { return j; });
    unrounded_ = nullptr;
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
        const T* grad = io_.grad + row_of(g, index(t)) * in_.value_dim;
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
    const int64_t size = (2 * in_.dim + width_ + 2 * kKeyBlock + 2) * kTokens;
    const int64_t tiles = (count + kTokens - 1) / kTokens, key_blocks = (key_count + kKeyBlock - 1) / kKeyBlock;
    const auto one = [&](int64_t tile, int64_t block, bool want_queries, A* numbers) {
      const int64_t begin = tile * kTokens, first = block * kKeyBlock;
      const int64_t rows = std::min(kTokens, count - begin);
      const GatheredKeys<T> keys(side_, std::min(kKeyBlock, key_count - first),
                                 [&](int64_t i) { return key(first + i); });
      if (want_queries)
        return pairs(
            g, rows, [&](int64_t t) { return index(begin + t); }, kTokens, exact, limit, keys.block(), -1, true,
            numbers);
      // Keys need not lie side by side: each goes to its own place.
      A* dk = numbers + size;
      gathered(
          g, rows, [&](int64_t t) { return index(begin + t); }, kTokens, exact, limit, keys.block(),
          [&](int64_t i) { return key(first + i); }, numbers, dk);
    };
    at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {
      const Buffer<A> numbers(size);
      for (int64_t tile = from; tile < to; ++tile) {
        for (int64_t block = 0; block < key_blocks; ++block) one(tile, block, true, numbers.get());
      }
    });
    at::parallel_for(0, key_blocks, 1, [&](int64_t from, int64_t to) {
      const Buffer<A> numbers(size + kKeyBlock * (in_.dim + width_));
      for (int64_t block = from; block < to; ++block) {
        for (int64_t tile = 0; tile < tiles; ++tile) one(tile, block, false, numbers.get());
      }
    });
  }

  template <typename Index, typename Limit, typename Key>
  void gathered(int64_t g, int64_t count, Index index, int64_t stride, bool exact, Limit limit_of,
                const KeyBlock<A>& keys, Key key, A* numbers, A* dk) const {
    A *dv = dk + kKeyBlock * in_.dim, *dbias = dv + kKeyBlock * in_.value_dim;
    std::fill(dk, dk + kKeyBlock * (in_.dim + width_), A(0));
    BackwardProblem local(*this, dk, dv, dbias);
    local.pairs(g, count, index, stride, exact, limit_of, keys, 0, false, numbers);
    for (int64_t i = 0; i < keys.count; ++i) {
      const int64_t j = key(i);
      for (int64_t l = 0; l < in_.dim; ++l) io_.dk[j * in_.dim + l] += dk[i * in_.dim + l];
      for (int64_t c = 0; c < in_.value_dim; ++c) io_.dv[j * in_.value_dim + c] += dv[i * in_.value_dim + c];
      if (io_.dbias) io_.dbias[j] += dbias[i];
    }
  }

  // The same problem with other places for the gradients of keys.
  BackwardProblem(const BackwardProblem& other, A* dk, A* dv, A* dbias)
      : side_(other.side_),
        in_(other.in_),
        io_(other.io_),
        rows_(other.rows_),
        width_(other.width_),
        heavy_(other.side_, 0, [](int64_t i) { return i; }),
        unrounded_(other.unrounded_) {
    io_.dk = dk, io_.dv = dv, io_.dbias = dbias;
  }

  const KeySide<T>& side_;
  const Problem<T>& in_;
  Backward<T> io_;
  int64_t rows_, width_;
  GatheredKeys<T> heavy_;
  // do.o of exact rows of the head under way, where the result was rounded to a short type.
  const A* unrounded_ = nullptr;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
