// An MLP with LoRA, forward and backward. A few tokens are bound by the reading of the weights and go the way of
// mlp_decode.h, more of them by arithmetic and go the way of mlp_gemm.h or, all in bfloat16, of mlp_matmul.h; gradients
// always go one of the latter.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "mlp_decode.h"
#include "mlp_gemm.h"
#include "mlp_matmul.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

#define LLMKERN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "shared_lora_mlp", __VA_ARGS__)

Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  TORCH_CHECK_VALUE(name == "relu",
                    "shared_lora_mlp: expected activation to be one of silu, gelu, gelu_tanh, relu, got ", name);
  return Activation::kRelu;
}

at::Tensor get(const OptionalTensors& list, size_t index) {
  const std::optional<at::Tensor> item = list.get(index);
  return item.has_value() ? *item : at::Tensor();
}

// The arguments that forward and backward share, with tensors that own what the pointers of the problem point at.
struct Inputs {
  Inputs(const at::Tensor& x, const OptionalTensors& weights, int64_t group_size, const OptionalTensors& lora,
         at::ArrayRef<double> scaling, const OptionalTensors& masks, c10::string_view activation)
      : x(unit_stride(x)), packed(weights.size() == 2), group(group_size), activation(activation_of(activation)) {
    for (size_t i = 0; i < weights.size(); ++i) {
      base[i] = get(weights, i);
      if (!base[i].defined()) continue;
      base[i] = packed ? base[i].contiguous() : unit_stride(base[i]);
    }
    for (int i = 0; i < 6; ++i) {
      pairs[i] = get(lora, i);
      if (pairs[i].defined()) pairs[i] = unit_stride(pairs[i]);
    }
    for (int i = 0; i < 3; ++i) {
      scales[i] = scaling[i];
      dropped[i] = get(masks, i);
      if (dropped[i].defined()) dropped[i] = dropped[i].contiguous();
      mask_data[i] = dropped[i].defined() ? dropped[i].const_data_ptr<bool>() : nullptr;
    }
  }

  bool gated() const { return packed ? base[0].size(1) == 3 : base[0].defined(); }
  int64_t inner() const { return packed ? base[0].size(0) : base[1].size(0); }
  bool masked() const { return mask_data[0] || mask_data[1] || mask_data[2]; }

  // Whether all operands are matrices in bfloat16, plain or packed, that the processor multiplies as such. That rounds
  // what enters the activation, which could flip the slope of relu.
  bool by_matmul() const {
    const auto fits = [](const at::Tensor& t) { return !t.defined() || t.scalar_type() == at::kBFloat16; };
    return multiplies_bf16() && activation != Activation::kRelu && fits(x) && (packed || fits(base[kUp])) &&
           std::all_of(pairs, pairs + 6, fits);
  }

  // Tokens up to which streaming the weights takes less time than products of matrices (bench/_mlp_crossover.py).
  int64_t few_tokens() const {
    if (!by_matmul()) return kDecodeTokens;
    if (!packed) return 8;
    return base[1].defined() ? 24 : 16;
  }

  MlpBase rows() const {
    if (packed && base[1].defined()) return {packed_base(), x.size(1), inner()};
    at::Tensor by_channel[3];
    for (int part = 0; part < 3; ++part) {
      if (packed && (part != kGate || gated())) {
        by_channel[part] = base[0].select(1, part - kDown + base[0].size(1) - 1).narrow(1, 0, x.size(1));
      } else if (!packed) {
        by_channel[part] = part == kDown ? base[part].t() : base[part];
      }
    }
    return MlpBase(by_channel);
  }

  MlpTensors tensors() const {
    MlpTensors t{rows(), {}, {}, {}, {}, activation};
    for (int part = 0; part < 3; ++part) {
      t.masks[part] = dropped[part], t.scaling[part] = scales[part];
      t.a[part] = pairs[2 * part], t.b[part] = pairs[2 * part + 1];
    }
    return t;
  }

  template <typename A>
  MlpProblem<A> problem() const {
    MlpProblem<A> p{x.size(0), x.size(1), inner(), gated(), activation, {}, {}, {}};
    for (int part = 0; part < 3; ++part) {
      p.scaling[part] = static_cast<A>(scales[part]);
      p.a[part] = matrix<A>(pairs[2 * part]);
      p.b[part] = matrix<A>(pairs[2 * part + 1]);
    }
    return p;
  }

  template <typename A>
  static PlainMatrix<A> matrix(const at::Tensor& t) {
    if (!t.defined()) return {};
    return {t.const_data_ptr(), t.stride(0), t.size(0), t.size(1), t.scalar_type()};
  }

  // Products of many tokens take LoRA in the type of computation.
  void widen_lora(at::ScalarType type) {
    for (at::Tensor& t : pairs)
      if (t.defined()) t = t.to(type);
  }

  PackedBase packed_base() const {
    const at::Tensor& data = base[0];
    const int bits = data.scalar_type() == at::kBFloat16 ? 16 : (data.scalar_type() == at::kChar ? 8 : 4);
    return {data.const_data_ptr(),
            base[1].defined() ? base[1].const_data_ptr<c10::BFloat16>() : nullptr,
            bits,
            data.size(1),
            data.size(2) * (bits == 4 ? 2 : 1),
            group};
  }

  template <typename T>
  PlainBase<T> plain_base() const {
    PlainBase<T> plain;
    for (int part = 0; part < 3; ++part)
      if (base[part].defined())
        plain.data[part] = base[part].const_data_ptr<T>(), plain.stride[part] = base[part].stride(0);
    return plain;
  }

  // body(chunks) with the base in chunks of channels, for x of type T.
  template <typename T, typename Body>
  void with_chunks(Body body) const {
    if (packed) {
      body(PackedChunks<Acc<T>>(packed_base(), x.size(1)));
    } else {
      body(PlainChunks<T>(plain_base<T>(), x.size(1)));
    }
  }

  at::Tensor x;
  bool packed;
  int64_t group;
  Activation activation;
  at::Tensor base[3], pairs[6], dropped[3];
  double scales[3];
  const bool* mask_data[3];
};

template <typename A>
Numbers<A> numbers(const at::Tensor& t) {
  return t.defined() && t.numel() ? Numbers<A>{t.mutable_data_ptr(), t.scalar_type()} : Numbers<A>{};
}

// Of an input, to be read only.
template <typename A>
Numbers<A> read_only(const at::Tensor& t) {
  return t.numel() ? Numbers<A>{const_cast<void*>(t.const_data_ptr()), t.scalar_type()} : Numbers<A>{};
}

template <typename T>
void decode(const Inputs& in, const at::Tensor& y) {
  using A = Acc<T>;
  const MlpProblem<A> problem = in.problem<A>();
  const PackedBase packed = in.packed ? in.packed_base() : PackedBase{};
  const int64_t width = in.packed ? packed.width : in.x.size(1), row = (width + kUnit - 1) / kUnit * kUnit;
  const at::Tensor wide = at::zeros({problem.tokens, row}, c10::CppTypeToScalarType<A>::value);
  A* x = wide.mutable_data_ptr<A>();
  for (int64_t n = 0; n < problem.tokens; ++n) {
    const T* from = in.x.const_data_ptr<T>() + n * in.x.stride(0);
    for_lanes<A>(0, problem.hidden,
                 [&](int64_t k, auto lanes) { store(x + n * row + k, load(from + k, lanes), lanes); });
  }
  MlpDecode<A> path(problem, x, row, std::is_same_v<T, c10::BFloat16>);
  if (in.packed) {
    path.packed(packed, y.mutable_data_ptr<T>());
  } else {
    path.plain(in.plain_base<T>(), y.mutable_data_ptr<T>());
  }
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const OptionalTensors& weights, int64_t group_size,
                                           const OptionalTensors& lora, at::ArrayRef<double> scaling,
                                           const OptionalTensors& masks, c10::string_view activation, bool keep) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Inputs in(x, weights, group_size, lora, scaling, masks, activation);
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor kept =
      keep ? at::empty({in.gated() ? 2 : 1, x.size(0), in.inner()}, x.options()) : at::empty({0}, x.options());
  if (x.size(0) == 0) return {y, kept};
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    if (x.size(0) <= in.few_tokens() && !keep && !in.masked()) return decode<scalar_t>(in, y);
    if (in.by_matmul()) return MlpMatmul(in.tensors()).forward(in.x, keep ? kept : at::Tensor(), y);
    in.widen_lora(c10::CppTypeToScalarType<A>::value);
    const MlpProblem<A> problem = in.problem<A>();
    in.with_chunks<scalar_t>([&](auto chunks) {
      MlpGemm<A, decltype(chunks)>(problem, chunks, in.mask_data, numbers<A>(kept))
          .forward(rows_of<scalar_t>(in.x), numbers<A>(y));
    });
  });
  return {y, kept};
}

std::vector<at::Tensor> backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& kept,
                                 const OptionalTensors& weights, int64_t group_size, const OptionalTensors& lora,
                                 at::ArrayRef<double> scaling, const OptionalTensors& masks,
                                 c10::string_view activation, const c10::List<bool>& needs) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Inputs in(x, weights, group_size, lora, scaling, masks, activation);
  const at::Tensor upstream = unit_stride(dy);
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < needs.size(); ++i) {
    const at::Tensor like = i == 0 ? x : (i < 4 ? (in.packed ? at::Tensor() : get(weights, i - 1)) : get(lora, i - 4));
    const bool wanted = needs.get(i) && like.defined();
    // Without tokens sums over them are zero.
    grads.push_back(
        wanted ? (x.size(0) ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options()))
               : at::empty({0}, x.options()));
  }
  if (x.size(0) == 0) return grads;
  if (in.by_matmul()) {
    MlpMatmul(in.tensors()).backward(in.x, upstream, kept, grads);
    return grads;
  }
  LLMKERN_DISPATCH(x.scalar_type(), [&] {
    using A = Acc<scalar_t>;
    in.widen_lora(c10::CppTypeToScalarType<A>::value);
    const MlpProblem<A> problem = in.problem<A>();
    MlpGradients<A> wanted{numbers<A>(grads[0]), {}, {}, {}};
    for (int part = 0; part < 3; ++part) {
      wanted.base[part] = numbers<A>(grads[1 + part]);
      wanted.a[part] = numbers<A>(grads[4 + 2 * part]);
      wanted.b[part] = numbers<A>(grads[5 + 2 * part]);
    }
    in.with_chunks<scalar_t>([&](auto chunks) {
      MlpGemm<A, decltype(chunks)>(problem, chunks, in.mask_data, read_only<A>(kept))
          .backward(rows_of<scalar_t>(in.x), rows_of<scalar_t>(upstream), wanted);
    });
  });
  return grads;
}

}  // namespace

void register_shared_lora_mlp(torch::Library& library) {
  library.impl("shared_lora_mlp_fwd", &forward);
  library.impl("shared_lora_mlp_bwd", &backward);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
