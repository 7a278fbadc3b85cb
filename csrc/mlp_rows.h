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

// One row of plain numbers; `length` entries, the last unit perhaps a part of one.
template <typename T>
struct PlainRow {
  using Storage = T;
  const T* data;

  static constexpr bool kScaled = false;
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
  template <typename A>
  void unit(int64_t k, Lanes<A>* w) const {
    typename VectorType<int8_t, kLanes<A>>::type bytes;
#pragma GCC unroll 16
    for (int i = 0; i < kUnitRegisters<A>; ++i) {
      std::memcpy(&bytes, data + k + i * kLanes<A>, sizeof(bytes));
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
  template <typename A>
  void unit(int64_t k, Lanes<A>* w) const {
    constexpr int kWidth = kLanes<A>;
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

// out[r * N + n] = row r times token n, over whole units: x holds zeros where rows are padded, or rows end with a unit.
template <int R, int N, typename Row, typename A>
inline void dot_units(const Row* rows, int64_t length, int64_t group, const A* x, int64_t x_row, A* out) {
  constexpr int kRegisters = kUnitRegisters<A>;
  // Two chains for each sum where there are too few to fill the pipeline.
  constexpr int kChains = R * N >= 8 || kRegisters < 2 ? 1 : 2;
  Lanes<A> total[R][N] = {};
  const int64_t step = Row::kScaled ? group : length;
  for (int64_t begin = 0, g = 0; begin < length; begin += step, ++g) {
    Lanes<A> acc[R][N][kChains] = {};
    for (int64_t k = begin; k < begin + step; k += kUnit) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Lanes<A> w[kRegisters];
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
          total[r][n] += static_cast<A>(static_cast<float>(rows[r].scales[g])) * part;
        } else {
          total[r][n] = part;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[r * N + n] = sum<A>(total[r][n]);
  }
}

// Rows at a time of dots, by the number of tokens at a time.
template <int N>
constexpr int kDotRows = N == 1 ? 4 : 2;

// Sums of rows: y[n * y_row + k] += sum_r c[r * tokens + n] row_r[k], over whole units of `length`. Weights are
// unpacked once for all tokens.
template <typename Row, typename A>
inline void add_rows(const Row* rows, int n_rows, int64_t length, int64_t group, const A* c, int64_t tokens, A* y,
                     int64_t y_row) {
  constexpr int kRegisters = kUnitRegisters<A>, kMost = 16;
  A scaled[kMost * 8];
  const A* factors = c;
  const int64_t step = Row::kScaled ? group : length;
  for (int64_t begin = 0, g = 0; begin < length; begin += step, ++g) {
    if constexpr (Row::kScaled) {
      for (int r = 0; r < n_rows; ++r) {
        const A scale = static_cast<A>(static_cast<float>(rows[r].scales[g]));
        for (int64_t n = 0; n < tokens; ++n) scaled[r * tokens + n] = c[r * tokens + n] * scale;
      }
      factors = scaled;
    }
    for (int64_t k = begin; k < begin + step; k += kUnit) {
      if (tokens == 1) {
        Lanes<A> sums[kRegisters], w[kRegisters];
#pragma GCC unroll 16
        for (int i = 0; i < kRegisters; ++i) sums[i] = load(y + k + i * kLanes<A>, All{});
        for (int r = 0; r < n_rows; ++r) {
          rows[r].template unit<A>(k, w);
          const Lanes<A> factor = fill(factors[r]);
#pragma GCC unroll 16
          for (int i = 0; i < kRegisters; ++i) sums[i] += factor * w[i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRegisters; ++i) store(y + k + i * kLanes<A>, sums[i], All{});
        continue;
      }
      Lanes<A> wide[kMost][kRegisters];
      for (int r = 0; r < n_rows; ++r) rows[r].template unit<A>(k, wide[r]);
      for (int64_t n = 0; n < tokens; ++n) {
        A* to = y + n * y_row + k;
        Lanes<A> sums[kRegisters];
#pragma GCC unroll 16
        for (int i = 0; i < kRegisters; ++i) sums[i] = load(to + i * kLanes<A>, All{});
        for (int r = 0; r < n_rows; ++r) {
          const Lanes<A> factor = fill(factors[r * tokens + n]);
#pragma GCC unroll 16
          for (int i = 0; i < kRegisters; ++i) sums[i] += factor * wide[r][i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRegisters; ++i) store(to + i * kLanes<A>, sums[i], All{});
      }
    }
  }
}

// The part of plain rows beyond their last whole unit.
template <int R, int N, typename T, typename A>
inline void dot_rest(const PlainRow<T>* rows, int64_t begin, int64_t end, const A* x, int64_t x_row, A* out) {
  if (begin >= end) return;
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      Lanes<A> total{};
      for_lanes<A>(begin, end, [&](int64_t k, auto lanes) {
        total += load(rows[r].data + k, lanes) * load(x + n * x_row + k, lanes);
      });
      out[r * N + n] += sum<A>(total);
    }
  }
}

// A matrix of plain rows in a type known at run time only (LoRA may have another one than the base): out (row, token) =
// or += row . token.
template <typename A>
struct PlainMatrix {
  const void* data = nullptr;
  int64_t stride = 0, rows = 0, width = 0;
  at::ScalarType type = at::kFloat;

  explicit operator bool() const { return data != nullptr; }

  // Rows [first, first + count) and entries [k0, k0 + length) of them; out[(r - first) * out_row + n].
  void dots(int64_t first, int64_t count, int64_t k0, int64_t length, const A* x, int64_t x_row, int64_t tokens, A* out,
            int64_t out_row, bool add) const {
    if constexpr (std::is_same_v<A, double>) {
      dots_of<double>(first, count, k0, length, x, x_row, tokens, out, out_row, add);
    } else if (type == at::kFloat) {
      dots_of<float>(first, count, k0, length, x, x_row, tokens, out, out_row, add);
    } else if (type == at::kBFloat16) {
      dots_of<c10::BFloat16>(first, count, k0, length, x, x_row, tokens, out, out_row, add);
    } else {
      dots_of<c10::Half>(first, count, k0, length, x, x_row, tokens, out, out_row, add);
    }
  }

 private:
  template <typename T>
  void dots_of(int64_t first, int64_t count, int64_t k0, int64_t length, const A* x, int64_t x_row, int64_t tokens,
               A* out, int64_t out_row, bool add) const {
    const T* base = static_cast<const T*>(data) + first * stride + k0;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4)
      row_dots<4, T>(base + r * stride, length, x, x_row, tokens, out + r * out_row, out_row, add);
    for (; r < count; ++r) row_dots<1, T>(base + r * stride, length, x, x_row, tokens, out + r * out_row, out_row, add);
  }

  template <int R, typename T>
  void row_dots(const T* data, int64_t length, const A* x, int64_t x_row, int64_t tokens, A* out, int64_t out_row,
                bool add) const {
    int64_t n = 0;
    for (; n + 2 <= tokens; n += 2) token_dots<R, 2, T>(data, length, x + n * x_row, x_row, out + n, out_row, add);
    if (n < tokens) token_dots<R, 1, T>(data, length, x + n * x_row, x_row, out + n, out_row, add);
  }

  template <int R, int N, typename T>
  void token_dots(const T* data, int64_t length, const A* x, int64_t x_row, A* out, int64_t out_row, bool add) const {
    PlainRow<T> rows[R];
    for (int r = 0; r < R; ++r) rows[r] = {data + r * stride};
    A sums[R * N];
    const int64_t whole = length / kUnit * kUnit;
    dot_units<R, N>(rows, whole, whole, x, x_row, sums);
    dot_rest<R, N>(rows, whole, length, x, x_row, sums);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) out[r * out_row + n] = (add ? out[r * out_row + n] : A(0)) + sums[r * N + n];
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
