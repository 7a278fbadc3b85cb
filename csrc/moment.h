// Sums of x x^T in exact integers, see llmkern/ops/vas_score/moment.py.
#pragma once

#include <vector>

#include "gram.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// The integers up to which float64 is exact, and the largest entry.
constexpr double kExact = 0x1p53, kLargest = 1.25 * 0x1p24;
static_assert(kTileColumns<double> * kLargest * kLargest <= kExact, "a step of rows must fit");
constexpr int64_t kLimb = int64_t{1} << 32;

template <typename T>
class Moment {
 public:
  Moment(const Rows<T>& x, int64_t n, int exponent, int64_t* limbs)
      : x_(x), n_(n), d_(x.width), scale_(std::ldexp(1.0, -exponent)), limbs_(limbs), gram_(d_, d_, true) {
    integers_ = at::empty({kRows, padded_depth<double>(d_)}, at::kDouble);
    tops_.resize(kRows), panel_tops_.resize(kRows * gram_.panels()), bounds_.resize(gram_.panels());
  }

  // First row that holds what it must not, or -1.
  int64_t run() {
    for (int64_t first = 0; first < n_; first += kRows) {
      const int64_t count = std::min(kRows, n_ - first);
      at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) tops_[r] = read(first + r, r);
      });
      for (int64_t r = 0; r < count; ++r)
        if (!(tops_[r] <= kLargest)) return first + r;
      const Rows<double> a{integers_.const_data_ptr<double>(), padded_depth<double>(d_), d_};
      const int64_t depth = gram_.pack(a, a, 0, count, static_cast<const double*>(nullptr));
      at::parallel_for(0, gram_.panels(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) add_to_panel(p, count, depth);
      });
    }
    for (int64_t p = 0; p < gram_.panels(); ++p) flush(p);
    mirror();
    return -1;
  }

 private:
  static constexpr int64_t kRows = Gram<double>::kRows, kStep = kTileColumns<double>;

  // One row as integers, and the largest magnitude of each panel; returns that of all, NaN where there is one.
  double read(int64_t row, int64_t r) {
    // Adding 1.5 * 2^52 rounds to the nearest integer, ties to even.
    constexpr double kRounder = 0x1.8p52;
    const T* from = x_(row);
    // A register of floats is as many numbers as two of doubles: a panel.
    double* to = integers_.mutable_data_ptr<double>() + r * padded_depth<double>(d_);
    double top = 0, odd = 0;
    for (int64_t k = 0; k < d_; k += kStep) {
      const Floats x = load(from + k, First{static_cast<int>(std::min<int64_t>(kStep, d_ - k))});
      double largest = 0;
      for (int i = 0; i < kStep; ++i) {
        const double a = (static_cast<double>(x[i]) * scale_ + kRounder) - kRounder;
        to[k + i] = a;
        largest = std::max(largest, std::fabs(a));
        // NaN where a is NaN or infinite, else zero.
        odd += a * 0.0;
      }
      panel_tops_[r * gram_.panels() + k / kStep] = largest;
      top = std::max(top, largest);
    }
    return top + odd;
  }

  // The rows in hand; before the sum of any entry could leave the exact range, what is there goes to the limbs.
  void add_to_panel(int64_t p, int64_t count, int64_t depth) {
    int64_t begin = 0;
    for (int64_t k = 0; k < depth; k += kStep) {
      double bound = 0;
      for (int64_t r = k; r < std::min(count, k + kStep); ++r) bound += tops_[r] * panel_tops_[r * gram_.panels() + p];
      if (bounds_[p] + bound > kExact) {
        gram_.accumulate(p, begin, k);
        flush(p);
        begin = k;
      }
      bounds_[p] += bound;
    }
    gram_.accumulate(p, begin, depth);
  }

  void flush(int64_t p) {
    for (int64_t i = 0; i < gram_.live_rows(p); ++i) {
      double* line = gram_.line(p, i);
      for (int64_t c = 0, j = p * kStep; c < kStep && j < d_; ++c, ++j) {
        if (j < i) continue;
        const auto whole = static_cast<int64_t>(line[c]) + limbs_[i * d_ + j];
        limbs_[i * d_ + j] = whole & (kLimb - 1);
        limbs_[d_ * d_ + i * d_ + j] += whole >> 32;
      }
      std::fill(line, line + kStep, 0.0);
    }
    bounds_[p] = 0;
  }

  void mirror() {
    for (int64_t limb = 0; limb < 2; ++limb)
      for (int64_t i = 0; i < d_; ++i)
        for (int64_t j = 0; j < i; ++j) limbs_[(limb * d_ + i) * d_ + j] = limbs_[(limb * d_ + j) * d_ + i];
  }

  Rows<T> x_;
  int64_t n_, d_;
  double scale_;
  int64_t* limbs_;
  Gram<double> gram_;
  at::Tensor integers_;
  std::vector<double> tops_, panel_tops_, bounds_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
