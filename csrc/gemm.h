// Matrix products whose result never leaves the cache: blocks of rows times packed panels, a tile of registers at a
// time.
//
// The left factor is kBlockRows rows, widened to the type of computation, which stay in the second-level cache. The
// right factor is panels of kTileColumns columns, packed so that a step of the sum reads one line. A panel product
// leaves rows x kTileColumns numbers, a few KiB, and its caller reduces or stores them while they are in the
// first-level cache:
//
//   RightPanels<float> right(n_panels, width);            pack_rows_as_columns(text, ...) or pack_matrix(...)
//   parallel over blocks of rows:
//     widen_rows(image, first, count, width, left);
//     for each panel: panel_product(left, rows, right.panel(p), right.depth(), c);   // c: rows x kTileColumns
//                     ... reduce c ...
//
// An entry of a product is a sum over slices of kSlice, each summed in the order of k, whatever the block, the panel or
// the thread that it falls to.
//
// Operands are packed in the type of computation, or as bf16 on CPUs that multiply bf16 pairs at twice the rate: there
// the steps 2k and 2k + 1 of a panel's column lie side by side.
#pragma once

#include "common.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// The tile: this many rows times two registers, and two registers of the right factor, fill the register file.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
template <typename A>
constexpr int kTileColumns = 2 * kLanes<A>;

// 72 rows of 768 floats are 216 KiB, under half of a second-level cache of 512; a multiple of the tile's rows.
constexpr int kBlockRows = 72;
// Steps of the sum between which a panel's slice (24 KiB of floats) stays in the first-level cache.
constexpr int64_t kSlice = 384;

// Rounded up to whole steps of kTileColumns, which is how long sums are and how wide rows: the rest is zero.
template <typename A>
inline int64_t padded_depth(int64_t n) {
  return (n + kTileColumns<A> - 1) / kTileColumns<A> * kTileColumns<A>;
}

inline int64_t padded_rows(int64_t n) { return (n + kTileRows - 1) / kTileRows * kTileRows; }
inline int64_t count_blocks(int64_t n) { return (n + kBlockRows - 1) / kBlockRows; }

template <typename A>
inline int64_t count_panels(int64_t n) {
  return (n + kTileColumns<A> - 1) / kTileColumns<A>;
}

// The left factor: entry (r, k) lies at data[r * row + k / kTileColumns * chunk + k % kTileColumns]. Row-major buffers
// have chunk = kTileColumns; panels of a former product serve as a left factor by their own chunk.
template <typename P>
struct Left {
  const P* data;
  int64_t row;
  int64_t chunk = kTileColumns<Acc<P>>;
};

#if defined(CPU_CAPABILITY_AVX512)
constexpr bool kHasBf16Tile = true;
inline bool multiplies_bf16() {
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported;
}
#else
constexpr bool kHasBf16Tile = false;
inline bool multiplies_bf16() { return false; }
#endif

// Calls body.operator()<P>(), P the type of packed operands for rows of type T.
template <typename T, typename Body>
inline void with_operands(bool bf16, Body body) {
  if constexpr (kHasBf16Tile && !std::is_same_v<T, double>) {
    if (bf16 && multiplies_bf16()) return body.template operator()<c10::BFloat16>();
  }
  body.template operator()<Acc<T>>();
}

// Distance of widened rows: off the powers of two, whose lines would share a set of the cache.
template <typename A>
inline int64_t left_stride(int64_t depth) {
  return padded_depth<A>(depth) + kTileColumns<A>;
}

// c (kTileRows x kTileColumns) = or += left rows times panel, over `depth` steps, a multiple of kTileColumns. Not
// inlined: a body of at::parallel_for is compiled twice, and in the copy for one thread registers were spilled, at a
// tenth of the speed.
template <typename A>
[[gnu::noinline]] void tile_product(const A* a, int64_t row, int64_t chunk, const A* b, int64_t depth, A* c, bool add) {
  using V = Lanes<A>;
  constexpr int kWidth = kLanes<A>;
  V acc[kTileRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = V{};
  for (; depth > 0; depth -= kTileColumns<A>, a += chunk) {
#pragma GCC unroll 4
    for (int k = 0; k < kTileColumns<A>; ++k, b += kTileColumns<A>) {
      const V b0 = load(b, All{}), b1 = load(b + kWidth, All{});
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const V x = fill(a[r * row + k]);
        acc[r][0] += x * b0;
        acc[r][1] += x * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    A* to = c + r * kTileColumns<A>;
    store(to, add ? load(to, All{}) + acc[r][0] : acc[r][0], All{});
    store(to + kWidth, add ? load(to + kWidth, All{}) + acc[r][1] : acc[r][1], All{});
  }
}

#if defined(CPU_CAPABILITY_AVX512)
[[gnu::target("avx512bf16"), gnu::noinline]] inline void tile_product(const c10::BFloat16* a, int64_t row,
                                                                      int64_t chunk, const c10::BFloat16* b,
                                                                      int64_t depth, float* c, bool add) {
  constexpr int kColumns = kTileColumns<float>, kWidth = kLanes<float>;
  __m512 acc[kTileRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  for (; depth > 0; depth -= kColumns, a += chunk) {
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; k += 2, b += 2 * kColumns) {
      const auto b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
      const auto b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 2 * kWidth));
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        int pair;
        std::memcpy(&pair, a + r * row + k, sizeof(pair));
        const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, b0);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, b1);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    float* to = c + r * kColumns;
    _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[r][0]) : acc[r][0]);
    _mm512_storeu_ps(to + kWidth, add ? _mm512_add_ps(_mm512_loadu_ps(to + kWidth), acc[r][1]) : acc[r][1]);
  }
}
#endif

// c (rows x kTileColumns) = left times one panel (or +=, with add); rows a multiple of kTileRows.
template <typename P>
inline void panel_product(const Left<P>& left, int64_t rows, const P* panel, int64_t depth, Acc<P>* c,
                          bool add = false) {
  using A = Acc<P>;
  for (int64_t k = 0; k < depth || (k == 0 && !add); k += kSlice) {
    const int64_t steps = std::min(kSlice, depth - k);
    const P* a = left.data + k / kTileColumns<A> * left.chunk;
    for (int64_t r = 0; r < rows; r += kTileRows)
      tile_product(a + r * left.row, left.row, left.chunk, panel + k * kTileColumns<A>, steps, c + r * kTileColumns<A>,
                   add || k > 0);
  }
}
static_assert(kSlice % kTileColumns<float> == 0 && kBlockRows % kTileRows == 0);

// Sets what lies right of the last column to zero: the product with an infinite row has left NaN there.
template <typename A>
inline void clear_beyond(A* c, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = columns; j < kTileColumns<A>; ++j) c[r * kTileColumns<A> + j] = 0;
}

// Sources ------------------------------------------------------------------------------------------------------------

// Rows of embeddings in storage type T: contiguous within a row, perhaps picked by an index.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride, width;
  const int64_t* index = nullptr;
  bool bf16 = false;

  const T* operator()(int64_t i) const { return data + (index ? index[i] : i) * stride; }
  Rows picked_by(const int64_t* rows) const { return {data, stride, width, rows, bf16}; }
};

// Kernels read along rows; what runs the other way is copied once.
inline at::Tensor unit_stride(const at::Tensor& x) { return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(); }

template <typename T>
inline Rows<T> rows_of(const at::Tensor& x, bool bf16 = false) {
  return {x.const_data_ptr<T>(), x.stride(0), x.size(1), nullptr, bf16 && !std::is_same_v<T, double>};
}

// A register of x in the type of computation, rounded to bf16 where the rows ask for it.
template <typename T, typename Part>
inline Lanes<Acc<T>> widened(const Rows<T>& x, const T* p, Part lanes) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, c10::Half>) {
    if (x.bf16) {
      c10::BFloat16 rounded[kLanes<float>];
      store(rounded, load(p, lanes), All{});
      return load(rounded, All{});
    }
  }
  return load(p, lanes);
}

// Rows [first, first + count) to `to`, (padded_rows(count), stride), with zeros around them.
template <typename T, typename P>
inline void widen_rows(const Rows<T>& x, int64_t first, int64_t count, int64_t stride, P* to) {
  using A = Acc<T>;
  for (int64_t r = 0; r < count; ++r, to += stride) {
    const T* row = x(first + r);
    for_lanes<A>(0, x.width, [&](int64_t k, auto lanes) {
      if constexpr (std::is_same_v<P, A>) {
        store(to + k, widened(x, row + k, lanes), All{});
      } else {
        store(to + k, load(row + k, lanes), All{});
      }
    });
    // The partial register above wrote zeros up to its end.
    std::fill(to + (x.width + kLanes<A> - 1) / kLanes<A> * kLanes<A>, to + stride, P(0));
  }
  std::fill(to, to + (padded_rows(count) - count) * stride, P(0));
}

// Columns [first, first + count) of rows [k0, k0 + depth), transposed: to (padded_rows(count), stride), so that rows of
// `to` run over rows of x; zeros beyond n rows of x.
template <typename T>
inline void widen_transposed(const Rows<T>& x, int64_t first, int64_t count, int64_t k0, int64_t depth, int64_t n,
                             int64_t stride, Acc<T>* to) {
  using A = Acc<T>;
  using V = Lanes<A>;
  constexpr int kWidth = kLanes<A>;
  alignas(64) A strip[kWidth][kBlockRows + kWidth];
  std::fill(to + count * stride, to + padded_rows(count) * stride, A(0));
  for (int64_t k = 0; k < depth; k += kWidth) {
    for (int r = 0; r < kWidth; ++r) {
      if (k0 + k + r >= n) {
        std::fill(strip[r], strip[r] + count, A(0));
        continue;
      }
      const T* row = x(k0 + k + r) + first;
      for_lanes<A>(0, count, [&](int64_t e, auto lanes) { store(strip[r] + e, widened(x, row + e, lanes), All{}); });
    }
    for (int64_t e = 0; e < count; ++e) {
      V column;
      for (int r = 0; r < kWidth; ++r) column[r] = strip[r][e];
      store(to + e * stride + k, column, All{});
    }
  }
}

// The right factor ---------------------------------------------------------------------------------------------------

// Panel of the rows [first, first + count) as columns: to[k * kTileColumns + c] = x(first + c)[k].
template <typename T>
inline void pack_rows_as_columns(const Rows<T>& x, int64_t first, int64_t count, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int64_t kStrip = 64;
  alignas(64) A strip[kTileColumns<A>][kStrip];
  const int64_t depth = padded_depth<A>(x.width);
  std::memset(strip, 0, sizeof(strip));
  for (int64_t begin = 0; begin < depth; begin += kStrip) {
    const int64_t end = std::min(depth, begin + kStrip), live = std::min(end, x.width);
    for (int64_t c = 0; c < std::min<int64_t>(count, kTileColumns<A>); ++c) {
      const T* row = x(first + c);
      if (live < end) std::fill(strip[c], strip[c] + kStrip, A(0));
      for_lanes<A>(begin, live,
                   [&](int64_t k, auto lanes) { store(strip[c] + k - begin, widened(x, row + k, lanes), All{}); });
    }
    for (int64_t k = begin; k < end; ++k)
      for (int c = 0; c < kTileColumns<A>; ++c) to[k * kTileColumns<A> + c] = strip[c][k - begin];
  }
}

// Panel of the columns [first, first + kTileColumns) of the rows [k0, k0 + count): to[k * kTileColumns + c] =
// x(k0 + k)[first + c], with zeros to the right of the rows and below them, up to depth.
template <typename T>
inline void pack_matrix(const Rows<T>& x, int64_t k0, int64_t count, int64_t depth, int64_t first, Acc<T>* to) {
  using A = Acc<T>;
  const int64_t columns = std::min<int64_t>(kTileColumns<A>, x.width - first);
  if (columns < kTileColumns<A>) std::fill(to, to + count * kTileColumns<A>, A(0));
  for (int64_t k = 0; k < count; ++k) {
    const T* row = x(k0 + k) + first;
    A* line = to + k * kTileColumns<A>;
    for_lanes<A>(0, columns, [&](int64_t c, auto lanes) { store(line + c, widened(x, row + c, lanes), All{}); });
  }
  std::fill(to + count * kTileColumns<A>, to + depth * kTileColumns<A>, A(0));
}

// Scratch of n numbers for each thread.
template <typename A>
class PerThread {
 public:
  explicit PerThread(int64_t n)
      : n_((n + 15) / 16 * 16), buffer_(at::empty({at::get_num_threads(), n_}, c10::CppTypeToScalarType<A>::value)) {}
  A* get() const { return buffer_.template mutable_data_ptr<A>() + at::get_thread_num() * n_; }

 private:
  int64_t n_;
  at::Tensor buffer_;
};

// A panel of operands of type P: pack(A* panel) writes one of the type of computation, there or to be narrowed.
template <typename P, typename Pack>
inline void pack_panel(const PerThread<Acc<P>>& wide, int64_t depth, P* to, Pack pack) {
  using A = Acc<P>;
  if constexpr (std::is_same_v<P, A>) {
    pack(to);
  } else {
    A* panel = wide.get();
    pack(panel);
    for (int64_t k = 0; k < depth; k += 2, panel += 2 * kTileColumns<A>, to += 2 * kTileColumns<A>)
      for (int c = 0; c < kTileColumns<A>; c += kLanes<A>)
        store_couple<P>(to + 2 * c, {load(panel + c, All{}), load(panel + kTileColumns<A> + c, All{})}, All{});
  }
}

// What pack_panel needs for each thread.
template <typename P>
inline PerThread<Acc<P>> wide_panels(int64_t depth) {
  return PerThread<Acc<P>>(std::is_same_v<P, Acc<P>> ? 0 : depth * kTileColumns<Acc<P>>);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
