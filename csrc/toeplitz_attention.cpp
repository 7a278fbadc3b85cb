// toeplitz_attention on the CPU: the dispatcher's end of toeplitz_tiles.h.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "toeplitz_tiles.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

using Optional = std::optional<at::Tensor>;

template <typename A>
constexpr at::ScalarType kType = c10::CppTypeToScalarType<A>::value;

// Tensors of one call in the type of computation, contiguous; heads of q share those of k in groups.
template <typename A>
struct Inputs {
  at::Tensor q, k, v, symbols, support, key_bias;
  int64_t batch, heads, kv_heads, group, spread;
  bool is_causal;
  A scale;

  Inputs(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& relative,
         const Optional& support_, const Optional& bias, bool is_causal, double scale)
      : q(q_.to(kType<A>).contiguous()),
        k(k_.to(kType<A>).contiguous()),
        v(v_.to(kType<A>).contiguous()),
        support(support_ ? support_->contiguous() : at::Tensor()),
        key_bias(bias ? bias->to(kType<A>).contiguous() : at::Tensor()),
        batch(q.size(0)),
        heads(q.size(1)),
        kv_heads(k.size(1)),
        group(heads / std::max<int64_t>(1, kv_heads)),
        spread(relative.size(2)),
        is_causal(is_causal),
        scale(static_cast<A>(scale)) {
    for (int64_t i = 0; support_ && i < support.numel(); ++i) {
      const int64_t place = support.const_data_ptr<int64_t>()[i];
      TORCH_CHECK_VALUE(place >= 0 && place < dim(), "toeplitz_attention: expected places of the support in 0 .. ",
                        dim() - 1, ", got ", place);
    }
    symbols = at::zeros({relative.size(0), relative.size(1), spread + kRowTokens<A>}, q.options());
    symbols.narrow(2, 0, spread).copy_(relative);
  }

  int64_t rows() const { return q.size(2); }
  int64_t keys() const { return k.size(2); }
  int64_t dim() const { return q.size(3); }
  int64_t value_dim() const { return v.size(3); }
  int64_t tiles() const { return (rows() + kRowTokens<A> - 1) / kRowTokens<A>; }
  int64_t symbol_size() const { return symbols.size(1) * symbols.size(2); }

  // Head ``index`` of batch * heads.
  ToeplitzHead<A> head(int64_t index) const {
    const int64_t b = index / heads, h = index % heads, kv = b * kv_heads + h / group;
    return {rows(),
            keys(),
            dim(),
            value_dim(),
            q.const_data_ptr<A>() + index * rows() * dim(),
            k.const_data_ptr<A>() + kv * keys() * dim(),
            v.const_data_ptr<A>() + kv * keys() * value_dim(),
            symbols.const_data_ptr<A>() + h * symbol_size(),
            symbols.size(1),
            symbols.size(2),
            (spread - 1) / 2,
            support.defined() ? support.const_data_ptr<int64_t>() : nullptr,
            key_bias.defined() ? key_bias.const_data_ptr<A>() + b * keys() : nullptr,
            is_causal,
            scale};
  }
};

#define LLMKERN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "toeplitz_attention", __VA_ARGS__)

std::tuple<at::Tensor, at::Tensor> toeplitz_exact_fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                      const at::Tensor& relative, const Optional& support,
                                                      const Optional& key_bias, bool is_causal, double scale) {
  at::Tensor out, lse;
  LLMKERN_DISPATCH(q.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const Inputs<A> in(q, k, v, relative, support, key_bias, is_causal, scale);
    out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, in.q.options());
    lse = at::empty({q.size(0), q.size(1), q.size(2)}, in.q.options());
    const int64_t tiles = in.tiles(), tasks = in.batch * in.heads * tiles;
    for_free_threads(tasks, [&](std::atomic<int64_t>& next) {
      ToeplitzTile<A> tile(in.dim(), in.value_dim(), false);
      for (int64_t task = next++; task < tasks; task = next++) {
        // The last tiles of causal attention are the longest: they go first.
        const int64_t index = task / tiles, begin = (tiles - 1 - task % tiles) * kRowTokens<A>;
        const ToeplitzHead<A> head = in.head(index);
        tile.load(head, begin, std::min(kRowTokens<A>, in.rows() - begin));
        toeplitz_forward(head, tile, out.mutable_data_ptr<A>() + index * in.rows() * in.value_dim(),
                         lse.mutable_data_ptr<A>() + index * in.rows());
      }
    });
  });
  return {out, lse};
}

// Sum over dimension ``dim`` in order.
at::Tensor sum_in_order(const at::Tensor& parts, int64_t dim) {
  at::Tensor total = parts.select(dim, 0);
  for (int64_t i = 1; i < parts.size(dim); ++i) total = total.add_(parts.select(dim, i));
  return total;
}

// Tasks that share the queries of a head, where heads are few: each sums gradients of all keys on its own.
constexpr int64_t kBackwardTasks = 8;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> toeplitz_exact_bwd(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& relative,
    const Optional& support, const Optional& key_bias, const at::Tensor& out, const at::Tensor& lse, bool is_causal,
    double scale, bool want_relative) {
  at::Tensor dq, dk, dv, drelative;
  LLMKERN_DISPATCH(q.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const Inputs<A> in(q, k, v, relative, support, key_bias, is_causal, scale);
    const at::Tensor upstream = grad.to(kType<A>).contiguous(), result = out.to(kType<A>).contiguous(),
                     normalizer = lse.contiguous();
    const int64_t tiles = in.tiles(), problems = in.batch * in.kv_heads;
    const int64_t parts = std::max<int64_t>(1, std::min(tiles, kBackwardTasks / std::max<int64_t>(1, problems))),
                  tasks = problems * parts;
    const int64_t dim_pad = whole_lanes<A>(in.dim()), value_pad = whole_lanes<A>(in.value_dim());
    dq = at::empty(q.sizes(), in.q.options());
    dk = at::zeros({in.batch, in.kv_heads, parts, in.keys(), dim_pad}, in.q.options());
    dv = at::zeros({in.batch, in.kv_heads, parts, in.keys(), value_pad}, in.q.options());
    if (want_relative) {
      drelative = at::zeros({in.batch, parts, in.heads, in.symbols.size(1), in.symbols.size(2)}, in.q.options());
    }
    for_free_threads(tasks, [&](std::atomic<int64_t>& next) {
      ToeplitzTile<A> tile(in.dim(), in.value_dim(), true);
      for (int64_t task = next++; task < tasks; task = next++) {
        const int64_t part = task % parts, b = task / parts / in.kv_heads, kv = task / parts % in.kv_heads;
        for (int64_t h = kv * in.group; h < (kv + 1) * in.group; ++h) {
          const int64_t index = b * in.heads + h;
          const ToeplitzHead<A> head = in.head(index);
          const int64_t row = index * in.rows();
          const ToeplitzGradients<A> to{
              upstream.const_data_ptr<A>() + row * in.value_dim(),
              result.const_data_ptr<A>() + row * in.value_dim(),
              normalizer.const_data_ptr<A>() + row,
              dq.mutable_data_ptr<A>() + row * in.dim(),
              dk.mutable_data_ptr<A>() + task * in.keys() * dim_pad,
              dv.mutable_data_ptr<A>() + task * in.keys() * value_pad,
              want_relative ? drelative.mutable_data_ptr<A>() + ((b * parts + part) * in.heads + h) * in.symbol_size()
                            : nullptr};
          // Tiles by turns, since those of causal attention differ in length.
          for (int64_t i = part; i < tiles; i += parts) {
            const int64_t begin = i * kRowTokens<A>;
            tile.load(head, begin, std::min(kRowTokens<A>, in.rows() - begin));
            toeplitz_backward(head, tile, to);
          }
        }
      }
    });
    dk = sum_in_order(dk, 2).narrow(3, 0, in.dim());
    dv = sum_in_order(dv, 2).narrow(3, 0, in.value_dim());
    if (want_relative) {
      const at::Tensor each = sum_in_order(drelative, 1);
      drelative = in.batch ? sum_in_order(each, 0) : at::zeros(in.symbols.sizes(), in.q.options());
      drelative = drelative.narrow(2, 0, in.spread).to(relative.scalar_type()).contiguous();
    } else {
      drelative = at::empty({0}, relative.options());
    }
  });
  return {dq.to(q.scalar_type()), dk.to(k.scalar_type()).contiguous(), dv.to(v.scalar_type()).contiguous(), drelative};
}

}  // namespace

void register_toeplitz_attention(torch::Library& library) {
  library.impl("toeplitz_exact_fwd", &toeplitz_exact_fwd);
  library.impl("toeplitz_exact_bwd", &toeplitz_exact_bwd);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
