// Circular convolutions by fast Fourier transform of as many complex sequences at a time as a register has lanes: every
// operation is one of whole registers, and nothing is ever shuffled.
//
// Decimation in frequency on the way there and in time on the way back, stage by stage on blocks that shrink: spectra
// stay in the order in which the stages leave them, and the frequencies of one small block go there, through the
// product and back while they are in the cache.
#pragma once

#include <cmath>
#include <memory>
#include <mutex>
#include <numbers>
#include <vector>

#include "common.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Elements of blocks whose remaining stages run one after the other: 32 KiB, within the first-level cache.
constexpr int64_t kSmallTransform = 32 * 1024 / (2 * kRegisterBytes);

// Arrays of registers stay in registers only where every index is a constant before loops are looked at: so loops over
// them are no loops, and what they call is inlined first.
#define LLMKERN_INLINE __attribute__((always_inline))

template <int N, typename Body>
LLMKERN_INLINE inline void unrolled(Body body) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      LLMKERN_INLINE { (body(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

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
  if constexpr (R == 2) {
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

// Of ``length`` = 2^a 3^b 5^c elements; a buffer holds registers of real and of imaginary parts by turns.
template <typename A>
class Transform {
 public:
  static constexpr int64_t kElement = 2 * kLanes<A>, kRun = kLanes<A>;

  explicit Transform(int64_t length) : length_(length) {
    TORCH_CHECK(length > 1, "a transform of ", length, " elements");
    for (int64_t rest = length, block = length; rest > 1;) {
      const int radix = rest % 8 == 0 ? 8 : rest % 4 == 0 ? 4 : rest % 2 == 0 ? 2 : rest % 3 == 0 ? 3 : 5;
      TORCH_CHECK(rest % radix == 0, "a transform of ", length, " elements, expected 2^a 3^b 5^c");
      Stage stage{radix, block, {}};
      const int64_t step = block / radix;
      for (int64_t j = 0; j < step; ++j) {
        for (int64_t k = 1; k < radix; ++k) {
          const double angle = -2 * std::numbers::pi * static_cast<double>(j * k) / static_cast<double>(block);
          stage.turns.push_back(static_cast<A>(std::cos(angle)));
          stage.turns.push_back(static_cast<A>(std::sin(angle)));
        }
      }
      stages_.push_back(std::move(stage));
      rest /= radix, block = step;
    }
  }

  int64_t length() const { return length_; }

  // That of a length, kept for the next calls.
  static std::shared_ptr<const Transform> of(int64_t length) {
    constexpr size_t kKept = 4;
    static std::mutex guard;
    static std::vector<std::shared_ptr<const Transform>> kept;
    const std::lock_guard<std::mutex> lock(guard);
    for (const auto& transform : kept) {
      if (transform->length() == length) return transform;
    }
    if (kept.size() == kKept) kept.erase(kept.begin());
    kept.push_back(std::make_shared<const Transform>(length));
    return kept.back();
  }

  // The first kThere buffers are transformed; product(begin, end) then works on a range of elements of any of them; the
  // first kBack are transformed back. read(buffer, i, n, x) makes n elements from number i on, write(buffer, i, n, x)
  // takes them; n is kRun at most.
  template <int kThere, int kBack, typename Read, typename Product, typename Write>
  void run(A* const* buffers, Read read, Product product, Write write) const {
    const Stage& top = stages_[0];
    with_radix(top.radix, [&]<int R>() {
      for (int b = 0; b < kThere; ++b)
        first_pass<R>(top, buffers[b], [&](int64_t i, int64_t n, Complex<A>* x) { read(b, i, n, x); });
      const int64_t step = top.block / R;
      for (int64_t k = 0; k < R; ++k) descend<kThere, kBack>(1, buffers, k * step, product);
      for (int b = 0; b < kBack; ++b) {
        last_pass<R>(top, buffers[b], [&](int64_t i, int64_t n, const Complex<A>* x) { write(b, i, n, x); });
      }
    });
  }

 private:
  struct Stage {
    int radix;
    int64_t block;
    std::vector<A> turns;
  };

  template <typename Body>
  static void with_radix(int radix, Body body) {
    switch (radix) {
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

  template <int kThere, int kBack, typename Product>
  void descend(size_t level, A* const* buffers, int64_t begin, Product& product) const {
    if (level == stages_.size()) return product(begin, begin + 1);
    const int64_t block = stages_[level].block;
    if (block > kSmallTransform) {
      for (int b = 0; b < kThere; ++b) there(stages_[level], buffers[b], begin);
      const int64_t step = block / stages_[level].radix;
      for (int64_t at = begin; at < begin + block; at += step) descend<kThere, kBack>(level + 1, buffers, at, product);
      for (int b = 0; b < kBack; ++b) back(stages_[level], buffers[b], begin);
      return;
    }
    for (int b = 0; b < kThere; ++b) {
      for (size_t s = level; s < stages_.size(); ++s) {
        for (int64_t at = begin; at < begin + block; at += stages_[s].block) there(stages_[s], buffers[b], at);
      }
    }
    product(begin, begin + block);
    for (int b = 0; b < kBack; ++b) {
      for (size_t s = stages_.size(); s-- > level;) {
        for (int64_t at = begin; at < begin + block; at += stages_[s].block) back(stages_[s], buffers[b], at);
      }
    }
  }

  template <int R>
  LLMKERN_INLINE static void turn_there(const A* turns, Complex<A> (&x)[R]) {
    small_transform<R, -1>(x);
    unrolled<R - 1>([&](auto k)
                        LLMKERN_INLINE { x[k + 1] = x[k + 1].times(fill(turns[2 * k]), fill(turns[2 * k + 1])); });
  }

  template <int R>
  LLMKERN_INLINE static void turn_back(const A* turns, Complex<A> (&x)[R]) {
    unrolled<R - 1>([&](auto k) LLMKERN_INLINE {
      const Lanes<A> c = fill(turns[2 * k]), s = fill(turns[2 * k + 1]);
      x[k + 1] = {x[k + 1].re * c + x[k + 1].im * s, x[k + 1].im * c - x[k + 1].re * s};
    });
    small_transform<R, 1>(x);
  }

  void there(const Stage& stage, A* buffer, int64_t begin) const {
    with_radix(stage.radix, [&]<int R>() {
      const int64_t step = stage.block / R;
      for (int64_t j = 0; j < step; ++j) {
        A* at = buffer + (begin + j) * kElement;
        Complex<A> x[R];
        unrolled<R>([&](auto q) LLMKERN_INLINE { x[q] = load_complex(at + q * step * kElement); });
        turn_there<R>(stage.turns.data() + 2 * (R - 1) * j, x);
        unrolled<R>([&](auto k) LLMKERN_INLINE { store_complex(at + k * step * kElement, x[k]); });
      }
    });
  }

  void back(const Stage& stage, A* buffer, int64_t begin) const {
    with_radix(stage.radix, [&]<int R>() {
      const int64_t step = stage.block / R;
      for (int64_t j = 0; j < step; ++j) {
        A* at = buffer + (begin + j) * kElement;
        Complex<A> x[R];
        unrolled<R>([&](auto k) LLMKERN_INLINE { x[k] = load_complex(at + k * step * kElement); });
        turn_back<R>(stage.turns.data() + 2 * (R - 1) * j, x);
        unrolled<R>([&](auto q) LLMKERN_INLINE { store_complex(at + q * step * kElement, x[q]); });
      }
    });
  }

  // The stages that meet the outside.
  template <int R, typename Read>
  void first_pass(const Stage& stage, A* buffer, Read read) const {
    const int64_t step = stage.block / R;
    alignas(64) Complex<A> runs[R][kRun];
    for (int64_t j = 0; j < step; j += kRun) {
      const int64_t n = std::min(kRun, step - j);
      for (int64_t q = 0; q < R; ++q) read(j + q * step, n, runs[q]);
      for (int64_t i = 0; i < n; ++i) {
        Complex<A> x[R];
        unrolled<R>([&](auto q) LLMKERN_INLINE { x[q] = runs[q][i]; });
        turn_there<R>(stage.turns.data() + 2 * (R - 1) * (j + i), x);
        unrolled<R>([&](auto k) LLMKERN_INLINE { store_complex(buffer + (k * step + j + i) * kElement, x[k]); });
      }
    }
  }

  template <int R, typename Write>
  void last_pass(const Stage& stage, const A* buffer, Write write) const {
    const int64_t step = stage.block / R;
    alignas(64) Complex<A> runs[R][kRun];
    for (int64_t j = 0; j < step; j += kRun) {
      const int64_t n = std::min(kRun, step - j);
      for (int64_t i = 0; i < n; ++i) {
        Complex<A> x[R];
        unrolled<R>([&](auto k) LLMKERN_INLINE { x[k] = load_complex(buffer + (k * step + j + i) * kElement); });
        turn_back<R>(stage.turns.data() + 2 * (R - 1) * (j + i), x);
        unrolled<R>([&](auto q) LLMKERN_INLINE { runs[q][i] = x[q]; });
      }
      for (int64_t q = 0; q < R; ++q) write(j + q * step, n, runs[q]);
    }
  }

  int64_t length_;
  std::vector<Stage> stages_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
