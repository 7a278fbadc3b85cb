// Philox4x32-10 (Salmon et al., SC 2011), a register of counters at a time: random words that are a function of seed,
// row, step and token alone. Token v takes word (v / 16) % 4 of counter 16 (v / 64) + v % 16, so that a register of
// counters yields four registers of neighbouring tokens.
#pragma once

#include "vec.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

constexpr int kTokensPerBlock = 64;

class Philox {
 public:
  Philox(int64_t seed, int64_t row, int64_t step)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)},
        row_(static_cast<uint32_t>(row)),
        step_{static_cast<uint32_t>(step), static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32)} {}

  // Words of the tokens [128 pair, 128 pair + 128), in their order. Two registers of counters go side by side, since
  // the rounds of one wait for each other.
  void pair_of_blocks(int64_t pair, uint32_t* out) const {
    constexpr int kChains = 2, kCounters = 2 * 16;
    for (int first = 0; first < kCounters; first += kChains * kLanes<float>) {
      Words c0[kChains], c1[kChains], c2[kChains], c3[kChains];
      for (int k = 0; k < kChains; ++k) {
        c0[k] = Words{} + static_cast<uint32_t>(kCounters * pair + first + k * kLanes<float>) + lane_numbers();
        c1[k] = Words{} + row_, c2[k] = Words{} + step_[0], c3[k] = Words{} + step_[1];
      }
      uint32_t k0 = key_[0], k1 = key_[1];
      for (int round = 0; round < 10; ++round) {
        for (int k = 0; k < kChains; ++k) {
          Words high0, low0, high1, low1;
          multiply(c0[k], 0xD2511F53u, &high0, &low0);
          multiply(c2[k], 0xCD9E8D57u, &high1, &low1);
          c0[k] = high1 ^ c1[k] ^ k0;
          c1[k] = low1;
          c2[k] = high0 ^ c3[k] ^ k1;
          c3[k] = low0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      for (int k = 0; k < kChains; ++k) {
        const int counter = first + k * kLanes<float>;
        uint32_t* to = out + counter / 16 * kTokensPerBlock + counter % 16;
        const Words words[4] = {c0[k], c1[k], c2[k], c3[k]};
        for (int word = 0; word < 4; ++word) std::memcpy(to + 16 * word, &words[word], sizeof(Words));
      }
    }
  }

 private:
  using Longs = Lanes<uint64_t>;

  static Words lane_numbers() {
    Words numbers{};
    for (int i = 0; i < kLanes<float>; ++i) numbers[i] = i;
    return numbers;
  }

  // Both halves of the 64-bit products; the hardware multiplies the even lanes of 32 bits.
  static void multiply(Words x, uint32_t m, Words* high, Words* low) {
    const Longs pairs = reinterpret<Longs>(x), factor = Longs{} + m;
    const Longs even = multiply_low(pairs, factor), odd = multiply_low(pairs >> 32, factor);
    constexpr uint64_t kUpper = 0xffffffff00000000u;
    *low = reinterpret<Words>((even & ~kUpper) | (odd << 32));
    *high = reinterpret<Words>((even >> 32) | (odd & kUpper));
  }

  static Longs multiply_low(Longs x, Longs y) {
#if defined(CPU_CAPABILITY_AVX512)
    return reinterpret<Longs>(_mm512_mul_epu32(reinterpret<__m512i>(x), reinterpret<__m512i>(y)));
#elif defined(CPU_CAPABILITY_AVX2)
    return reinterpret<Longs>(_mm256_mul_epu32(reinterpret<__m256i>(x), reinterpret<__m256i>(y)));
#elif defined(__SSE2__)
    return reinterpret<Longs>(_mm_mul_epu32(reinterpret<__m128i>(x), reinterpret<__m128i>(y)));
#else
    return (x & 0xffffffffu) * (y & 0xffffffffu);
#endif
  }

  uint32_t key_[2], row_, step_[2];
};

// In (0, 1): 32 random bits, with the resolution of 2^-32 near zero that the race between tokens needs.
inline Floats uniform(Words words) {
  const Floats u = __builtin_convertvector(words, Floats) * 0x1p-32f + 0x1p-33f;
  return u < 1.0f - 0x1p-24f ? u : fill(1.0f - 0x1p-24f);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
