// Convolutions by fast Fourier transform. The first stage is one of as many numbers at a time as a register has lanes,
// and leaves in each lane a transform on its own: what follows are operations of whole registers, and only the first
// stage and its inverse shuffle.
//
// Frequencies are k + 1/4, so that what wraps around a circle of length L comes back turned by a right angle: of the
// product of two spectra of real sequences the real part is what does not wrap around, and no zeros beside them are
// needed.
//
// Decimation in frequency on the way there and in time on the way back, stage by stage on blocks that shrink: spectra
// stay in the order in which the stages leave them, and the frequencies of one small block go there, through the
// product and back while they are in the cache.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "common.h"
#include "fourier_stage.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// Elements of blocks whose remaining stages run one after the other: 32 KiB, within the first-level cache.
constexpr int64_t kSmallTransform = 32 * 1024 / (2 * kRegisterBytes);

// Of ``length`` = kLanes^2 2^a 3^b 5^c numbers, X_f = sum_j e^{-2 pi i f j / length} x_j, f = k + 1/4. A buffer holds
// them as ``elements`` of kLanes each, an element in one register of real parts and one of imaginary ones.
//
// Sequences stand in rows: kLanes segments with a gap after each, so that the segments, which the first stage reads
// side by side, do not compete for the same places of a cache where lengths are powers of two.
template <typename A>
class Transform {
 public:
  static constexpr int kWidth = kLanes<A>, kHalf = kWidth / 2;
  static constexpr int64_t kElement = llmkern::kElement<A>;

  explicit Transform(int64_t length) : length_(length), elements_(length / kWidth), segment_(elements_ + kWidth) {
    TORCH_CHECK(elements_ > 0 && length % (kWidth * kWidth) == 0, "a transform of ", length, " numbers in ", kWidth,
                " lanes");
    for (int64_t block = elements_; block > 1;) {
      const int radix = block % 8 == 0 ? 8 : block % 4 == 0 ? 4 : block % 2 == 0 ? 2 : block % 3 == 0 ? 3 : 5;
      TORCH_CHECK(block % radix == 0, "a transform of ", length, " numbers, expected ", kWidth * kWidth,
                  " times 2^a 3^b 5^c");
      last_radix_ = radix;
      if (block == radix) break;
      stages_.emplace_back(radix, block);
      block /= radix;
    }
    for (int64_t q = 0; q < kWidth; ++q) add_turn(place_turns_, q, 4 * kWidth);
    for (int64_t q = 0; q < kHalf; ++q) add_turn(half_turns_, q, kWidth);
    for (int64_t r = 0; r < elements_; r += kWidth) {
      for (int lane = 0; lane < kWidth; ++lane) add_turn(run_turns_, quarters(lane) * r, 4 * length);
    }
    for (int lane = 0; lane < kWidth; ++lane) {
      for (int64_t r = 0; r < kWidth; ++r) {
        const auto [c, s] = turn<A>(quarters(lane) * r, 4 * length);
        lane_turns_[lane].re[r] = c, lane_turns_[lane].im[r] = s;
      }
    }
  }

  int64_t length() const { return length_; }
  // Numbers of type A that a buffer holds.
  int64_t buffer_size() const { return elements_ * kElement; }
  // And a row of real numbers.
  int64_t row_size() const { return kWidth * segment_; }

  // ``count`` numbers into a row as those from number ``first`` on, zeros as the others; and the way back, to be added.
  void to_row(const A* from, int64_t stride, int64_t first, int64_t count, A* row) const {
    std::fill_n(row, row_size(), A{0});
    for_segments(first, count, [&](int64_t i, int64_t place, int64_t n) {
      for (int64_t j = 0; j < n; ++j) row[place + j] = from[(i + j) * stride];
    });
  }
  void add_row(const A* row, int64_t first, int64_t count, A* to) const {
    for_segments(first, count, [&](int64_t i, int64_t place, int64_t n) {
      for (int64_t j = 0; j < n; ++j) to[i + j] += row[place + j];
    });
  }

  // The least that is long enough, kept for the next calls.
  static std::shared_ptr<const Transform> of(int64_t least) {
    constexpr size_t kKept = 4;
    static std::mutex guard;
    static std::vector<std::shared_ptr<const Transform>> kept;
    int64_t elements = kWidth * std::max<int64_t>(1, (least + kWidth * kWidth - 1) / (kWidth * kWidth));
    while (!is_smooth(elements)) elements += kWidth;
    const std::lock_guard<std::mutex> lock(guard);
    for (const auto& transform : kept) {
      if (transform->elements_ == elements) return transform;
    }
    if (kept.size() == kKept) kept.erase(kept.begin());
    kept.push_back(std::make_shared<const Transform>(elements * kWidth));
    return kept.back();
  }

  // The first kThere buffers are transformed; product(place, x) then works on the numbers x[buffer] at a place, and the
  // first kBack are transformed back. read(buffer, i) makes kLanes numbers, real or complex, of place i of a row, and
  // write(buffer, i, x) takes them.
  template <int kThere, int kBack, typename Read, typename Product, typename Write>
  void run(A* const* buffers, Read read, Product product, Write write) const {
    for (int b = 0; b < kThere; ++b) enter(buffers[b], [&](int64_t i) LLMKERN_INLINE { return read(b, i); });
    descend<kThere, kBack>(0, buffers, 0, elements_, product);
    for (int b = 0; b < kBack; ++b) {
      leave(buffers[b], [&](int64_t i, const Complex<A>& x) LLMKERN_INLINE { write(b, i, x); });
    }
  }

 private:
  // body(i, place, n): n numbers from number first + i on stand at that place of a row.
  template <typename Body>
  void for_segments(int64_t first, int64_t count, Body body) const {
    for (int64_t q = 0; q < kWidth; ++q) {
      const int64_t begin = std::max(first, q * elements_), end = std::min(first + count, (q + 1) * elements_);
      if (begin < end) body(begin - first, begin + q * (segment_ - elements_), end - begin);
    }
  }

  static bool is_smooth(int64_t x) {
    for (int64_t prime : {2, 3, 5}) {
      while (x % prime == 0) x /= prime;
    }
    return x == 1;
  }

  // Four times the frequency of a lane, modulo 4 kLanes: even ones come first.
  static int64_t quarters(int64_t lane) { return 4 * (lane < kHalf ? 2 * lane : 2 * (lane - kHalf) + 1) + 1; }

  // e^{-2 pi i quarters(lane) (r + place) / (4 length)} at each place of a register; r is a multiple of kLanes.
  LLMKERN_INLINE Complex<A> lane_turn(int64_t r, int lane) const {
    const A* turns = run_turns_.data() + 2 * (r + lane);
    return lane_turns_[lane].times(fill(turns[0]), fill(turns[1]));
  }

  // The first stage, between registers of consecutive numbers: it hands a part of the frequencies to each lane.
  template <typename Read>
  void enter(A* buffer, Read read) const {
    for (int64_t r = 0; r < elements_; r += kWidth) {
      alignas(64) Complex<A> even[kHalf], odd[kHalf];
      for (int q = 0; q < kHalf; ++q) {
        const Complex<A> x = turned(read(q * segment_ + r), place_turns_.data() + 2 * q);
        const Complex<A> y = turned(read((q + kHalf) * segment_ + r), place_turns_.data() + 2 * (q + kHalf));
        even[q] = x + y;
        odd[q] = turned(x - y, half_turns_.data() + 2 * q);
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
      unrolled<kWidth>([&](auto t) LLMKERN_INLINE { store_complex<A>(buffer + (r + t) * kElement, {re[t], im[t]}); });
    }
  }

  // Its inverse.
  template <typename Write>
  void leave(const A* buffer, Write write) const {
    for (int64_t r = 0; r < elements_; r += kWidth) {
      Lanes<A> re[kWidth], im[kWidth];
      unrolled<kWidth>([&](auto t) LLMKERN_INLINE {
        const Complex<A> x = load_complex(buffer + (r + t) * kElement);
        re[t] = x.re, im[t] = x.im;
      });
      transpose<A>(re);
      transpose<A>(im);
      alignas(64) Complex<A> even[kHalf], odd[kHalf];
      unrolled<kWidth>([&](auto lane) LLMKERN_INLINE {
        (lane < kHalf ? even : odd)[lane % kHalf] = Complex<A>{re[lane], im[lane]}.times(lane_turn(r, lane).conj());
      });
      small_transform<kHalf, 1>(even);
      small_transform<kHalf, 1>(odd);
      for (int q = 0; q < kHalf; ++q) {
        const Complex<A> x = turned_back(odd[q], half_turns_.data() + 2 * q);
        write(q * segment_ + r, turned_back(even[q] + x, place_turns_.data() + 2 * q));
        write((q + kHalf) * segment_ + r, turned_back(even[q] - x, place_turns_.data() + 2 * (q + kHalf)));
      }
    }
  }

  LLMKERN_INLINE static Complex<A> turned(const Complex<A>& x, const A* by) {
    return x.times(fill(by[0]), fill(by[1]));
  }
  LLMKERN_INLINE static Complex<A> turned(const Lanes<A>& x, const A* by) { return {x * by[0], x * by[1]}; }
  LLMKERN_INLINE static Complex<A> turned_back(const Complex<A>& x, const A* by) {
    return x.times(fill(by[0]), fill(-by[1]));
  }

  template <int kThere, int kBack, typename Product>
  void descend(size_t level, A* const* buffers, int64_t begin, int64_t end, Product& product) const {
    if (end - begin > kSmallTransform) {
      const Stage<A>& stage = stages_[level];
      for (int b = 0; b < kThere; ++b) stage.there(buffers[b], begin, end);
      const int64_t step = stage.block / stage.radix;
      for (int64_t at = begin; at < end; at += step) descend<kThere, kBack>(level + 1, buffers, at, at + step, product);
      for (int b = 0; b < kBack; ++b) stage.back(buffers[b], begin, end);
      return;
    }
    for (int b = 0; b < kThere; ++b) {
      for (size_t s = level; s < stages_.size(); ++s) stages_[s].there(buffers[b], begin, end);
    }
    with_radix(last_radix_, [&]<int R>() {
      for (int64_t at = begin; at < end; at += R) last_stage<kThere, kBack, R>(buffers, at, product);
    });
    for (int b = 0; b < kBack; ++b) {
      for (size_t s = stages_.size(); s-- > level;) stages_[s].back(buffers[b], begin, end);
    }
  }

  // The last stage, the product and the inverse of that stage, in registers.
  template <int kThere, int kBack, int R, typename Product>
  LLMKERN_INLINE static void last_stage(A* const* buffers, int64_t place, Product& product) {
    constexpr int kBuffers = std::max(kThere, kBack);
    Complex<A> x[kBuffers][R];
    for (int b = 0; b < kBuffers; ++b) {
      unrolled<R>([&](auto q) LLMKERN_INLINE { x[b][q] = load_complex(buffers[b] + (place + q) * kElement); });
      if (b < kThere) small_transform<R, -1>(x[b]);
    }
    unrolled<R>([&](auto q) LLMKERN_INLINE {
      Complex<A> at_place[kBuffers];
      for (int b = 0; b < kBuffers; ++b) at_place[b] = x[b][q];
      product(place + q, at_place);
      for (int b = 0; b < kBuffers; ++b) x[b][q] = at_place[b];
    });
    for (int b = 0; b < kBuffers; ++b) {
      if (b < kBack) small_transform<R, 1>(x[b]);
      unrolled<R>([&](auto q) LLMKERN_INLINE { store_complex(buffers[b] + (place + q) * kElement, x[b][q]); });
    }
  }

  int64_t length_, elements_, segment_;
  // All but the last, whose blocks are its radix.
  std::vector<Stage<A>> stages_;
  int last_radix_ = 1;
  std::vector<A> place_turns_, half_turns_, run_turns_;
  Complex<A> lane_turns_[kWidth];
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
