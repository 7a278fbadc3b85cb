// A few tokens through an MLP, bound by the reading of its weights. Packed weights are one stream: for each block of
// channels the rows of gate and up give h, and h times the rows of down goes to a sum of outputs. Channels are cut into
// slices, whatever the number of threads, each with a sum of its own that the last step adds in order:
//
//   t = A_gate x, A_up x  |  for each slice: h, sum of outputs, sum of A_down h  |  y = sums + B_down t_down
//
// Plain weights have rows of down over channels, so h comes whole before them.
#pragma once

#include "gemm.h"
#include "mlp_lines.h"
#include "mlp_problem.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Tokens that go this way at most.
constexpr int64_t kDecodeTokens = 32;
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
    low_of({kGate, kUp}, x, x_row);
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
    low_of({kDown}, h, h_row);
    const int64_t outputs = (p_.hidden + kBlockChannels - 1) / kBlockChannels;
    at::parallel_for(0, outputs, grain(kBlockChannels * p_.inner), [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t i = block * kBlockChannels, count = std::min<int64_t>(kBlockChannels, p_.hidden - i);
        A out[kBlockChannels * kDecodeTokens];
        rows[kDown].dots(i, count, 0, p_.inner, h, h_row, p_.tokens, out, p_.tokens, false);
        if (p_.b[kDown])
          p_.b[kDown].dots(i, count, 0, p_.rank(kDown), low_[kDown].data(), p_.rank(kDown), p_.tokens, out, p_.tokens,
                           true);
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

  // low_[part] = s A x for the parts. Rows of A go in fours, so that one meets the same partners whatever the number of
  // threads.
  void low_of(std::initializer_list<int> parts, const A* x, int64_t x_row) {
    struct Four {
      int part;
      int64_t row;
    };
    std::vector<Four> fours;
    for (int part : parts) {
      low_[part].resize(p_.rank(part) * p_.tokens);
      for (int64_t r = 0; r < p_.rank(part); r += 4) fours.push_back({part, r});
    }
    if (fours.empty()) return;
    at::parallel_for(0, static_cast<int64_t>(fours.size()), grain(4 * p_.a[fours[0].part].width),
                     [&](int64_t first, int64_t last) {
                       for (int64_t i = first; i < last; ++i) {
                         const auto [part, row] = fours[i];
                         const int64_t rank = p_.rank(part), count = std::min<int64_t>(4, rank - row);
                         A found[4 * kDecodeTokens];
                         p_.a[part].dots(row, count, 0, p_.a[part].width, x, x_row, p_.tokens, found, p_.tokens, false);
                         for (int64_t r = 0; r < count; ++r)
                           for (int64_t n = 0; n < p_.tokens; ++n)
                             low_[part][n * rank + row + r] = p_.scaling[part] * found[r * p_.tokens + n];
                       }
                     });
  }

  // low_[kDown] from those of slices, (slice, rank, token), `each` numbers apart.
  void low_of_slices(const A* parts, int64_t each, int64_t slices) {
    const int64_t rank = p_.rank(kDown);
    low_[kDown].resize(rank * p_.tokens);
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t n = 0; n < p_.tokens; ++n) {
        A total = 0;
        for (int64_t s = 0; s < slices; ++s) total += parts[s * each + r * p_.tokens + n];
        low_[kDown][n * rank + r] = p_.scaling[kDown] * total;
      }
  }

  // Whether sums of outputs are in the order of lines of the rows.
  template <typename Row>
  static constexpr bool kSumsByLine = std::is_same_v<A, float> && std::is_same_v<Row, Int4Row> && Line<Row>::kPaired;

  // x in bfloat16, in the order of lines of such rows; nothing where they take it as it is.
  template <typename Row>
  std::vector<c10::BFloat16> paired_x(int64_t width) const {
    std::vector<c10::BFloat16> pairs;
    if constexpr (Line<Row>::kPaired && std::is_same_v<A, float>) {
      if (!x_is_bf16_ || !multiplies_bf16()) return pairs;
      const int64_t row = padded_to_lines<Row>(width);
      pairs.resize(p_.tokens * row);
      // A number of bfloat16 is the upper half of its float.
      const auto* const halves = reinterpret_cast<const c10::BFloat16*>(x_) + 1;
      for (int64_t n = 0; n < p_.tokens; ++n)
        for (int64_t k = 0; k < row; k += Line<Row>::kEntries)
          for (int i = 0; i < Line<Row>::kPairs; ++i)
            for (int place = 0; place < 32; ++place) {
              const int64_t entry = k + Line<Row>::pair_entry(i, place);
              if (k + Line<Row>::kEntries <= width || entry < width)
                pairs[n * row + k + 32 * i + place] = halves[2 * (n * x_row_ + entry)];
            }
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

  // What a block of channels needs beside the rows: x as they take it, and room for their scales.
  template <typename Row>
  struct BlockScratch {
    RowShape shape;
    const c10::BFloat16* pairs;
    int64_t pairs_row;
    A* scales = nullptr;
    c10::BFloat16* line_scales = nullptr;
    int64_t line_scale_row() const { return shape.length / kUnit + 4; }
  };

  template <int N, typename Row>
  void block_dots(const Row* rows, int count, const BlockScratch<Row>& block, RowsAhead& ahead, int64_t n,
                  A* out) const {
    constexpr int R = kDotRows<N>;
    A sums[R * N];
    for (int r = 0; r < count; r += R) {
      // Rows beyond the last are the last again.
      Row some[R];
      for (int i = 0; i < R; ++i) some[i] = rows[std::min(r + i, count - 1)];
      if (!line_dots_of<R, N>(some, block, ahead, n, sums))
        dot_units<R, N>(some, block.shape, ahead, x_ + n * x_row_, x_row_, block.scales, sums);
      for (int i = 0; i < R && r + i < count; ++i)
        for (int t = 0; t < N; ++t) out[(r + i) * p_.tokens + n + t] = sums[i * N + t];
    }
  }

  template <int R, int N, typename Row>
  bool line_dots_of(const Row* rows, const BlockScratch<Row>& block, RowsAhead& ahead, int64_t n, A* sums) const {
    if constexpr (Line<Row>::kPaired && std::is_same_v<A, float>) {
      if (!block.pairs) return false;
      const int64_t scale_row = block.line_scale_row();
      for (int i = 0; i < R; ++i) unit_scales(rows[i], block.shape, ahead.scales, block.line_scales + i * scale_row);
      line_dots<R, N>(rows, block.shape, ahead.rows, block.pairs + n * block.pairs_row, block.pairs_row,
                      block.line_scales, scale_row, sums);
      return true;
    }
    return false;
  }

  // sums += h times rows of down
  template <int R, typename Row>
  void add_block(const Row* rows, const BlockScratch<Row>& block, RowsAhead& ahead, const A* h, A* sums,
                 int64_t sum_row) const {
    if constexpr (kSumsByLine<Row>) {
      const int64_t scale_row = block.line_scale_row();
      for (int r = 0; r < R; ++r) unit_scales(rows[r], block.shape, ahead.scales, block.line_scales + r * scale_row);
      if (p_.tokens == 1) {
        add_lines<R, true>(rows, block.shape, ahead.rows, h, 1, block.line_scales, scale_row, sums, sum_row);
      } else {
        add_lines<R, false>(rows, block.shape, ahead.rows, h, p_.tokens, block.line_scales, scale_row, sums, sum_row);
      }
    } else {
      add_rows<R>(rows, block.shape, ahead, h, p_.tokens, block.scales, sums, sum_row);
    }
  }

  template <typename Out, typename RowOf>
  void stream(const PackedBase& base, Out* y, RowOf row_of) {
    using Row = decltype(row_of(0));
    // Entries between which sums of outputs are in an order of their own.
    constexpr int64_t kSpan = kSumsByLine<Row> ? Line<Row>::kEntries : kUnit;
    const int64_t n_tokens = p_.tokens, rank = p_.rank(kDown);
    const int64_t slice = std::max<int64_t>(
        64, ((p_.inner + kSlices - 1) / kSlices + kBlockChannels - 1) / kBlockChannels * kBlockChannels);
    const int64_t slices = (p_.inner + slice - 1) / slice;
    const std::vector<c10::BFloat16> pairs = paired_x<Row>(base.width);
    const BlockScratch<Row> block{RowShape{base.width, Row::kScaled ? base.group : base.width},
                                  pairs.empty() ? nullptr : pairs.data(),
                                  static_cast<int64_t>(pairs.size()) / n_tokens};
    // For each slice: the sum of outputs (tokens, sum_row), A_down h (rank, tokens), scales of a block; then h (tokens,
    // inner).
    const int64_t sum_row = (base.width + kSpan - 1) / kSpan * kSpan, h_row = (p_.inner + 15) / 16 * 16;
    const int64_t sum_size = n_tokens * sum_row, scale_size = kBlockChannels * block.line_scale_row();
    const int64_t low_size = rank * n_tokens, each = (sum_size + low_size + scale_size + 15) / 16 * 16;
    const at::Tensor buffer = at::empty({slices * each + n_tokens * h_row}, c10::CppTypeToScalarType<A>::value);
    A *const scratch = buffer.mutable_data_ptr<A>(), *const h = scratch + slices * each;
    at::parallel_for(0, slices, grain(slice * base.width * base.parts), [&](int64_t first, int64_t last) {
      BlockScratch<Row> own = block;
      for (int64_t s = first; s < last; ++s) {
        A* sums = scratch + s * each;
        own.scales = sums + sum_size + low_size, own.line_scales = reinterpret_cast<c10::BFloat16*>(own.scales);
        std::fill(sums, sums + sum_size, A(0));
        const int64_t begin = s * slice, end = std::min(p_.inner, begin + slice);
        const int64_t low_rows = (rank * kBlockChannels + slice - 1) / slice;
        for (int64_t j = begin; j < end; j += kBlockChannels) {
          const int count = static_cast<int>(std::min<int64_t>(kBlockChannels, end - j));
          A pre[2][kBlockChannels * kDecodeTokens];
          Row rows[kBlockChannels];
          // While a block is read for its first tokens, the next one is fetched.
          RowsAhead ahead = RowsAhead::from(row_of((j + kBlockChannels) * base.parts));
          RowsAhead nothing = RowsAhead::nothing(sums);
          // Rows of B are too few for a block to be noticed as a stream.
          for (int part : {kGate, kUp}) p_.b[part].fetch(j + kBlockChannels, kBlockChannels);
          p_.a[kDown].fetch((j - begin) / kBlockChannels * low_rows, low_rows, begin, end - begin);
          for (int part = p_.gated ? kGate : kUp; part <= kUp; ++part) {
            const int64_t at = part - (p_.gated ? 0 : 1);
            for (int r = 0; r < count; ++r) rows[r] = row_of((j + r) * base.parts + at);
            int64_t n = 0;
            for (; n + 4 <= n_tokens; n += 4) block_dots<4>(rows, count, own, n ? nothing : ahead, n, pre[part]);
            for (; n + 2 <= n_tokens; n += 2) block_dots<2>(rows, count, own, n ? nothing : ahead, n, pre[part]);
            if (n < n_tokens) block_dots<1>(rows, count, own, n ? nothing : ahead, n, pre[part]);
          }
          finish_block(j, count, pre, h + j, h_row);
          for (int r = 0; r < count; ++r) rows[r] = row_of((j + r) * base.parts + base.parts - 1);
          if (count == kBlockChannels) {
            add_block<kBlockChannels>(rows, own, ahead, pre[kGate], sums, sum_row);
          } else {
            for (int r = 0; r < count; ++r)
              add_block<1>(rows + r, own, ahead, pre[kGate] + r * n_tokens, sums, sum_row);
          }
        }
        if (rank)
          p_.a[kDown].dots(0, rank, begin, end - begin, h + begin, h_row, n_tokens, sums + sum_size, n_tokens, false);
      }
    });
    low_of_slices(scratch + sum_size, each, slices);
    // Outputs in pieces; sums of slices come together in the first of them.
    at::parallel_for(0, sum_row / kSpan, grain(kSpan * (rank + slices) * n_tokens), [&](int64_t first, int64_t last) {
      const int64_t begin = first * kSpan, end = last * kSpan, live = std::min(end, p_.hidden);
      for (int64_t n = 0; n < n_tokens; ++n) {
        A* total = scratch + n * sum_row;
        for (int64_t s = 1; s < slices; ++s)
          for (int64_t i = begin; i < end; i += kLanes<A>)
            store(total + i, load(total + i, All{}) + load(total + s * each + i, All{}), All{});
        if constexpr (kSumsByLine<Row>)
          for (int64_t i = begin; i < end; i += kSpan) sums_in_order(total + i);
        if (rank)
          p_.b[kDown].dots(begin, live - begin, 0, rank, low_[kDown].data() + n * rank, rank, 1, total + begin, 1,
                           true);
        for (int64_t i = begin; i < live; ++i) y[n * p_.hidden + i] = static_cast<Out>(total[i]);
      }
    });
  }

  const MlpProblem<A>& p_;
  const A* x_;
  int64_t x_row_;
  bool x_is_bf16_;
  // s A x of each part, for down s A h: (tokens, rank)
  std::vector<A> low_[3];
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
