// One key head of one sequence, and the query heads that share it: inputs by pointer, and what forward and backward
// both do with them. Symbols as in llmkern/ops/rope_attention/reference.py.
#pragma once

#include "common.h"
#include "exact_pairs.h"
#include "polynomial_pairs.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Tokens of a panel on the side of the keys: long enough that sums over tokens cost little beside the products, short
// enough that panel and columns stay in the second-level cache. A multiple of all tiles.
constexpr int64_t kPanelTokens = 240;
constexpr int64_t kSegments = 2;
constexpr int64_t kSegmentTokens = 2048;
// Keys that a task looks at before any pass, and whose sums are one part of the mean.
constexpr int64_t kLookTokens = 4096;
// A normaliser above this may have lost terms that were held at exp(88).
constexpr double kLargestNormalizer = 1e30;
constexpr int kRoundingParts = 5;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename A>
inline int64_t token_stride(int64_t tokens) {
  return round_up(tokens, kLanes<A>);
}

// Runs body(begin, end) over tasks in parallel, or here and now inside another parallel region.
template <typename Body>
inline void for_tasks(int64_t tasks, Body body) {
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) body(task);
  });
}

// Uninitialised numbers, freed with the object.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : tensor_(at::empty({size}, c10::CppTypeToScalarType<A>::value)),
        numbers_(tensor_.template mutable_data_ptr<A>()) {}
  A* get() const { return numbers_; }
  void zero() const { std::fill(get(), get() + tensor_.numel(), A(0)); }

 private:
  at::Tensor tensor_;
  // Asking the tensor is a call.
  A* numbers_;
};

struct Options {
  bool is_causal;
  int64_t degree, contact, leading, chunk;
  // Products of the highest degree in bfloat16.
  bool top_bf16 = false;
};

// A row of the table.
template <typename A>
struct Coefficients {
  const double* polynomial;
  double error, tail1, tail0;
  A q_limit, k_limit;
  double rounding;

  Coefficients(const double* row, int64_t degree) : polynomial(row) {
    const double* rest = row + degree + 1;
    error = rest[0], tail1 = rest[1], tail0 = rest[2];
    q_limit = static_cast<A>(rest[3]), k_limit = static_cast<A>(rest[4]);
    rounding = rest[5];
  }
};

template <typename T>
struct Problem {
  using A = Acc<T>;

  const Monomials& tables;
  Options options;
  int64_t queries, keys, dim, value_dim, group;
  // Rows of head g of the group: x(g) + i * dim.
  const A* q;
  int64_t q_head;
  const A* k;
  const T* v;
  const A* bias;
  const double* table;

  int64_t width() const { return value_dim + 1; }
  // Whether values are multiplied with features of the highest degree in bfloat16. The last column, whose sums certify,
  // never is.
  bool top_in_bf16() const {
    return options.top_bf16 && std::is_same_v<A, float> && multiplies_bf16() && tables.leading == dim;
  }
  const A* query(int64_t g, int64_t i) const { return q + g * q_head + i * dim; }
  Coefficients<A> coefficients(int64_t g) const { return {table + g * (options.degree + 7), options.degree}; }
};

template <typename A>
inline A norm(const A* x, int64_t dim) {
  Lanes<A> total{};
  for_lanes<A>(0, dim, [&](int64_t l, auto lanes) {
    const Lanes<A> part = load(x + l, lanes);
    total += part * part;
  });
  return std::sqrt(sum<A>(total));
}

// What is known of the keys before any pass: their weights, which of them are too large, the mean of their values.
template <typename T>
struct KeySide {
  using A = Acc<T>;

  const Problem<T>& in;
  A top = 0;
  // Of each key; bytes, since tasks write side by side.
  std::vector<char> heavy;
  std::vector<int64_t> heavy_keys;
  std::vector<A> mean;

  explicit KeySide(const Problem<T>& problem) : in(problem), heavy(problem.keys), mean(problem.value_dim, A(0)) {
    if (in.bias && in.keys > 0) {
      top = *std::max_element(in.bias, in.bias + in.keys);
      if (top == -std::numeric_limits<A>::infinity()) top = 0;
    }
    const A limit = in.coefficients(0).k_limit;
    for_tasks(looks(), [&](int64_t task) {
      const int64_t end = std::min(in.keys, (task + 1) * kLookTokens);
      for (int64_t j = task * kLookTokens; j < end; ++j) heavy[j] = !(norm(in.k + j * in.dim, in.dim) <= limit);
    });
    for (int64_t j = 0; j < in.keys; ++j) {
      if (heavy[j]) heavy_keys.push_back(j);
    }
  }

  int64_t looks() const { return (in.keys + kLookTokens - 1) / kLookTokens; }

  A weight(int64_t j) const {
    if (heavy[j]) return 0;
    return in.bias ? std::exp(in.bias[j] - top) : A(1);
  }

  // Weighted mean of the values, in double: it is subtracted before sums, so that they round what differs alone.
  void find_mean() {
    const int64_t width = in.width();
    std::vector<double> parts(looks() * width, 0.0);
    for_tasks(looks(), [&](int64_t task) {
      double* sums = parts.data() + task * width;
      const int64_t end = std::min(in.keys, (task + 1) * kLookTokens);
      for (int64_t j = task * kLookTokens; j < end; ++j) {
        const A w = weight(j);
        if (w == 0) continue;
        const T* v = in.v + j * in.value_dim;
        for (int64_t c = 0; c < in.value_dim; ++c) sums[c] += static_cast<double>(w * static_cast<A>(v[c]));
        sums[in.value_dim] += w;
      }
    });
    for (int64_t task = 1; task < looks(); ++task) {
      for (int64_t c = 0; c < width; ++c) parts[c] += parts[task * width + c];
    }
    if (parts.empty() || !(parts[in.value_dim] > 0)) return;
    for (int64_t c = 0; c < in.value_dim; ++c) mean[c] = static_cast<A>(parts[c] / parts[in.value_dim]);
  }

  // Values less their mean and a one: rows of width.
  void values(int64_t j, A* row) const {
    const T* v = in.v + j * in.value_dim;
    for (int64_t c = 0; c < in.value_dim; ++c) row[c] = static_cast<A>(v[c]) - mean[c];
    row[in.value_dim] = 1;
  }

  // columns[c][t] = w_j [v_j - mean, 1] (w_j left out where not wanted) of keys begin .. begin + count; zeros up to the
  // stride. Returns the sum of the weights.
  double columns(int64_t begin, int64_t count, int64_t stride, bool weighted, A* to) const {
    double total = 0;
    A* factor = to + in.value_dim * stride;
    for (int64_t t = 0; t < stride; ++t) {
      const A w = t < count ? weight(begin + t) : A(0);
      total += w;
      factor[t] = weighted ? w : A(t < count);
    }
    rows_over_tokens([&](int64_t t) { return in.v + (begin + t) * in.value_dim; }, count, in.value_dim, stride, stride,
                     to);
    for (int64_t c = 0; c < in.value_dim; ++c) {
      const Lanes<A> middle = fill(mean[c]);
      for (A* at = to + c * stride; at < to + (c + 1) * stride; at += kLanes<A>) {
        const Lanes<A> by = load(factor + (at - to - c * stride), All{});
        store(at, by == Lanes<A>{} ? Lanes<A>{} : by * (load(at, All{}) - middle), All{});
      }
    }
    return total;
  }
};

// Copies of single keys, as a KeyBlock.
template <typename T>
class GatheredKeys {
  using A = Acc<T>;

 public:
  template <typename Index>
  GatheredKeys(const KeySide<T>& side, int64_t count, Index index)
      : count_(count),
        dim_(side.in.dim),
        width_(side.in.width()),
        numbers_(std::max<int64_t>(1, count * (side.in.dim + side.in.width() + 2))) {
    A *k = numbers_.get(), *v = k + count * dim_, *bias = v + count * width_, *position = bias + count;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = index(i);
      std::copy_n(side.in.k + j * dim_, dim_, k + i * dim_);
      side.values(j, v + i * width_);
      bias[i] = side.in.bias ? side.in.bias[j] : A(0);
      position[i] = static_cast<A>(j);
    }
  }

  KeyBlock<A> block() const {
    const A* k = numbers_.get();
    const A *v = k + count_ * dim_, *bias = v + count_ * width_;
    return {k, dim_, v, width_, bias, bias + count_, count_};
  }

 private:
  int64_t count_, dim_, width_;
  Buffer<A> numbers_;
};

// Coefficients of p(q.k) by degree: of one head.
template <typename T, typename A = Acc<T>>
inline std::vector<A> by_degree(const Problem<T>& in, int64_t g) {
  const double* a = in.coefficients(g).polynomial;
  return {a, a + in.options.degree + 1};
}

// Multiplicities of the monomials, times what their degree counts.
template <typename T, typename A = Acc<T>>
inline std::vector<A> row_weights(const Problem<T>& in, const std::vector<A>& by_degree) {
  std::vector<A> weights(in.tables.multiplicity.begin(), in.tables.multiplicity.end());
  for (const auto& block : in.tables.blocks) {
    for (int64_t row = block.row; row < block.row + block.count; ++row) weights[row] *= by_degree[block.degree];
  }
  return weights;
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
