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

// Rows of ``tokens`` numbers: monomials, or columns.
template <typename A>
struct Rows {
  const A* at;
  int64_t tokens;

  const A* row(int64_t r) const { return at + r * tokens; }
};

// Rows that one part adds to, from number ``first`` on.
template <typename A>
struct Sums {
  A* at;
  int64_t tokens, first;

  A* row(int64_t r) const { return at + (r - first) * tokens; }
};

struct Sequence {
  int64_t feature, column;  // -1: there is none, and it is zero
};

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// What one part of a call computes: the sequences of some features and some columns, feature by feature, so that few
// rows are at work at a time. A task is a pair of them; or all of one feature, pair by pair, where features have
// symbols of their own.
struct Part {
  Range features, columns;
  bool own_symbols;

  int64_t tasks() const { return own_symbols ? features.size() : (features.size() * columns.size() + 1) / 2; }
  int64_t pairs_of_a_task() const { return own_symbols ? (columns.size() + 1) / 2 : 1; }
  Sequence at(int64_t task, int64_t pair, int half) const {
    const int64_t s = 2 * (own_symbols ? pair : task) + half, width = columns.size();
    if (s >= (own_symbols ? width : features.size() * width)) return {-1, 0};
    return {features.begin + (own_symbols ? task : s / width), columns.begin + s % width};
  }
};

template <typename A, typename L>
inline void add_to(A* p, Lanes<A> x, L lanes) {
  store(p, load(p, lanes) + x, lanes);
}

// body(lanes) with how many of n numbers from number i on there are in a row, if any.
template <typename A, typename Body>
inline void with_lanes(int64_t tokens, int64_t i, int64_t n, Body body) {
  n = std::min(n, tokens - i);
  if (n == kLanes<A>)
    body(All{});
  else if (n > 0)
    body(First{static_cast<int>(n)});
}

// Two sequences as one.
template <typename A>
struct Pair {
  Sequence halves[2];

  Pair(const Part& part, int64_t task, int64_t pair) : halves{part.at(task, pair, 0), part.at(task, pair, 1)} {}

  // n numbers from token i on: products of the rows of features (by weight) and columns.
  Complex<A> read(const Rows<A>& features, const A* weights, const Rows<A>& columns, int64_t i, int64_t n) const {
    Lanes<A> made[2] = {};
    with_lanes<A>(features.tokens, i, n, [&](auto lanes) {
      for (int half = 0; half < 2; ++half) {
        const Sequence& s = halves[half];
        if (s.feature < 0) continue;
        made[half] = load(features.row(s.feature) + i, lanes) * load(columns.row(s.column) + i, lanes);
        if (weights) made[half] *= weights[s.feature];
      }
    });
    return {made[0], made[1]};
  }

  // take(sequence, lanes, values), for tokens [i, i + n) as far as there are any.
  template <typename Take>
  void write(int64_t tokens, int64_t i, int64_t n, const Complex<A>& x, Take take) const {
    with_lanes<A>(tokens, i, n, [&](auto lanes) {
      if (halves[0].feature >= 0) take(halves[0], lanes, x.re);
      if (halves[1].feature >= 0) take(halves[1], lanes, x.im);
    });
  }
};

constexpr auto kNothing = [](auto...) {};

// What a call is about. symbols: rows on the circle of the transform, divided by its length; or their spectra, as
// buffers of a transform hold them, where all features share one.
template <typename A>
struct FourierProblem {
  const Transform<A>& transform;
  Rows<A> x, y, columns;
  int64_t width;  // Number of columns.
  const A *coefficients, *moments;
  Rows<A> symbols;
};

template <typename A>
inline void transform_symbol(const Transform<A>& transform, const A* circle, A* spectrum) {
  transform.template run<1, 0>(
      &spectrum, {transform.length()},
      [&](int, int64_t i, int64_t n) {
        Complex<A> x{};
        with_lanes<A>(transform.length(), i, n, [&](auto lanes) { x.re = load(circle + i, lanes); });
        return x;
      },
      kNothing, {}, kNothing);
}

// Adds the real part of what has that spectrum to the circle, not divided by the length; spoils the spectrum.
template <typename A>
inline void transform_symbol_back(const Transform<A>& transform, A* spectrum, A* circle) {
  transform.template run<0, 1>(
      &spectrum, {}, kNothing, kNothing, {transform.length()}, [&](int, int64_t i, int64_t n, const Complex<A>& x) {
        with_lanes<A>(transform.length(), i, n, [&](auto lanes) { add_to(circle + i, x.re, lanes); });
      });
}

// The spectrum of the symbol of a task. buffer: for symbols of their own.
template <typename A>
inline const A* symbol_of(const FourierProblem<A>& in, const Part& part, int64_t task, A* buffer) {
  if (!part.own_symbols) return in.symbols.at;
  transform_symbol(in.transform, in.symbols.row(part.features.begin + task), buffer);
  return buffer;
}

// Adds to out (width + 1 rows of queries); the last row is the last column with the weights ``moments``. Buffers: one,
// another for symbols of their own.
template <typename A>
inline void fourier_forward(const FourierProblem<A>& in, const Part& part, int64_t task, A* const* buffers,
                            const Sums<A>& out) {
  const A* symbol = symbol_of(in, part, task, buffers[1]);
  for (int64_t number = 0; number < part.pairs_of_a_task(); ++number) {
    const Pair<A> pair(part, task, number);
    in.transform.template run<1, 1>(
        buffers, {in.y.tokens}, [&](int, int64_t i, int64_t n) { return pair.read(in.y, nullptr, in.columns, i, n); },
        [&](int64_t begin, int64_t end) {
          for (int64_t at = begin * Transform<A>::kElement; at < end * Transform<A>::kElement;
               at += Transform<A>::kElement) {
            store_complex(buffers[0] + at, load_complex(buffers[0] + at).times(load_complex(symbol + at)));
          }
        },
        {in.x.tokens},
        [&](int, int64_t i, int64_t n, const Complex<A>& x) {
          pair.write(in.x.tokens, i, n, x, [&](const Sequence& s, auto lanes, Lanes<A> seen) {
            const Lanes<A> term = load(in.x.row(s.feature) + i, lanes) * seen;
            add_to(out.row(s.column) + i, in.coefficients[s.feature] * term, lanes);
            if (s.column == in.width - 1) add_to(out.row(in.width) + i, in.moments[s.feature] * term, lanes);
          });
        });
  }
}

// Where gradients of one part go: dx and dy by feature, dcolumns by column; the spectrum of that of a shared symbol, or
// dsymbols by feature. The last two may be null.
template <typename A>
struct FourierGradients {
  Rows<A> grad;
  Sums<A> dx, dy, dcolumns;
  A* dspectrum;
  Sums<A> dsymbols;
};

// Buffers: two, one more for symbols of their own, and another for their gradients.
template <typename A>
inline void fourier_backward(const FourierProblem<A>& in, const Part& part, int64_t task, A* const* buffers,
                             const FourierGradients<A>& to) {
  const A* symbol = symbol_of(in, part, task, buffers[2]);
  A* dspectrum = to.dspectrum;
  if (to.dsymbols.at) {
    dspectrum = buffers[3];
    std::fill_n(dspectrum, in.transform.buffer_size(), A{0});
  }
  for (int64_t number = 0; number < part.pairs_of_a_task(); ++number) {
    const Pair<A> pair(part, task, number);
    in.transform.template run<2, 2>(
        buffers, {in.y.tokens, in.x.tokens},
        [&](int b, int64_t i, int64_t n) {
          return b == 0 ? pair.read(in.y, nullptr, in.columns, i, n) : pair.read(in.x, in.coefficients, to.grad, i, n);
        },
        [&](int64_t begin, int64_t end) {
          for (int64_t at = begin * Transform<A>::kElement; at < end * Transform<A>::kElement;
               at += Transform<A>::kElement) {
            const Complex<A> keys = load_complex(buffers[0] + at), queries = load_complex(buffers[1] + at);
            const Complex<A> h = load_complex(symbol + at);
            if (dspectrum) {
              // The real part of what has this spectrum is the correlations of both sequences.
              store_complex(dspectrum + at, load_complex(dspectrum + at) + queries.times(keys.conj()));
            }
            store_complex(buffers[0] + at, keys.times(h));
            store_complex(buffers[1] + at, queries.times(h.conj()));
          }
        },
        {in.x.tokens, in.y.tokens},
        [&](int b, int64_t i, int64_t n, const Complex<A>& x) {
          if (b == 0) {
            pair.write(in.x.tokens, i, n, x, [&](const Sequence& s, auto lanes, Lanes<A> seen) {
              const Lanes<A> slope = load(to.grad.row(s.column) + i, lanes) * in.coefficients[s.feature];
              add_to(to.dx.row(s.feature) + i, slope * seen, lanes);
            });
            return;
          }
          pair.write(in.y.tokens, i, n, x, [&](const Sequence& s, auto lanes, Lanes<A> pulled) {
            add_to(to.dy.row(s.feature) + i, load(in.columns.row(s.column) + i, lanes) * pulled, lanes);
            add_to(to.dcolumns.row(s.column) + i, load(in.y.row(s.feature) + i, lanes) * pulled, lanes);
          });
        });
  }
  if (to.dsymbols.at) transform_symbol_back(in.transform, dspectrum, to.dsymbols.row(part.features.begin + task));
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
