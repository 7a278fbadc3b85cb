// Sums over all distances by transforms, of one head, as in llmkern/ops/toeplitz_attention/fourier.py:
//
//   N[c][i] = sum_alpha coefficient_alpha x_alpha[i] seen_{alpha c}[i],   seen_{alpha c} = symbol_alpha * (y_alpha
//   column_c)
//
// Monomials are made feature by feature; their products with columns as the first stage of a transform reads them; and
// what comes back is summed as the last stage writes it. So nothing of the size of all features is ever in memory.
#pragma once

#include "fourier.h"
#include "polynomial.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Rows as transforms read them.
template <typename A>
struct Rows {
  const A* at;
  int64_t size;

  const A* row(int64_t r) const { return at + r * size; }
};

// Rows that one part adds to, from number ``first`` on.
template <typename A>
struct Sums {
  A* at;
  int64_t size, first;

  A* row(int64_t r) const { return at + (r - first) * size; }
};

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// What one part of a call computes: the sequences of some features and some columns, feature by feature.
struct Part {
  Range features, columns;
};

// The variables of a monomial, each as often as it is a factor.
using Factors = std::vector<int64_t>;

inline std::vector<Factors> factors_of(const Monomials& tables) {
  std::vector<Factors> panel(tables.panel()), all;
  for (int64_t p = 1; p < tables.panel(); ++p) {
    panel[p] = panel[tables.parent[p]];
    panel[p].push_back(tables.variable[p]);
  }
  for (const auto& block : tables.blocks) {
    for (int64_t p = block.start; p < block.start + block.count; ++p) {
      all.push_back(panel[p]);
      if (block.dim >= 0) all.back().push_back(block.dim);
    }
  }
  return all;
}

template <typename A>
LLMKERN_INLINE inline Lanes<A> lanes_at(const A* row, int64_t i) {
  return load(row + i, All{});
}

template <typename A>
LLMKERN_INLINE inline void add_to(A* p, Lanes<A> x) {
  store(p, load(p, All{}) + x, All{});
}

// As many registers of a row at a time as there are lanes, so that the walk over factors does not count.
template <typename A>
constexpr int64_t kRun = kLanes<A> * kLanes<A>;

// Multiplies what starts at place i by all factors but number ``without``.
template <typename A>
LLMKERN_INLINE inline void multiply(Lanes<A> (&x)[kLanes<A>], const Factors& factors, const Rows<A>& variables,
                                    int64_t i, size_t without) {
  for (size_t f = 0; f < factors.size(); ++f) {
    if (f == without) continue;
    const A* by = variables.row(factors[f]) + i;
    unrolled<kLanes<A>>([&](auto r) LLMKERN_INLINE { x[r] *= lanes_at(by, r * kLanes<A>); });
  }
}

template <typename A>
inline void make_monomial(const Factors& factors, const Rows<A>& variables, A* made) {
  for (int64_t i = 0; i < variables.size; i += kRun<A>) {
    Lanes<A> x[kLanes<A>];
    unrolled<kLanes<A>>([&](auto r) LLMKERN_INLINE { x[r] = fill(A{1}); });
    multiply(x, factors, variables, i, factors.size());
    unrolled<kLanes<A>>([&](auto r) LLMKERN_INLINE { store(made + i + r * kLanes<A>, x[r], All{}); });
  }
}

// Adds to the gradients of the variables what ``slope``, that of the monomial, is to them.
template <typename A>
inline void pull_monomial(const Factors& factors, const Rows<A>& variables, const A* slope, const Sums<A>& to) {
  for (size_t f = 0; f < factors.size(); ++f) {
    for (int64_t i = 0; i < variables.size; i += kRun<A>) {
      Lanes<A> x[kLanes<A>];
      unrolled<kLanes<A>>([&](auto r) LLMKERN_INLINE { x[r] = lanes_at(slope, i + r * kLanes<A>); });
      multiply(x, factors, variables, i, f);
      A* at = to.row(factors[f]) + i;
      unrolled<kLanes<A>>([&](auto r) LLMKERN_INLINE { add_to(at + r * kLanes<A>, x[r]); });
    }
  }
}

// What a call is about. symbols: each a circle of complex numbers, a row of real parts and one of imaginary ones,
// divided by its length. Those of distances from 0 on are real; negative ones are counted from its end, and imaginary.
template <typename A>
struct FourierProblem {
  const Transform<A>& transform;
  std::vector<Factors> factors;
  Rows<A> x, y, columns;
  int64_t width;  // Number of columns.
  const A *coefficients, *moments;
  Rows<A> symbols;
  const A* spectrum;  // Of the symbol that all features share, if they do.
};

// What a thread works in: two buffers of transforms; the monomials, and in the backward their slopes; and for symbols
// of their own their spectrum, and that of their gradient.
template <typename A>
struct FourierScratch {
  A* buffers[2];
  A *x, *y, *dx, *dy;
  A *spectrum, *dspectrum;
};

template <typename A>
inline void transform_symbol(const Transform<A>& transform, const A* circle, A* spectrum) {
  const A* imaginary = circle + transform.row_size();
  transform.template run<1, 0>(
      &spectrum, [&](int, int64_t i) LLMKERN_INLINE { return Complex<A>{lanes_at(circle, i), lanes_at(imaginary, i)}; },
      [](int64_t, Complex<A>(&)[1]) {}, [](auto...) {});
}

// Adds what has that spectrum to the circle, not divided by the length; spoils the spectrum.
template <typename A>
inline void transform_symbol_back(const Transform<A>& transform, A* spectrum, A* circle) {
  A* imaginary = circle + transform.row_size();
  transform.template run<0, 1>(
      &spectrum, [](int, int64_t) { return Lanes<A>{}; }, [](int64_t, Complex<A>(&)[1]) {},
      [&](int, int64_t i, const Complex<A>& x) LLMKERN_INLINE {
        add_to(circle + i, x.re);
        add_to(imaginary + i, x.im);
      });
}

// The spectrum of the symbol of a feature.
template <typename A>
inline const A* spectrum_of(const FourierProblem<A>& in, int64_t feature, A* scratch) {
  if (in.spectrum) return in.spectrum;
  transform_symbol(in.transform, in.symbols.row(feature), scratch);
  return scratch;
}

// Adds to out (width + 1 rows of queries); the last row is the last column with the weights ``moments``.
template <typename A>
inline void fourier_forward(const FourierProblem<A>& in, const Part& part, const FourierScratch<A>& scratch,
                            const Sums<A>& out) {
  const A *x = scratch.x, *y = scratch.y;
  for (int64_t feature = part.features.begin; feature < part.features.end; ++feature) {
    const A* spectrum = spectrum_of(in, feature, scratch.spectrum);
    make_monomial(in.factors[feature], in.x, scratch.x);
    make_monomial(in.factors[feature], in.y, scratch.y);
    const A weight = in.coefficients[feature], moment = in.moments[feature];
    for (int64_t c = part.columns.begin; c < part.columns.end; ++c) {
      const A* column = in.columns.row(c);
      A *to = out.row(c), *to_moment = c == in.width - 1 ? out.row(in.width) : nullptr;
      in.transform.template run<1, 1>(
          scratch.buffers, [&](int, int64_t i) LLMKERN_INLINE { return lanes_at(y, i) * lanes_at(column, i); },
          [&](int64_t place, Complex<A>(&keys)[1])
              LLMKERN_INLINE { keys[0] = keys[0].times(load_complex(spectrum + place * Transform<A>::kElement)); },
          [&](int, int64_t i, const Complex<A>& seen) LLMKERN_INLINE {
            const Lanes<A> term = lanes_at(x, i) * seen.re;
            add_to(to + i, weight * term);
            if (to_moment) add_to(to_moment + i, moment * term);
          });
    }
  }
}

// Where gradients of one part go: dx and dy by variable, dcolumns by column; the spectrum of that of a shared symbol,
// or dsymbols by feature. The last two may be null.
template <typename A>
struct FourierGradients {
  Rows<A> grad;
  Sums<A> dx, dy, dcolumns;
  A* dspectrum;
  Sums<A> dsymbols;
};

template <typename A>
inline void fourier_backward(const FourierProblem<A>& in, const Part& part, const FourierScratch<A>& scratch,
                             const FourierGradients<A>& to) {
  const A *x = scratch.x, *y = scratch.y;
  A *dx = scratch.dx, *dy = scratch.dy;
  for (int64_t feature = part.features.begin; feature < part.features.end; ++feature) {
    const A* spectrum = spectrum_of(in, feature, scratch.spectrum);
    A* dspectrum = to.dspectrum;
    if (to.dsymbols.at) {
      dspectrum = scratch.dspectrum;
      std::fill_n(dspectrum, in.transform.buffer_size(), A{0});
    }
    const Factors& factors = in.factors[feature];
    make_monomial(factors, in.x, scratch.x);
    make_monomial(factors, in.y, scratch.y);
    std::fill_n(dx, in.x.size, A{0});
    std::fill_n(dy, in.y.size, A{0});
    const A weight = in.coefficients[feature];
    for (int64_t c = part.columns.begin; c < part.columns.end; ++c) {
      const A *column = in.columns.row(c), *grad = to.grad.row(c);
      A* dcolumn = to.dcolumns.row(c);
      in.transform.template run<2, 2>(
          scratch.buffers,
          [&](int b, int64_t i) LLMKERN_INLINE {
            return b == 0 ? lanes_at(y, i) * lanes_at(column, i) : weight * lanes_at(x, i) * lanes_at(grad, i);
          },
          [&](int64_t place, Complex<A>(&of)[2]) LLMKERN_INLINE {
            const int64_t i = place * Transform<A>::kElement;
            const Complex<A> keys = of[0], queries = of[1], h = load_complex(spectrum + i);
            if (dspectrum) store_complex(dspectrum + i, load_complex(dspectrum + i) + queries.times(keys.conj()));
            of[0] = keys.times(h);
            of[1] = queries.times(h.conj());
          },
          [&](int b, int64_t i, const Complex<A>& found) LLMKERN_INLINE {
            if (b == 0) {
              add_to(dx + i, weight * lanes_at(grad, i) * found.re);
            } else {
              add_to(dy + i, lanes_at(column, i) * found.re);
              add_to(dcolumn + i, lanes_at(y, i) * found.re);
            }
          });
    }
    pull_monomial(factors, in.x, dx, to.dx);
    pull_monomial(factors, in.y, dy, to.dy);
    if (to.dsymbols.at) transform_symbol_back(in.transform, dspectrum, to.dsymbols.row(feature));
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
