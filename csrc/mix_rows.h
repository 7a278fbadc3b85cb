// Rows of a logit mixture, as mix_logits and sample_mixed see them: the arguments, the log-sum-exp of a row, and the
// row of exact reverse KL, a weighted sum of logits. Notation and formulas: llmkern/ops/mix_logits/reference.py.
#pragma once

#include <c10/util/SmallVector.h>

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "common.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

enum class Divergence { kReverseKl, kForwardKl, kAlpha, kJsd };

inline Divergence parse_divergence(std::string_view name) {
  if (name == "reverse_kl") return Divergence::kReverseKl;
  if (name == "forward_kl") return Divergence::kForwardKl;
  if (name == "alpha") return Divergence::kAlpha;
  TORCH_CHECK_VALUE(name == "jsd",
                    "mix_logits: expected divergence to be one of reverse_kl, forward_kl, alpha, jsd, got ", name);
  return Divergence::kJsd;
}

// Entries of a scratch row: room for the last partial register, which is padded with entries of no mass.
inline int64_t padded(int64_t vocab) { return (vocab + 127) / 128 * 128; }

template <typename T>
struct MixInputs {
  using A = Acc<T>;

  MixInputs(at::TensorList logits_, const at::Tensor& weights_, const std::optional<at::Tensor>& reference_,
            const std::optional<at::Tensor>& carry_, std::string_view divergence_, double alpha_, bool exact_)
      : divergence(parse_divergence(divergence_)),
        alpha(static_cast<A>(divergence == Divergence::kAlpha ? alpha_ : 1.0)),
        exact(exact_),
        rows(logits_[0].size(0)),
        vocab(logits_[0].size(1)),
        models(static_cast<int64_t>(logits_.size())) {
    for (const at::Tensor& x : logits_) hold(x);
    if (reference_) hold(*reference_);
    weights = as_rows(weights_);
    if (carry_) carry = as_rows(*carry_);
  }

  const T* logits_row(int64_t model, int64_t row) const { return pointers[model] + row * strides[model]; }
  const T* reference_row(int64_t row) const { return has_reference() ? logits_row(models, row) : nullptr; }
  bool has_reference() const { return static_cast<int64_t>(pointers.size()) > models; }
  const A* weights_row(int64_t row) const { return weights.const_data_ptr<A>() + row * models; }
  A carry_of(int64_t row, int64_t model) const {
    return carry.defined() ? carry.const_data_ptr<A>()[row * models + model] : A(0);
  }

  // 1 - W, the weight of the reference under reverse KL; zero within the rounding of the sum.
  A reference_weight(int64_t row) const {
    double total = 0, magnitude = 0;
    for (int64_t i = 0; i < models; ++i) {
      total += weights_row(row)[i];
      magnitude += std::abs(weights_row(row)[i]);
    }
    const double noise = models * std::numeric_limits<float>::epsilon() * magnitude;
    return static_cast<A>(std::abs(1 - total) <= noise ? 0.0 : 1 - total);
  }

  Divergence divergence;
  A alpha;
  bool exact;
  int64_t rows, vocab, models;
  std::vector<const T*> pointers;
  std::vector<int64_t> strides;
  at::Tensor weights, carry;

 private:
  void hold(const at::Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == rows && x.size(1) == vocab, "mix_logits: expected rows of shape (",
                      rows, ", ", vocab, "), got ", x.sizes());
    held_.push_back(x.stride(1) == 1 || vocab == 1 ? x : x.contiguous());
    pointers.push_back(held_.back().template const_data_ptr<T>());
    strides.push_back(held_.back().stride(0));
  }
  at::Tensor as_rows(const at::Tensor& x) const {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == rows && x.size(1) == models,
                      "mix_logits: expected weights and carry of shape (", rows, ", ", models, "), got ", x.sizes());
    return x.to(c10::CppTypeToScalarType<A>::value).contiguous();
  }

  std::vector<at::Tensor> held_;
};

// Log-sum-exp by pieces
// ------------------------------------------------------------------------------------------------

template <typename A>
struct PieceSum {
  A top;
  A sum;
};

struct NoWork {
  void operator()(int64_t, int64_t) const {}
};

// Sum of exp((z - top) scale) over one piece of n entries, padded to a couple; NaN where z holds NaN, which top
// overlooks. This is arithmetic alone: `meanwhile(i, j)`, called for every kStride entries, is where memory can be
// asked for.
template <typename A, typename Meanwhile = NoWork>
inline PieceSum<A> sum_exp_piece(const A* z, int64_t n, A top, A scale = 1, Meanwhile meanwhile = {}) {
  constexpr int64_t kStride = 128;
  const Lanes<A> shift = fill(top > -std::numeric_limits<A>::infinity() ? top : A(0));
  Lanes<A> even{}, odd{};
  for (int64_t begin = 0; begin < n; begin += kStride) {
    const int64_t end = std::min(n, begin + kStride);
    meanwhile(begin, end);
    for (int64_t i = begin; i < end; i += 2 * kLanes<A>) {
      even += exp_for_sum(load(z + i, All{}) - shift, scale);
      odd += exp_for_sum(load(z + i + kLanes<A>, All{}) - shift, scale);
    }
  }
  return {top, sum<A>(even + odd)};
}

template <typename A>
inline A top_of(const PieceSum<A>* pieces, int64_t count) {
  A top = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < count; ++i) top = std::max(top, pieces[i].top);
  return top;
}

// Sum of exp((z - top) scale) over a row from its pieces, in their order.
template <typename A>
inline double sum_of(const PieceSum<A>* pieces, int64_t count, A top, A scale = 1) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool dead = pieces[i].top == -std::numeric_limits<A>::infinity();
    total += dead ? pieces[i].sum : pieces[i].sum * std::exp((static_cast<double>(pieces[i].top) - top) * scale);
  }
  return total;
}

// Log-sum-exp of a row; not finite where the row holds no distribution.
template <typename A>
inline A combine(const PieceSum<A>* pieces, int64_t count) {
  const A top = top_of(pieces, count);
  return static_cast<A>(top + std::log(sum_of(pieces, count, top)));
}

// Exact reverse KL
// -----------------------------------------------------------------------------------------------------

template <typename T>
struct Term {
  const T* row;
  Acc<T> weight;
};

// z = sum_i w_i logits_i + (1 - W) reference, over the models of weight.
template <typename T>
class LinearRow {
 public:
  using A = Acc<T>;

  LinearRow(const MixInputs<T>& in, int64_t row) {
    for (int64_t i = 0; i < in.models; ++i) add(in.logits_row(i, row), in.weights_row(row)[i]);
    if (in.has_reference()) add(in.reference_row(row), in.reference_weight(row));
  }

  // Writes z[begin, end) to out[0, end - begin), padded to a full couple with -inf; returns its maximum.
  A mix(int64_t begin, int64_t end, A* out) const { return mix<false>(begin, end, out); }

  // The same with the entries of each couple as load_couple places them, which costs less.
  A mix_couples(int64_t begin, int64_t end, A* out) const { return mix<true>(begin, end, out); }

  // Asks for entries [begin, end) of each model, which may lie past the end of the row: there the next one begins.
  void prefetch(int64_t begin, int64_t end) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (const Term<T>& term : terms_) {
      for (int64_t i = begin; i < end; i += kLine) __builtin_prefetch(term.row + i);
    }
  }

 private:
  void add(const T* row, A weight) {
    if (weight == 0) return;
    terms_.push_back({row, weight});
    negative_ |= weight < 0;
  }

  template <bool kCouples>
  A mix(int64_t begin, int64_t end, A* out) const {
    if (negative_) return mix_signed<kCouples>(begin, end, out);
    switch (terms_.size()) {
      case 1:
        return mix_terms<kCouples, 1>(begin, end, out);
      case 2:
        return mix_terms<kCouples, 2>(begin, end, out);
      case 3:
        return mix_terms<kCouples, 3>(begin, end, out);
      case 4:
        return mix_terms<kCouples, 4>(begin, end, out);
      default:
        return mix_terms<kCouples, 0>(begin, end, out);
    }
  }

  template <bool kCouples, int kTerms>
  A mix_terms(int64_t begin, int64_t end, A* out) const {
    // A copy, since for all that the compiler knows writing to `out` could change the members.
    std::array<Term<T>, kTerms> few;
    std::copy_n(terms_.data(), kTerms, few.data());
    const Term<T>* terms = kTerms > 0 ? few.data() : terms_.data();
    const int count = kTerms > 0 ? kTerms : static_cast<int>(terms_.size());
    Lanes<A> best_a = fill(-std::numeric_limits<A>::infinity()), best_b = best_a;
    for_couples<A>(begin, end, [&](int64_t i, auto entries) {
      Couple<A> z{};
      for (int j = 0; j < count; ++j) {
        const Couple<A> x = load_couple(terms[j].row + i, entries);
        z.a += terms[j].weight * x.a;
        z.b += terms[j].weight * x.b;
      }
      z = place<kCouples>(z, entries);
      store_couple(out + (i - begin), z, All{});
      best_a = max(z.a, best_a);
      best_b = max(z.b, best_b);
    });
    return top<A>(max(best_a, best_b));
  }

  // With a negative weight -inf times it would be +inf, or NaN beside a -inf of positive weight, which decides.
  template <bool kCouples>
  A mix_signed(int64_t begin, int64_t end, A* out) const {
    const Lanes<A> excluded = fill(-std::numeric_limits<A>::infinity());
    Lanes<A> best = excluded;
    for_couples<A>(begin, end, [&](int64_t i, auto entries) {
      Couple<A> z{}, lowest{};
      for (const Term<T>& term : terms_) {
        const Couple<A> x = load_couple(term.row + i, entries);
        z.a += term.weight * x.a;
        z.b += term.weight * x.b;
        if (term.weight > 0) {
          lowest.a = x.a < lowest.a ? x.a : lowest.a;
          lowest.b = x.b < lowest.b ? x.b : lowest.b;
        }
      }
      z = {lowest.a == excluded ? excluded : z.a, lowest.b == excluded ? excluded : z.b};
      z = place<kCouples>(z, entries);
      store_couple(out + (i - begin), z, All{});
      best = max(max(z.a, z.b), best);
    });
    return top<A>(best);
  }

  // The couple as load_couple has it for T, or in the order of its entries; past the end -inf.
  template <bool kCouples, typename Entries>
  static Couple<A> place(Couple<A> z, Entries entries) {
    constexpr A kNothing = -std::numeric_limits<A>::infinity();
    if constexpr (kCouples) {
      return pad_couple<T>(z, kNothing, entries);
    } else {
      return pad_couple<A>(in_order<T>(z), kNothing, entries);
    }
  }

  c10::SmallVector<Term<T>, 8> terms_;
  bool negative_ = false;
};

template <typename T>
inline Acc<T> log_sum_exp(const T* row, int64_t vocab) {
  using A = Acc<T>;
  c10::SmallVector<PieceSum<A>, 128> pieces(count_pieces(vocab));
  for_pieces(vocab, 16, [&](int64_t piece, int64_t begin, int64_t end) {
    alignas(64) A z[kPiece];
    Lanes<A> best = fill(-std::numeric_limits<A>::infinity());
    for_couples<A>(begin, end, [&](int64_t i, auto entries) {
      const Couple<A> x = pad_couple<T>(load_couple(row + i, entries), -std::numeric_limits<A>::infinity(), entries);
      store_couple(z + (i - begin), x, All{});
      best = max(max(x.a, x.b), best);
    });
    pieces[piece] = sum_exp_piece(z, end - begin, top<A>(best));
  });
  return combine(pieces.data(), pieces.size());
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
