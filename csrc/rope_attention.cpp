// rope_attention on the CPU: the dispatcher's end of rope_forward.h, rope_backward.h, rope_norms.h and
// rope_rotate.h.
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "rope_backward.h"
#include "rope_forward.h"
#include "rope_norms.h"
#include "rope_rotate.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

using Optional = std::optional<at::Tensor>;

// Sequences: all of a batch entry, or what cu_q and cu_k cut out of the only one.
struct Sequence {
  int64_t batch, q0, q1, k0, k1;
};

std::vector<Sequence> sequences(const at::Tensor& q, const at::Tensor& k, const Optional& cu_q, const Optional& cu_k) {
  std::vector<Sequence> found;
  if (!cu_q || !cu_k) {
    for (int64_t b = 0; b < q.size(0); ++b) found.push_back({b, 0, q.size(2), 0, k.size(2)});
    return found;
  }
  const at::Tensor rows = cu_q->contiguous(), keys = cu_k->contiguous();
  const auto *r = rows.const_data_ptr<int64_t>(), *c = keys.const_data_ptr<int64_t>();
  for (int64_t s = 0; s + 1 < rows.numel(); ++s) found.push_back({0, r[s], r[s + 1], c[s], c[s + 1]});
  return found;
}

template <typename T>
struct Inputs {
  using A = Acc<T>;

  at::Tensor q, k, v, bias, table;
  std::vector<Sequence> parts;
  Monomials tables;
  Options options;
  int64_t heads, kv_heads, group;

  Inputs(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const Optional& bias_,
         const at::Tensor& table_, const Optional& cu_q, const Optional& cu_k, Options options_)
      : q(q_.contiguous()),
        k(k_.contiguous()),
        v(v_.contiguous()),
        bias(bias_ ? bias_->to(c10::CppTypeToScalarType<A>::value).contiguous() : at::Tensor()),
        table(table_.to(at::kDouble).contiguous()),
        parts(sequences(q_, k_, cu_q, cu_k)),
        tables(q_.size(3), options_.degree, options_.leading),
        options(options_),
        heads(q_.size(1)),
        kv_heads(k_.size(1)),
        group(heads / std::max<int64_t>(1, kv_heads)) {}

  int64_t problems() const { return parts.size() * kv_heads; }

  // Rows of q, k, .. before this problem's first.
  int64_t query_row(const Sequence& s, int64_t head) const {
    return (s.batch * heads + head * group) * q.size(2) + s.q0;
  }
  int64_t key_row(const Sequence& s, int64_t head) const { return (s.batch * kv_heads + head) * k.size(2) + s.k0; }

  Problem<T> problem(int64_t index) const {
    const int64_t part = index / kv_heads, head = index % kv_heads;
    const Sequence& s = parts[part];
    const int64_t key = key_row(s, head);
    return {tables,
            options,
            s.q1 - s.q0,
            s.k1 - s.k0,
            q.size(3),
            v.size(3),
            group,
            q.template const_data_ptr<A>() + query_row(s, head) * q.size(3),
            q.size(2) * q.size(3),
            k.template const_data_ptr<A>() + key * k.size(3),
            v.template const_data_ptr<T>() + key * v.size(3),
            bias.defined() ? bias.template const_data_ptr<A>() + key : nullptr,
            table.const_data_ptr<double>() + (part * heads + head * group) * table.size(2)};
  }
};

#define LLMKERN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "rope_attention", __VA_ARGS__)

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rope_attention_fwd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& key_bias, const at::Tensor& table,
    const Optional& cu_q, const Optional& cu_k, bool is_causal, int64_t degree, int64_t contact, int64_t leading,
    int64_t chunk, double rtol, bool top_bf16) {
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, v.options());
  at::Tensor normalizer = at::empty({q.size(0), q.size(1), q.size(2)}, q.options());
  at::Tensor exact = at::empty(normalizer.sizes(), q.options().dtype(at::kBool));
  at::Tensor state;
  LLMKERN_DISPATCH(v.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const Inputs<scalar_t> in(q, k, v, key_bias, table, cu_q, cu_k,
                              {is_causal, degree, contact, leading, chunk, top_bf16});
    state = at::empty({table.size(0), k.size(1), in.tables.count() + 1, v.size(3) + 1}, q.options());
    for_rows(in.problems(), [&](int64_t index, int64_t) {
      const int64_t row = in.query_row(in.parts[index / in.kv_heads], index % in.kv_heads);
      forward_problem(in.problem(index), rtol,
                      {out.mutable_data_ptr<scalar_t>() + row * v.size(3), normalizer.mutable_data_ptr<A>() + row,
                       exact.mutable_data_ptr<bool>() + row, q.size(2),
                       state.mutable_data_ptr<A>() + index * state.size(2) * state.size(3)});
    });
  });
  return {out, normalizer, exact, state};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rope_attention_bwd(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& key_bias,
    const at::Tensor& table, const Optional& cu_q, const Optional& cu_k, const at::Tensor& out,
    const at::Tensor& normalizer, const at::Tensor& exact_rows, const at::Tensor& state, bool is_causal, int64_t degree,
    int64_t contact, int64_t leading, int64_t chunk) {
  at::Tensor dq = at::zeros(q.sizes(), q.options()), dk = at::zeros(k.sizes(), k.options());
  at::Tensor dv = at::zeros(v.sizes(), q.options());
  at::Tensor dbias = at::zeros(key_bias ? key_bias->sizes() : at::IntArrayRef{0}, q.options());
  const at::Tensor upstream = grad.contiguous(), output = out.contiguous(), z = normalizer.contiguous(),
                   flags = exact_rows.contiguous(), moments = state.contiguous();
  LLMKERN_DISPATCH(v.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const Inputs<scalar_t> in(q, k, v, key_bias, table, cu_q, cu_k, {is_causal, degree, contact, leading, chunk});
    for_rows(in.problems(), [&](int64_t index, int64_t) {
      const Sequence& part = in.parts[index / in.kv_heads];
      const int64_t row = in.query_row(part, index % in.kv_heads), key = in.key_row(part, index % in.kv_heads);
      const Problem<scalar_t> problem = in.problem(index);
      KeySide<scalar_t> side(problem);
      const A* saved = moments.const_data_ptr<A>() + index * moments.size(2) * moments.size(3);
      side.mean.assign(saved + in.tables.count() * moments.size(3),
                       saved + in.tables.count() * moments.size(3) + v.size(3));
      backward_problem<scalar_t>(
          side,
          {upstream.const_data_ptr<scalar_t>() + row * v.size(3), output.const_data_ptr<scalar_t>() + row * v.size(3),
           z.const_data_ptr<A>() + row, flags.const_data_ptr<bool>() + row, saved, q.size(2),
           dq.mutable_data_ptr<A>() + row * q.size(3), dk.mutable_data_ptr<A>() + key * k.size(3),
           dv.mutable_data_ptr<A>() + key * v.size(3), key_bias ? dbias.mutable_data_ptr<A>() + key : nullptr});
    });
  });
  return {dq, dk, dv.to(v.scalar_type()),
          key_bias ? dbias.to(key_bias->scalar_type()) : at::empty({0}, grad.options())};
}

// A table under which every key is within its limit, for problems that have no polynomial.
at::Tensor no_table(const at::Tensor& q, const Optional& cu_q) {
  at::Tensor table = at::zeros({cu_q ? cu_q->numel() - 1 : q.size(0), q.size(1), 8}, q.options().dtype(at::kDouble));
  table.select(2, 6).fill_(std::numeric_limits<double>::infinity());
  return table;
}

std::tuple<at::Tensor, at::Tensor> rope_attention_exact_fwd(const at::Tensor& q, const at::Tensor& k,
                                                            const at::Tensor& v, const Optional& key_bias,
                                                            const Optional& cu_q, const Optional& cu_k, bool is_causal,
                                                            double scale) {
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, v.options());
  at::Tensor normalizer;
  LLMKERN_DISPATCH(v.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const auto type = c10::CppTypeToScalarType<A>::value;
    normalizer = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(type));
    const at::Tensor flags = at::empty(normalizer.sizes(), q.options().dtype(at::kBool));
    const Inputs<scalar_t> in(q.to(type).mul(scale), k.to(type), v, key_bias, no_table(q, cu_q), cu_q, cu_k,
                              {is_causal, 1, 0, q.size(3), 1});
    for_rows(in.problems(), [&](int64_t index, int64_t) {
      const int64_t row = in.query_row(in.parts[index / in.kv_heads], index % in.kv_heads);
      const Problem<scalar_t> problem = in.problem(index);
      const ExactRows<scalar_t> exact(problem);
      for (int64_t g = 0; g < in.group; ++g)
        exact.run(g, problem.queries, [](int64_t i) { return i; },
                  {out.mutable_data_ptr<scalar_t>() + row * v.size(3), normalizer.mutable_data_ptr<A>() + row,
                   flags.mutable_data_ptr<bool>() + row, q.size(2), nullptr});
    });
  });
  return {out, normalizer};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_attention_exact_bwd(const at::Tensor& grad, const at::Tensor& q,
                                                                        const at::Tensor& k, const at::Tensor& v,
                                                                        const Optional& key_bias, const Optional& cu_q,
                                                                        const Optional& cu_k, const at::Tensor& out,
                                                                        const at::Tensor& normalizer, bool is_causal,
                                                                        double scale) {
  const at::ScalarType type = normalizer.scalar_type();
  const at::Tensor flags = at::ones(normalizer.sizes(), normalizer.options().dtype(at::kBool));
  const at::Tensor state =
      at::zeros({cu_q ? cu_q->numel() - 1 : q.size(0), k.size(1), q.size(3) + 2, v.size(3) + 1}, normalizer.options());
  const auto [dq, dk, dv, unused] =
      rope_attention_bwd(grad, q.to(type).mul(scale), k.to(type), v, key_bias, no_table(q, cu_q), cu_q, cu_k, out,
                         normalizer, flags, state, is_causal, 1, 0, q.size(3), 1);
  return {dq.mul(scale).to(q.scalar_type()), dk.to(k.scalar_type()), dv};
}

at::Tensor rope_attention_norms(const at::Tensor& x_, const Optional& shift, const Optional& map) {
  const at::Tensor x = x_.stride(3) == 1 || x_.size(3) == 1 ? x_ : x_.contiguous();
  const int64_t heads = x.size(1), tokens = x.size(2), dim = x.size(3),
                tasks = (tokens + kLookTokens - 1) / kLookTokens;
  at::Tensor norms;
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const auto type = c10::CppTypeToScalarType<A>::value;
    norms = at::empty({x.size(0), heads, tokens}, x.options().dtype(type));
    const at::Tensor shifts = shift ? shift->to(type).contiguous() : at::Tensor();
    const at::Tensor maps = map ? map->to(type).contiguous() : at::Tensor();
    for_tasks(x.size(0) * heads * tasks, [&](int64_t task) {
      const int64_t head = task / tasks, begin = task % tasks * kLookTokens;
      row_norms(
          x.const_data_ptr<scalar_t>() + head / heads * x.stride(0) + head % heads * x.stride(1) + begin * x.stride(2),
          x.stride(2), std::min(kLookTokens, tokens - begin), dim,
          shift ? shifts.const_data_ptr<A>() + head * dim : nullptr,
          map ? maps.const_data_ptr<A>() + head * dim * dim : nullptr,
          norms.mutable_data_ptr<A>() + head * tokens + begin);
    });
  });
  return norms;
}

at::Tensor rope_attention_rotate(const at::Tensor& x_, const at::Tensor& cos_, const at::Tensor& sin_, bool back) {
  const at::Tensor x = x_.stride(3) == 1 || x_.size(3) == 1 ? x_ : x_.contiguous();
  const int64_t heads = x.size(1), tokens = x.size(2), dim = x.size(3), turning = cos_.size(2),
                tasks = (tokens + kLookTokens - 1) / kLookTokens;
  at::Tensor y = at::empty(x.sizes(), x.options());
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    const at::Tensor cos = cos_.contiguous(), sin = sin_.contiguous();
    for_tasks(x.size(0) * heads * tasks, [&](int64_t task) {
      const int64_t head = task / tasks, begin = task % tasks * kLookTokens;
      const int64_t table = ((cos.size(0) > 1 ? head / heads * tokens : 0) + begin) * turning;
      rotate_rows(
          x.const_data_ptr<scalar_t>() + head / heads * x.stride(0) + head % heads * x.stride(1) + begin * x.stride(2),
          x.stride(2), std::min(kLookTokens, tokens - begin), dim, turning, cos.const_data_ptr<A>() + table,
          sin.const_data_ptr<A>() + table, A(back ? -1 : 1),
          y.mutable_data_ptr<scalar_t>() + (head * tokens + begin) * dim);
    });
  });
  return y;
}

}  // namespace

void register_rope_attention(torch::Library& library) {
  library.impl("rope_attention_fwd", &rope_attention_fwd);
  library.impl("rope_attention_bwd", &rope_attention_bwd);
  library.impl("rope_attention_exact_fwd", &rope_attention_exact_fwd);
  library.impl("rope_attention_exact_bwd", &rope_attention_exact_bwd);
  library.impl("rope_attention_norms", &rope_attention_norms);
  library.impl("rope_attention_rotate", &rope_attention_rotate);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
