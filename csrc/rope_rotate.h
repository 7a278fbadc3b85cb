// Rotary positions of tokens, in one pass.
#pragma once

#include "rope_problem.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// y_l = x_l cos_l + x_(l + turning / 2 mod turning) sin_l for l < turning, the other numbers as they are: of ``count``
// tokens, a row of tables each. sign: of sin, -1 turns back.
template <typename T, typename A = Acc<T>>
inline void rotate_rows(const T* x, int64_t row, int64_t count, int64_t dim, int64_t turning, const A* cos,
                        const A* sin, A sign, T* y) {
  const int64_t half = turning / 2;
  if (turning == dim && row == dim && kLanes<A> % dim == 0) {
    // Whole tokens fill a register; their halves change places.
    Lanes<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>> other;
    for (int l = 0; l < kLanes<A>; ++l) other[l] = l / dim * dim + (l + half) % dim;
    for_lanes<A>(0, count * dim, [&](int64_t l, auto lanes) {
      const Lanes<A> here = load(x + l, lanes);
      const Lanes<A> turned = __builtin_shuffle(here, other) * (sign * load(sin + l, lanes));
      store(y + l, here * load(cos + l, lanes) + turned, lanes);
    });
    return;
  }
  for (int64_t t = 0; t < count; ++t, x += row, y += dim, cos += turning, sin += turning) {
    // The second half of a row of tables holds what the first does, but for the sign of sin.
    for_lanes<A>(0, half, [&](int64_t l, auto lanes) {
      const Lanes<A> first = load(x + l, lanes), second = load(x + half + l, lanes);
      const Lanes<A> c = load(cos + half + l, lanes), s = sign * load(sin + half + l, lanes);
      store(y + l, first * c - second * s, lanes);
      store(y + half + l, second * c + first * s, lanes);
    });
    std::copy(x + turning, x + dim, y + turning);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
