// Packed rows a line of memory at a time, in AVX-512: its entries stay in the order in which a line yields them, and
// what meets them, numbers of x or sums of outputs, is brought into that order once for all rows.
#pragma once

#include <array>

#include "mlp_rows.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

template <typename Row>
struct Line {
  static constexpr bool kPaired = false;
  static constexpr int kEntries = kUnit;
};

#if defined(CPU_CAPABILITY_AVX512)
// How a line becomes registers of bfloat16, for products with numbers of x two at a time: `kTerms` registers, whose sum
// is meant, for each of `kPairs` registers of x. Entry pair_entry(i, p) of the line meets place p of register i.

template <>
struct Line<PlainRow<c10::BFloat16>> {
  static constexpr bool kPaired = true;
  static constexpr int kPairs = 1, kTerms = 1, kEntries = 32;
  static constexpr int pair_entry(int, int place) { return place; }
  static void pairs(__m512i line, __m512i* w) { w[0] = line; }
};

// Entries of even and of odd places, each of them q = (128 + q mod 128) + (-128 or, below zero, -256): bfloat16 holds
// the two by bits of q and constants.
template <>
struct Line<Int8Row> {
  static constexpr bool kPaired = true;
  static constexpr int kPairs = 2, kTerms = 2, kEntries = 64;
  static constexpr int pair_entry(int i, int place) { return 2 * place + i; }
  static void pairs(__m512i line, __m512i* w) {
    const auto joined = [](__m512i bits, int kept, int constant) {
      return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi16(static_cast<short>(kept)),
                                       _mm512_set1_epi16(static_cast<short>(constant)), 0xea);
    };
    for (int i = 0; i < kPairs; ++i) {
      const __m512i bits = i == 0 ? line : _mm512_srli_epi16(line, 8);
      w[2 * i] = joined(bits, 0x7f, 0x4300);
      w[2 * i + 1] = joined(bits, 0x80, 0xc300);
    }
  }
};

// Nibble i of each 16 bits; it looks up its number, in a table that is there twice because the first bit of the next
// nibble is part of the index.
template <>
struct Line<Int4Row> {
  static constexpr bool kPaired = true;
  static constexpr int kPairs = 4, kTerms = 1, kEntries = 128;
  static constexpr int pair_entry(int i, int place) { return place / 8 * 32 + place % 2 * 16 + 4 * i + place % 8 / 2; }
  static void pairs(__m512i line, __m512i* w) {
    alignas(64) static constexpr uint16_t kNumbers[2][16] = {
        {0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
         0xc000, 0xbf80},
        {0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
         0xc000, 0xbf80}};
    const __m512i numbers = _mm512_load_si512(kNumbers);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) w[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * i), numbers);
  }

  // Sums of outputs: lane l of register `part` is entry sum_entry(part, l).
  static constexpr int kParts = 8;
  static constexpr int sum_entry(int part, int lane) { return lane / 4 * 32 + 4 * part + lane % 4; }
  static __m512 part(__m512i line, int part) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(line, 4 * part), numbers);
  }
};

template <typename Row>
constexpr int kLineUnits = Line<Row>::kEntries / kUnit;

// The scale of each unit of a row, and four zeros for the units that its last line may lack.
template <typename Row>
inline void unit_scales(const Row& row, const RowShape& shape, Ahead& ahead, c10::BFloat16* to) {
  if constexpr (Row::kScaled) {
    ahead.scales(shape.groups());
    const auto put = [&](int64_t at, uint64_t four) { std::memcpy(static_cast<void*>(to + at), &four, sizeof(four)); };
    const int64_t each = shape.group / kUnit;
    if (each == 1) {
      std::memcpy(static_cast<void*>(to), row.scales, shape.groups() * sizeof(*to));
    } else {
      for (int64_t g = 0; g < shape.groups(); ++g)
        for (int64_t i = 0; i < each; i += 4) put(g * each + i, row.scales[g].x * 0x0001000100010001u);
    }
    put(shape.length / kUnit, 0);
  }
}

// The scales of a line's units, each in the lanes of its entries.
template <typename Row>
[[gnu::always_inline]] inline Floats line_scales(const c10::BFloat16* scales) {
  constexpr int kUnits = kLineUnits<Row>;
  uint64_t some = 0;
  std::memcpy(&some, scales, kUnits * sizeof(*scales));
  // A table: GCC does not always see that a loop makes the same numbers each time.
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint16_t, kLanes<uint16_t>> order{};
    for (int i = 0; i < kLanes<uint16_t>; ++i) order[i] = static_cast<uint16_t>(i * kUnits / kLanes<uint16_t>);
    return order;
  }();
  // In the upper half of a lane bfloat16 is a float.
  return reinterpret<Floats>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(kOrder.data()),
                                                            _mm512_set1_epi64(static_cast<long long>(some))));
}

// The line at entry k, all of it or its first units and zeros.
template <typename Row>
[[gnu::always_inline]] inline __m512i load_line(const Row& row, int64_t k, All) {
  return _mm512_loadu_si512(row.address(k));
}
template <typename Row>
[[gnu::always_inline]] inline __m512i load_line(const Row& row, int64_t k, First units) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << units.count * 64 / kLineUnits<Row>)-1, row.address(k));
}

// Calls body(k, All or First units) for the lines of rows of this length.
template <typename Row, typename Body>
[[gnu::always_inline]] inline void for_lines(int64_t length, Body body) {
  int64_t k = 0;
  for (; k + Line<Row>::kEntries <= length; k += Line<Row>::kEntries) body(k, All{});
  if (k < length) body(k, First{static_cast<int>((length - k) / kUnit)});
}

// total[r][n] += row r times token n, over one line.
template <int R, int N, typename Row, typename Part>
[[gnu::target("avx512bf16"), gnu::always_inline]] inline void line_step(const Row* rows, Ahead& ahead,
                                                                        const c10::BFloat16* x, int64_t x_row,
                                                                        const c10::BFloat16* scales, int64_t scale_row,
                                                                        int64_t k, Part units, Floats (*total)[N]) {
  using L = Line<Row>;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    ahead.line();
    __m512i w[L::kPairs * L::kTerms];
    L::pairs(load_line(rows[r], k, units), w);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      // Of rows without scales all lines go to one sum.
      __m512 part = Row::kScaled ? _mm512_setzero_ps() : reinterpret<__m512>(total[r][n]);
#pragma GCC unroll 8
      for (int i = 0; i < L::kPairs * L::kTerms; ++i) {
        const __m512i pairs = _mm512_loadu_si512(x + n * x_row + k + i / L::kTerms * 32);
        part = _mm512_dpbf16_ps(part, reinterpret_cast<__m512bh>(w[i]), reinterpret_cast<__m512bh>(pairs));
      }
      if constexpr (Row::kScaled) {
        total[r][n] += line_scales<Row>(scales + r * scale_row + k / kUnit) * reinterpret<Floats>(part);
      } else {
        total[r][n] = reinterpret<Floats>(part);
      }
    }
  }
}

// As dot_units, for x in the order of lines and, beyond the end of rows, zeros up to a whole line. scales: those of
// each row's units, scale_row apart.
template <int R, int N, typename Row>
[[gnu::target("avx512bf16")]] inline void line_dots(const Row* rows, const RowShape& shape, Ahead& next,
                                                    const c10::BFloat16* x, int64_t x_row, const c10::BFloat16* scales,
                                                    int64_t scale_row, float* out) {
  Ahead ahead = next;
  Floats total[R][N] = {};
  const int64_t whole = shape.length / Line<Row>::kEntries * Line<Row>::kEntries;
  for (int64_t k = 0; k < whole; k += Line<Row>::kEntries)
    line_step<R, N>(rows, ahead, x, x_row, scales, scale_row, k, All{}, total);
  if (whole < shape.length)
    line_step<R, N>(rows, ahead, x, x_row, scales, scale_row, whole,
                    First{static_cast<int>((shape.length - whole) / kUnit)}, total);
  sum_lanes<R * N, float>(total[0], out);
  next = ahead;
}

// As add_rows, for sums in the order of lines, whole ones.
template <int R, bool one_token>
inline void add_lines(const Int4Row* rows, const RowShape& shape, Ahead& next, const float* c, int64_t tokens,
                      const c10::BFloat16* scales, int64_t scale_row, float* y, int64_t y_row) {
  using L = Line<Int4Row>;
  Ahead ahead = next;
  for_lines<Int4Row>(shape.length, [&](int64_t k, auto units) {
    __m512i lines[R];
    Floats scale[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      ahead.line();
      lines[r] = load_line(rows[r], k, units);
      scale[r] = line_scales<Int4Row>(scales + r * scale_row + k / kUnit);
      if (one_token) scale[r] *= c[r];
    }
#pragma GCC unroll 8
    for (int part = 0; part < L::kParts; ++part) {
      float* to = y + k + part * kLanes<float>;
      Floats w[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) w[r] = L::part(lines[r], part);
      if constexpr (one_token) {
        Floats sums = load(to, All{});
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums += scale[r] * w[r];
        store(to, sums, All{});
        continue;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) w[r] *= scale[r];
      for (int64_t n = 0; n < tokens; ++n, to += y_row) {
        Floats sums = load(to, All{});
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums += c[r * tokens + n] * w[r];
        store(to, sums, All{});
      }
    }
  });
  next = ahead;
}

// Brings the sums of a line into the order of its entries.
inline void sums_in_order(float* sums) {
  using L = Line<Int4Row>;
  float ordered[L::kEntries];
  for (int part = 0; part < L::kParts; ++part)
    for (int lane = 0; lane < kLanes<float>; ++lane)
      ordered[L::sum_entry(part, lane)] = sums[part * kLanes<float> + lane];
  std::memcpy(sums, ordered, sizeof(ordered));
}
#endif

template <typename Row>
constexpr int64_t padded_to_lines(int64_t n) {
  return (n + Line<Row>::kEntries - 1) / Line<Row>::kEntries * Line<Row>::kEntries;
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
