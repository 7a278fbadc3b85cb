// Exact softmax attention by tiles: whole calls, and the rows of a polynomial one whose certificate fails.
#pragma once

#include "rope_problem.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Where a problem's results go; heads of the group lie ``rows`` apart.
template <typename T>
struct ForwardOutput {
  using A = Acc<T>;
  T* out;
  A* normalizer;
  bool* exact;
  int64_t head_rows;
  // (R + 1, width)
  A* state;
};

// Softmax attention of the rows that index(i), i < count, names, by tiles in parallel.
template <typename T>
class ExactRows {
  using A = Acc<T>;

 public:
  static constexpr int64_t kTokens = 2 * kTileTokens<A>;

  explicit ExactRows(const Problem<T>& in) : in_(in), position_(in.keys) {
    std::vector<double> tops((in.keys + kLookTokens - 1) / kLookTokens, 0.0);
    for_tasks(tops.size(), [&](int64_t task) {
      const int64_t end = std::min(in.keys, (task + 1) * kLookTokens);
      for (int64_t j = task * kLookTokens; j < end; ++j) {
        position_.get()[j] = static_cast<A>(j);
        const A bias = in.bias ? in.bias[j] : A(0);
        if (bias == -std::numeric_limits<A>::infinity()) continue;
        const double size = norm(in.k + j * in.dim, in.dim);
        if (!(size <= tops[task])) tops[task] = std::isnan(size) ? std::numeric_limits<double>::infinity() : size;
        // A bias of zero is that of keys without one; others may be as large as they like.
        if (bias != 0) tops[task] = std::numeric_limits<double>::infinity();
      }
    });
    for (double top : tops) key_norm_ = std::max(key_norm_, top);
  }

  template <typename Index>
  void run(int64_t g, int64_t count, Index index, const ForwardOutput<T>& to) const {
    const int64_t tasks = (count + kTokens - 1) / kTokens;
    for_tasks(tasks, [&](int64_t task) {
      // Early and late tiles in turns: under a causal mask late ones take longest.
      const int64_t begin = (task % 2 ? tasks - 1 - task / 2 : task / 2) * kTokens;
      tile(g, std::min(kTokens, count - begin), [&](int64_t t) { return index(begin + t); }, to);
    });
  }

 private:
  template <typename Index>
  void tile(int64_t g, int64_t count, Index index, const ForwardOutput<T>& to) const {
    const int64_t stride = token_stride<A>(count), width = in_.width();
    const Buffer<A> numbers((in_.dim + width + kKeyBlock + 3) * stride + kKeyBlock * width);
    A *x = numbers.get(), *sums = x + in_.dim * stride, *p = sums + width * stride, *top = p + (kKeyBlock + 1) * stride,
      *limit = top + stride, *values = limit + stride;
    int64_t first = in_.keys, last = 0;
    bool bounded = true;
    for (int64_t t = 0; t < stride; ++t) {
      for (int64_t l = 0; l < in_.dim; ++l) x[l * stride + t] = t < count ? in_.query(g, index(t))[l] : A(0);
      const int64_t seen = t >= count ? 0 : (in_.options.is_causal ? std::min(index(t) + 1, in_.keys) : in_.keys);
      limit[t] = static_cast<A>(seen);
      last = std::max(last, seen);
      if (t >= count) continue;
      first = std::min(first, seen);
      bounded = bounded && norm(in_.query(g, index(t)), in_.dim) * key_norm_ <= kBoundedLogit;
    }
    std::fill(sums, sums + width * stride, A(0));
    std::fill(top, top + stride, bounded ? A(0) : -std::numeric_limits<A>::infinity());
    const QueryTile<A> query{x, in_.dim, stride, stride, top, limit};
    for (int64_t j = 0; j < last; j += kKeyBlock) {
      KeyBlock<A> keys{
          in_.k + j * in_.dim,          in_.dim, values, width, in_.bias ? in_.bias + j : nullptr, position_.get() + j,
          std::min(kKeyBlock, last - j)};
      const T* v = in_.v + j * in_.value_dim;
      if constexpr (std::is_same_v<T, A>) {
        if (bounded) keys.v = v, keys.v_row = in_.value_dim;
      }
      for (int64_t i = 0; keys.v == values && i < keys.count; ++i) {
        for (int64_t c = 0; c < in_.value_dim; ++c) values[i * width + c] = static_cast<A>(v[i * in_.value_dim + c]);
        values[i * width + in_.value_dim] = 1;
      }
      if (bounded)
        add_pairs_bounded(keys, query, in_.value_dim, j + keys.count > first, p, sums);
      else
        add_pairs_online(keys, query, width, p, sums);
    }
    for (int64_t t = 0; t < count; ++t) {
      const A z = sums[in_.value_dim * stride + t];
      const int64_t row = g * to.head_rows + index(t);
      to.exact[row] = true;
      to.normalizer[row] = top[t] + std::log(z);
      T* out = to.out + row * in_.value_dim;
      for (int64_t c = 0; c < in_.value_dim; ++c) out[c] = static_cast<T>(z == 0 ? A(0) : sums[c * stride + t] / z);
    }
  }

  const Problem<T>& in_;
  Buffer<A> position_;
  // The largest, of keys that take part; infinite where logits are not bounded by it.
  double key_norm_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
