// A few tokens through an MLP, bound by the reading of its weights. Packed weights are one stream: for each block of
// channels the rows of gate and up give h, and h times the rows of down goes to a sum of outputs. Channels are cut into
// slices, whatever the number of threads, each with a sum of its own that the last step adds in order:
//
//   t = A_gate x, A_up x  |  for each slice: h, t_down, sum of outputs  |  y = sums over slices + B_down t_down
//
// Plain weights have rows of down over channels, so h comes whole before them.
#pragma once

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
  MlpDecode(const MlpProblem<A>& p, const A* x, int64_t x_row) : p_(p), x_(x), x_row_(x_row) {
    for (int part : {kGate, kUp}) {
      low_[part].resize(p.rank(part) * p.tokens);
      if (!p.a[part]) continue;
      rows_in_parallel(p.rank(part), p.hidden, [&](int64_t first, int64_t count) {
        p.a[part].dots(first, count, 0, p.hidden, x, x_row, p.tokens, low_[part].data() + first * p.tokens, p.tokens,
                       false);
      });
      // B reads rows of it, token by token.
      low_[part] = transposed(low_[part], p.rank(part), p.scaling[part]);
    }
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
    std::vector<A> low(p_.rank(kDown) * p_.tokens);
    if (p_.a[kDown]) {
      rows_in_parallel(p_.rank(kDown), p_.inner, [&](int64_t first, int64_t count) {
        p_.a[kDown].dots(first, count, 0, p_.inner, h, h_row, p_.tokens, low.data() + first * p_.tokens, p_.tokens,
                         false);
      });
      low = transposed(low, p_.rank(kDown), p_.scaling[kDown]);
    }
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

  std::vector<A> transposed(const std::vector<A>& from, int64_t rank, A scaling) const {
    std::vector<A> to(from.size());
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t n = 0; n < p_.tokens; ++n) to[n * rank + r] = scaling * from[r * p_.tokens + n];
    return to;
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
  void block_dots(const Row* rows, int count, const RowShape& shape, int64_t n, A* scales, A* out) const {
    constexpr int R = kDotRows<N>;
    A sums[R * N];
    for (int r = 0; r < count; r += R) {
      // Rows beyond the last are the last again.
      Row some[R];
      for (int i = 0; i < R; ++i) some[i] = rows[std::min(r + i, count - 1)];
      dot_units<R, N>(some, shape, x_ + n * x_row_, x_row_, scales, sums);
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
    // For each slice: the sum of outputs (tokens, width), t_down (rank, tokens), h (tokens, slice), scales of a block.
    const int64_t sum_size = n_tokens * base.width, low_size = rank * n_tokens, h_size = n_tokens * slice;
    const int64_t each = (sum_size + low_size + h_size + kBlockChannels * plain.groups() + 15) / 16 * 16;
    const at::Tensor buffer = at::empty({slices * each}, c10::CppTypeToScalarType<A>::value);
    A* const scratch = buffer.mutable_data_ptr<A>();
    at::parallel_for(0, slices, grain(slice * base.width * base.parts), [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        A *sums = scratch + s * each, *low = sums + sum_size, *h = low + low_size, *scales = h + h_size;
        std::fill(sums, sums + sum_size, A(0));
        const int64_t begin = s * slice, end = std::min(p_.inner, begin + slice);
        for (int64_t j = begin; j < end; j += kBlockChannels) {
          const int count = static_cast<int>(std::min<int64_t>(kBlockChannels, end - j));
          A pre[2][kBlockChannels * kDecodeTokens];
          Row rows[kBlockChannels];
          for (int part = p_.gated ? kGate : kUp; part <= kUp; ++part) {
            const int64_t at = part - (p_.gated ? 0 : 1);
            for (int r = 0; r < count; ++r) rows[r] = row_of((j + r) * base.parts + at);
            int64_t n = 0;
            for (; n + 4 <= n_tokens; n += 4)
              block_dots<4>(rows, count, n == 0 ? fetching : plain, n, scales, pre[part]);
            for (; n + 2 <= n_tokens; n += 2)
              block_dots<2>(rows, count, n == 0 ? fetching : plain, n, scales, pre[part]);
            if (n < n_tokens) block_dots<1>(rows, count, n == 0 ? fetching : plain, n, scales, pre[part]);
          }
          finish_block(j, count, pre, h + j - begin, slice);
          for (int r = 0; r < count; ++r) rows[r] = row_of((j + r) * base.parts + base.parts - 1);
          if (count == kBlockChannels) {
            add_rows<kBlockChannels>(rows, fetching, pre[kGate], n_tokens, scales, sums, base.width);
          } else {
            for (int r = 0; r < count; ++r)
              add_rows<1>(rows + r, plain, pre[kGate] + r * n_tokens, n_tokens, scales, sums, base.width);
          }
        }
        if (rank) p_.a[kDown].dots(0, rank, begin, end - begin, h, slice, n_tokens, low, n_tokens, false);
      }
    });
    std::vector<A> low(low_size);
    for (int64_t s = 0; s < slices; ++s)
      for (int64_t i = 0; i < low_size; ++i) low[i] += scratch[s * each + sum_size + i];
    low = transposed(low, rank, p_.scaling[kDown]);
    // Outputs in pieces of a unit.
    at::parallel_for(0, base.width / kUnit, grain(kUnit * (rank + slices) * n_tokens),
                     [&](int64_t first, int64_t last) {
                       const int64_t i0 = first * kUnit, i1 = std::min(p_.hidden, last * kUnit);
                       for (int64_t n = 0; n < n_tokens; ++n) {
                         for (int64_t i = i0; i < i1; i += kUnit) {
                           const int64_t count = std::min<int64_t>(kUnit, i1 - i);
                           A out[kUnit] = {};
                           for (int64_t s = 0; s < slices; ++s) {
                             const A* from = scratch + s * each + n * base.width + i;
                             for (int k = 0; k < kUnit; k += kLanes<A>)
                               store(out + k, load(out + k, All{}) + load(from + k, All{}), All{});
                           }
                           if (rank) p_.b[kDown].dots(i, count, 0, rank, low.data() + n * rank, rank, 1, out, 1, true);
                           for (int64_t k = 0; k < count; ++k) y[n * p_.hidden + i + k] = static_cast<Out>(out[k]);
                         }
                       }
                     });
  }

  const MlpProblem<A>& p_;
  const A* x_;
  int64_t x_row_;
  // s A x, (tokens, rank)
  std::vector<A> low_[2];
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
