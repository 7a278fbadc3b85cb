// One register of numbers as a value: GCC's vector types, sized by the instruction set that this file is compiled for.
//
// Lanes<float> and Lanes<double> take + - * / < == and the ternary operator lane by lane. Storage types (half,
// bfloat16) widen on load and round to nearest even on store. Loops run over full registers and end with one partial
// register, so that body and tail share their text:
//
//   for_lanes<float>(0, n, [&](int64_t i, auto lanes) { store(y + i, a * load(x + i, lanes), lanes); });
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace llmkern {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRegisterBytes = 64;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename T, int kBytes>
struct VectorType {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <typename A>
using Lanes = typename VectorType<A, kRegisterBytes>::type;
template <typename A>
constexpr int kLanes = kRegisterBytes / sizeof(A);

using Floats = Lanes<float>;
using Doubles = Lanes<double>;
using Ints = Lanes<int32_t>;
using Words = Lanes<uint32_t>;

// Type of computation for a type of storage.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr float kInf = std::numeric_limits<float>::infinity();

template <typename To, typename From>
inline To reinterpret(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <typename A>
inline Lanes<A> fill(A x) {
  // Minus zero, not plus: that is x itself for every x, and so one broadcast.
  return x - Lanes<A>{};
}

// Loads and stores ---------------------------------------------------------------------------------------------------

struct All {};
struct First {
  int count;
};

template <typename A, typename Body>
inline void for_lanes(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes<A> <= end; i += kLanes<A>) body(i, All{});
  if (i < end) body(i, First{static_cast<int>(end - i)});
}

inline Floats load(const float* p, All) {
  Floats x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline Doubles load(const double* p, All) {
  Doubles x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

#if defined(CPU_CAPABILITY_AVX512)
// The bytes of some lanes or of all: a copy of so many, through memory, would be waited for.
template <typename T>
inline __mmask64 bytes_of(First lanes) {
  const uint64_t count = lanes.count * sizeof(T);
  return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
}

// Numbers of the type that p points at.
inline Floats widened(const c10::BFloat16*, __m256i bits) {
  return reinterpret<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Floats widened(const c10::Half*, __m256i bits) { return _mm512_cvtph_ps(bits); }
#endif

// Without the intrinsics GCC widens the two halves of a register one by one.
inline Floats load(const c10::BFloat16* p, All) {
#if defined(CPU_CAPABILITY_AVX512)
  return widened(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CPU_CAPABILITY_AVX2)
  return reinterpret<Floats>(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
  typename VectorType<uint16_t, kRegisterBytes / 2>::type bits;
  std::memcpy(&bits, p, sizeof(bits));
  return reinterpret<Floats>(__builtin_convertvector(bits, Words) << 16);
#endif
}

inline Floats load(const c10::Half* p, All) {
#if defined(CPU_CAPABILITY_AVX512)
  return widened(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Floats x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = static_cast<float>(p[i]);
  return x;
#endif
}

inline Words load_words(const uint32_t* p) {
  Words x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// Lanes past the end read as zero.
template <typename T>
inline Lanes<Acc<T>> load(const T* p, First lanes) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i bits = _mm512_maskz_loadu_epi8(bytes_of<T>(lanes), p);
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return reinterpret<Lanes<Acc<T>>>(bits);
  } else {
    return widened(p, _mm512_castsi512_si256(bits));
  }
#else
  T padded[kLanes<Acc<T>>] = {};
  std::memcpy(static_cast<void*>(padded), p, lanes.count * sizeof(T));
  return load(padded, All{});
#endif
}

inline void store(float* p, Floats x, All) { std::memcpy(p, &x, sizeof(x)); }

inline void store(double* p, Doubles x, All) { std::memcpy(p, &x, sizeof(x)); }

// Half a register of numbers of the type that p points at.
using Narrow = typename VectorType<uint16_t, kRegisterBytes / 2>::type;
inline Narrow narrowed(const c10::BFloat16*, Floats x) {
  // Add half of the last kept place, and one more where the kept part is odd: to nearest, ties to even.
  const Words bits = reinterpret<Words>(x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words kept = x == x ? rounded : Words{} + 0x7fc0;
  return __builtin_convertvector(kept, Narrow);
}
inline Narrow narrowed(const c10::Half*, Floats x) {
#if defined(CPU_CAPABILITY_AVX512)
  return reinterpret<Narrow>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(CPU_CAPABILITY_AVX2)
  return reinterpret<Narrow>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  Narrow bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = c10::Half(x[i]).x;
  return bits;
#endif
}

template <typename T>
  requires(sizeof(T) < sizeof(float))
inline void store(T* p, Floats x, All) {
  const Narrow bits = narrowed(p, x);
  std::memcpy(static_cast<void*>(p), &bits, sizeof(bits));
}

template <typename T>
inline void store(T* p, Lanes<Acc<T>> x, First lanes) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i bits;
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    bits = reinterpret<__m512i>(x);
  } else {
    bits = _mm512_castsi256_si512(reinterpret<__m256i>(narrowed(p, x)));
  }
  _mm512_mask_storeu_epi8(p, bytes_of<T>(lanes), bits);
#else
  T padded[kLanes<Acc<T>>];
  store(padded, x, All{});
  std::memcpy(static_cast<void*>(p), padded, lanes.count * sizeof(T));
#endif
}

// Two registers of 2 kLanes neighbouring entries. Which entry lies in which lane is left open, since bfloat16 widens
// and narrows at half the cost where even entries fill one register and odd ones the other; store_couple undoes it.
template <typename A>
struct Couple {
  Lanes<A> a, b;
};

// The two registers in the order of their entries, for any T.
template <typename T>
inline Couple<Acc<T>> load_in_order(const T* p, All) {
  return {load(p, All{}), load(p + kLanes<Acc<T>>, All{})};
}

template <typename T>
inline Couple<Acc<T>> load_in_order(const T* p, First entries) {
  T padded[2 * kLanes<Acc<T>>] = {};
  std::memcpy(static_cast<void*>(padded), p, entries.count * sizeof(T));
  return load_in_order(padded, All{});
}

template <typename T>
inline Couple<Acc<T>> load_couple(const T* p, All) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Words bits;
    std::memcpy(&bits, p, sizeof(bits));
    return {reinterpret<Floats>(bits << 16), reinterpret<Floats>(bits & 0xffff0000u)};
  } else {
    return load_in_order(p, All{});
  }
}

// Entries past the end read as zero.
template <typename T>
inline Couple<Acc<T>> load_couple(const T* p, First entries) {
  T padded[2 * kLanes<Acc<T>>] = {};
  std::memcpy(static_cast<void*>(padded), p, entries.count * sizeof(T));
  return load_couple(padded, All{});
}

// What load_couple<T> loaded, in the order of the entries: half the cost of widening each input in order.
template <typename T>
inline Couple<Acc<T>> in_order(Couple<Acc<T>> x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    constexpr int kWidth = kLanes<float>;
    Ints low, high;
    for (int i = 0; i < kWidth; ++i) {
      low[i] = i / 2 + i % 2 * kWidth;
      high[i] = low[i] + kWidth / 2;
    }
    return {__builtin_shuffle(x.a, x.b, low), __builtin_shuffle(x.a, x.b, high)};
  } else {
    return x;
  }
}

// Not for NaN, whose payload may round to infinity.
template <typename T>
inline void store_couple(T* p, Couple<Acc<T>> x, All) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const Words even = reinterpret<Words>(x.a), odd = reinterpret<Words>(x.b);
    const Words low = (even + 0x7fff + ((even >> 16) & 1)) >> 16;
    const Words high = (odd + 0x7fff + ((odd >> 16) & 1)) & 0xffff0000u;
    const Words joined = low | high;
    std::memcpy(static_cast<void*>(p), &joined, sizeof(joined));
  } else {
    store(p, x.a, All{});
    store(p + kLanes<Acc<T>>, x.b, All{});
  }
}

template <typename T>
inline void store_couple(T* p, Couple<Acc<T>> x, First entries) {
  T padded[2 * kLanes<Acc<T>>];
  store_couple(padded, x, All{});
  std::memcpy(static_cast<void*>(p), padded, entries.count * sizeof(T));
}

// The couple with the entries past the end set to `value`, as load_couple<T> places them.
template <typename T>
inline Couple<Acc<T>> pad_couple(Couple<Acc<T>> x, Acc<T>, All) {
  return x;
}

template <typename T>
inline Couple<Acc<T>> pad_couple(Couple<Acc<T>> x, Acc<T> value, First entries) {
  constexpr int kWidth = kLanes<Acc<T>>;
  Acc<T> parts[2][kWidth];
  store(parts[0], x.a, All{});
  store(parts[1], x.b, All{});
  for (int i = entries.count; i < 2 * kWidth; ++i) {
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      parts[i % 2][i / 2] = value;
    } else {
      parts[i / kWidth][i % kWidth] = value;
    }
  }
  return {load(parts[0], All{}), load(parts[1], All{})};
}

template <typename A, typename Body>
inline void for_couples(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + 2 * kLanes<A> <= end; i += 2 * kLanes<A>) body(i, All{});
  if (i < end) body(i, First{static_cast<int>(end - i)});
}

// x with the lanes past the end set to `value`.
template <typename A>
inline Lanes<A> pad_with(Lanes<A> x, A, All) {
  return x;
}

template <typename A>
inline Lanes<A> pad_with(Lanes<A> x, A value, First lanes) {
  for (int i = lanes.count; i < kLanes<A>; ++i) x[i] = value;
  return x;
}

template <typename A>
inline A sum(Lanes<A> x) {
  A total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += x[i];
  return total;
}

// Sums over lanes of four registers.
template <typename A>
inline void sum_four(const Lanes<A>* x, A* sums) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    __m256 y[4];
    for (int i = 0; i < 4; ++i) {
#if defined(CPU_CAPABILITY_AVX512)
      const __m512 z = reinterpret<__m512>(x[i]);
      y[i] = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
#else
      y[i] = reinterpret<__m256>(x[i]);
#endif
    }
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) sums[i] = sum<A>(x[i]);
}

template <typename Mask>
inline bool any(Mask mask) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_test_epi32_mask(reinterpret<__m512i>(mask), reinterpret<__m512i>(mask)) != 0;
#elif defined(CPU_CAPABILITY_AVX2)
  return !_mm256_testz_si256(reinterpret<__m256i>(mask), reinterpret<__m256i>(mask));
#else
  uint64_t parts[kRegisterBytes / 8], joined = 0;
  std::memcpy(parts, &mask, sizeof(mask));
  for (uint64_t part : parts) joined |= part;
  return joined != 0;
#endif
}

// Writes the lanes of x that the mask selects to p, one after the other, and whatever comes after them; returns their
// number.
#if defined(CPU_CAPABILITY_AVX512)
constexpr bool kCanCompress = true;

inline int compress(float* p, Floats x, Ints mask) {
  const __mmask16 bits = _mm512_movepi32_mask(reinterpret<__m512i>(mask));
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(bits, x));
  return __builtin_popcount(bits);
}
#elif defined(CPU_CAPABILITY_AVX2)
constexpr bool kCanCompress = true;

// For each mask the numbers of its lanes, a byte each.
struct CompressTable {
  uint64_t lanes[256] = {};
  constexpr CompressTable() {
    for (int mask = 0; mask < 256; ++mask) {
      int taken = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask] |= static_cast<uint64_t>(lane) << 8 * taken++;
      }
    }
  }
};
inline constexpr CompressTable kCompressTable;

inline int compress(float* p, Floats x, Ints mask) {
  const int bits = _mm256_movemask_ps(reinterpret<__m256>(mask));
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kCompressTable.lanes[bits])));
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(x, lanes));
  return __builtin_popcount(bits);
}
#else
constexpr bool kCanCompress = false;
inline int compress(float*, Floats, Ints) { return 0; }
#endif

// y where one of them is NaN.
template <typename V>
inline V max(V x, V y) {
  return x > y ? x : y;
}

// The same in one instruction, which GCC does not find.
#if defined(CPU_CAPABILITY_AVX512)
inline Floats max(Floats x, Floats y) { return _mm512_max_ps(x, y); }
#elif defined(CPU_CAPABILITY_AVX2)
inline Floats max(Floats x, Floats y) { return _mm256_max_ps(x, y); }
#endif

template <typename A>
inline A top(Lanes<A> x) {
  A best = x[0];
  for (int i = 1; i < kLanes<A>; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// Elementary functions: NaN in, NaN out. The float ones err by at most 2 units in the last place.  -------------------

namespace detail {
constexpr float kLog2e = 1.44269504088896341f;
// ln 2 in two parts, the first short enough that its product with an exponent is exact.
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440054690583e-4f;
// Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
constexpr float kRounder = 12582912.0f;

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2: interpolation at Chebyshev nodes, relative error of exp 1e-8.
[[gnu::always_inline]] inline Floats exp_tail(Floats r) {
  return (((0.00139189435f * r + 0.00836317905f) * r + 0.0416666633f) * r + 0.166665770f) * r + 0.499999997f;
}
}  // namespace detail

// Zero below -87.3. For x of at most zero, which spares the upper bound.
[[gnu::always_inline]] inline Floats exp_nonpositive(Floats x) {
  const Floats shifted = x * detail::kLog2e + detail::kRounder;
  const Floats n = shifted - detail::kRounder;
  const Floats r = (x - n * detail::kLn2High) - n * detail::kLn2Low;
  const Floats poly = (detail::exp_tail(r) * r + 1.0f) * r + 1.0f;
  const Floats power = reinterpret<Floats>((reinterpret<Ints>(shifted) + 127) << 23);
  return x < -87.3f ? Floats{} : poly * power;
}

inline Doubles exp_nonpositive(Doubles x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// exp(scale x) for the sum of numbers of which one is exp(0), hence held at exp(-86) below: relative error 2e-7, and
// that of a rounding of x. NaN in, NaN out.
[[gnu::always_inline]] inline Floats exp_for_sum(Floats x, float scale = 1) {
  const Floats held = max(fill(-125.0f), x * (detail::kLog2e * scale));
  const Floats shifted = held + detail::kRounder;
  const Floats r = held - (shifted - detail::kRounder);
  // 2^r for |r| <= 1/2: the smallest largest relative error among polynomials that are one at zero.
  const Floats poly =
      ((((0.0013264727f * r + 0.009671513f) * r + 0.055507336f) * r + 0.24022242f) * r + 0.693147f) * r + 1.0f;
  return reinterpret<Floats>(reinterpret<Ints>(poly) + (reinterpret<Ints>(shifted) << 23));
}

inline Doubles exp_for_sum(Doubles x, double scale = 1) { return exp_nonpositive(x * scale); }

// Held at exp(88) above, so that what follows stays finite.
inline Floats exp(Floats x) { return exp_nonpositive(x > 88.0f ? fill(88.0f) : x); }

inline Doubles exp(Doubles x) { return exp_nonpositive(x); }

inline Floats expm1(Floats x) {
  const Floats near = (detail::exp_tail(x) * x + 1.0f) * x;
  return (x > -0.34f) & (x < 0.34f) ? near : exp(x) - 1.0f;
}

inline Doubles expm1(Doubles x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::expm1(x[i]);
  return x;
}

// -inf at zero, NaN below.
inline Floats log(Floats x) {
  const auto tiny = x < 1.17549435e-38f;
  const Floats scaled = tiny ? x * 33554432.0f : x;
  const Ints bits = reinterpret<Ints>(scaled);
  // Mantissa to [sqrt(1/2), sqrt(2)), so that the series is short.
  const Ints exponent = (bits - 0x3f3504f3) >> 23;
  const Floats m = reinterpret<Floats>(bits - (exponent << 23));
  const Floats e = __builtin_convertvector(exponent, Floats) - (tiny ? fill(25.0f) : Floats{});
  const Floats s = (m - 1.0f) / (m + 1.0f);
  const Floats q = s * s;
  const Floats series = (((0.2222222222f * q + 0.2857142857f) * q + 0.4f) * q + 0.6666666667f) * q * s;
  const Floats finite = e * detail::kLn2High + (2.0f * s + (series + e * detail::kLn2Low));
  const Floats edge = x == 0.0f ? fill(-kInf) : (x > 0.0f ? x : fill(std::numeric_limits<float>::quiet_NaN()));
  return (x > 0.0f) & (x < kInf) ? finite : edge;
}

inline Doubles log(Doubles x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// For x of at least 0 and finite.
inline Floats log1p(Floats x) {
  const Floats u = x + 1.0f;
  return log(u) + (x - (u - 1.0f)) / u;
}

inline Doubles log1p(Doubles x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log1p(x[i]);
  return x;
}

// log(1 + exp(x))
template <typename V>
inline V softplus(V x) {
  const V magnitude = x > 0 ? x : -x;
  return max(x, V{}) + log1p(exp_nonpositive(-magnitude));
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
