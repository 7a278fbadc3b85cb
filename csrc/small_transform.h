// Transforms of few complex numbers, each of a register of real parts and one of imaginary parts.
#pragma once

#include <numbers>

#include "transpose.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

template <typename A>
struct Complex {
  Lanes<A> re, im;

  LLMKERN_INLINE Complex operator+(const Complex& y) const { return {re + y.re, im + y.im}; }
  LLMKERN_INLINE Complex operator-(const Complex& y) const { return {re - y.re, im - y.im}; }
  template <typename B>
  LLMKERN_INLINE Complex times(B c, B s) const {
    return {re * c - im * s, re * s + im * c};
  }
  LLMKERN_INLINE Complex times(const Complex& y) const { return times(y.re, y.im); }
  LLMKERN_INLINE Complex scaled(A c) const { return {re * c, im * c}; }
  LLMKERN_INLINE Complex conj() const { return {re, -im}; }
  // Times i sign.
  template <int kSign>
  LLMKERN_INLINE Complex turned() const {
    return kSign > 0 ? Complex{-im, re} : Complex{im, -re};
  }
};

template <typename A>
LLMKERN_INLINE inline Complex<A> load_complex(const A* p) {
  return {load(p, All{}), load(p + kLanes<A>, All{})};
}

template <typename A>
LLMKERN_INLINE inline void store_complex(A* p, const Complex<A>& x) {
  store(p, x.re, All{});
  store(p + kLanes<A>, x.im, All{});
}

template <int kSign, typename A>
LLMKERN_INLINE inline void transform_four(Complex<A>& a, Complex<A>& b, Complex<A>& c, Complex<A>& d) {
  const Complex<A> s = a + c, t = a - c, u = b + d, v = (b - d).template turned<kSign>();
  a = s + u, b = t + v, c = s - u, d = t - v;
}

template <int kSign, typename A>
LLMKERN_INLINE inline void transform_odd(Complex<A> (&x)[3]) {
  const A c = static_cast<A>(-0.5), s = static_cast<A>(std::numbers::sqrt3 / 2);
  const Complex<A> sum = x[1] + x[2], even = x[0] + sum.scaled(c);
  const Complex<A> odd = (x[1] - x[2]).template turned<kSign>().scaled(s);
  x[0] = x[0] + sum, x[1] = even + odd, x[2] = even - odd;
}

template <int kSign, typename A>
LLMKERN_INLINE inline void transform_odd(Complex<A> (&x)[5]) {
  // Cosines and sines of 72 and of 144 degrees.
  const A c1 = static_cast<A>(0.30901699437494742410), c2 = static_cast<A>(-0.80901699437494742410),
          s1 = static_cast<A>(0.95105651629515357212), s2 = static_cast<A>(0.58778525229247312917);
  const Complex<A> near = x[1] + x[4], far = x[2] + x[3];
  const Complex<A> dn = (x[1] - x[4]).template turned<kSign>(), df = (x[2] - x[3]).template turned<kSign>();
  const Complex<A> even1 = x[0] + near.scaled(c1) + far.scaled(c2), odd1 = dn.scaled(s1) + df.scaled(s2);
  const Complex<A> even2 = x[0] + near.scaled(c2) + far.scaled(c1), odd2 = dn.scaled(s2) - df.scaled(s1);
  x[0] = x[0] + near + far;
  x[1] = even1 + odd1, x[2] = even2 + odd2, x[3] = even2 - odd2, x[4] = even1 - odd1;
}

// x_k = sum_q e^{sign 2 pi i q k / R} x_q, in place.
template <int R, int kSign, typename A>
LLMKERN_INLINE inline void small_transform(Complex<A> (&x)[R]) {
  if constexpr (R == 1) {
  } else if constexpr (R == 2) {
    const Complex<A> a = x[0], b = x[1];
    x[0] = a + b, x[1] = a - b;
  } else if constexpr (R == 4) {
    transform_four<kSign>(x[0], x[1], x[2], x[3]);
  } else if constexpr (R == 8) {
    transform_four<kSign>(x[0], x[2], x[4], x[6]);
    transform_four<kSign>(x[1], x[3], x[5], x[7]);
    const A half = static_cast<A>(std::numbers::sqrt2 / 2);
    const Complex<A> e1 = x[2], e2 = x[4], e3 = x[6], o0 = x[1];
    const Complex<A> o1 = (x[3] + x[3].template turned<kSign>()).scaled(half);
    const Complex<A> o2 = x[5].template turned<kSign>();
    const Complex<A> o3 = (x[7].template turned<kSign>() - x[7]).scaled(half);
    x[4] = x[0] - o0, x[0] = x[0] + o0;
    x[1] = e1 + o1, x[5] = e1 - o1, x[2] = e2 + o2, x[6] = e2 - o2, x[3] = e3 + o3, x[7] = e3 - o3;
  } else {
    transform_odd<kSign>(x);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
