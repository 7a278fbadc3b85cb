// Backward pass of polynomial attention. Nothing but states is kept: features and shares are computed again.
//
// With g_i = do_i / Z_i and G = [g, -g.(o - mean)] of a row that is not exact, S the state, a the coefficients of p by
// the degree of a row,
//
//   dq_i = derivative of sum_r a_r S[r] phi_r(q_i) . G_i        dS = a multiplicity sum_i phi(q_i) G_i^T
//   dk_j = derivative of sum_r dS[r] phi_r(k_j) . w_j [v_j, 1]   dv_j = w_j phi(k_j)^T dS,  dbias_j = w_j phi^T dS
//   [v_j, 1]
//
// and pairs that count exactly follow by themselves.
#pragma once

#include "rope_exact_gradients.h"
#include "rope_keys.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

template <typename T>
class PolynomialGradients {
  using A = Acc<T>;

 public:
  PolynomialGradients(const KeySide<T>& side, const Backward<T>& io, const ExactGradients<T>& exact)
      : side_(side),
        in_(side.in),
        io_(io),
        exact_(exact),
        rows_(in_.tables.count()),
        width_(in_.width()),
        ones_(in_.options.degree + 1, A(1)) {
    for (int64_t g = 0; g < in_.group; ++g) {
      values_.push_back(by_degree(in_, g));
      moments_.push_back(row_weights(in_, values_[g]));
    }
  }

  void full() const {
    const Buffer<A> ds(state_size());
    full_queries(ds.get());
    at::parallel_for(0, (in_.keys + kPanelTokens - 1) / kPanelTokens, 1, [&](int64_t first, int64_t last) {
      const Rows rows(*this, kPanelTokens);
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task * kPanelTokens;
        key_rows(begin, std::min(kPanelTokens, in_.keys - begin), ds.get(), rows);
      }
    });
  }

  void causal() const {
    at::parallel_for(0, chunks(), 1, [&](int64_t first, int64_t last) {
      const int64_t stride = token_stride<A>(in_.options.chunk);
      const Buffer<A> numbers(exact_.pairs_size(stride));
      for (int64_t chunk = first; chunk < last; ++chunk)
        exact_.chunk(chunk * in_.options.chunk, chunk_end(chunk), stride, numbers.get());
    });
    // Neither scan reads or writes what the other writes. The one backward does half as much again for each token: what
    // is left of it when the other ends is shared, chunk by chunk.
    const int64_t shared = chunks() / 4;
    const BackwardScan back(*this);
    for_segments([&](int64_t s) { s ? back.run(shared, chunks()) : scan_forward(); });
    back.run(0, shared);
  }

 private:
  // Tokens of a task as a panel, their columns, and what is pulled back to them.
  struct Rows {
    Rows(const PolynomialGradients& parent, int64_t tokens)
        : stride(token_stride<A>(tokens)),
          panel(panel_rows(parent.in_.tables) * stride),
          slope(panel_rows(parent.in_.tables) * stride),
          columns((2 * parent.width_ + parent.in_.dim) * stride),
          dx(columns.get() + 2 * parent.width_ * stride) {}

    int64_t stride;
    Buffer<A> panel, slope, columns;
    A* dx;
  };

  int64_t state_size() const { return rows_ * width_; }
  int64_t chunks() const { return (in_.queries + in_.options.chunk - 1) / in_.options.chunk; }
  // Tokens of a task within a chunk: a share for each thread, since each task reads whole states.
  int64_t task_tokens() const {
    const int64_t chunk = std::min(kPanelTokens, in_.options.chunk);
    if (at::in_parallel_region()) return chunk;
    const int64_t threads = at::get_num_threads();
    return std::min(chunk, std::max(kTileTokens<A>, token_stride<A>((chunk + threads - 1) / threads)));
  }
  int64_t chunk_end(int64_t chunk) const { return std::min(in_.queries, (chunk + 1) * in_.options.chunk); }

  // Panel and G of rows [begin, begin + count).
  void build_queries(int64_t g, int64_t begin, int64_t count, const Rows& rows) const {
    build_panel(in_.tables, in_.query(g, begin), in_.dim, count, rows.stride, rows.panel.get(), rows.stride);
    exact_.slopes(g, count, [&](int64_t t) { return begin + t; }, rows.stride, false, true, rows.columns.get());
  }

  // dq of the rows that were built.
  void pull_queries(int64_t g, int64_t begin, int64_t count, const A* state, const Rows& rows) const {
    pull_back(in_.tables, rows.panel.get(), rows.stride, rows.stride, state, values_[g].data(), rows.columns.get(),
              width_, rows.slope.get(), rows.dx);
    add_rows(rows.dx, count, rows.stride, in_.dim, io_.dq + io_.row_of(g, begin) * in_.dim);
  }

  // to (count, dim) += transpose of x.
  static void add_rows(const A* x, int64_t count, int64_t stride, int64_t dim, A* to) {
    rows_of_tokens(x, stride, count, dim,
                   [&](int64_t t, int64_t l, auto sums) LLMKERN_INLINE { add_at(to + t * dim + l, sums); });
  }

  // dk, dv, dbias of keys [begin, begin + count) from dS.
  void key_rows(int64_t begin, int64_t count, const A* ds, const Rows& rows) const {
    const int64_t stride = rows.stride;
    A *plain = rows.columns.get(), *sums = plain + width_ * stride;
    build_key_panel(side_, begin, count, stride, rows.panel.get());
    std::fill(sums, sums + width_ * stride, A(0));
    apply_state(in_.tables, rows.panel.get(), stride, stride, ds, width_, ones_.data(), sums,
                [](const Monomials::Block&, int64_t, Lanes<A>) {});
    side_.columns(begin, count, stride, false, plain);
    // Rows of slope are free until pull_back: weights, and gradients of biases.
    A *w = rows.slope.get(), *dw = w + stride;
    for (int64_t t = 0; t < stride; ++t) w[t] = t < count ? side_.weight(begin + t) : A(0);
    std::fill(dw, dw + stride, A(0));
    for (int64_t c = 0; c < width_; ++c) {
      for (int64_t t = 0; t < stride; t += kLanes<A>) {
        A *value = plain + c * stride + t, *sum = sums + c * stride + t;
        const Lanes<A> by = load(w + t, All{}), weighted = by * load(sum, All{});
        store(sum, weighted, All{});
        store(dw + t, load(dw + t, All{}) + weighted * load(value, All{}), All{});
        store(value, by == Lanes<A>{} ? Lanes<A>{} : by * load(value, All{}), All{});
      }
    }
    add_rows(sums, count, stride, in_.value_dim, io_.dv + begin * in_.value_dim);
    for (int64_t t = 0; io_.dbias && t < count; ++t) {
      if (w[t] != 0) io_.dbias[begin + t] += dw[t];
    }
    pull_back(in_.tables, rows.panel.get(), stride, stride, ds, ones_.data(), plain, width_, rows.slope.get(), rows.dx);
    add_rows(rows.dx, count, stride, in_.dim, io_.dk + begin * in_.dim);
  }

  // dq of all rows, and ds.
  void full_queries(A* ds) const {
    const bool split = in_.queries >= kSegments * kSegmentTokens;
    const int64_t middle = split ? round_up(in_.queries / kSegments, kPanelTokens) : in_.queries;
    const Buffer<A> other(split ? state_size() : 0);
    std::fill(ds, ds + state_size(), A(0));
    other.zero();
    for_tasks(split ? kSegments : 1, [&](int64_t s) {
      const Rows rows(*this, kPanelTokens);
      const Buffer<A> scratch(moments_scratch(width_, rows.stride));
      const int64_t end = s ? in_.queries : middle;
      for (int64_t g = 0; g < in_.group; ++g) {
        for (int64_t i = s ? middle : 0; i < end; i += kPanelTokens) {
          const int64_t count = std::min(kPanelTokens, end - i);
          build_queries(g, i, count, rows);
          pull_queries(g, i, count, io_.state, rows);
          add_queries(g, rows, scratch.get(), s ? other.get() : ds, 0, rows_);
        }
      }
    });
    for (int64_t i = 0; split && i < state_size(); ++i) ds[i] += other.get()[i];
  }

  // Rows [low, high) of ds += what the rows that were built add.
  void add_queries(int64_t g, const Rows& rows, A* scratch, A* ds, int64_t low, int64_t high) const {
    add_moments(in_.tables, rows.panel.get(), rows.columns.get(), width_, rows.stride, rows.stride, moments_[g].data(),
                scratch, ds, low, high);
  }

  // Forward over chunks: dq against the state of the chunks before.
  void scan_forward() const {
    const int64_t tokens = task_tokens();
    const Buffer<A> state(state_size());
    state.zero();
    const KeyPanel<T> panel(side_, in_.options.chunk);
    for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
      const int64_t begin = chunk * in_.options.chunk, end = chunk_end(chunk);
      const int64_t tiles = (end - begin + tokens - 1) / tokens;
      at::parallel_for(0, begin && in_.keys ? in_.group * tiles : 0, 1, [&](int64_t first, int64_t last) {
        const Rows rows(*this, tokens);
        for (int64_t task = first; task < last; ++task) {
          const int64_t g = task / tiles, row = begin + task % tiles * tokens, count = std::min(tokens, end - row);
          build_queries(g, row, count, rows);
          pull_queries(g, row, count, state.get(), rows);
        }
      });
      add_keys(side_, panel, begin, std::min(end, in_.keys), state.get());
    }
  }

  // Backward over chunks: dk and dv against the queries of the chunks after.
  class BackwardScan {
   public:
    explicit BackwardScan(const PolynomialGradients& parent)
        : parent_(parent),
          in_(parent.in_),
          ds_(parent.state_size()),
          queries_(parent, std::min(kPanelTokens, parent.in_.options.chunk)) {
      ds_.zero();
    }

    // Chunks [first, last), from the last on: those after have been through.
    void run(int64_t first, int64_t last) const {
      for (int64_t chunk = last - 1; chunk >= first; --chunk) {
        const int64_t begin = chunk * in_.options.chunk, end = parent_.chunk_end(chunk);
        if (end < in_.queries) pull_keys(begin, std::min(end, in_.keys));
        for (int64_t g = 0; begin > 0 && g < in_.group; ++g) {
          for (int64_t i = begin; i < end; i += kPanelTokens) add_queries(g, i, std::min(kPanelTokens, end - i));
        }
      }
    }

   private:
    void pull_keys(int64_t begin, int64_t end) const {
      const int64_t tokens = parent_.task_tokens();
      at::parallel_for(0, begin < end ? (end - begin + tokens - 1) / tokens : 0, 1, [&](int64_t first, int64_t last) {
        const Rows rows(parent_, tokens);
        for (int64_t task = first; task < last; ++task) {
          const int64_t key = begin + task * tokens;
          parent_.key_rows(key, std::min(tokens, end - key), ds_.get(), rows);
        }
      });
    }

    void add_queries(int64_t g, int64_t begin, int64_t count) const {
      parent_.build_queries(g, begin, count, queries_);
      for_state_rows<A>(parent_.rows_, moments_scratch(parent_.width_, queries_.stride),
                        [&](int64_t low, int64_t high, A* scratch) {
                          parent_.add_queries(g, queries_, scratch, ds_.get(), low, high);
                        });
    }

    const PolynomialGradients& parent_;
    const Problem<T>& in_;
    Buffer<A> ds_;
    Rows queries_;
  };

  const KeySide<T>& side_;
  const Problem<T>& in_;
  const Backward<T>& io_;
  const ExactGradients<T>& exact_;
  int64_t rows_, width_;
  // Of each head, by degree and by row; and ones by degree.
  std::vector<std::vector<A>> values_, moments_;
  std::vector<A> ones_;
};

template <typename T>
inline void backward_problem(const KeySide<T>& side, const Backward<T>& io) {
  const Problem<T>& in = side.in;
  ExactGradients<T> exact(side, io);
  bool any = false;
  for (int64_t g = 0; g < in.group; ++g) {
    const bool* flags = io.exact + io.row_of(g, 0);
    any = any || std::find(flags, flags + in.queries, false) != flags + in.queries;
  }
  if (any) {
    const PolynomialGradients<T> polynomial(side, io, exact);
    in.options.is_causal ? polynomial.causal() : polynomial.full();
  }
  for (int64_t g = 0; g < in.group; ++g) {
    exact.heavy_keys(g);
    exact.exact_rows(g);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
