// The MLP at hand: its sizes, base weights and LoRA, as raw pointers.
#pragma once

#include "mlp_activation.h"
#include "mlp_rows.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

enum Part { kGate, kUp, kDown };

// Base weights in the layout of nn.Linear.
template <typename T>
struct PlainBase {
  const T* data[3] = {};
  int64_t stride[3] = {};
};

// Base weights by channel: row `part` of channel j begins at entry (j * parts + part) * width.
struct PackedBase {
  const void* data = nullptr;
  const c10::BFloat16* scales = nullptr;
  // 16, 8 or 4
  int bits = 0;
  int64_t parts = 0, width = 0, group = 0;
};

template <typename A>
struct MlpProblem {
  int64_t tokens, hidden, inner;
  bool gated;
  Activation activation;
  // A (r, in) and B (out, r) of each part, in their own type, and the scaling of B.
  PlainMatrix<A> a[3], b[3];
  A scaling[3];

  int64_t rank(int part) const { return a[part].rows; }
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
