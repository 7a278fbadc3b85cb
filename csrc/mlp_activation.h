// Activations of an MLP and their slopes, a register at a time.
#pragma once

#include "vec.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

template <typename V>
struct Activated {
  V value, slope;
};

namespace detail {
// Phi(-a) exp(a^2 / 2) for a >= 0, by a polynomial in (a mapping of) t = 1 / (1 + 0.3 a): interpolation at Chebyshev
// nodes, relative error 5e-9 up to a = 14, beyond which exp(-a^2 / 2) is zero.
inline Floats mills_ratio(Floats a) {
  const Floats t = 1.0f / (1.0f + 0.3f * a);
  const Floats k = t * 2.4761905f - 1.4761905f;
  Floats p = -5.8428686e-06f * k + 1.2838524e-06f;
  p = p * k + 7.723953e-05f;
  p = p * k - 3.7973048e-05f;
  p = p * k - 9.758959e-04f;
  p = p * k - 3.2104211e-04f;
  p = p * k + 1.4855924e-02f;
  p = p * k + 6.7054078e-02f;
  p = p * k + 1.6233166e-01f;
  p = p * k + 2.5702056e-01f;
  return p * t;
}

template <typename V>
struct NormalAt {
  V below, density;
};

// Probability below x under the standard normal distribution, and the density there.
inline NormalAt<Floats> normal_at(Floats x) {
  const Floats bell = exp_nonpositive(-0.5f * x * x);
  const Floats tail = bell * mills_ratio(x < 0.0f ? -x : x);
  return {x < 0.0f ? tail : 1.0f - tail, 0.39894228f * bell};
}

inline NormalAt<Doubles> normal_at(Doubles x) {
  NormalAt<Doubles> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    result.below[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
    result.density[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
  }
  return result;
}

template <typename V>
inline V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}
}  // namespace detail

// The value, and with kSlope its derivative.
template <Activation kind, bool kSlope, typename V>
inline Activated<V> activate(V x) {
  if constexpr (kind == Activation::kSilu) {
    const V s = detail::sigmoid(x);
    return {x * s, kSlope ? s * (1 + x * (1 - s)) : V{}};
  } else if constexpr (kind == Activation::kGelu) {
    const auto normal = detail::normal_at(x);
    return {x * normal.below, kSlope ? normal.below + x * normal.density : V{}};
  } else if constexpr (kind == Activation::kGeluTanh) {
    // 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    using A = std::remove_cvref_t<decltype(x[0])>;
    constexpr A kTwice = A(1.59576912160573081L), kCubic = A(0.044715L);
    const V s = detail::sigmoid(x * kTwice * (1 + kCubic * x * x));
    return {x * s, kSlope ? s + x * s * (1 - s) * kTwice * (1 + 3 * kCubic * x * x) : V{}};
  } else {
    const V one = V{} + 1;
    // NaN stays NaN.
    return {x < 0 ? V{} : x, x > 0 ? one : V{}};
  }
}

// body.template operator()<kind>() for the kind at hand.
template <typename Body>
inline void with_activation(Activation kind, Body body) {
  switch (kind) {
    case Activation::kSilu:
      return body.template operator()<Activation::kSilu>();
    case Activation::kGelu:
      return body.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return body.template operator()<Activation::kGeluTanh>();
    default:
      return body.template operator()<Activation::kRelu>();
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
