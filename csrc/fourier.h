// Circular convolutions by fast Fourier transform of a complex sequence. Its first stage is one of as many numbers at a
// time as a register has lanes, and leaves in each lane a transform on its own: what follows are operations of whole
// registers, and only the first stage and its inverse shuffle.
//
// Decimation in frequency on the way there and in time on the way back, stage by stage on blocks that shrink: spectra
// stay in the order in which the stages leave them, and the frequencies of one small block go there, through the
// product and back while they are in the cache.
#pragma once

#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <numbers>
#include <vector>

#include "common.h"
#include "small_transform.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Elements of blocks whose remaining stages run one after the other: 32 KiB, within the first-level cache.
constexpr int64_t kSmallTransform = 32 * 1024 / (2 * kRegisterBytes);

// Of ``length`` = kLanes 2^a 3^b 5^c numbers. A buffer holds them as ``elements`` of kLanes each, an element in one
// register of real parts and one of imaginary ones.
template <typename A>
class Transform {
 public:
  static constexpr int kWidth = kLanes<A>, kHalf = kWidth / 2;
  static constexpr int64_t kElement = 2 * kWidth;

  explicit Transform(int64_t length) : length_(length), elements_(length / kWidth) {
    TORCH_CHECK(length > 0 && length % kWidth == 0, "a transform of ", length, " numbers in ", kWidth, " lanes");
    for (int64_t rest = elements_, block = elements_; rest > 1;) {
      const int radix = rest % 8 == 0 ? 8 : rest % 4 == 0 ? 4 : rest % 2 == 0 ? 2 : rest % 3 == 0 ? 3 : 5;
      TORCH_CHECK(rest % radix == 0, "a transform of ", length, " numbers, expected ", kWidth, " times 2^a 3^b 5^c");
      Stage stage{radix, block, {}};
      const int64_t step = block / radix;
      for (int64_t j = 0; j < step; ++j) {
        for (int64_t k = 1; k < radix; ++k) add_turn(stage.turns, j * k, block);
      }
      stages_.push_back(std::move(stage));
      rest /= radix, block = step;
    }
    for (int64_t q = 0; q < kHalf; ++q) add_turn(half_turns_, q, kWidth);
    for (int64_t r = 0; r < elements_; r += kWidth) {
      for (int lane = 0; lane < kWidth; ++lane) add_turn(run_turns_, frequency(lane) * r, length);
    }
    for (int lane = 0; lane < kWidth; ++lane) {
      for (int64_t r = 0; r < kWidth; ++r) {
        const auto [c, s] = turn(frequency(lane) * r, length);
        lane_turns_[lane].re[r] = c, lane_turns_[lane].im[r] = s;
      }
    }
  }

  int64_t length() const { return length_; }
  // Numbers of type A that a buffer holds.
  int64_t buffer_size() const { return elements_ * kElement; }

  // The least that is long enough, kept for the next calls.
  static std::shared_ptr<const Transform> of(int64_t least) {
    constexpr size_t kKept = 4;
    static std::mutex guard;
    static std::vector<std::shared_ptr<const Transform>> kept;
    int64_t elements = std::max<int64_t>(1, (least + kWidth - 1) / kWidth);
    while (!is_smooth(elements)) ++elements;
    const std::lock_guard<std::mutex> lock(guard);
    for (const auto& transform : kept) {
      if (transform->elements_ == elements) return transform;
    }
    if (kept.size() == kKept) kept.erase(kept.begin());
    kept.push_back(std::make_shared<const Transform>(elements * kWidth));
    return kept.back();
  }

  // The first kThere buffers are transformed; product(begin, end) then works on a range of elements of any of them; the
  // first kBack are transformed back. read(buffer, i, n) makes n numbers from number i on, kLanes at most, and
  // write(buffer, i, n, x) takes them; those from number there[buffer] on are zero, and those from back[buffer] on are
  // of no interest.
  template <int kThere, int kBack, typename Read, typename Product, typename Write>
  void run(A* const* buffers, std::array<int64_t, kThere> there, Read read, Product product,
           std::array<int64_t, kBack> back, Write write) const {
    if constexpr (kThere > 0) {
      for (int b = 0; b < kThere; ++b) {
        const auto of_buffer = [&](int64_t i, int64_t n) { return read(b, i, n); };
        2 * there[b] <= length_ ? enter<true>(buffers[b], of_buffer) : enter<false>(buffers[b], of_buffer);
      }
    }
    descend<kThere, kBack>(0, buffers, 0, product);
    for (int b = 0; b < kBack; ++b) {
      const auto of_buffer = [&](int64_t i, int64_t n, const Complex<A>& x) { write(b, i, n, x); };
      2 * back[b] <= length_ ? leave<true>(buffers[b], of_buffer) : leave<false>(buffers[b], of_buffer);
    }
  }

 private:
  struct Stage {
    int radix;
    int64_t block;
    std::vector<A> turns;
  };

  static bool is_smooth(int64_t x) {
    for (int64_t prime : {2, 3, 5}) {
      while (x % prime == 0) x /= prime;
    }
    return x == 1;
  }

  // e^{-2 pi i part / whole}
  static std::pair<A, A> turn(int64_t part, int64_t whole) {
    const double angle = -2 * std::numbers::pi * static_cast<double>(part) / static_cast<double>(whole);
    return {static_cast<A>(std::cos(angle)), static_cast<A>(std::sin(angle))};
  }
  static void add_turn(std::vector<A>& turns, int64_t part, int64_t whole) {
    const auto [c, s] = turn(part, whole);
    turns.push_back(c);
    turns.push_back(s);
  }

  // Which frequencies, modulo kLanes, a lane has: even ones first.
  static int64_t frequency(int64_t lane) { return lane < kHalf ? 2 * lane : 2 * (lane - kHalf) + 1; }

  // e^{-2 pi i frequency(lane) (r + place) / length} at each place of a register; r is a multiple of kLanes.
  LLMKERN_INLINE Complex<A> lane_turn(int64_t r, int lane) const {
    const A* turns = run_turns_.data() + 2 * (r + lane);
    return lane_turns_[lane].times(fill(turns[0]), fill(turns[1]));
  }

  // The first stage, between registers of consecutive numbers: it hands a part of the frequencies to each lane. With
  // kOneHalf the second half of the numbers is zero.
  template <bool kOneHalf, typename Read>
  void enter(A* buffer, Read read) const {
    for (int64_t r = 0; r < elements_; r += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, elements_ - r);
      alignas(64) Complex<A> even[kHalf], odd[kHalf];
      for (int q = 0; q < kHalf; ++q) {
        const Complex<A> x = read(q * elements_ + r, n);
        const Complex<A> y = kOneHalf ? Complex<A>{} : read((q + kHalf) * elements_ + r, n);
        even[q] = kOneHalf ? x : x + y;
        odd[q] = (kOneHalf ? x : x - y).times(fill(half_turns_[2 * q]), fill(half_turns_[2 * q + 1]));
      }
      small_transform<kHalf, -1>(even);
      small_transform<kHalf, -1>(odd);
      Lanes<A> re[kWidth], im[kWidth];
      unrolled<kWidth>([&](auto lane) LLMKERN_INLINE {
        const Complex<A> x = (lane < kHalf ? even : odd)[lane % kHalf].times(lane_turn(r, lane));
        re[lane] = x.re, im[lane] = x.im;
      });
      transpose<A>(re);
      transpose<A>(im);
      for (int64_t t = 0; t < n; ++t) store_complex<A>(buffer + (r + t) * kElement, {re[t], im[t]});
    }
  }

  // Its inverse; with kOneHalf of the first half only.
  template <bool kOneHalf, typename Write>
  void leave(const A* buffer, Write write) const {
    for (int64_t r = 0; r < elements_; r += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, elements_ - r);
      Lanes<A> re[kWidth] = {}, im[kWidth] = {};
      for (int64_t t = 0; t < n; ++t) {
        const Complex<A> x = load_complex(buffer + (r + t) * kElement);
        re[t] = x.re, im[t] = x.im;
      }
      transpose<A>(re);
      transpose<A>(im);
      alignas(64) Complex<A> even[kHalf], odd[kHalf];
      unrolled<kWidth>([&](auto lane) LLMKERN_INLINE {
        (lane < kHalf ? even : odd)[lane % kHalf] = Complex<A>{re[lane], im[lane]}.times(lane_turn(r, lane).conj());
      });
      small_transform<kHalf, 1>(even);
      small_transform<kHalf, 1>(odd);
      unrolled<kHalf>([&](auto q) LLMKERN_INLINE {
        const Complex<A> turned = odd[q].times(fill(half_turns_[2 * q]), fill(-half_turns_[2 * q + 1]));
        write(q * elements_ + r, n, even[q] + turned);
        if (!kOneHalf) write((q + kHalf) * elements_ + r, n, even[q] - turned);
      });
    }
  }

  template <typename Body>
  static void with_radix(int radix, Body body) {
    switch (radix) {
      case 2:
        return body.template operator()<2>();
      case 3:
        return body.template operator()<3>();
      case 4:
        return body.template operator()<4>();
      case 5:
        return body.template operator()<5>();
      default:
        return body.template operator()<8>();
    }
  }

  template <int kThere, int kBack, typename Product>
  void descend(size_t level, A* const* buffers, int64_t begin, Product& product) const {
    if (level == stages_.size()) return product(begin, begin + 1);
    const int64_t block = stages_[level].block, end = begin + block;
    if (block > kSmallTransform) {
      for (int b = 0; b < kThere; ++b) there(stages_[level], buffers[b], begin, end);
      const int64_t step = block / stages_[level].radix;
      for (int64_t at = begin; at < end; at += step) descend<kThere, kBack>(level + 1, buffers, at, product);
      for (int b = 0; b < kBack; ++b) back(stages_[level], buffers[b], begin, end);
      return;
    }
    for (int b = 0; b < kThere; ++b) {
      for (size_t s = level; s < stages_.size(); ++s) there(stages_[s], buffers[b], begin, end);
    }
    product(begin, end);
    for (int b = 0; b < kBack; ++b) {
      for (size_t s = stages_.size(); s-- > level;) back(stages_[s], buffers[b], begin, end);
    }
  }

  void there(const Stage& stage, A* buffer, int64_t begin, int64_t end) const {
    with_radix(stage.radix, [&]<int R>() {
      for (int64_t at = begin; at < end; at += stage.block) there_block<R>(stage, buffer + at * kElement);
    });
  }

  void back(const Stage& stage, A* buffer, int64_t begin, int64_t end) const {
    with_radix(stage.radix, [&]<int R>() {
      for (int64_t at = begin; at < end; at += stage.block) back_block<R>(stage, buffer + at * kElement);
    });
  }

  template <int R>
  LLMKERN_INLINE static void there_block(const Stage& stage, A* block) {
    const int64_t step = stage.block / R * kElement;
    for (int64_t j = 0; j < stage.block / R; ++j) {
      A* at = block + j * kElement;
      Complex<A> x[R];
      unrolled<R>([&](auto q) LLMKERN_INLINE { x[q] = load_complex(at + q * step); });
      small_transform<R, -1>(x);
      if (j > 0) {
        const A* turns = stage.turns.data() + 2 * (R - 1) * j;
        unrolled<R - 1>([&](auto k)
                            LLMKERN_INLINE { x[k + 1] = x[k + 1].times(fill(turns[2 * k]), fill(turns[2 * k + 1])); });
      }
      unrolled<R>([&](auto k) LLMKERN_INLINE { store_complex(at + k * step, x[k]); });
    }
  }

  template <int R>
  LLMKERN_INLINE static void back_block(const Stage& stage, A* block) {
    const int64_t step = stage.block / R * kElement;
    for (int64_t j = 0; j < stage.block / R; ++j) {
      A* at = block + j * kElement;
      Complex<A> x[R];
      unrolled<R>([&](auto k) LLMKERN_INLINE { x[k] = load_complex(at + k * step); });
      if (j > 0) {
        const A* turns = stage.turns.data() + 2 * (R - 1) * j;
        unrolled<R - 1>([&](auto k) LLMKERN_INLINE {
          const Lanes<A> c = fill(turns[2 * k]), s = fill(turns[2 * k + 1]);
          x[k + 1] = {x[k + 1].re * c + x[k + 1].im * s, x[k + 1].im * c - x[k + 1].re * s};
        });
      }
      small_transform<R, 1>(x);
      unrolled<R>([&](auto q) LLMKERN_INLINE { store_complex(at + q * step, x[q]); });
    }
  }

  int64_t length_, elements_;
  std::vector<Stage> stages_;
  std::vector<A> half_turns_, run_turns_;
  Complex<A> lane_turns_[kWidth];
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
