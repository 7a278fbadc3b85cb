// Squares of lanes turned over: rows of tokens become rows over tokens, and go back. What is narrower than a square
// goes number by number.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Arrays of registers stay in registers only where every index is a constant before loops are looked at: so loops over
// them are no loops, and what they call is inlined first.
#define LLMKERN_INLINE __attribute__((always_inline))

template <int N, typename Body>
LLMKERN_INLINE inline void unrolled(Body body) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      LLMKERN_INLINE { (body(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

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

// square(first, second) for every square of tokens [first, first + lanes) and numbers [second, second + lanes), and
// single(t, l) for what they leave of ``count`` tokens of ``dim`` numbers.
template <typename A, typename Square, typename Single>
LLMKERN_INLINE inline void for_squares(int64_t count, int64_t dim, Square square, Single single) {
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t tokens = count / kWidth * kWidth, numbers = dim / kWidth * kWidth;
  for (int64_t t = 0; t < tokens; t += kWidth) {
    for (int64_t l = 0; l < numbers; l += kWidth) square(t, l);
    for (int64_t l = numbers; l < dim; ++l) {
      for (int64_t i = t; i < t + kWidth; ++i) single(i, l);
    }
  }
  for (int64_t l = 0; l < dim; ++l) {
    for (int64_t t = tokens; t < count; ++t) single(t, l);
  }
}

// to[l * stride + t] = row(t)[l] for l < dim, t < count; zeros from there up to ``tokens``.
template <typename A, typename Row>
inline void rows_over_tokens(Row row, int64_t count, int64_t dim, int64_t tokens, int64_t stride, A* to) {
  for_squares<A>(
      count, dim,
      [&](int64_t t, int64_t l) LLMKERN_INLINE {
        Lanes<A> x[kLanes<A>];
        unrolled<kLanes<A>>([&](auto i) LLMKERN_INLINE { x[i] = load(row(t + i) + l, All{}); });
        transpose<A>(x);
        unrolled<kLanes<A>>([&](auto i) LLMKERN_INLINE { store(to + (l + i) * stride + t, x[i], All{}); });
      },
      [&](int64_t t, int64_t l) LLMKERN_INLINE { to[l * stride + t] = static_cast<A>(row(t)[l]); });
  for (int64_t l = 0; l < dim; ++l) std::fill(to + l * stride + count, to + l * stride + tokens, A(0));
}

// The way back: take(t, l, x) gets the numbers of token t from the l-th on, a register of them or a single one.
template <typename A, typename Take>
inline void rows_of_tokens(const A* from, int64_t stride, int64_t count, int64_t dim, Take take) {
  for_squares<A>(
      count, dim,
      [&](int64_t t, int64_t l) LLMKERN_INLINE {
        Lanes<A> x[kLanes<A>];
        unrolled<kLanes<A>>([&](auto i) LLMKERN_INLINE { x[i] = load(from + (l + i) * stride + t, All{}); });
        transpose<A>(x);
        unrolled<kLanes<A>>([&](auto i) LLMKERN_INLINE { take(t + i, l, x[i]); });
      },
      [&](int64_t t, int64_t l) LLMKERN_INLINE { take(t, l, from[l * stride + t]); });
}

// What ``take`` does with a register or with a single number.
template <typename A>
LLMKERN_INLINE inline void add_at(A* to, A x) {
  *to += x;
}

template <typename A>
LLMKERN_INLINE inline void add_at(A* to, const Lanes<A>& x) {
  store(to, load(to, All{}) + x, All{});
}

template <typename T>
LLMKERN_INLINE inline void store_at(T* to, Acc<T> x) {
  *to = static_cast<T>(x);
}

template <typename T>
LLMKERN_INLINE inline void store_at(T* to, const Lanes<Acc<T>>& x) {
  store(to, x, All{});
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
