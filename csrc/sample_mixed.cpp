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

// Kept tokens that race a register at a time, wherever they lie: where a cut leaves few, most numbers of a block would
// be drawn for nothing.
template <typename A>
class ScatteredRace {
 public:
  ScatteredRace(const Probability<A>& probability, double min_p, const Philox& philox, Race* race)
      : probability_(probability), min_p_(min_p), philox_(philox), race_(race) {}

  void enter(int64_t id, A z) {
    ids_[count_] = static_cast<uint32_t>(id);
    z_[count_] = z;
    if (++count_ == kWidth) run();
  }

  void run() {
    float u[kWidth];
    A p[kWidth];
    for (int i = count_; i < kWidth; ++i) ids_[i] = 0, z_[i] = -std::numeric_limits<A>::infinity();
    store(u, uniform(philox_.words_of(load_words(ids_))), All{});
    for (int i = 0; i < kWidth; i += kLanes<A>) store(p + i, probability_(load(z_ + i, All{})), All{});
    for (int i = 0; i < count_; ++i) {
      if (p[i] >= min_p_) race_->enter(ids_[i], u[i], p[i]);
    }
    count_ = 0;
  }

 private:
  static constexpr int kWidth = kLanes<float>;
  const Probability<A> probability_;
  const double min_p_;
  const Philox& philox_;
  Race* race_;
  uint32_t ids_[kWidth];
  A z_[kWidth];
  int count_ = 0;
};

// Lets the kept tokens of blocks [first, last) race. Of many that are kept most lose against u < -log(1 - u) alone, and
// most blocks as a whole: with their smallest u for each lane against their largest score there.
template <typename A>
void run_race(const Scores<A>& scores, const Probability<A>& probability, const Cut<A>& cut, double min_p,
              const Philox& philox, int64_t first, int64_t last, Race* race) {
  using V = Lanes<A>;
  constexpr int kScattered = 16;
  ScatteredRace<A> scattered(probability, min_p, philox, race);
  for (int64_t block = first; block < last; ++block) {
    if (scores.below(block, cut.value)) continue;
    const A* z = scores.z + block * kBlock;
    const auto kept = [&](int i) { return z[i] > cut.value || (z[i] == cut.value && block * kBlock + i <= cut.last); };
    if (cut.value > -std::numeric_limits<A>::infinity()) {
      V reached{};
      for (int i = 0; i < kBlock; i += kLanes<A>) reached += load(z + i, All{}) >= cut.value ? fill(A(1)) : V{};
      if (sum<A>(reached) <= kScattered) {
        for (int i = 0; i < kBlock; i += kLanes<A>) {
          if (!any(load(z + i, All{}) >= cut.value)) continue;
          for (int j = i; j < i + kLanes<A>; ++j) {
            if (kept(j)) scattered.enter(block * kBlock + j, z[j]);
          }
        }
        continue;
      }
    }
    // Rounded up, so that no winner is dismissed.
    const A bound = static_cast<A>(std::min(race->time * (1 + 1e-6), 1e30));
    uint32_t words[kBlock];
    philox.pair_of_blocks(block, words);
    if constexpr (std::is_same_v<A, float>) {
      Words least = Words{} - 1;
      for (int i = 0; i < kBlock; i += kLanes<float>) {
        const Words w = load_words(words + i);
        least = w < least ? w : least;
      }
      if (!any(uniform(least) < probability(scores.block_tops[block]) * bound)) continue;
    }
    float u[kBlock];
    A p[kBlock];
    for (int i = 0; i < kBlock; i += kLanes<float>) store(u + i, uniform(load_words(words + i)), All{});
    for (int i = 0; i < kBlock; i += kLanes<A>) store(p + i, probability(load(z + i, All{})), All{});
    for (int i = 0; i < kBlock; ++i) {
      if (kept(i) && p[i] >= min_p && u[i] < p[i] * static_cast<double>(bound)) {
        race->enter(block * kBlock + i, u[i], p[i]);
      }
    }
  }
  scattered.run();
}

// Draws from the scores of a row, which go on with -inf to the end of the last block. mass() is the sum of their
// probabilities, asked for only where a filter needs it.
template <typename A, typename Mass>
int64_t draw(const Scores<A>& scores, const Probability<A>& probability, const Filters& filters, const Philox& philox,
             Mass mass, A* buffer) {
  const int64_t width = padded(scores.count) + kTokensPerBlock;
  A *other = buffer + width, *kept = other + width;
  Cut<A> cut;
  if (filters.top_k > 0 && filters.top_k < scores.count) {
    cut = select_cut(scores, Unit{}, static_cast<double>(scores.count), filters.top_k, buffer, other);
    // Ties with the k-th are kept.
    cut.last = std::numeric_limits<int64_t>::max();
    if (filters.top_p < 1) {
      const auto found = collect(scores, cut.value, std::numeric_limits<A>::infinity(), probability, kept);
      Cut<A> within = select_cut(Scores<A>{kept, found.count}, probability, found.within, filters.top_p * found.within,
                                 buffer, other);
      if (within.last < found.count) {
        // From a position among the kept to a token.
        int64_t equals = 0, i = -1;
        for (int64_t j = 0; j <= within.last; ++j) equals += kept[j] == within.value;
        while (equals > 0) equals -= scores.z[++i] == within.value;
        within.last = i;
      }
      cut = within;
    }
  } else if (filters.top_p < 1) {
    const double total = mass();
    cut = select_cut(scores, probability, total, filters.top_p * total, buffer, other);
  }

  const int64_t blocks = padded(scores.count) / kBlock, per_task = kPiecesPerTask * kPiece / kBlock;
  // One for each thread, as tasks do not begin at multiples of their least size; within a row of its own thread, one.
  c10::SmallVector<Race, 32> races(std::max(at::get_num_threads(), at::get_thread_num() + 1));
  at::parallel_for(0, blocks, per_task, [&](int64_t first, int64_t last) {
    run_race(scores, probability, cut, filters.min_p, philox, first, last, &races[at::get_thread_num()]);
  });
  Race winner;
  for (const Race& race : races) winner.enter(race);
  return winner.token;
}

// Largest scores of the blocks of [begin, end), which go on with -inf to the end of the last one.
template <typename A>
void find_block_tops(const A* z, int64_t begin, int64_t end, Lanes<A>* tops) {
  for (int64_t i = begin; i < end; i += kBlock) {
    Lanes<A> best = load(z + i, All{});
    for (int64_t j = kLanes<A>; j < kBlock; j += kLanes<A>) best = max(load(z + i + j, All{}), best);
    tops[i / kBlock] = best;
  }
}

// A row of scores and what the draw needs beside it, in one piece of scratch.
template <typename A>
struct Workspace {
  static int64_t size(int64_t vocab) { return 5 * (padded(vocab) + kTokensPerBlock); }

  Workspace(A* scratch, int64_t vocab)
      : z(scratch),
        buffers(scratch + padded(vocab) + kTokensPerBlock),
        tops(reinterpret_cast<Lanes<A>*>(buffers + 3 * (padded(vocab) + kTokensPerBlock))) {}

  A *z, *buffers;
  Lanes<A>* tops;
};

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
    const A best = mixture.mix_couples(begin, end, z);
    pieces[piece] =
        sum_exp_piece(z, end - begin, best, A(1), [&](int64_t i, int64_t j) { mixture.prefetch(end + i, end + j); });
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

template <typename A>
Probability<A> probability_of(A top, const Filters& filters) {
  const double temperature = std::max<double>(filters.temperature, std::numeric_limits<A>::min());
  return {top, static_cast<A>(1 / temperature)};
}

template <typename T>
std::pair<int64_t, Acc<T>> sample_linear(const MixInputs<T>& in, const LinearRow<T>& mixture, const Filters& filters,
                                         const Philox& philox, Acc<T>* scratch) {
  using A = Acc<T>;
  const Workspace<A> work(scratch, in.vocab);
  const int64_t count = count_pieces(in.vocab);
  const A inverse = probability_of(A(0), filters).inverse_temperature;
  const bool tempered = inverse != 1 && filters.top_p < 1;
  c10::SmallVector<PieceSum<A>, 128> pieces(count), tempered_pieces(count);
  for_pieces(in.vocab, kPiecesPerTask, [&](int64_t piece, int64_t begin, int64_t end) {
    A* z = work.z + begin;
    const A top = mixture.mix(begin, end, z);
    if (end == in.vocab) std::fill(work.z + end, work.z + padded(end), -std::numeric_limits<A>::infinity());
    find_block_tops(work.z, begin, end, work.tops);
    pieces[piece] =
        sum_exp_piece(z, end - begin, top, A(1), [&](int64_t i, int64_t j) { mixture.prefetch(end + i, end + j); });
    if (tempered) tempered_pieces[piece] = sum_exp_piece(z, end - begin, top, inverse);
  });
  const A top = top_of(pieces.data(), count), lse = combine(pieces.data(), count);
  if (!std::isfinite(lse)) return {-1, lse};
  const auto mass = [&] { return sum_of((tempered ? tempered_pieces : pieces).data(), count, top, inverse); };
  const Scores<A> scores{work.z, in.vocab, work.tops};
  const int64_t token = draw(scores, probability_of(top, filters), filters, philox, mass, work.buffers);
  return {token, work.z[token] - lse};
}

template <typename T>
std::pair<int64_t, Acc<T>> sample_divergence(const MixInputs<T>& in, int64_t row, const Filters& filters,
                                             const Philox& philox, Acc<T>* scratch) {
  using A = Acc<T>;
  // The mixing takes the space of three rows; two of them are free again for the draw.
  const Workspace<A> work(scratch, in.vocab);
  A* y = work.z;
  c10::SmallVector<A, 16> statistics(in.models + 4);
  if (!mix_divergence_row(in, row, y, statistics.data())) return {-1, std::numeric_limits<A>::quiet_NaN()};
  const A best = *std::max_element(y, y + in.vocab);
  if (filters.temperature == 0) return {first_index(y, in.vocab, best), best};
  std::fill(y + in.vocab, y + padded(in.vocab), -std::numeric_limits<A>::infinity());
  find_block_tops(y, 0, in.vocab, work.tops);
  const Probability<A> probability = probability_of(best, filters);
  const auto mass = [&] {
    double total = 0;
    for (int64_t i = 0; i < in.vocab; i += kPiece) {
      const int64_t n = std::min(in.vocab, i + kPiece) - i;
      total += sum_exp_piece(y + i, n, best, probability.inverse_temperature).sum;
    }
    return total;
  };
  const Scores<A> scores{y, in.vocab, work.tops};
  const int64_t token = draw(scores, probability, filters, philox, mass, work.buffers);
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
    const int64_t slot_size = linear && all_greedy ? 0 : Workspace<A>::size(in.vocab);
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
