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
      Words words[kChains][4];
      for (int k = 0; k < kChains; ++k) {
        words[k][0] = Words{} + static_cast<uint32_t>(kCounters * pair + first + k * kLanes<float>) + lane_numbers();
      }
      run_rounds<kChains>(words);
      for (int k = 0; k < kChains; ++k) {
        const int counter = first + k * kLanes<float>;
        uint32_t* to = out + counter / 16 * kTokensPerBlock + counter % 16;
        for (int word = 0; word < 4; ++word) std::memcpy(to + 16 * word, &words[k][word], sizeof(Words));
      }
    }
  }

  // Words of any tokens, one a lane.
  Words words_of(Words tokens) const {
    Words words[1][4];
    words[0][0] = tokens / 64 * 16 + tokens % 16;
    run_rounds<1>(words);
    const Words place = tokens / 16 % 4;
    return place < 2 ? (place == 0 ? words[0][0] : words[0][1]) : (place == 2 ? words[0][2] : words[0][3]);
  }

 private:
  using Longs = Lanes<uint64_t>;

  // From the first word of counters to the random words.
  template <int kChains>
  void run_rounds(Words (*words)[4]) const {
    for (int k = 0; k < kChains; ++k) {
      words[k][1] = Words{} + row_, words[k][2] = Words{} + step_[0], words[k][3] = Words{} + step_[1];
    }
    uint32_t k0 = key_[0], k1 = key_[1];
    for (int round = 0; round < 10; ++round) {
      for (int k = 0; k < kChains; ++k) {
        Words* c = words[k];
        Words high0, low0, high1, low1;
        multiply(c[0], 0xD2511F53u, &high0, &low0);
        multiply(c[2], 0xCD9E8D57u, &high1, &low1);
        c[0] = high1 ^ c[1] ^ k0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ k1;
        c[3] = low0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }

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
