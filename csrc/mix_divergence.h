// Rows of a logit mixture under everything but exact reverse KL: the other divergences, and the forms with Z = 0.
// Notation and formulas: llmkern/ops/mix_logits/reference.py.
#pragma once

#include "mix_rows.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

template <typename A>
struct Point {
  Lanes<A> log_mix;  // with Z = 0; without meaning where dead
  Lanes<A> level;    // log |g|, under JSD u
  Lanes<A> sign;     // of g
  Lanes<A> dead;     // one where the token has no mass whatever Z is, else zero
};

// The linear form of the search for Z: log mix = b - log(h + root e) / alpha.
template <typename A>
struct Root {
  A anchor = 0, sign = 1, value = 0;
};

template <typename T>
class DivergenceRow {
 public:
  using A = Acc<T>;
  using V = Lanes<A>;

  // Statistics hold the log-sum-exp of each model and of the reference.
  DivergenceRow(const MixInputs<T>& in, int64_t row, const A* statistics)
      : in_(in), row_(row), reference_(in.reference_row(row)), weights_(in.weights_row(row)) {
    for (int64_t i = 0; i < in.models; ++i) {
      rows_.push_back(in.logits_row(i, row));
      shifts_.push_back(in.carry_of(row, i) - statistics[i]);
      total_ += weights_[i];
    }
    reference_shift_ = reference_ ? -statistics[in.models] : A(-std::log(static_cast<double>(in.vocab)));
    rest_ = in.reference_weight(row);
  }

  int64_t models() const { return static_cast<int64_t>(rows_.size()); }
  A weight(int64_t model) const { return weights_[model]; }
  A rest() const { return rest_; }
  A softmax_shift(int64_t model) const { return in_.carry_of(row_, model) - shifts_[model]; }
  A reference_shift() const { return reference_shift_; }

  template <typename Count>
  V log_reference(int64_t i, Count lanes) const {
    return reference_ ? load(reference_ + i, lanes) + reference_shift_ : fill(reference_shift_);
  }
  // log pi_i + carry_i
  template <typename Count>
  V log_policy(int64_t model, int64_t i, Count lanes) const {
    return load(rows_[model] + i, lanes) + shifts_[model];
  }

  template <typename Count>
  Point<A> at(int64_t i, Count lanes) const {
    const V r = log_reference(i, lanes), one = fill(A(1)), none{};
    // Under reverse KL the reference counts as one more model, of weight 1 - W.
    const bool reference_rules = in_.divergence != Divergence::kReverseKl || rest_ > 0;
    V dead = reference_rules ? (r == -kInf_ ? one : none) : none;
    for (int64_t m = 0; m < models(); ++m) {
      if (weights_[m] > 0) dead = log_policy(m, i, lanes) == -kInf_ ? one : dead;
    }
    switch (in_.divergence) {
      case Divergence::kReverseKl:
        return reverse_kl(r, dead, i, lanes);
      case Divergence::kJsd:
        return jsd(r, dead, i, lanes);
      default:
        return power(r, dead, i, lanes);
    }
  }

  // h and e of the linear form, for a point of this anchor.
  void linear_form(const Point<A>& point, const Root<A>& root, V* h, V* e) const {
    const V none{}, one = fill(A(1));
    if (in_.divergence == Divergence::kJsd) {
      *h = -expm1(point.level - root.anchor);
      *e = one;
    } else {
      const V t = root.anchor - point.level;
      *e = exp(t);
      *h = root.sign > 0 ? -expm1(t) : point.sign + *e;
    }
    *h = point.dead > none ? none : *h;
    *e = point.dead > none ? one : *e;
  }
  // b of the linear form; -inf for a token of no mass.
  V linear_offset(const Point<A>& point, const Root<A>& root, V r) const {
    const V b = in_.divergence == Divergence::kJsd ? r + (point.level - root.anchor) : point.log_mix;
    return point.dead > V{} ? fill(-kInf_) : b;
  }

 private:
  static constexpr A kInf_ = std::numeric_limits<A>::infinity();

  // log mix = r + (W - 1) + sum_i w_i (a_i - r) for Z = 0
  template <typename Count>
  Point<A> reverse_kl(V r, V dead, int64_t i, Count lanes) const {
    V z = fill(total_ - 1);
    for (int64_t m = 0; m < models(); ++m) {
      if (weights_[m] != 0) z += weights_[m] * log_policy(m, i, lanes);
    }
    if (rest_ != 0) z += rest_ * r;
    return {dead > V{} ? fill(-kInf_) : z, z, fill(A(1)), dead};
  }

  template <typename Count>
  Point<A> power(V r, V dead, int64_t i, Count lanes) const {
    const A rest = in_.divergence == Divergence::kAlpha && !in_.exact ? rest_ : A(0);
    V best = rest != 0 ? V{} : fill(-kInf_);
    for (int64_t m = 0; m < models(); ++m) {
      if (weights_[m] != 0) best = max(-in_.alpha * (log_policy(m, i, lanes) - r), best);
    }
    V g = rest != 0 ? rest * exp_nonpositive(-best) : V{};
    for (int64_t m = 0; m < models(); ++m) {
      if (weights_[m] != 0) g += weights_[m] * exp_nonpositive(-in_.alpha * (log_policy(m, i, lanes) - r) - best);
    }
    const V magnitude = g < V{} ? -g : g;
    const V level = best + log(magnitude), sign = g > V{} ? fill(A(1)) : (g < V{} ? fill(A(-1)) : g);
    const V log_mix = r - level / in_.alpha;
    const V off = !in_.exact ? (sign <= V{} ? fill(A(1)) : dead) : dead;
    return {off > V{} ? fill(-kInf_) : log_mix, level, sign, off};
  }

  template <typename Count>
  Point<A> jsd(V r, V dead, int64_t i, Count lanes) const {
    V u = fill((total_ - 1) * A(0.69314718055994530942));
    for (int64_t m = 0; m < models(); ++m) {
      if (weights_[m] != 0) u -= weights_[m] * softplus(r - log_policy(m, i, lanes));
    }
    const V off = !in_.exact ? (u >= V{} ? fill(A(1)) : dead) : dead;
    const V below = u < V{} ? u : fill(A(-1));
    const V log_mix = in_.exact ? r + u : r + u - log(-expm1(below));
    return {off > V{} ? fill(-kInf_) : log_mix, u, fill(A(1)), off};
  }

  const MixInputs<T>& in_;
  int64_t row_;
  const T* reference_;
  const A* weights_;
  c10::SmallVector<const T*, 8> rows_;
  c10::SmallVector<A, 8> shifts_;
  A total_ = 0, reference_shift_ = 0, rest_ = 0;
};

// log mix of one register of tokens, given the root of the row.
template <typename T, typename Count>
inline Lanes<Acc<T>> log_mix_at(const MixInputs<T>& in, const DivergenceRow<T>& mixture, const Root<Acc<T>>& root,
                                int64_t i, Count lanes) {
  using V = Lanes<Acc<T>>;
  const Point<Acc<T>> point = mixture.at(i, lanes);
  if (!in.exact) return point.log_mix;
  V h, e;
  mixture.linear_form(point, root, &h, &e);
  return mixture.linear_offset(point, root, mixture.log_reference(i, lanes)) - log(h + root.value * e) / in.alpha;
}

// Solves sum exp(b) (h + d e)^(-1/alpha) = 1 for d by Newton's method on the -alpha-th power of the sum, from below.
template <typename A>
inline bool solve_root(const A* b, const A* h, const A* e, int64_t width, A alpha, Root<A>* root) {
  using V = Lanes<A>;
  // d of the largest single term: there the sum is at least one, and no term is larger than one.
  V largest{};
  for (int64_t i = 0; i < width; i += kLanes<A>) {
    largest = max((exp(alpha * load(b + i, All{})) - load(h + i, All{})) / load(e + i, All{}), largest);
  }
  const double tolerance = 4 * std::numeric_limits<A>::epsilon();
  const double lowest = std::is_same_v<A, double> ? 1e-300 : 1e-37;
  double d = std::max<double>(top<A>(largest), lowest), mass = 0;
  for (int step = 0; step < 60; ++step) {
    double slope = 0;
    mass = 0;
    for (int64_t begin = 0; begin < width; begin += kPiece) {
      V mass_part{}, slope_part{};
      for (int64_t i = begin; i < std::min(width, begin + kPiece); i += kLanes<A>) {
        const V e_i = load(e + i, All{}), y = load(h + i, All{}) + static_cast<A>(d) * e_i;
        const V term = exp(load(b + i, All{}) - log(y) / alpha);
        mass_part += term;
        slope_part += term * e_i / y;
      }
      mass += sum<A>(mass_part);
      slope += sum<A>(slope_part);
    }
    if (!(mass > 1 + tolerance)) break;
    d += mass * (std::pow(mass, static_cast<double>(alpha)) - 1) / slope;
  }
  root->value = static_cast<A>(d);
  // Out of range of the dtype, or NaN among the inputs.
  return mass > 0.99 && mass < 1.01;
}

// Writes log mix of one row to out, which has room for three padded rows; fills the row's statistics. False where the
// row holds no distribution.
template <typename T>
bool mix_divergence_row(const MixInputs<T>& in, int64_t row, Acc<T>* out, Acc<T>* statistics) {
  using A = Acc<T>;
  using V = Lanes<A>;
  const A infinity = std::numeric_limits<A>::infinity();
  const int64_t width = padded(in.vocab);
  for (int64_t m = 0; m < in.models; ++m) {
    statistics[m] = in.weights_row(row)[m] == 0 ? A(0) : log_sum_exp(in.logits_row(m, row), in.vocab);
  }
  statistics[in.models] = in.has_reference() ? log_sum_exp(in.reference_row(row), in.vocab) : A(0);
  const DivergenceRow<T> mixture(in, row, statistics);
  Root<A> root;
  A *b = out, *h = out + width, *e = out + 2 * width;

  if (!in.exact) {
    V best = fill(-infinity), spoiled{};
    for_lanes<A>(0, in.vocab, [&](int64_t i, auto lanes) {
      const V y = pad_with(mixture.at(i, lanes).log_mix, -infinity, lanes);
      store(b + i, y, All{});
      best = max(y, best);
      spoiled += y == y ? V{} : fill(A(1));
    });
    std::fill(statistics + in.models + 1, statistics + in.models + 4, A(0));
    return std::isfinite(top<A>(best)) && sum<A>(spoiled) == 0;
  }

  // The anchor: the smallest g, or among negative ones the largest in magnitude; under JSD the largest u.
  V lowest = fill(infinity), deepest = fill(-infinity), highest = fill(-infinity);
  for_lanes<A>(0, in.vocab, [&](int64_t i, auto lanes) {
    const Point<A> point = mixture.at(i, lanes);
    const V dead = pad_with(point.dead, A(1), lanes);
    const auto live = dead == V{};
    lowest = live & (point.level < lowest) ? point.level : lowest;
    highest = live & (point.level > highest) ? point.level : highest;
    deepest = live & (point.sign < V{}) & (point.level > deepest) ? point.level : deepest;
  });
  if (in.divergence == Divergence::kJsd) {
    root.anchor = top<A>(highest);
  } else {
    root.sign = top<A>(deepest) > -infinity ? A(-1) : A(1);
    root.anchor = root.sign < 0 ? top<A>(deepest) : -top<A>(-lowest);
  }
  for_lanes<A>(0, in.vocab, [&](int64_t i, auto lanes) {
    const Point<A> point = mixture.at(i, lanes);
    V h_i, e_i;
    mixture.linear_form(point, root, &h_i, &e_i);
    store(h + i, pad_with(h_i, A(0), lanes), All{});
    store(e + i, pad_with(e_i, A(1), lanes), All{});
    const V b_i = mixture.linear_offset(point, root, mixture.log_reference(i, lanes));
    store(b + i, pad_with(b_i, -infinity, lanes), All{});
  });
  // Whole registers beyond the vocabulary, up to the padded width.
  for (int64_t i = (in.vocab + kLanes<A> - 1) / kLanes<A> * kLanes<A>; i < width; ++i)
    b[i] = -infinity, h[i] = 0, e[i] = 1;
  const bool solved = solve_root(b, h, e, width, in.alpha, &root);
  for (int64_t i = 0; i < width; i += kLanes<A>) {
    const V y = load(h + i, All{}) + root.value * load(e + i, All{});
    store(b + i, load(b + i, All{}) - log(y) / in.alpha, All{});
  }
  statistics[in.models + 1] = root.anchor;
  statistics[in.models + 2] = root.sign;
  statistics[in.models + 3] = root.value;
  return solved;
}

// Factors of the backward pass: D = d log mix / ds, K_i = D x_i f''(x_i), T_i = D f'(x_i).
template <typename T>
class DivergenceGradient {
 public:
  using A = Acc<T>;
  using V = Lanes<A>;

  DivergenceGradient(const MixInputs<T>& in, const DivergenceRow<T>& mixture) : in_(in), mixture_(mixture) {}

  V slope(V y, V r) const {
    switch (in_.divergence) {
      case Divergence::kReverseKl:
        return fill(A(1));
      case Divergence::kJsd:
        return exp(y - r) + 1;
      default:
        return exp(in_.alpha * (y - r));
    }
  }

  template <typename Count>
  void factors(int64_t model, int64_t i, Count lanes, V y, V* k, V* t) const {
    const V r = mixture_.log_reference(i, lanes), a = mixture_.log_policy(model, i, lanes), log_x = a - r;
    const V d = slope(y, r);
    switch (in_.divergence) {
      case Divergence::kReverseKl:
        *k = fill(A(1));
        *t = log_x + (in_.exact ? A(0) : A(1));
        break;
      case Divergence::kJsd:
        *k = exp(softplus(y - r) - softplus(log_x));
        *t = d * (A(0.69314718055994530942) - softplus(-log_x));
        break;
      default: {
        *k = exp(in_.alpha * (y - a));
        const V power = -in_.alpha * log_x;
        const V centred = (power > A(-0.5)) & (power < A(0.5)) ? -d * expm1(power) : d - *k;
        *t = in_.divergence == Divergence::kForwardKl ? -*k : centred / in_.alpha;
      }
    }
    // No mass under the mix or under the model: no gradient passes.
    const V infinity = fill(std::numeric_limits<A>::infinity());
    const auto absent = (y == -infinity) | (a == -infinity);
    *k = absent ? V{} : *k;
    *t = absent | (r == -infinity) ? V{} : *t;
  }

  // dr from H and from H (1 - sum_i w_i K_i).
  V reference_part(V h, V rest) const { return in_.divergence == Divergence::kReverseKl ? mixture_.rest() * h : rest; }

 private:
  const MixInputs<T>& in_;
  const DivergenceRow<T>& mixture_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
