// sample_mixed on the CPU: mix a row into the second-level cache, cut it without a sort, let the kept tokens race.
#include <torch/library.h>

#include <tuple>

#include "mix_divergence.h"
#include "philox.h"
#include "select.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

struct Filters {
  double temperature, top_k, top_p, min_p;
};

// The token whose exponential time -log(1 - u) / p is the smallest; of equal ones the lowest.
struct Race {
  double time = std::numeric_limits<double>::infinity();
  int64_t token = std::numeric_limits<int64_t>::max();

  void enter(int64_t id, double uniform_, double p) {
    const double t = -std::log1p(-uniform_) / p;
    if (t < time || (t == time && id < token)) time = t, token = id;
  }
  void enter(const Race& other) {
    if (other.time < time || (other.time == time && other.token < token)) *this = other;
  }
};

// Lets the kept tokens of pairs of blocks [first, last) race. Most lose against u < -log(1 - u) alone, and pairs
// without a token that could win even with the smallest u are not drawn at all.
constexpr int64_t kPair = 2 * kTokensPerBlock;

template <typename A>
void run_race(const A* p, const Cut<A>& cut, const Philox& philox, int64_t first, int64_t last, Race* race) {
  using V = Lanes<A>;
  constexpr double kSmallest = 0x1p-33;
  for (int64_t pair = first; pair < last; ++pair) {
    const A* p_pair = p + pair * kPair;
    // Rounded up, so that no winner is dismissed.
    const A bound = static_cast<A>(std::min(race->time * (1 + 1e-6), 1e30));
    const A least = std::max(cut.value, static_cast<A>(kSmallest / bound));
    V best{};
    for (int i = 0; i < kPair; i += kLanes<A>) best = max(load(p_pair + i, All{}), best);
    if (top<A>(best) < least) continue;

    uint32_t words[kPair];
    philox.pair_of_blocks(pair, words);
    float u[kPair];
    Ints hits{};
    for (int i = 0; i < kPair; i += kLanes<float>) {
      Words w;
      std::memcpy(&w, words + i, sizeof(w));
      const Floats drawn = uniform(w);
      store(u + i, drawn, All{});
      if constexpr (std::is_same_v<A, float>) {
        const Floats p_i = load(p_pair + i, All{});
        hits |= (drawn < p_i * bound) & (p_i >= cut.value);
      }
    }
    if (std::is_same_v<A, float> && !any(hits)) continue;
    for (int i = 0; i < kPair; ++i) {
      const int64_t id = pair * kPair + i;
      const bool kept = p_pair[i] > cut.value || (p_pair[i] == cut.value && id <= cut.last);
      if (kept && u[i] < p_pair[i] * static_cast<double>(bound)) race->enter(id, u[i], p_pair[i]);
    }
  }
}

// Draws from p (padded with zeros), whose largest entry is one and whose sum is mass.
template <typename A>
int64_t draw(const A* p, int64_t vocab, double mass, const Filters& filters, const Philox& philox, A* buffer) {
  const int64_t width = padded(vocab);
  A* other = buffer + width + kTokensPerBlock;
  Cut<A> cut;
  if (filters.top_k > 0 && filters.top_k < vocab) {
    cut = select_cut<A, false>(p, vocab, static_cast<double>(vocab), filters.top_k, buffer, other);
    // Ties with the k-th are kept.
    cut.last = std::numeric_limits<int64_t>::max();
  }
  if (filters.top_p < 1) {
    if (cut.value > 0) {
      double none;
      A* kept = other + width + kTokensPerBlock;
      const int64_t count =
          collect<A, true>(p, vocab, cut.value, std::numeric_limits<A>::infinity(), kept, &none, &mass);
      Cut<A> within = select_cut<A, true>(kept, count, mass, filters.top_p * mass, buffer, other);
      if (within.last < count) {
        // From a position among the kept to a token.
        int64_t equals = 0, i = -1;
        for (int64_t j = 0; j <= within.last; ++j) equals += kept[j] == within.value;
        while (equals > 0) equals -= p[++i] == within.value;
        within.last = i;
      }
      cut = within;
    } else {
      cut = select_cut<A, true>(p, vocab, mass, filters.top_p * mass, buffer, other);
    }
  }
  if (filters.min_p > cut.value) cut = {static_cast<A>(filters.min_p), std::numeric_limits<int64_t>::max()};

  const int64_t pairs = width / kPair, per_task = kPiecesPerTask * kPiece / kPair;
  c10::SmallVector<Race, 32> races(pairs / per_task + 1);
  at::parallel_for(0, pairs, per_task, [&](int64_t first, int64_t last) {
    run_race(p, cut, philox, first, last, &races[first / per_task]);
  });
  Race winner;
  for (const Race& race : races) winner.enter(race);
  return winner.token;
}

// p = exp((z - top) / temperature), padded with zeros; p may be z. Sums of p, and of exp(z - top), by pieces.
template <typename A>
void exponentials(const A* z, int64_t vocab, A top, A temperature, A* p, double* mass, double* unit_mass) {
  using V = Lanes<A>;
  const int64_t count = count_pieces(vocab);
  c10::SmallVector<double, 128> masses(count, 0.0), unit_masses(count, 0.0);
  const A inverse = 1 / temperature;
  for_pieces(vocab, kPiecesPerTask, [&](int64_t piece, int64_t begin, int64_t end) {
    V part{}, unit_part{};
    for_lanes<A>(begin, end, [&](int64_t i, auto lanes) {
      const V low = load(z + i, All{}) - top;
      if (temperature != 1) unit_part += pad_with(exp_nonpositive(low), A(0), lanes);
      const V p_i = pad_with(exp_nonpositive(temperature == 1 ? low : low * inverse), A(0), lanes);
      part += p_i;
      store(p + i, p_i, All{});
    });
    masses[piece] = sum<A>(part);
    unit_masses[piece] = temperature == 1 ? masses[piece] : sum<A>(unit_part);
  });
  *mass = *unit_mass = 0;
  for (int64_t piece = 0; piece < count; ++piece) *mass += masses[piece], *unit_mass += unit_masses[piece];
  for (int64_t i = (vocab + kLanes<A> - 1) / kLanes<A> * kLanes<A>; i < padded(vocab); ++i) p[i] = 0;
}

template <typename A>
int64_t first_index(const A* z, int64_t n, A value) {
  for (int64_t i = 0; i < n; ++i) {
    if (z[i] == value) return i;
  }
  return -1;
}

// Greedy under exact reverse KL: one pass over the inputs, and nothing is kept.
template <typename T>
std::pair<int64_t, Acc<T>> greedy_linear(const MixInputs<T>& in, const LinearRow<T>& mixture) {
  using A = Acc<T>;
  c10::SmallVector<PieceSum<A>, 128> pieces(count_pieces(in.vocab));
  for_pieces(in.vocab, kPiecesPerTask, [&](int64_t piece, int64_t begin, int64_t end) {
    alignas(64) A z[kPiece];
    const A best = mixture.mix(begin, end, z);
    pieces[piece] = sum_exp_piece(z, end - begin, best);
  });
  const A lse = combine(pieces.data(), pieces.size());
  if (!std::isfinite(lse)) return {-1, lse};
  int64_t winner = 0;
  for (size_t piece = 1; piece < pieces.size(); ++piece) {
    if (pieces[piece].top > pieces[winner].top) winner = piece;
  }
  alignas(64) A z[kPiece];
  const int64_t begin = winner * kPiece, end = std::min(in.vocab, begin + kPiece);
  const A best = mixture.mix(begin, end, z);
  return {begin + first_index(z, end - begin, best), best - lse};
}

template <typename T>
std::pair<int64_t, Acc<T>> sample_linear(const MixInputs<T>& in, const LinearRow<T>& mixture, const Filters& filters,
                                         const Philox& philox, Acc<T>* scratch) {
  using A = Acc<T>;
  A* z = scratch;
  c10::SmallVector<A, 128> tops(count_pieces(in.vocab));
  for_pieces(in.vocab, kPiecesPerTask,
             [&](int64_t piece, int64_t begin, int64_t end) { tops[piece] = mixture.mix(begin, end, z + begin); });
  const A best = *std::max_element(tops.begin(), tops.end());
  double mass, unit_mass;
  exponentials(z, in.vocab, best, static_cast<A>(filters.temperature), z, &mass, &unit_mass);
  const A lse = static_cast<A>(best + std::log(unit_mass));
  if (!std::isfinite(lse) || !std::isfinite(mass)) return {-1, lse};
  const int64_t token = draw(z, in.vocab, mass, filters, philox, scratch + padded(in.vocab));
  A around[kTokensPerBlock];
  mixture.mix(token, token + 1, around);
  return {token, around[0] - lse};
}

template <typename T>
std::pair<int64_t, Acc<T>> sample_divergence(const MixInputs<T>& in, int64_t row, const Filters& filters,
                                             const Philox& philox, Acc<T>* scratch) {
  using A = Acc<T>;
  const int64_t width = padded(in.vocab);
  A* y = scratch;
  c10::SmallVector<A, 16> statistics(in.models + 4);
  if (!mix_divergence_row(in, row, y, statistics.data())) return {-1, std::numeric_limits<A>::quiet_NaN()};
  const A best = *std::max_element(y, y + in.vocab);
  if (filters.temperature == 0) return {first_index(y, in.vocab, best), best};
  double mass, unit_mass;
  A* p = scratch + width;
  exponentials(y, in.vocab, best, static_cast<A>(filters.temperature), p, &mass, &unit_mass);
  const int64_t token = draw(p, in.vocab, mass, filters, philox, p + width);
  return {token, y[token]};
}

std::tuple<at::Tensor, at::Tensor> sample_mixed(at::TensorList logits, const at::Tensor& weights,
                                                const std::optional<at::Tensor>& reference,
                                                const std::optional<at::Tensor>& carry, std::string_view divergence,
                                                double alpha, bool exact, const at::Tensor& filters_,
                                                const at::Tensor& draws_) {
  const at::Tensor& first = logits[0];
  const int64_t rows = first.size(0);
  const auto accumulate = first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor filters = filters_.contiguous(), draws = draws_.contiguous();
  at::Tensor tokens = at::empty({rows}, first.options().dtype(at::kLong));
  at::Tensor logprobs = at::empty({rows}, first.options().dtype(accumulate));
  BadRow bad;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, first.scalar_type(), "sample_mixed", [&] {
    using A = Acc<scalar_t>;
    const MixInputs<scalar_t> in(logits, weights, reference, carry, divergence, alpha, exact);
    const bool linear = in.divergence == Divergence::kReverseKl && exact;
    const auto* filter_data = reinterpret_cast<const Filters*>(filters.const_data_ptr<double>());
    const int64_t* draw_data = draws.const_data_ptr<int64_t>();
    const bool all_greedy =
        std::all_of(filter_data, filter_data + rows, [](const Filters& f) { return f.temperature == 0; });
    // A row of z or p, the two of a divergence, and three of the search for a cut.
    const int64_t width = padded(in.vocab) + kTokensPerBlock, slot_size = (linear && all_greedy ? 0 : 6) * width;
    const at::Tensor scratch = at::empty({scratch_slots(rows), slot_size}, c10::CppTypeToScalarType<A>::value);
    for_rows(rows, [&](int64_t row, int64_t slot) {
      A* own = scratch.mutable_data_ptr<A>() + slot * slot_size;
      const Filters& f = filter_data[row];
      const Philox philox(draw_data[3 * row], draw_data[3 * row + 1], draw_data[3 * row + 2]);
      std::pair<int64_t, A> drawn;
      if (!linear) {
        drawn = sample_divergence(in, row, f, philox, own);
      } else if (f.temperature == 0) {
        drawn = greedy_linear(in, LinearRow<scalar_t>(in, row));
      } else {
        drawn = sample_linear(in, LinearRow<scalar_t>(in, row), f, philox, own);
      }
      if (drawn.first < 0) bad.note(row);
      tokens.mutable_data_ptr<int64_t>()[row] = drawn.first;
      logprobs.mutable_data_ptr<A>()[row] = drawn.second;
    });
  });
  bad.check("sample_mixed");
  return {tokens, logprobs};
}

}  // namespace

void register_sample_mixed(torch::Library& library) { library.impl("sample_mixed", &sample_mixed); }

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
