// The random numbers of kernels/sampling.py, whose torch version is the law.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

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

// -ln(1 - u) for u in (0, 1): its series where 1 - u would lose digits.
inline double exponential_time(double u) { return -std::log1p(-u); }
inline float exponential_time(float u) {
    float p = 1.0f / 6;
    p = p * u + 1.0f / 5;
    p = p * u + 1.0f / 4;
    p = p * u + 1.0f / 3;
    p = p * u + 1.0f / 2;
    p = p * u + 1.0f;
    return u < 0.06f ? p * u : -logarithm(1.0f - u);
}

// The first of the largest of all logits / temperature + Gumbel noise; without noise where the temperature is 0. A NaN
// is never it.
template <typename F>
struct Draw {
    F temperature;
    RowKey key;
    F best = -std::numeric_limits<F>::infinity();
    int64_t token_id = 0;

    // logits [size] of the token `first_id` and those behind it.
    void take(const F* logits, int64_t size, int64_t first_id);
};

template <typename F>
void Draw<F>::take(const F* logits, int64_t size, int64_t first_id) {
    constexpr int64_t BLOCK = 256;
    for (int64_t start = 0; start < size; start += BLOCK) {
        const int64_t count = std::min(BLOCK, size - start);
        F noisy[BLOCK];
        const F* values = logits + start;
        if (temperature > 0) {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t bits = mix(mix(uint32_t(first_id + start + i) ^ key.first) + key.second);
                F u = (F(bits) + F(0.5)) * F(1.0 / 4294967296.0);
                u = u > F(1 - 1.0 / 16777216) ? F(1 - 1.0 / 16777216) : u;
                noisy[i] = values[i] / temperature - logarithm(exponential_time(u));
            }
            values = noisy;
        }
        F highest = best;
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < count; ++i) highest = values[i] > highest ? values[i] : highest;
        if (highest > best) {
            best = highest;
            token_id = first_id + start + (std::find(values, values + count, highest) - values);
        }
    }
}

}  // namespace tandem
