// A few tokens through an MLP, bound by the reading of its weights. Packed weights are one stream: for each block of
// channels the rows of gate and up give h, and h times the rows of down goes to a sum of outputs. Channels are cut into
// slices, whatever the number of threads, each with a sum of its own that the last step adds in order:
//
//   t = A_gate x, A_up x  |  for each slice: h, sum of outputs  |  t_down = A_down h  |  y = sums + B_down t_down
//
// Plain weights have rows of down over channels, so h comes whole before them.
#pragma once

#include "gemm.h"
#include "mlp_problem.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

constexpr int64_t kDecodeTokens = 8;
constexpr int kBlockChannels = 8;
constexpr int64_t kSlices = 32;
// Numbers of weights that are worth the waking of a thread.
constexpr int64_t kWeightsPerTask = 16384;

template <typename A>
class MlpDecode {
 public:
  // x_is_bf16: all numbers of x are such of bfloat16.
  MlpDecode(const MlpProblem<A>& p, const A* x, int64_t x_row, bool x_is_bf16)
      : p_(p), x_(x), x_row_(x_row), x_is_bf16_(x_is_bf16) {
    for (int part : {kGate, kUp}) low_[part] = low_of(part, x, x_row);
  }

  template <typename T, typename Out>
  void plain(const PlainBase<T>& base, Out* y) {
    PlainMatrix<A> rows[3];
    for (int part : {kGate, kUp, kDown})
      rows[part] = {base.data[part], base.stride[part], part == kDown ? p_.hidden : p_.inner,
                    part == kDown ? p_.inner : p_.hidden, c10::CppTypeToScalarType<T>::value};
    // h (tokens, h_row)
    const int64_t h_row = (p_.inner + kUnit - 1) / kUnit * kUnit;
    const at::Tensor buffer = at::empty({p_.tokens * h_row}, c10::CppTypeToScalarType<A>::value);
    A* h = buffer.mutable_data_ptr<A>();
    const int64_t blocks = (p_.inner + kBlockChannels - 1) / kBlockChannels;
    at::parallel_for(0, blocks, grain(kBlockChannels * p_.hidden * 2), [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t j = block * kBlockChannels, count = std::min<int64_t>(kBlockChannels, p_.inner - j);
        A pre[2][kBlockChannels * kDecodeTokens];
        for (int part = p_.gated ? kGate : kUp; part <= kUp; ++part)
          rows[part].dots(j, count, 0, p_.hidden, x_, x_row_, p_.tokens, pre[part], p_.tokens, false);
        finish_block(j, count, pre, h + j, h_row);
      }
    });
    const std::vector<A> low = low_of(kDown, h, h_row);
    const int64_t outputs = (p_.hidden + kBlockChannels - 1) / kBlockChannels;
    at::parallel_for(0, outputs, grain(kBlockChannels * p_.inner), [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t i = block * kBlockChannels, count = std::min<int64_t>(kBlockChannels, p_.hidden - i);
        A out[kBlockChannels * kDecodeTokens];
        rows[kDown].dots(i, count, 0, p_.inner, h, h_row, p_.tokens, out, p_.tokens, false);
        if (p_.b[kDown])
          p_.b[kDown].dots(i, count, 0, p_.rank(kDown), low.data(), p_.rank(kDown), p_.tokens, out, p_.tokens, true);
        for (int64_t n = 0; n < p_.tokens; ++n)
          for (int64_t r = 0; r < count; ++r) y[n * p_.hidden + i + r] = static_cast<Out>(out[r * p_.tokens + n]);
      }
    });
  }

  // x has zeros up to base.width.
  template <typename Out>
  void packed(const PackedBase& base, Out* y) {
    if (base.bits == 16) {
      stream(base, y, [&](int64_t row) {
        return PlainRow<c10::BFloat16>{static_cast<const c10::BFloat16*>(base.data) + row * base.width};
      });
    } else if (base.bits == 8) {
      stream(base, y, [&](int64_t row) {
        return Int8Row{static_cast<const int8_t*>(base.data) + row * base.width,
                       base.scales + row * (base.width / base.group)};
      });
    } else {
      stream(base, y, [&](int64_t row) {
        return Int4Row{static_cast<const uint8_t*>(base.data) + row * (base.width / 2),
                       base.scales + row * (base.width / base.group)};
      });
    }
  }

 private:
  static int64_t grain(int64_t weights) { return std::max<int64_t>(1, kWeightsPerTask / weights); }

  template <typename Body>
  static void rows_in_parallel(int64_t rows, int64_t width, Body body) {
    // Rows go in fours, so that a row meets the same partners whatever the number of threads.
    at::parallel_for(0, (rows + 3) / 4, grain(4 * width),
                     [&](int64_t first, int64_t last) { body(4 * first, std::min(rows, 4 * last) - 4 * first); });
  }

  // s A x, (tokens, rank)
  std::vector<A> low_of(int part, const A* x, int64_t x_row) const {
    const int64_t rank = p_.rank(part);
    std::vector<A> found(rank * p_.tokens), low(rank * p_.tokens);
    if (!rank) return low;
    rows_in_parallel(rank, p_.a[part].width, [&](int64_t first, int64_t count) {
      p_.a[part].dots(first, count, 0, p_.a[part].width, x, x_row, p_.tokens, found.data() + first * p_.tokens,
                      p_.tokens, false);
    });
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t n = 0; n < p_.tokens; ++n) low[n * rank + r] = p_.scaling[part] * found[r * p_.tokens + n];
    return low;
  }

  // x in bfloat16, in the order of such rows; nothing where they take it as it is.
  template <typename Row>
  std::vector<c10::BFloat16> paired_x(int64_t width) const {
    std::vector<c10::BFloat16> pairs;
    if constexpr (kPaired<Row> && std::is_same_v<A, float>) {
      if (!x_is_bf16_ || !multiplies_bf16()) return pairs;
      pairs.resize(p_.tokens * width);
      for (int64_t n = 0; n < p_.tokens; ++n)
        for (int64_t k = 0; k < width; k += kUnit)
          for (int p = 0; p < kUnit; ++p)
            pairs[n * width + k + p] = static_cast<c10::BFloat16>(x_[n * x_row_ + k + paired_entry<Row>(p)]);
    }
    return pairs;
  }

  // Pre-activations of the base (channel, token) to h[n * h_row + r], with LoRA added.
  void finish_block(int64_t j, int64_t count, A (*pre)[kBlockChannels * kDecodeTokens], A* h, int64_t h_row) const {
    for (int part : {kGate, kUp})
      if (p_.b[part])
        p_.b[part].dots(j, count, 0, p_.rank(part), low_[part].data(), p_.rank(part), p_.tokens, pre[part], p_.tokens,
                        true);
    const int64_t total = count * p_.tokens;
    with_activation(p_.activation, [&]<Activation kind>() {
      for_lanes<A>(0, total, [&](int64_t i, auto lanes) {
        const Lanes<A> value = activate<kind, false>(load(pre[p_.gated ? kGate : kUp] + i, lanes)).value;
        store(pre[kGate] + i, p_.gated ? value * load(pre[kUp] + i, lanes) : value, lanes);
      });
    });
    for (int64_t r = 0; r < count; ++r)
      for (int64_t n = 0; n < p_.tokens; ++n) h[n * h_row + r] = pre[kGate][r * p_.tokens + n];
  }

  template <int N, typename Row>
  void block_dots(const Row* rows, int count, const RowShape& shape, const std::vector<c10::BFloat16>& pairs, int64_t n,
                  A* scales, A* out) const {
    constexpr int R = kDotRows<N>;
    A sums[R * N];
    for (int r = 0; r < count; r += R) {
      // Rows beyond the last are the last again.
      Row some[R];
      for (int i = 0; i < R; ++i) some[i] = rows[std::min(r + i, count - 1)];
      if constexpr (kPaired<Row> && std::is_same_v<A, float>) {
        if (pairs.empty()) {
          dot_units<R, N>(some, shape, x_ + n * x_row_, x_row_, scales, sums);
        } else {
          paired_dots<R, N>(some, shape, pairs.data() + n * shape.length, shape.length, scales, sums);
        }
      } else {
        dot_units<R, N>(some, shape, x_ + n * x_row_, x_row_, scales, sums);
      }
      for (int i = 0; i < R && r + i < count; ++i)
        for (int t = 0; t < N; ++t) out[(r + i) * p_.tokens + n + t] = sums[i * N + t];
    }
  }

  template <typename Out, typename RowOf>
  void stream(const PackedBase& base, Out* y, RowOf row_of) {
    using Row = decltype(row_of(0));
    const int64_t n_tokens = p_.tokens, rank = p_.rank(kDown);
    const int64_t slice = std::max<int64_t>(
        64, ((p_.inner + kSlices - 1) / kSlices + kBlockChannels - 1) / kBlockChannels * kBlockChannels);
    const int64_t slices = (p_.inner + slice - 1) / slice;
    const RowShape plain{base.width, Row::kScaled ? base.group : base.width};
    // While a block is read, the next one is fetched.
    RowShape fetching = plain;
    fetching.ahead = kBlockChannels * base.parts * base.width * base.bits / 8;
    const std::vector<c10::BFloat16> pairs = paired_x<Row>(base.width);
    // For each slice: the sum of outputs (tokens, width), scales of a block; then h (tokens, inner).
    const int64_t sum_size = n_tokens * base.width, h_row = (p_.inner + 15) / 16 * 16;
    const int64_t each = (sum_size + kBlockChannels * plain.groups() + 15) / 16 * 16;
    const at::Tensor buffer = at::empty({slices * each + n_tokens * h_row}, c10::CppTypeToScalarType<A>::value);
    A *const scratch = buffer.mutable_data_ptr<A>(), *const h = scratch + slices * each;
    at::parallel_for(0, slices, grain(slice * base.width * base.parts), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        A *sums = scratch + s * each, *scales = sums + sum_size;
        std::fill(sums, sums + sum_size, A(0));
        const int64_t begin = s * slice, end = std::min(p_.inner, begin + slice);
        for (int64_t j = begin; j < end; j += kBlockChannels) {
          const int count = static_cast<int>(std::min<int64_t>(kBlockChannels, end - j));
          A pre[2][kBlockChannels * kDecodeTokens];
          Row rows[kBlockChannels];
          // Rows of B are too few for a block to be noticed as a stream.
          for (int part : {kGate, kUp}) p_.b[part].fetch(j + kBlockChannels, kBlockChannels);
          for (int part = p_.gated ? kGate : kUp; part <= kUp; ++part) {
            const int64_t at = part - (p_.gated ? 0 : 1);
            for (int r = 0; r < count; ++r) rows[r] = row_of((j + r) * base.parts + at);
            int64_t n = 0;
            for (; n + 4 <= n_tokens; n += 4)
              block_dots<4>(rows, count, n == 0 ? fetching : plain, pairs, n, scales, pre[part]);
            for (; n + 2 <= n_tokens; n += 2)
              block_dots<2>(rows, count, n == 0 ? fetching : plain, pairs, n, scales, pre[part]);
            if (n < n_tokens) block_dots<1>(rows, count, n == 0 ? fetching : plain, pairs, n, scales, pre[part]);
          }
          finish_block(j, count, pre, h + j, h_row);
          for (int r = 0; r < count; ++r) rows[r] = row_of((j + r) * base.parts + base.parts - 1);
          if (count == kBlockChannels) {
            add_rows<kBlockChannels>(rows, fetching, pre[kGate], n_tokens, scales, sums, base.width);
          } else {
            for (int r = 0; r < count; ++r)
              add_rows<1>(rows + r, plain, pre[kGate] + r * n_tokens, n_tokens, scales, sums, base.width);
          }
        }
      }
    });
    const std::vector<A> low = low_of(kDown, h, h_row);
    // Outputs in pieces of a unit; sums of slices come together in the first of them.
    at::parallel_for(
        0, base.width / kUnit, grain(kUnit * (rank + slices) * n_tokens), [&](int64_t first, int64_t last) {
          const int64_t begin = first * kUnit, end = last * kUnit, live = std::min(end, p_.hidden);
          for (int64_t n = 0; n < n_tokens; ++n) {
            A* total = scratch + n * base.width;
            for (int64_t s = 1; s < slices; ++s)
              for (int64_t i = begin; i < end; i += kLanes<A>)
                store(total + i, load(total + i, All{}) + load(total + s * each + i, All{}), All{});
            if (rank)
              p_.b[kDown].dots(begin, live - begin, 0, rank, low.data() + n * rank, rank, 1, total + begin, 1, true);
            for (int64_t i = begin; i < live; ++i) y[n * p_.hidden + i] = static_cast<Out>(total[i]);
          }
        });
  }

  const MlpProblem<A>& p_;
  const A* x_;
  int64_t x_row_;
  bool x_is_bf16_;
  // s A x, (tokens, rank)
  std::vector<A> low_[2];
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
