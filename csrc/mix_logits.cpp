// mix_logits on the CPU. Exact reverse KL is one weighted sum and a log-sum-exp: the mixed row stays in the
// second-level cache between the two. All else needs the log-sum-exp of each model first, and a search for Z over
// cached rows.
#include <torch/library.h>

#include <tuple>

#include "mix_divergence.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

// Columns of a row's statistics: log-sum-exp of each model, of the reference, anchor, sign, root.
constexpr int64_t kTail = 4;

template <typename T>
void forward_reverse_kl(const MixInputs<T>& in, T* out, Acc<T>* stats) {
  using A = Acc<T>;
  const int64_t width = padded(in.vocab), columns = in.models + kTail;
  const at::Tensor scratch = at::empty({scratch_slots(in.rows), width}, c10::CppTypeToScalarType<A>::value);
  BadRow bad;
  for_rows(in.rows, [&](int64_t row, int64_t slot) {
    A* z = scratch.mutable_data_ptr<A>() + slot * width;
    const LinearRow<T> mixture(in, row);
    c10::SmallVector<PieceSum<A>, 128> pieces(count_pieces(in.vocab));
    for_pieces(in.vocab, kPiecesPerTask, [&](int64_t piece, int64_t begin, int64_t end) {
      const A top = mixture.mix_couples(begin, end, z + begin);
      pieces[piece] = sum_exp_piece(z + begin, end - begin, top, A(1),
                                    [&](int64_t i, int64_t j) { mixture.prefetch(end + i, end + j); });
    });
    const A lse = combine(pieces.data(), pieces.size());
    if (!std::isfinite(lse)) bad.note(row);
    T* y = out + row * in.vocab;
    for_pieces(in.vocab, kPiecesPerTask, [&](int64_t, int64_t begin, int64_t end) {
      for_couples<A>(begin, end, [&](int64_t i, auto entries) {
        const Couple<A> z_i = load_in_order(z + i, All{});
        store_couple(y + i, {z_i.a - lse, z_i.b - lse}, entries);
      });
    });
    A* statistics = stats + row * columns;
    std::fill(statistics, statistics + columns, A(0));
    statistics[in.models + 1] = lse;
  });
  bad.check("mix_logits");
}

template <typename T>
void forward_divergence(const MixInputs<T>& in, T* out, Acc<T>* stats) {
  using A = Acc<T>;
  const int64_t width = padded(in.vocab), columns = in.models + kTail;
  const at::Tensor scratch = at::empty({scratch_slots(in.rows), 3 * width}, c10::CppTypeToScalarType<A>::value);
  BadRow bad;
  for_rows(in.rows, [&](int64_t row, int64_t slot) {
    A* b = scratch.mutable_data_ptr<A>() + slot * 3 * width;
    const bool valid = mix_divergence_row(in, row, b, stats + row * columns);
    if (!valid) bad.note(row);
    T* y = out + row * in.vocab;
    for_lanes<A>(0, in.vocab, [&](int64_t i, auto lanes) { store(y + i, load(b + i, All{}), lanes); });
  });
  bad.check("mix_logits");
}

// Where the gradients go; null where none is wanted.
template <typename T>
struct Gradients {
  std::vector<T*> logits;
  Acc<T>*weights, *carry;
  T* reference;
};

// dz = dy - p sum(dy); dlogits_i = w_i dz, dreference = (1 - W) dz, dweights_i = sum dz (logits_i - reference).
template <typename T>
void backward_reverse_kl(const MixInputs<T>& in, const T* dy, const Acc<T>* stats, const Gradients<T>& grads) {
  using A = Acc<T>;
  using V = Lanes<A>;
  const int64_t columns = in.models + kTail, count = count_pieces(in.vocab);
  for_rows(in.rows, [&](int64_t row, int64_t) {
    const LinearRow<T> mixture(in, row);
    const V lse = fill(stats[row * columns + in.models + 1]), dead = fill(-std::numeric_limits<A>::infinity());
    const T* dy_row = dy + row * in.vocab;
    const T* reference = in.reference_row(row);
    const A rest = in.reference_weight(row);
    c10::SmallVector<double, 128> totals(count, 0.0);
    for_pieces(in.vocab, kPiecesPerTask, [&](int64_t piece, int64_t begin, int64_t end) {
      alignas(64) A z[kPiece];
      mixture.mix(begin, end, z);
      V total{};
      for_lanes<A>(begin, end, [&](int64_t i, auto lanes) {
        total += load(z + (i - begin), All{}) > dead ? load(dy_row + i, lanes) : V{};
      });
      totals[piece] = sum<A>(total);
    });
    double total = 0;
    for (double part : totals) total += part;

    c10::SmallVector<double, 256> weight_parts(count * in.models, 0.0);
    for_pieces(in.vocab, kPiecesPerTask, [&](int64_t piece, int64_t begin, int64_t end) {
      alignas(64) A z[kPiece];
      mixture.mix(begin, end, z);
      for_lanes<A>(begin, end, [&](int64_t i, auto lanes) {
        const V z_i = load(z + (i - begin), All{});
        const V dz = load(dy_row + i, lanes) - exp_nonpositive(z_i - lse) * static_cast<A>(total);
        store(z + (i - begin), z_i > dead ? dz : V{}, All{});
      });
      for (int64_t m = 0; m < in.models; ++m) {
        const A weight = in.weights_row(row)[m];
        if (T* to = grads.logits[m]) {
          to += row * in.vocab;
          for_lanes<A>(begin, end,
                       [&](int64_t i, auto lanes) { store(to + i, weight * load(z + (i - begin), All{}), lanes); });
        }
        if (grads.weights) {
          const T* policy = in.logits_row(m, row);
          V part{};
          for_lanes<A>(begin, end, [&](int64_t i, auto lanes) {
            const V a = load(policy + i, lanes), r = reference ? load(reference + i, lanes) : V{};
            const V dz = load(z + (i - begin), All{});
            // Where model or reference has no mass the derivative is infinite: no gradient passes there.
            part += (a == dead) | (r == dead) | (dz == V{}) ? V{} : dz * (a - r);
          });
          weight_parts[piece * in.models + m] = sum<A>(part);
        }
      }
      if (T* to = grads.reference) {
        to += row * in.vocab;
        for_lanes<A>(begin, end,
                     [&](int64_t i, auto lanes) { store(to + i, rest * load(z + (i - begin), All{}), lanes); });
      }
    });
    for (int64_t m = 0; m < in.models; ++m) {
      double weight_total = 0;
      for (int64_t piece = 0; piece < count; ++piece) weight_total += weight_parts[piece * in.models + m];
      if (grads.weights) grads.weights[row * in.models + m] = static_cast<A>(weight_total);
      if (grads.carry) grads.carry[row * in.models + m] = 0;
    }
  });
}

// The general case; symbols as in mix_logits_backward_reference.
template <typename T>
void backward_divergence(const MixInputs<T>& in, const T* dy, const Acc<T>* stats, const Gradients<T>& grads) {
  using A = Acc<T>;
  using V = Lanes<A>;
  const int64_t width = padded(in.vocab), columns = in.models + kTail;
  const at::Tensor scratch = at::empty({scratch_slots(in.rows), 2 * width}, c10::CppTypeToScalarType<A>::value);
  const bool needs_zero_weight = grads.weights != nullptr;
  for_rows(in.rows, [&](int64_t row, int64_t slot) {
    A* y = scratch.mutable_data_ptr<A>() + slot * 2 * width;
    A* h = y + width;
    c10::SmallVector<A, 16> statistics(stats + row * columns, stats + (row + 1) * columns);
    for (int64_t m = 0; m < in.models; ++m) {
      // The forward pass did not read a model without weight.
      if (in.weights_row(row)[m] == 0 && needs_zero_weight)
        statistics[m] = log_sum_exp(in.logits_row(m, row), in.vocab);
    }
    const DivergenceRow<T> mixture(in, row, statistics.data());
    const Root<A> root{statistics[in.models + 1], statistics[in.models + 2], statistics[in.models + 3]};
    const DivergenceGradient<T> gradient(in, mixture);
    const T* dy_row = dy + row * in.vocab;
    const V dead = fill(-std::numeric_limits<A>::infinity());

    double weighted_grad = 0, weighted_mass = 0;
    for (int64_t begin = 0; begin < in.vocab; begin += kPiece) {
      V grad_part{}, mass_part{};
      for_lanes<A>(begin, std::min(in.vocab, begin + kPiece), [&](int64_t i, auto lanes) {
        const V y_i = pad_with(log_mix_at(in, mixture, root, i, lanes), -std::numeric_limits<A>::infinity(), lanes);
        store(y + i, y_i, All{});
        const V d = gradient.slope(y_i, mixture.log_reference(i, lanes));
        grad_part += y_i > dead ? d * load(dy_row + i, lanes) : V{};
        mass_part += y_i > dead ? d * exp(y_i) : V{};
      });
      weighted_grad += sum<A>(grad_part);
      weighted_mass += sum<A>(mass_part);
    }
    const A pull = in.exact ? static_cast<A>(weighted_grad / weighted_mass) : A(0);
    c10::SmallVector<double, 16> mass(in.models, 0.0), weight_grad(in.models, 0.0);
    double reference_mass = 0;
    for (int64_t begin = 0; begin < in.vocab; begin += kPiece) {
      const int64_t end = std::min(in.vocab, begin + kPiece);
      c10::SmallVector<V, 8> mass_part(in.models, V{}), weight_part(in.models, V{});
      V reference_part{};
      for_lanes<A>(begin, end, [&](int64_t i, auto lanes) {
        const V y_i = load(y + i, All{});
        const V h_i = y_i > dead ? load(dy_row + i, lanes) - exp(y_i) * pull : V{};
        store(h + i, h_i, All{});
        V rest = h_i;
        for (int64_t m = 0; m < in.models; ++m) {
          const A weight = mixture.weight(m);
          if (weight == 0 && !needs_zero_weight) continue;
          V k, t;
          gradient.factors(m, i, lanes, y_i, &k, &t);
          mass_part[m] += h_i * k;
          weight_part[m] += h_i * t;
          if (weight != 0) rest -= weight * h_i * k;
        }
        reference_part += pad_with(gradient.reference_part(h_i, rest), A(0), lanes);
      });
      for (int64_t m = 0; m < in.models; ++m) {
        mass[m] += sum<A>(mass_part[m]);
        weight_grad[m] += sum<A>(weight_part[m]);
      }
      reference_mass += sum<A>(reference_part);
    }

    for (int64_t m = 0; m < in.models; ++m) {
      const A weight = mixture.weight(m);
      if (grads.weights) grads.weights[row * in.models + m] = static_cast<A>(weight_grad[m]);
      if (grads.carry) grads.carry[row * in.models + m] = weight == 0 ? A(0) : static_cast<A>(weight * mass[m]);
      if (!grads.logits[m]) continue;
      T* to = grads.logits[m] + row * in.vocab;
      const A mass_m = static_cast<A>(mass[m]), shift = mixture.softmax_shift(m);
      const T* policy = in.logits_row(m, row);
      for_lanes<A>(0, in.vocab, [&](int64_t i, auto lanes) {
        if (weight == 0) return store(to + i, V{}, lanes);
        V k, t;
        gradient.factors(m, i, lanes, load(y + i, All{}), &k, &t);
        const V softmax = exp(load(policy + i, lanes) - shift);
        store(to + i, weight * (load(h + i, All{}) * k - softmax * mass_m), lanes);
      });
    }
    if (T* to = grads.reference) {
      to += row * in.vocab;
      for_lanes<A>(0, in.vocab, [&](int64_t i, auto lanes) {
        const V h_i = load(h + i, All{}), y_i = load(y + i, All{});
        V rest = h_i;
        for (int64_t m = 0; m < in.models; ++m) {
          if (mixture.weight(m) == 0) continue;
          V k, t;
          gradient.factors(m, i, lanes, y_i, &k, &t);
          rest -= mixture.weight(m) * h_i * k;
        }
        const V softmax = exp(mixture.log_reference(i, lanes));
        store(to + i, gradient.reference_part(h_i, rest) - softmax * static_cast<A>(reference_mass), lanes);
      });
    }
  });
}

#define LLMKERN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "mix_logits", __VA_ARGS__)

std::tuple<at::Tensor, at::Tensor> mix_logits_fwd(at::TensorList logits, const at::Tensor& weights,
                                                  const std::optional<at::Tensor>& reference,
                                                  const std::optional<at::Tensor>& carry, std::string_view divergence,
                                                  double alpha, bool exact) {
  const at::Tensor& first = logits[0];
  const auto accumulate = first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = at::empty(first.sizes(), first.options());
  at::Tensor stats =
      at::empty({first.size(0), static_cast<int64_t>(logits.size()) + kTail}, first.options().dtype(accumulate));
  LLMKERN_DISPATCH(first.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const MixInputs<scalar_t> in(logits, weights, reference, carry, divergence, alpha, exact);
    auto* y = out.mutable_data_ptr<scalar_t>();
    auto* statistics = stats.mutable_data_ptr<A>();
    if (in.divergence == Divergence::kReverseKl && exact) {
      forward_reverse_kl(in, y, statistics);
    } else {
      forward_divergence(in, y, statistics);
    }
  });
  return {out, stats};
}

std::vector<at::Tensor> mix_logits_bwd(const at::Tensor& dy, const at::Tensor& stats, at::TensorList logits,
                                       const at::Tensor& weights, const std::optional<at::Tensor>& reference,
                                       const std::optional<at::Tensor>& carry, std::string_view divergence,
                                       double alpha, bool exact, const c10::List<bool>& needs) {
  const size_t models = logits.size();
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < models + 3; ++i) {
    const at::Tensor& like =
        i < models
            ? logits[i]
            : (i == models ? weights : (i == models + 1 ? (reference ? *reference : dy) : (carry ? *carry : dy)));
    grads.push_back(needs.get(i) ? at::empty(like.sizes(), like.options()) : at::empty({0}, dy.options()));
  }
  LLMKERN_DISPATCH(logits[0].scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const MixInputs<scalar_t> in(logits, weights, reference, carry, divergence, alpha, exact);
    Gradients<scalar_t> to{};
    for (size_t i = 0; i < models; ++i) {
      to.logits.push_back(needs.get(i) ? grads[i].template mutable_data_ptr<scalar_t>() : nullptr);
    }
    to.weights = needs.get(models) ? grads[models].template mutable_data_ptr<A>() : nullptr;
    to.reference = needs.get(models + 1) ? grads[models + 1].template mutable_data_ptr<scalar_t>() : nullptr;
    to.carry = needs.get(models + 2) ? grads[models + 2].template mutable_data_ptr<A>() : nullptr;
    const at::Tensor upstream = dy.contiguous(), statistics = stats.contiguous();
    const auto* dy_data = upstream.const_data_ptr<scalar_t>();
    if (in.divergence == Divergence::kReverseKl && exact) {
      backward_reverse_kl(in, dy_data, statistics.const_data_ptr<A>(), to);
    } else {
      backward_divergence(in, dy_data, statistics.const_data_ptr<A>(), to);
    }
  });
  return grads;
}

}  // namespace

void register_mix_logits(torch::Library& library) {
  library.impl("mix_logits_fwd", &mix_logits_fwd);
  library.impl("mix_logits_bwd", &mix_logits_bwd);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
