// The random numbers of kernels/sampling.py, whose torch version is the law.

#pragma once

#include <cstdint>

#include "elementwise.h"

namespace tandem {

struct RowKey {
    uint32_t first, second;
};

// Philox4x32-10 with (position, 0, 0) as counter and the seed as key, of which the first two words are kept.
inline RowKey row_key(int64_t seed, int64_t position) {
    uint32_t words[4] = {uint32_t(position), uint32_t(uint64_t(position) >> 32), 0, 0};
    uint32_t key[2] = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = uint64_t(words[0]) * 0xD2511F53u, second = uint64_t(words[2]) * 0xCD9E8D57u;
        const uint32_t next[4] = {uint32_t(second >> 32) ^ words[1] ^ key[0], uint32_t(second),
                                  uint32_t(first >> 32) ^ words[3] ^ key[1], uint32_t(first)};
        for (int i = 0; i < 4; ++i) words[i] = next[i];
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return {words[0], words[1]};
}

inline uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

// logits [size] / temperature plus Gumbel noise, which is the law's but for its last bits: good for guesses.
template <typename F>
void add_gumbel_noise(F* logits, int64_t size, F temperature, RowKey key) {
    const F scale = F(1) / temperature;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t bits = mix(mix(uint32_t(i) ^ key.first) + key.second);
        F u = (F(bits) + F(0.5)) * F(1.0 / 4294967296.0);
        u = u > F(1 - 1.0 / 16777216) ? F(1 - 1.0 / 16777216) : u;
        const F wait = u < F(1e-3) ? u * (F(1) + u * (F(0.5) + u / F(3))) : -logarithm(F(1) - u);
        logits[i] = logits[i] * scale - logarithm(wait);
    }
}

}  // namespace tandem
