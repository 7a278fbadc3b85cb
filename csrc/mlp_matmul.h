// Many tokens in bfloat16 where the processor multiplies bfloat16: products by torch's BLAS, whose rate the tiles of
// mlp_gemm.h, in float32, do not reach there. LoRA is added to a product in place; activations and slopes are one pass.
#pragma once

#include <ATen/ops/mul.h>

#include "gemm.h"
#include "mlp_base.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Tokens of a forward step at a time: what is of width I stays in the last-level cache.
constexpr int64_t kMatmulTokens = 1024;

struct MlpTensors {
  MlpBase base;
  at::Tensor a[3], b[3], masks[3];
  double scaling[3];
  Activation activation;
  bool gated() const { return base.gated(); }
};

// to = act(e) g of n entries; without a gate (g null) act(e).
inline void activate_all(Activation kind, const c10::BFloat16* e, const c10::BFloat16* g, int64_t n,
                         c10::BFloat16* to) {
  with_activation(kind, [&]<Activation known>() {
    at::parallel_for(0, n, kPiece, [&](int64_t first, int64_t last) {
      for_lanes<float>(first, last, [&](int64_t i, auto lanes) {
        const Floats value = activate<known, false>(load(e + i, lanes)).value;
        store(to + i, g ? value * load(g + i, lanes) : value, lanes);
      });
    });
  });
}

// h, de and dg of n entries from e, g and dh, which they may overwrite; without a gate (g null) h and de.
inline void slopes_of_all(Activation kind, const c10::BFloat16* e, const c10::BFloat16* g, const c10::BFloat16* dh,
                          int64_t n, c10::BFloat16* h, c10::BFloat16* de, c10::BFloat16* dg) {
  with_activation(kind, [&]<Activation known>() {
    at::parallel_for(0, n, kPiece, [&](int64_t first, int64_t last) {
      for_lanes<float>(first, last, [&](int64_t i, auto lanes) {
        const auto at = activate<known, true>(load(e + i, lanes));
        const Floats upstream = load(dh + i, lanes), up = g ? load(g + i, lanes) : fill(1.0f);
        store(h + i, at.value * up, lanes);
        store(de + i, upstream * up * at.slope, lanes);
        if (g) store(dg + i, upstream * at.value, lanes);
      });
    });
  });
}

class MlpMatmul {
 public:
  explicit MlpMatmul(MlpTensors t) : t_(std::move(t)), first_part_(t_.gated() ? kGate : kUp) {}

  // kept (1 or 2, tokens, inner) or undefined
  void forward(const at::Tensor& x, const at::Tensor& kept, const at::Tensor& y) const {
    for (int64_t first = 0; first < x.size(0); first += kMatmulTokens) {
      const int64_t count = std::min(kMatmulTokens, x.size(0) - first);
      const auto some = [&](const at::Tensor& t) { return t.defined() ? t.narrow(0, first, count) : t; };
      at::Tensor pre[2];
      for (int part = first_part_; part <= kUp; ++part) {
        pre[part] = kept.defined() ? some(kept[part - first_part_]) : wide(count);
        linear(part, some(x), some(t_.masks[part]), pre[part]);
      }
      const at::Tensor h = kept.defined() ? wide(count) : pre[first_part_];
      activate_all(t_.activation, read(pre[first_part_]), t_.gated() ? read(pre[kUp]) : nullptr, h.numel(), data(h));
      linear(kDown, h, some(t_.masks[kDown]), some(y));
    }
  }

  // grads: of x, the weights, and A and B of each part; empty where none is asked for.
  void backward(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& kept,
                const std::vector<at::Tensor>& grads) const {
    const auto wanted = [&](int i) { return grads[i].numel() > 0; };
    const int64_t tokens = x.size(0);
    at::Tensor pre[2], low[3], dlow[3];
    for (int part = first_part_; part <= kUp; ++part) {
      pre[part] = kept.numel() ? kept[part - first_part_] : wide(tokens);
      if (!kept.numel()) low[part] = linear(part, x, t_.masks[part], pre[part]);
    }
    const at::Tensor dh = wide(tokens);
    t_.base.to_channels(kDown, dy, dh);
    dlow[kDown] = back_through(kDown, dy, dh);
    // What was kept is not written to.
    at::Tensor h = pre[first_part_], dg = pre[kUp];
    if (kept.numel()) h = wide(tokens), dg = wide(tokens);
    slopes_of_all(t_.activation, read(pre[first_part_]), t_.gated() ? read(pre[kUp]) : nullptr, read(dh), dh.numel(),
                  data(h), data(dh), data(dg));
    const at::Tensor d[3] = {dh, t_.gated() ? dg : dh, dy};
    const at::Tensor in[3] = {x, x, h};
    if (wanted(0)) {
      t_.base.from_channels(first_part_, d[first_part_], grads[0], false);
      if (t_.gated()) t_.base.from_channels(kUp, d[kUp], grads[0], true);
    }
    for (int part = first_part_; part <= kDown; ++part) {
      at::Tensor base = grads[1 + part], a = grads[4 + 2 * part], b = grads[5 + 2 * part];
      if (base.numel()) at::mm_out(base, d[part].t(), in[part]);
      if (!t_.a[part].defined()) continue;
      const at::Tensor dropped = masked(in[part], t_.masks[part]);
      if (part != kDown && (wanted(0) || a.numel())) dlow[part] = back_through(part, d[part], grads[0]);
      if (a.numel()) at::mm_out(a, dlow[part].t(), dropped);
      if (!b.numel()) continue;
      if (!low[part].defined()) low[part] = at::mm(dropped, t_.a[part].t());
      at::mm_out(b, d[part].t(), low[part].mul_(t_.scaling[part]));
    }
  }

 private:
  static const c10::BFloat16* read(const at::Tensor& t) { return t.const_data_ptr<c10::BFloat16>(); }
  static c10::BFloat16* data(const at::Tensor& t) { return t.mutable_data_ptr<c10::BFloat16>(); }
  static at::Tensor masked(const at::Tensor& t, const at::Tensor& mask) {
    return mask.defined() ? at::mul(t, mask) : t;
  }
  at::Tensor wide(int64_t tokens) const { return at::empty({tokens, t_.base.inner()}, at::kBFloat16); }

  // to = in W^T + s A (mask in) B^T; returns A (mask in).
  at::Tensor linear(int part, const at::Tensor& in, const at::Tensor& mask, at::Tensor to) const {
    if (part == kDown) {
      t_.base.from_channels(part, in, to, false);
    } else {
      t_.base.to_channels(part, in, to);
    }
    if (!t_.a[part].defined()) return {};
    const at::Tensor low = at::mm(masked(in, mask), t_.a[part].t());
    to.addmm_(low, t_.b[part].t(), 1, t_.scaling[part]);
    return low;
  }

  // s grad B; times A it is added to `to`, where that is not empty.
  at::Tensor back_through(int part, const at::Tensor& grad, at::Tensor to) const {
    if (!t_.a[part].defined()) return {};
    const at::Tensor dlow = at::mm(grad, t_.b[part]).mul_(t_.scaling[part]);
    if (to.numel() == 0) return dlow;
    if (t_.masks[part].defined()) {
      to.add_(at::mm(dlow, t_.a[part]).mul_(t_.masks[part]));
    } else {
      to.addmm_(dlow, t_.a[part]);
    }
    return dlow;
  }

  const MlpTensors t_;
  int first_part_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
