// Monomials up to degree g as in llmkern/polynomial/monomials.py, and the passes over tokens that they are for. What
// the weights and columns mean is the caller's business.
//
// The panel holds the features that are built: [feature][token], all of degree g - 1 and less. Those of degree g are
// x_l times a slice of the panel and are never built: on the side of the keys x_l goes to the columns, on the side of
// the queries to the sums.
#pragma once

#include <vector>

#include "tiles.h"
#include "transpose.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

struct Monomials {
  // Rows of one degree: x_dim (dim -1: one) times ``count`` rows of the panel from ``start`` on. tail: see
  // monomials.py.
  struct Block {
    int64_t dim, start, count, row;
    int degree;
    bool tail;
  };

  int64_t dim, degree, leading;
  std::vector<int32_t> parent, variable;
  std::vector<Block> blocks;
  std::vector<double> multiplicity;

  int64_t panel() const { return parent.size(); }
  int64_t count() const { return multiplicity.size(); }

  Monomials(int64_t dim, int64_t degree, int64_t leading_variables)
      : dim(dim), degree(degree), leading(degree <= 2 ? dim : std::min(leading_variables, dim)) {
    const int64_t first = dim - leading;
    parent = {0};
    variable = {-1};
    std::vector<std::pair<int64_t, int64_t>> levels = {{0, 1}};
    std::vector<int64_t> suffix(dim, 0), linear(dim, 0);
    for (int64_t level = 1; level < degree; ++level) {
      const auto [below, below_end] = levels.back();
      const int64_t begin = parent.size();
      std::vector<int64_t> starts(dim, 0);
      for (int64_t low = level == 1 ? 0 : first; low < dim; ++low) {
        starts[low] = parent.size();
        for (int64_t p = level > 1 ? suffix[low] : below; p < below_end; ++p) {
          parent.push_back(p);
          variable.push_back(low);
        }
      }
      levels.emplace_back(begin, parent.size());
      suffix = starts;
      if (level == 1) linear = starts;
    }
    int64_t row = 0;
    const auto add = [&](int64_t low, int64_t start, int64_t end, int64_t degree, bool tail = false) {
      if (start < end) blocks.push_back({low, start, end - start, row, static_cast<int>(degree), tail});
      row += end - start;
    };
    for (int64_t level = 0; level < degree; ++level) add(-1, levels[level].first, levels[level].second, level);
    if (degree == 1) {
      for (int64_t low = 0; low < dim; ++low) add(low, 0, 1, 1);
    } else {
      for (int64_t low = 0; degree > 2 && low < first; ++low) {
        add(low, linear[low], linear[first], 2, true);
        add(low, linear[first], levels[1].second, 2);
      }
      for (int64_t low = first; low < dim; ++low) add(low, suffix[low], levels.back().second, degree);
    }
    count_exponents(row);
  }

 private:
  // Of one monomial: its degree, exponent of its lowest variable, multiplicity.
  struct Exponents {
    int32_t degree = 0, lowest = 0;
    double multiplicity = 1;
  };

  void count_exponents(int64_t rows) {
    std::vector<Exponents> features(panel());
    // x_l beta, l its lowest variable: multiplicity is that of beta times the degree over the exponent of l.
    const auto times = [&](int64_t l, int64_t beta) {
      Exponents e = features[beta];
      ++e.degree;
      e.lowest = variable[beta] == l ? e.lowest + 1 : 1;
      e.multiplicity = e.multiplicity * e.degree / e.lowest;
      return e;
    };
    for (int64_t p = 1; p < panel(); ++p) features[p] = times(variable[p], parent[p]);
    multiplicity.reserve(rows);
    for (const Block& block : blocks) {
      for (int64_t p = block.start; p < block.start + block.count; ++p)
        multiplicity.push_back((block.dim < 0 ? features[p] : times(block.dim, p)).multiplicity);
    }
  }
};

// Row l of x in a panel.
template <typename A>
inline const A* variable_row(const A* panel, int64_t l, int64_t stride) {
  return panel + (1 + l) * stride;
}

// Panel of tokens [0, count) of x (count, dim) row-major; up to ``tokens`` the variables are zero.
template <typename A>
inline void build_panel(const Monomials& tables, const A* x, int64_t x_row, int64_t count, int64_t tokens, A* panel,
                        int64_t stride) {
  std::fill(panel, panel + tokens, A(1));
  rows_over_tokens([&](int64_t t) { return x + t * x_row; }, count, tables.dim, tokens, stride, panel + stride);
  for (int64_t p = 1 + tables.dim; p < tables.panel(); ++p) {
    const A* from = panel + tables.parent[p] * stride;
    const A* by = variable_row(panel, tables.variable[p], stride);
    A* to = panel + p * stride;
    for (int64_t t = 0; t < tokens; t += kLanes<A>) store(to + t, load(from + t, All{}) * load(by + t, All{}), All{});
  }
}

// Rows that a panel has at least: the variables are there, used or not.
inline int64_t panel_rows(const Monomials& tables) { return std::max(tables.panel(), 1 + tables.dim); }

// Columns that fill registers go as sums of outer products, the others as products of rows over tokens, of which each
// ends in a sum over lanes.
template <typename A>
inline int64_t whole_columns(int64_t width) {
  return width / kLanes<A> * kLanes<A>;
}

// Numbers of scratch of add_moments.
inline int64_t moments_scratch(int64_t width, int64_t stride) { return 2 * width * stride; }

// state[row][c] += weights[row] times the sum over tokens of monomial row times columns[c], for rows
// [row_begin, row_end). Without ``top`` whole columns but the last, of rows whose features are never built,
// are left out.
template <typename A>
inline void add_moments(const Monomials& tables, const A* panel, const A* columns, int64_t width, int64_t tokens,
                        int64_t stride, const A* weights, A* scratch, A* state, int64_t row_begin, int64_t row_end,
                        bool top = true) {
  const int64_t whole = whole_columns<A>(top ? width : width - 1);
  A *values = scratch, *scaled = values + whole * tokens, *scaled_columns = scaled + whole * tokens;
  rows_over_tokens([&](int64_t c) { return columns + c * stride; }, whole, tokens, whole, whole, values);
  columns += whole * stride;
  const auto scale = [&](const A* by) {
    for (int64_t t = 0; top && t < tokens; ++t) {
      for (int64_t c = t * whole; c < (t + 1) * whole; c += kLanes<A>)
        store(scaled + c, load(values + c, All{}) * fill(by[t]), All{});
    }
    for (int64_t c = 0; c < (width - whole) * stride; c += stride) {
      for (int64_t t = 0; t < tokens; t += kLanes<A>)
        store(scaled_columns + c + t, load(columns + c + t, All{}) * load(by + t, All{}), All{});
    }
  };
  int64_t held = -1;
  for (const auto& block : tables.blocks) {
    const int64_t begin = std::max(row_begin, block.row), end = std::min(row_end, block.row + block.count);
    if (begin >= end) continue;
    if (block.dim != held) scale(variable_row(panel, block.dim, stride));
    held = block.dim;
    const A *features = panel + (block.start + begin - block.row) * stride, *by = weights + begin;
    A* to = state + begin * width;
    const int64_t outer_columns = top || block.dim < 0 ? whole : 0;
    outer(end - begin, tokens, outer_columns, features, stride, 1, block.dim < 0 ? values : scaled, whole,
          [&]<int M, int N>(int64_t m, int64_t c, const Tile<M, N, A>& tile) {
#pragma GCC unroll 8
            for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
              for (int n = 0; n < N; ++n) {
                A* at = to + (m + i) * width + c + n * kLanes<A>;
                store(at, load(at, All{}) + fill(by[m + i]) * tile.at[i][n], All{});
              }
            }
          });
    dot(end - begin, width - whole, tokens, features, block.dim < 0 ? columns : scaled_columns, stride, to + whole,
        width, [&](int64_t row) { return by[row]; });
  }
}

// out[c][token] += sum over rows of by_degree[degree of row] state[row][c] times monomial row.
// last(block, token, x) takes for each register of tokens the sum over the block's rows of the last column, without
// by_degree. The first ``without_top`` columns do without the rows whose features are never built.
template <typename A, typename Last>
inline void apply_state(const Monomials& tables, const A* panel, int64_t tokens, int64_t stride, const A* state,
                        int64_t width, const A* by_degree, A* out, Last last, int64_t without_top = 0) {
  for_token_tiles<A>(tokens, [&]<int N>(int64_t t) {
    const auto columns = [&]<int M>(int64_t c) {
      for (const auto& block : tables.blocks) {
        if (c < without_top && block.dim >= 0) continue;
        const auto tile = outer_tile<M, N, A>(block.count, state + block.row * width + c, 1, width,
                                              panel + block.start * stride + t, stride);
        const A* by = block.dim < 0 ? panel : variable_row(panel, block.dim, stride);
        Lanes<A> x[N];
        for (int n = 0; n < N; ++n) x[n] = load(by + t + n * kLanes<A>, All{});
        if (c + M == width) {
          for (int n = 0; n < N; ++n) last(block, t + n * kLanes<A>, x[n] * tile.at[M - 1][n]);
        }
        for (int n = 0; n < N; ++n) x[n] *= by_degree[block.degree];
        update_tile(out + c * stride + t, stride, tile,
                    [&](Lanes<A> old, Lanes<A> sums, int n) { return old + x[n] * sums; });
      }
    };
    for_row_tiles<kTokenTileRows>(without_top, columns);
    for_row_tiles<kTokenTileRows>(width - without_top,
                                  [&]<int M>(int64_t c) { columns.template operator()<M>(without_top + c); });
  });
}

// dx (dim rows of tokens) = derivative of sum over rows, columns of by_degree[degree of row] state[row][c]
// monomial_row(x) columns[c]. slope: a panel's size, zeroed here.
template <typename A>
inline void pull_back(const Monomials& tables, const A* panel, int64_t tokens, int64_t stride, const A* state,
                      const A* by_degree, const A* columns, int64_t width, A* slope, A* dx) {
  std::fill(slope, slope + panel_rows(tables) * stride, A(0));
  std::fill(dx, dx + tables.dim * stride, A(0));
  for (const auto& block : tables.blocks) {
    A* to = slope + block.start * stride;
    const A* features = panel + block.start * stride;
    const A weight = by_degree[block.degree];
    if (block.dim < 0) {
      outer(block.count, width, tokens, state + block.row * width, width, 1, columns, stride,
            [&](int64_t m, int64_t t, const auto& tile) {
              update_tile(to + m * stride + t, stride, tile,
                          [&](Lanes<A> old, Lanes<A> x, int) { return old + weight * x; });
            });
      continue;
    }
    const A* x = variable_row(panel, block.dim, stride);
    A* dx_row = dx + block.dim * stride;
    const auto chain = [&]<int M, int N>(int64_t m, int64_t t, const Tile<M, N, A>& tile) {
      Lanes<A> sums[N] = {}, by[N];
      for (int n = 0; n < N; ++n) by[n] = weight * load(x + t + n * kLanes<A>, All{});
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          const int64_t place = (m + i) * stride + t + n * kLanes<A>;
          store(to + place, load(to + place, All{}) + by[n] * tile.at[i][n], All{});
          sums[n] += load(features + place, All{}) * tile.at[i][n];
        }
      }
      for (int n = 0; n < N; ++n) {
        A* p = dx_row + t + n * kLanes<A>;
        store(p, load(p, All{}) + weight * sums[n], All{});
      }
    };
    outer(block.count, width, tokens, state + block.row * width, width, 1, columns, stride, chain);
  }
  for (int64_t p = tables.panel() - 1; p > tables.dim; --p) {
    const int64_t from = tables.parent[p] * stride, l = tables.variable[p];
    const A* x = variable_row(panel, l, stride);
    for (int64_t t = 0; t < tokens; t += kLanes<A>) {
      const Lanes<A> d = load(slope + p * stride + t, All{});
      store(slope + from + t, load(slope + from + t, All{}) + d * load(x + t, All{}), All{});
      A* to = dx + l * stride + t;
      store(to, load(to, All{}) + d * load(panel + from + t, All{}), All{});
    }
  }
  if (tables.degree < 2) return;
  for (int64_t l = 0; l < tables.dim; ++l) {
    for (int64_t t = 0; t < tokens; t += kLanes<A>) {
      A* to = dx + l * stride + t;
      store(to, load(to, All{}) + load(slope + (1 + l) * stride + t, All{}), All{});
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
