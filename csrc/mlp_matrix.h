// A matrix of plain numbers in a type known at run time only, by rows that meet a few tokens.
#pragma once

#include "mlp_rows.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

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

  // Fetches rows [first, first + count) into the second-level cache, as far as there are such, or `length` entries of
  // each from k0 on.
  [[gnu::always_inline]] void fetch(int64_t first, int64_t count) const { fetch(first, count, 0, width); }
  [[gnu::always_inline]] void fetch(int64_t first, int64_t count, int64_t k0, int64_t length) const {
    const int64_t bytes = static_cast<int64_t>(c10::elementSize(type));
    for (int64_t r = first; r < std::min(rows, first + count); ++r)
      for (int64_t at = 0; at < length * bytes; at += kLine)
        __builtin_prefetch(static_cast<const char*>(data) + (r * stride + k0) * bytes + at, 0, 2);
  }

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
    // Of pieces of rows the next rows are not the next in memory.
    Ahead ahead = stride == length ? Ahead(base + 4 * stride) : Ahead::nothing(base);
    int64_t r = 0;
    for (; r + 4 <= count; r += 4)
      row_dots<4, T>(base + r * stride, length, ahead, x, x_row, tokens, out + r * out_row, out_row, add);
    for (; r < count; ++r)
      row_dots<1, T>(base + r * stride, length, ahead, x, x_row, tokens, out + r * out_row, out_row, add);
  }

  template <int R, typename T>
  void row_dots(const T* data, int64_t length, Ahead& ahead, const A* x, int64_t x_row, int64_t tokens, A* out,
                int64_t out_row, bool add) const {
    // Rows are read from memory for the first tokens.
    RowsAhead first{ahead, Ahead::nothing(data)}, later = RowsAhead::nothing(data);
    int64_t n = 0;
    for (; n + 2 <= tokens; n += 2)
      token_dots<R, 2, T>(data, length, n ? later : first, x + n * x_row, x_row, out + n, out_row, add);
    if (n < tokens) token_dots<R, 1, T>(data, length, n ? later : first, x + n * x_row, x_row, out + n, out_row, add);
    ahead = first.rows;
  }

  template <int R, int N, typename T>
  void token_dots(const T* data, int64_t length, RowsAhead& ahead, const A* x, int64_t x_row, A* out, int64_t out_row,
                  bool add) const {
    PlainRow<T> rows[R];
    for (int r = 0; r < R; ++r) rows[r] = {data + r * stride};
    A sums[R * N];
    const int64_t whole = length / kUnit * kUnit;
    dot_units<R, N>(rows, RowShape{whole, whole}, ahead, x, x_row, static_cast<A*>(nullptr), sums);
    dot_rest<R, N>(rows, whole, length, x, x_row, sums);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) out[r * out_row + n] = (add ? out[r * out_row + n] : A(0)) + sums[r * N + n];
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
