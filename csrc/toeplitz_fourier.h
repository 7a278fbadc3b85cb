// Sums over all distances by transforms, of one head, as in llmkern/ops/toeplitz_attention/fourier.py:
//
//   N[c][i] = sum_alpha coefficient_alpha x_alpha[i] seen_{alpha c}[i],   seen_{alpha c} = symbol_alpha * (y_alpha
//   column_c)
//
// Sequences (alpha, c) are made from rows of monomials and of columns as the first stage of a transform reads them, and
// what comes back is summed as the last stage writes it, so that none of them is ever in memory whole. As symbols are
// real, two sequences go as the real and the imaginary part of one.
#pragma once

#include "fourier.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// x[i][lane] <-> x[lane][i].
template <typename A, int kWidth = 1>
LLMKERN_INLINE inline void transpose(Lanes<A> (&x)[kLanes<A>]) {
  using Places = Lanes<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;
  if constexpr (kWidth < kLanes<A>) {
    Places low, high;
    for (int i = 0; i < kLanes<A>; ++i) {
      low[i] = i & kWidth ? kLanes<A> + i - kWidth : i;
      high[i] = i & kWidth ? kLanes<A> + i : i + kWidth;
    }
    unrolled<kLanes<A>>([&](auto i) LLMKERN_INLINE {
      if constexpr (!(i & kWidth)) {
        const Lanes<A> a = x[i], b = x[i | kWidth];
        x[i] = __builtin_shuffle(a, b, low), x[i | kWidth] = __builtin_shuffle(a, b, high);
      }
    });
    transpose<A, 2 * kWidth>(x);
  }
}

// Rows of ``tokens`` numbers: monomials, or columns.
template <typename A>
struct Rows {
  const A* at;
  int64_t tokens;

  const A* row(int64_t r) const { return at + r * tokens; }
};

// Rows that one task adds to, from number ``first`` on.
template <typename A>
struct Sums {
  A* at;
  int64_t tokens, first;

  A* row(int64_t r) const { return at + (r - first) * tokens; }
};

struct Sequence {
  int64_t feature, column;  // -1: there is none, and it is zero
};

// Which sequences stand in which lanes: pairs of sequences (two lanes of one element), kLanes pairs a task.
struct Sequences {
  int64_t features, width;
  bool own_symbols;  // Then both sequences of a pair are of one feature.
  bool by_column;    // Else by feature; of symbols of their own they always are.

  int64_t pairs() const { return own_symbols ? features * ((width + 1) / 2) : (features * width + 1) / 2; }
  template <typename A>
  int64_t tasks() const {
    return (pairs() + kLanes<A> - 1) / kLanes<A>;
  }
  Sequence at(int64_t pair, int part) const {
    if (pair >= pairs()) return {-1, 0};
    if (own_symbols) {
      const int64_t each = (width + 1) / 2, column = pair % each * 2 + part;
      return {column < width ? pair / each : -1, column};
    }
    const int64_t s = 2 * pair + part;
    if (s >= features * width) return {-1, 0};
    return by_column ? Sequence{s % features, s / features} : Sequence{s / width, s % width};
  }
  // Columns that tasks [first, last) have to do with, and with the last of them one more: [begin, end).
  template <typename A>
  std::pair<int64_t, int64_t> columns_of(int64_t first, int64_t last) const {
    if (own_symbols || !by_column) return {0, width + 1};
    const int64_t each = 2 * kLanes<A>, end = (std::min(last * each, features * width) - 1) / features + 1;
    return {first * each / features, end == width ? end + 1 : end};
  }
  // Features that a task has to do with: [begin, end).
  template <typename A>
  std::pair<int64_t, int64_t> features_of(int64_t task) const {
    const int64_t last = std::min((task + 1) * kLanes<A>, pairs()) - 1;
    const int64_t end = std::max(at(last, 0).feature, at(last, 1).feature) + 1;
    return {at(task * kLanes<A>, 0).feature, end};
  }
};

template <typename A>
class FourierTask {
 public:
  static constexpr int kWidth = kLanes<A>;

  FourierTask(const Sequences& sequences, int64_t task) {
    for (int part = 0; part < 2; ++part) {
      for (int lane = 0; lane < kWidth; ++lane) sequence_[part][lane] = sequences.at(task * kWidth + lane, part);
    }
  }

  // n elements from token i on: products of the rows of features (by weight) and columns.
  void read(const Rows<A>& features, const A* weights, const Rows<A>& columns, int64_t i, int64_t n,
            Complex<A>* x) const {
    read_parts<2>(features.tokens, i, n, x, [&](const Sequence& s, auto lanes) {
      const Lanes<A> product = load(features.row(s.feature) + i, lanes) * load(columns.row(s.column) + i, lanes);
      return weights ? product * weights[s.feature] : product;
    });
  }

  // The symbol of each lane's feature.
  void read_symbols(const Rows<A>& symbols, int64_t i, int64_t n, Complex<A>* x) const {
    read_parts<1>(symbols.tokens, i, n, x,
                  [&](const Sequence& s, auto lanes) { return load(symbols.row(s.feature) + i, lanes); });
  }

  // take(sequence, lanes, values) of the first kParts parts, for tokens [i, i + n) as far as there are any.
  template <int kParts, typename Take>
  void write(int64_t tokens, int64_t i, int64_t n, const Complex<A>* x, Take take) const {
    n = std::min(n, tokens - i);
    if (n <= 0) return;
    for (int part = 0; part < kParts; ++part) {
      Lanes<A> rows[kWidth];
      for (int t = 0; t < kWidth; ++t) rows[t] = part ? x[t].im : x[t].re;
      transpose<A>(rows);
      for (int lane = 0; lane < kWidth; ++lane) {
        const Sequence& s = sequence_[part][lane];
        if (s.feature < 0) continue;
        if (n == kWidth)
          take(s, All{}, rows[lane]);
        else
          take(s, First{static_cast<int>(n)}, rows[lane]);
      }
    }
  }

 private:
  template <int kParts, typename Make>
  void read_parts(int64_t tokens, int64_t i, int64_t n, Complex<A>* x, Make make) const {
    n = std::min(n, tokens - i);
    for (int part = 0; part < 2; ++part) {
      Lanes<A> rows[kWidth] = {};
      if (n > 0 && part < kParts) {
        for (int lane = 0; lane < kWidth; ++lane) {
          const Sequence& s = sequence_[part][lane];
          if (s.feature < 0) continue;
          rows[lane] = n == kWidth ? make(s, All{}) : make(s, First{static_cast<int>(n)});
        }
        transpose<A>(rows);
      }
      for (int t = 0; t < kWidth; ++t) (part ? x[t].im : x[t].re) = rows[t];
    }
  }

  Sequence sequence_[2][kWidth];
};

template <typename A, typename L>
inline void add_to(A* p, Lanes<A> x, L lanes) {
  store(p, load(p, lanes) + x, lanes);
}

// What a call is about. symbols: on the circle of the transform, where features have their own; one that all share is
// transformed before, its spectrum in rows of real and of imaginary parts. Either is divided by the length.
template <typename A>
struct FourierProblem {
  const Transform<A>& transform;
  Sequences sequences;
  Rows<A> x, y, columns;
  const A *coefficients, *moments;
  Rows<A> symbols;

  // At element i; h: spectra of the lanes, or null.
  Complex<A> symbol(const A* h, int64_t i) const {
    if (h) return load_complex(h + i * Transform<A>::kElement);
    return {fill(symbols.row(0)[i]), fill(symbols.row(1)[i])};
  }
};

constexpr auto kNothing = [](auto...) {};

// Spectrum of one symbol, rows of real and imaginary parts. buffer: of one sequence.
template <typename A>
inline void transform_shared(const Transform<A>& transform, const A* circle, A* buffer, A* spectrum) {
  const int64_t length = transform.length();
  transform.template run<1, 0>(
      &buffer,
      [&](int, int64_t i, int64_t n, Complex<A>* x) {
        for (int64_t t = 0; t < n; ++t) x[t] = {fill(circle[i + t]), Lanes<A>{}};
      },
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          spectrum[i] = buffer[i * Transform<A>::kElement];
          spectrum[length + i] = buffer[i * Transform<A>::kElement + kLanes<A>];
        }
      },
      kNothing);
}

// The real part of what has that spectrum, not divided by the length.
template <typename A>
inline void transform_shared_back(const Transform<A>& transform, const A* spectrum, A* buffer, A* circle) {
  const int64_t length = transform.length();
  transform.template run<0, 1>(
      &buffer, kNothing,
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          store_complex<A>(buffer + i * Transform<A>::kElement, {fill(spectrum[i]), fill(spectrum[length + i])});
      },
      [&](int, int64_t i, int64_t n, const Complex<A>* x) {
        for (int64_t t = 0; t < n; ++t) circle[i + t] = x[t].re[0];
      });
}

template <typename A>
inline const A* transform_own(const FourierProblem<A>& in, const FourierTask<A>& task, A* buffer) {
  if (!in.sequences.own_symbols) return nullptr;
  in.transform.template run<1, 0>(
      &buffer, [&](int, int64_t i, int64_t n, Complex<A>* x) { task.read_symbols(in.symbols, i, n, x); }, kNothing,
      kNothing);
  return buffer;
}

// Adds to out (width + 1 rows of queries); the last row is the last column with the weights ``moments``. Buffers: one,
// another for symbols of their own.
template <typename A>
inline void fourier_forward(const FourierProblem<A>& in, int64_t number, A* const* buffers, const Sums<A>& out) {
  const FourierTask<A> task(in.sequences, number);
  const A* h = transform_own(in, task, buffers[1]);
  const int64_t width = in.sequences.width;
  in.transform.template run<1, 1>(
      buffers, [&](int, int64_t i, int64_t n, Complex<A>* x) { task.read(in.y, nullptr, in.columns, i, n, x); },
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          A* at = buffers[0] + i * Transform<A>::kElement;
          store_complex(at, load_complex(at).times(in.symbol(h, i)));
        }
      },
      [&](int, int64_t i, int64_t n, const Complex<A>* x) {
        task.template write<2>(in.x.tokens, i, n, x, [&](const Sequence& s, auto lanes, Lanes<A> seen) {
          const Lanes<A> term = load(in.x.row(s.feature) + i, lanes) * seen;
          add_to(out.row(s.column) + i, in.coefficients[s.feature] * term, lanes);
          if (s.column == width - 1) add_to(out.row(width) + i, in.moments[s.feature] * term, lanes);
        });
      });
}

// Where gradients of one task go: dx and dy by feature, dcolumns by column; the spectrum of that of a shared symbol, as
// FourierProblem has it, or dsymbols by feature. The last two may be null.
template <typename A>
struct FourierGradients {
  Rows<A> grad;
  Sums<A> dx, dy, dcolumns;
  A* dspectrum;
  Sums<A> dsymbols;
};

// Buffers: two, one more for symbols of their own, and another for their gradients.
template <typename A>
inline void fourier_backward(const FourierProblem<A>& in, int64_t number, A* const* buffers,
                             const FourierGradients<A>& to) {
  const FourierTask<A> task(in.sequences, number);
  const A* h = transform_own(in, task, buffers[2]);
  const int64_t length = in.transform.length();
  in.transform.template run<2, 2>(
      buffers,
      [&](int b, int64_t i, int64_t n, Complex<A>* x) {
        if (b == 0)
          task.read(in.y, nullptr, in.columns, i, n, x);
        else
          task.read(in.x, in.coefficients, to.grad, i, n, x);
      },
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t at = i * Transform<A>::kElement;
          const Complex<A> keys = load_complex(buffers[0] + at), queries = load_complex(buffers[1] + at);
          const Complex<A> symbol = in.symbol(h, i), both = queries.times(keys.conj());
          if (to.dsymbols.at) store_complex(buffers[3] + at, both);
          if (to.dspectrum) {
            to.dspectrum[i] += sum<A>(both.re);
            to.dspectrum[length + i] += sum<A>(both.im);
          }
          store_complex(buffers[0] + at, keys.times(symbol));
          store_complex(buffers[1] + at, queries.times(symbol.conj()));
        }
      },
      [&](int b, int64_t i, int64_t n, const Complex<A>* x) {
        if (b == 0) {
          task.template write<2>(in.x.tokens, i, n, x, [&](const Sequence& s, auto lanes, Lanes<A> seen) {
            const Lanes<A> slope = load(to.grad.row(s.column) + i, lanes) * in.coefficients[s.feature];
            add_to(to.dx.row(s.feature) + i, slope * seen, lanes);
          });
          return;
        }
        task.template write<2>(in.y.tokens, i, n, x, [&](const Sequence& s, auto lanes, Lanes<A> pulled) {
          add_to(to.dy.row(s.feature) + i, load(in.columns.row(s.column) + i, lanes) * pulled, lanes);
          add_to(to.dcolumns.row(s.column) + i, load(in.y.row(s.feature) + i, lanes) * pulled, lanes);
        });
      });
  if (!to.dsymbols.at) return;
  // The real part is the correlations of both sequences of a pair.
  in.transform.template run<0, 1>(buffers + 3, kNothing, kNothing, [&](int, int64_t i, int64_t n, const Complex<A>* x) {
    task.template write<1>(length, i, n, x, [&](const Sequence& s, auto lanes, Lanes<A> pulled) {
      add_to(to.dsymbols.row(s.feature) + i, pulled, lanes);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
