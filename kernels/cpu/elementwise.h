// What is done to single numbers: conversions between served dtypes, and exponentials that a compiler can vectorise.
// And memory to keep them in.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace tandem {

using bf16 = uint16_t;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Memory for numbers that begins with a line of the processor's cache: a vector that lies in two lines is read twice.
template <typename T>
Buffer<T> make_buffer(int64_t count) {
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64)));
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) {
    const uint32_t word = uint32_t(x) << 16;
    float v;
    std::memcpy(&v, &word, sizeof v);
    return v;
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(double x, double& y) { y = x; }
// Round to nearest, ties to even, as torch does.
inline void narrow(float x, bf16& y) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    y = std::isnan(x) ? bf16(0x7fc0) : bf16((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

inline double exponential(double x) { return std::exp(x); }
// 2^n · e^r with |r| <= ln(2) / 2 and e^r by its Taylor polynomial: within 2 units in the last place.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;  // a NaN stays one
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t word = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &word, sizeof scale);
    return p * scale;
}

inline double logarithm(double x) { return std::log(x); }
// x = m · 2^n with m in [1/√2, √2), and the series of 2 · artanh((m - 1) / (m + 1)); for normal positive numbers.
inline float logarithm(float x) {
    int32_t word;
    std::memcpy(&word, &x, sizeof word);
    const int32_t n = (word - 0x3f3504f3) >> 23;
    word -= n << 23;
    float m;
    std::memcpy(&m, &word, sizeof m);
    const float s = (m - 1.0f) / (m + 1.0f), t = s * s;
    float p = 1.0f / 9;
    p = p * t + 1.0f / 7;
    p = p * t + 1.0f / 5;
    p = p * t + 1.0f / 3;
    return n * 0.693147181f + 2.0f * s * (p * t + 1.0f);
}

template <typename F>
F sigmoid(F x) {
    return F(1) / (F(1) + exponential(-x));
}

template <typename F>
F softplus(F x) {
    return x > F(20) ? x : std::log1p(std::exp(x));
}

}  // namespace tandem
