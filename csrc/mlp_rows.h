// Rows of weights as a decode step reads them, once: dots with a few tokens, and sums of rows. Rows are plain numbers
// of any type of storage, or packed ones of 8 or 4 bits with a scale for each group (see
// ops/shared_lora_mlp/packed.py).
#pragma once

#include "common.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Entries that are unpacked together.
constexpr int kUnit = 32;
template <typename A>
constexpr int kUnitRegisters = kUnit / kLanes<A>;

template <typename A>
inline Lanes<A> from_ints(typename VectorType<int32_t, sizeof(int32_t) * kLanes<A>>::type x) {
  return __builtin_convertvector(x, Lanes<A>);
}

// Bytes that are fetched from memory together.
constexpr int64_t kLine = 64;

// One row of plain numbers; `length` entries, the last unit perhaps a part of one.
template <typename T>
struct PlainRow {
  using Storage = T;
  const T* data;

  static constexpr bool kScaled = false;
  static constexpr int64_t kLineEntries = kLine / sizeof(T);
  const void* address(int64_t k) const { return data + k; }
  template <typename A>
  void unit(int64_t k, Lanes<A>* w) const {
#pragma GCC unroll 16
    for (int i = 0; i < kUnitRegisters<A>; ++i) {
      if constexpr (std::is_same_v<A, Acc<T>>) {
        w[i] = load(data + k + i * kLanes<A>, All{});
      } else {
        for (int lane = 0; lane < kLanes<A>; ++lane) w[i][lane] = static_cast<A>(data[k + i * kLanes<A> + lane]);
      }
    }
  }
};

struct Int8Row {
  const int8_t* data;
  const c10::BFloat16* scales;

  static constexpr bool kScaled = true;
  static constexpr int64_t kLineEntries = kLine;
  const void* address(int64_t k) const { return data + k; }
  template <typename A>
  void unit(int64_t k, Lanes<A>* w) const {
    typename VectorType<int8_t, kLanes<A>>::type bytes;
#pragma GCC unroll 16
    for (int i = 0; i < kUnitRegisters<A>; ++i) {
      std::memcpy(&bytes, data + k + i * kLanes<A>, sizeof(bytes));
      // GCC makes a dozen instructions of the general form.
      if constexpr (std::is_same_v<A, float>) {
#if defined(CPU_CAPABILITY_AVX512)
        w[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(reinterpret<__m128i>(bytes)));
        continue;
#elif defined(CPU_CAPABILITY_AVX2)
        w[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes))));
        continue;
#endif
      }
      w[i] =
          from_ints<A>(__builtin_convertvector(bytes, typename VectorType<int32_t, sizeof(int32_t) * kLanes<A>>::type));
    }
  }
};

// Entry 4 k + l of a unit is nibble k of its word l.
struct Int4Row {
  const uint8_t* data;
  const c10::BFloat16* scales;

  static constexpr bool kScaled = true;
  static constexpr int64_t kLineEntries = 2 * kLine;
  const void* address(int64_t k) const { return data + k / 2; }
  template <typename A>
  void unit(int64_t k, Lanes<A>* w) const {
    constexpr int kWidth = kLanes<A>;
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<A, float>) {
      // A nibble looks up its number.
      const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
      const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
      const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + k / 2)));
      const __m512i more = _mm512_add_epi32(shift, _mm512_set1_epi32(16));
      w[0] = _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shift), numbers);
      w[1] = _mm512_permutexvar_ps(_mm512_srlv_epi32(words, more), numbers);
      return;
    }
#endif
    using Integers = typename VectorType<int32_t, sizeof(int32_t) * kWidth>::type;
    int32_t words[4];
    std::memcpy(words, data + k / 2, sizeof(words));
    if constexpr (kWidth < 4) {
#pragma GCC unroll 16
      for (int i = 0; i < kUnitRegisters<A>; ++i)
        for (int lane = 0; lane < kWidth; ++lane) {
          const int entry = i * kWidth + lane;
          w[i][lane] = static_cast<A>(words[entry % 4] << (28 - entry / 4 * 4) >> 28);
        }
    } else {
      Integers repeated, shift;
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane) repeated[lane] = words[lane % 4], shift[lane] = 28 - lane / 4 * 4;
#pragma GCC unroll 16
      for (int i = 0; i < kUnitRegisters<A>; ++i) w[i] = from_ints<A>((repeated << (shift - i * kWidth)) >> 28);
    }
  }
};

// Rows of `length` entries in whole units, with a scale for each `group` of them where they have scales.
struct RowShape {
  int64_t length, group;
  int64_t groups() const { return length / group; }
};

// Fetches what lies ahead in the order of memory, a line for each line that is used: rows are read several at a time,
// and memory yields a quarter less to several streams than to one.
class Ahead {
 public:
  // Always the same line, which is as good as none.
  static Ahead nothing(const void* at) { return {at, 0}; }
  explicit Ahead(const void* from) : Ahead(from, kLine) {}

  // Always inlined: GCC takes a function that only fetches for one without effect, and drops the calls.
  [[gnu::always_inline]] void line() {
    __builtin_prefetch(at_);
    at_ += step_;
  }

  // For entries [k, k + kUnit) of a row.
  template <typename Row>
  [[gnu::always_inline]] void unit(int64_t k) {
    if (k % Row::kLineEntries >= kUnit) return;
    for (int64_t i = 0; i < kUnit; i += Row::kLineEntries) line();
  }

  // For the scales of a row.
  [[gnu::always_inline]] void scales(int64_t groups) {
    for (int64_t g = 0; g < groups; g += kLine / 2) line();
  }

 private:
  Ahead(const void* from, int64_t step) : at_(static_cast<const char*>(from)), step_(step) {}

  const char* at_;
  int64_t step_;
};

// Of rows and of their scales.
struct RowsAhead {
  Ahead rows, scales;

  static RowsAhead nothing(const void* at) { return {Ahead::nothing(at), Ahead::nothing(at)}; }
  template <typename Row>
  static RowsAhead from(const Row& row) {
    if constexpr (Row::kScaled) {
      return {Ahead(row.address(0)), Ahead(row.scales)};
    } else {
      return {Ahead(row.address(0)), Ahead::nothing(row.address(0))};
    }
  }
};

// factor times the scales of a row, as numbers of the type of computation.
template <typename Row, typename A>
inline void scale_factors(const Row& row, const RowShape& shape, Ahead& ahead, A factor, A* to) {
  const int64_t groups = shape.groups();
  ahead.scales(groups);
  for_lanes<float>(0, groups, [&](int64_t g, auto lanes) {
    const Floats scale = load(row.scales + g, lanes);
    if constexpr (std::is_same_v<A, float>) {
      store(to + g, factor * scale, lanes);
    } else {
      for (int64_t i = 0; i < std::min<int64_t>(kLanes<float>, groups - g); ++i) to[g + i] = factor * A(scale[i]);
    }
  });
}

// Sums over the lanes of n registers.
template <int n, typename A>
inline void sum_lanes(const Lanes<A>* x, A* sums) {
  if constexpr (n % 4 == 0) {
#pragma GCC unroll 8
    for (int i = 0; i < n; i += 4) sum_four<A>(x + i, sums + i);
  } else {
    for (int i = 0; i < n; ++i) sums[i] = sum<A>(x[i]);
  }
}

// out[r * N + n] = row r times token n, over whole units: x holds zeros where rows are padded, or rows end with a unit.
// scales: room for R groups() numbers, where rows have scales.
template <int R, int N, typename Row, typename A>
inline void dot_units(const Row* rows, const RowShape& shape, RowsAhead& next, const A* x, int64_t x_row, A* scales,
                      A* out) {
  RowsAhead ahead = next;
  constexpr int kRegisters = kUnitRegisters<A>;
  // Two chains for each sum where there are too few to fill the pipeline; groups are chains of their own.
  constexpr int kChains = Row::kScaled || R * N >= 8 || kRegisters < 2 ? 1 : 2;
  Lanes<A> total[R][N] = {};
  const int64_t step = Row::kScaled ? shape.group : shape.length, groups = Row::kScaled ? shape.groups() : 1;
  if constexpr (Row::kScaled)
    for (int r = 0; r < R; ++r) scale_factors(rows[r], shape, ahead.scales, A(1), scales + r * groups);
  for (int64_t begin = 0, g = 0; begin < shape.length; begin += step, ++g) {
    Lanes<A> acc[R][N][kChains] = {};
    for (int64_t k = begin; k < begin + step; k += kUnit) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Lanes<A> w[kRegisters];
        ahead.rows.unit<Row>(k);
        rows[r].template unit<A>(k, w);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
          for (int i = 0; i < kRegisters; ++i)
            acc[r][n][i % kChains] += w[i] * load(x + n * x_row + k + i * kLanes<A>, All{});
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Lanes<A> part = kChains == 2 ? acc[r][n][0] + acc[r][n][kChains - 1] : acc[r][n][0];
        if constexpr (Row::kScaled) {
          total[r][n] += scales[r * groups + g] * part;
        } else {
          total[r][n] = part;
        }
      }
    }
  }
  sum_lanes<R * N, A>(total[0], out);
  next = ahead;
}

// Rows at a time of dots, by the number of tokens at a time.
template <int N>
constexpr int kDotRows = N == 1 ? 4 : 2;

// Sums of R rows: y[n * y_row + k] += sum_r c[r * tokens + n] row_r[k], over whole units. Weights are unpacked once for
// all tokens. scales: room for R groups() numbers, where rows have scales.
template <int R, typename Row, typename A>
inline void add_rows(const Row* rows, const RowShape& shape, RowsAhead& next, const A* c, int64_t tokens, A* scales,
                     A* y, int64_t y_row) {
  RowsAhead ahead = next;
  constexpr int kRegisters = kUnitRegisters<A>;
  const int64_t step = Row::kScaled ? shape.group : shape.length, groups = Row::kScaled ? shape.groups() : 1;
  // Of a single token the factors join the scales.
  if constexpr (Row::kScaled)
    for (int r = 0; r < R; ++r)
      scale_factors(rows[r], shape, ahead.scales, tokens == 1 ? c[r] : A(1), scales + r * groups);
  for (int64_t begin = 0, g = 0; begin < shape.length; begin += step, ++g) {
    // Held here, where no store of sums can change them.
    A factors[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) factors[r] = Row::kScaled ? scales[r * groups + g] : c[r];
    for (int64_t k = begin; k < begin + step; k += kUnit) {
      if (tokens == 1) {
        Lanes<A> sums[kRegisters], w[kRegisters];
#pragma GCC unroll 16
        for (int i = 0; i < kRegisters; ++i) sums[i] = load(y + k + i * kLanes<A>, All{});
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          ahead.rows.unit<Row>(k);
          rows[r].template unit<A>(k, w);
#pragma GCC unroll 16
          for (int i = 0; i < kRegisters; ++i) sums[i] += factors[r] * w[i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRegisters; ++i) store(y + k + i * kLanes<A>, sums[i], All{});
        continue;
      }
      Lanes<A> wide[R][kRegisters];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        ahead.rows.unit<Row>(k);
        rows[r].template unit<A>(k, wide[r]);
        if constexpr (Row::kScaled) {
#pragma GCC unroll 16
          for (int i = 0; i < kRegisters; ++i) wide[r][i] *= factors[r];
        }
      }
      for (int64_t n = 0; n < tokens; ++n) {
        A* to = y + n * y_row + k;
        Lanes<A> sums[kRegisters];
#pragma GCC unroll 16
        for (int i = 0; i < kRegisters; ++i) sums[i] = load(to + i * kLanes<A>, All{});
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
          for (int i = 0; i < kRegisters; ++i) sums[i] += c[r * tokens + n] * wide[r][i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRegisters; ++i) store(to + i * kLanes<A>, sums[i], All{});
      }
    }
  }
  next = ahead;
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
