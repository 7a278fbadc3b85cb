// Base weights of many tokens in bfloat16, by channel: rows (I, H) of gate, of up, and of down transposed. Plain
// weights and packs in bfloat16 are views; of packs in int8 and int4 one panel after the other is unpacked.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/mm.h>

#include "mlp_problem.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Numbers of a panel, which stays in the last-level cache until it is multiplied.
constexpr int64_t kBasePanel = int64_t{1} << 22;

class MlpBase {
 public:
  // rows of gate, where there is one, up and down
  explicit MlpBase(const at::Tensor (&rows)[3])
      : rows_{rows[kGate], rows[kUp], rows[kDown]}, inner_(rows[kUp].size(0)) {}
  MlpBase(const PackedBase& packed, int64_t hidden, int64_t inner)
      : packed_(packed),
        hidden_(hidden),
        inner_(inner),
        panel_(at::empty({std::max(kBasePanel, std::max(inner * packed.group, packed.width))}, at::kBFloat16)) {}

  int64_t inner() const { return inner_; }
  bool gated() const { return packed_.data ? packed_.parts == 3 : rows_[kGate].defined(); }

  // to (N, I) = x (N, H) rows^T
  void to_channels(int part, const at::Tensor& x, const at::Tensor& to) const {
    if (!packed_.data) return product(x, rows_[part].t(), to, false);
    const int64_t step = std::max<int64_t>(1, panel_.numel() / packed_.width);
    for (int64_t first = 0; first < inner_; first += step) {
      const int64_t count = std::min(step, inner_ - first);
      const at::Tensor rows = unpack(part, first, count, 0, packed_.width).narrow(1, 0, hidden_);
      product(x, rows.t(), to.narrow(1, first, count), false);
    }
  }

  // to (N, H) = or += x (N, I) rows
  void from_channels(int part, const at::Tensor& x, const at::Tensor& to, bool add) const {
    if (!packed_.data) return product(x, rows_[part], to, add);
    const int64_t step = panel_.numel() / inner_ / packed_.group * packed_.group;
    for (int64_t first = 0; first < hidden_; first += step) {
      const int64_t width = std::min(step, packed_.width - first), count = std::min(width, hidden_ - first);
      const at::Tensor rows = unpack(part, 0, inner_, first, width).narrow(1, 0, count);
      product(x, rows, to.narrow(1, first, count), add);
    }
  }

 private:
  static void product(const at::Tensor& a, const at::Tensor& b, at::Tensor to, bool add) {
    if (add) {
      to.addmm_(a, b);
    } else {
      at::mm_out(to, a, b);
    }
  }

  // Channels [first, first + count) and entries [k0, k0 + width) of their rows.
  at::Tensor unpack(int part, int64_t first, int64_t count, int64_t k0, int64_t width) const {
    auto* const to = panel_.mutable_data_ptr<c10::BFloat16>();
    const int64_t at = part - kDown + packed_.parts - 1;
    at::parallel_for(0, count, std::max<int64_t>(1, 32768 / width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        packed_.unpack<float>((first + r) * packed_.parts + at, k0, k0 + width, to + r * width);
    });
    return panel_.narrow(0, 0, count * width).view({count, width});
  }

  at::Tensor rows_[3];
  PackedBase packed_;
  int64_t hidden_ = 0, inner_ = 0;
  at::Tensor panel_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
