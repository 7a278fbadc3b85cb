// The MLP at hand: its sizes, base weights and LoRA, as raw pointers.
#pragma once

#include "mlp_activation.h"
#include "mlp_matrix.h"

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

  // Entries [k0, k1) of a row, whole units, and whole groups where there are such; A is the type of computation.
  template <typename A, typename T>
  void unpack(int64_t row, int64_t k0, int64_t k1, T* to) const {
    if (bits == 16) {
      unpack_row<A>(PlainRow<c10::BFloat16>{static_cast<const c10::BFloat16*>(data) + row * width}, k0, k1, to);
      return;
    }
    const c10::BFloat16* of_row = scales + row * (width / group);
    if (bits == 8) {
      unpack_row<A>(Int8Row{static_cast<const int8_t*>(data) + row * width, of_row}, k0, k1, to);
    } else {
      unpack_row<A>(Int4Row{static_cast<const uint8_t*>(data) + row * (width / 2), of_row}, k0, k1, to);
    }
  }

 private:
  template <typename A, typename Row, typename T>
  void unpack_row(const Row& row, int64_t k0, int64_t k1, T* to) const {
    const int64_t step = Row::kScaled ? group : k1 - k0;
    for (int64_t begin = k0; begin < k1; begin += step) {
      A scale = 1;
      if constexpr (Row::kScaled) scale = static_cast<A>(static_cast<float>(row.scales[begin / step]));
      for (int64_t k = begin; k < begin + step; k += kUnit) {
        Lanes<A> w[kUnitRegisters<A>];
        row.template unit<A>(k, w);
        for (int i = 0; i < kUnitRegisters<A>; ++i) store(to + k - k0 + i * kLanes<A>, w[i] * scale, All{});
      }
    }
  }
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
