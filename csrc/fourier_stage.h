// One stage of a transform of elements, each a register of real parts and one of imaginary ones.
#pragma once

#include <cmath>
#include <numbers>
#include <utility>
#include <vector>

#include "small_transform.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Numbers of an element.
template <typename A>
constexpr int64_t kElement = 2 * kLanes<A>;

// e^{-2 pi i part / whole}
template <typename A>
inline std::pair<A, A> turn(int64_t part, int64_t whole) {
  const double angle = -2 * std::numbers::pi * static_cast<double>(part) / static_cast<double>(whole);
  return {static_cast<A>(std::cos(angle)), static_cast<A>(std::sin(angle))};
}

template <typename A>
inline void add_turn(std::vector<A>& turns, int64_t part, int64_t whole) {
  const auto [c, s] = turn<A>(part, whole);
  turns.push_back(c);
  turns.push_back(s);
}

template <typename Body>
inline void with_radix(int radix, Body body) {
  switch (radix) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    default:
      return body.template operator()<8>();
  }
}

// Of blocks of ``block`` elements, each into ``radix`` blocks; and its inverse.
template <typename A>
struct Stage {
  int radix;
  int64_t block;
  std::vector<A> turns;

  Stage(int radix, int64_t block) : radix(radix), block(block) {
    for (int64_t j = 0; j < block / radix; ++j) {
      for (int64_t k = 1; k < radix; ++k) add_turn(turns, j * k, block);
    }
  }

  void there(A* buffer, int64_t begin, int64_t end) const {
    with_radix(radix, [&]<int R>() {
      for (int64_t at = begin; at < end; at += block) there_block<R>(buffer + at * kElement<A>);
    });
  }

  void back(A* buffer, int64_t begin, int64_t end) const {
    with_radix(radix, [&]<int R>() {
      for (int64_t at = begin; at < end; at += block) back_block<R>(buffer + at * kElement<A>);
    });
  }

 private:
  template <int R>
  LLMKERN_INLINE void there_block(A* to) const {
    const int64_t step = block / R * kElement<A>;
    for (int64_t j = 0; j < block / R; ++j) {
      A* at = to + j * kElement<A>;
      Complex<A> x[R];
      unrolled<R>([&](auto q) LLMKERN_INLINE { x[q] = load_complex(at + q * step); });
      small_transform<R, -1>(x);
      if (j > 0) {
        const A* by = turns.data() + 2 * (R - 1) * j;
        unrolled<R - 1>([&](auto k)
                            LLMKERN_INLINE { x[k + 1] = x[k + 1].times(fill(by[2 * k]), fill(by[2 * k + 1])); });
      }
      unrolled<R>([&](auto k) LLMKERN_INLINE { store_complex(at + k * step, x[k]); });
    }
  }

  template <int R>
  LLMKERN_INLINE void back_block(A* to) const {
    const int64_t step = block / R * kElement<A>;
    for (int64_t j = 0; j < block / R; ++j) {
      A* at = to + j * kElement<A>;
      Complex<A> x[R];
      unrolled<R>([&](auto k) LLMKERN_INLINE { x[k] = load_complex(at + k * step); });
      if (j > 0) {
        const A* by = turns.data() + 2 * (R - 1) * j;
        unrolled<R - 1>([&](auto k) LLMKERN_INLINE {
          const Lanes<A> c = fill(by[2 * k]), s = fill(by[2 * k + 1]);
          x[k + 1] = {x[k + 1].re * c + x[k + 1].im * s, x[k + 1].im * c - x[k + 1].re * s};
        });
      }
      small_transform<R, 1>(x);
      unrolled<R>([&](auto q) LLMKERN_INLINE { store_complex(at + q * step, x[q]); });
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
