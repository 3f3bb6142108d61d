// Products of few rows with many, in 64-byte vectors, with weights of any served dtype widened as they are read; or, where
// the processor multiplies bfloat16, with rows rounded to it.
//
// Each output is summed in one fixed order (lanes along K, then across them), whatever the number of rows and threads. So a row's result does not depend on its company, bit for bit: a verify step computes what plain decoding does.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "elementwise.h"
#include "team.h"

namespace tandem {

template <typename F>
struct Vector;
template <>
struct Vector<float> {
    static constexpr int64_t lanes = 16;
    typedef float type __attribute__((vector_size(64)));
};
template <>
struct Vector<double> {
    static constexpr int64_t lanes = 8;
    typedef double type __attribute__((vector_size(64)));
};

template <typename F>
typename Vector<F>::type load(const F* p) {
    typename Vector<F>::type v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Vector<float>::type load(const bf16* p) {
    typedef uint16_t halves __attribute__((vector_size(32)));
    typedef uint32_t words __attribute__((vector_size(64)));
    halves h;
    std::memcpy(&h, p, sizeof h);
    const words w = __builtin_convertvector(h, words) << 16;
    Vector<float>::type v;
    std::memcpy(&v, &w, sizeof v);
    return v;
}

// Halves every segment of W lanes of a and b: the sums of each segment's two halves, those of a first.
template <int W, typename V, int... J>
V halve(V a, V b, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(a, b, (J / (W / 2) * W + J % (W / 2))...) +
           __builtin_shufflevector(a, b, (J / (W / 2) * W + J % (W / 2) + W / 2)...);
}

// Lane j of v[0] becomes the sum of all lanes of v[j], for as many vectors as a vector has lanes.
template <int W, int L, typename V>
void add_lanes(V* v) {
    if constexpr (W > 1) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) v[i] = halve<W>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, L>());
        add_lanes<W / 2, L>(v);
    }
}

// The place in the tile after this one: a row of weights is too short for the processor to see it coming. Where eight are
// read at a time it sees enough.
template <int COLS, typename W>
void fetch_ahead(const W* weights, int64_t stride) {
    if (COLS < 8) __builtin_prefetch(weights + COLS * stride);
}

// y [ROWS, N] of x [ROWS, K] against COLS rows of W, which lie `stride` elements apart.
template <int ROWS, int COLS, typename W, typename F>
void multiply_tile(const F* x, const W* weight, F* y, int64_t K, int64_t stride, int64_t N) {
    using V = typename Vector<F>::type;
    constexpr int L = Vector<F>::lanes, SUMS = (ROWS * COLS + L - 1) / L * L;
    V sums[SUMS] = {};
    int64_t k = 0;
    for (; k + L <= K; k += L) {
        V w[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) {
            fetch_ahead<COLS>(weight + c * stride + k, stride);
            w[c] = load(weight + c * stride + k);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const V a = load(x + r * K + k);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; ++c) sums[r * COLS + c] += a * w[c];
        }
    }
    F totals[SUMS];
#pragma GCC unroll 8
    for (int first = 0; first < SUMS; first += L) {
        add_lanes<L, L>(sums + first);
        std::memcpy(totals + first, sums + first, sizeof(V));
    }
    for (; k < K; ++k)
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLS; ++c)  // fma by name: the compiler must not choose per tile
                totals[r * COLS + c] = std::fma(x[r * K + k], F(widen(weight[c * stride + k])), totals[r * COLS + c]);
    for (int r = 0; r < ROWS; ++r) std::memcpy(y + r * N, totals + r * COLS, COLS * sizeof(F));
}

// The same for any number of rows.
template <int COLS, typename W, typename F>
void multiply_rows(const F* x, const W* weight, F* y, int64_t M, int64_t K, int64_t stride, int64_t N) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) multiply_tile<4, COLS>(x + m * K, weight, y + m * N, K, stride, N);
    if (M - m == 3) multiply_tile<3, COLS>(x + m * K, weight, y + m * N, K, stride, N);
    if (M - m == 2) multiply_tile<2, COLS>(x + m * K, weight, y + m * N, K, stride, N);
    if (M - m == 1) multiply_tile<1, COLS>(x + m * K, weight, y + m * N, K, stride, N);
}

#if defined(__AVX512BF16__)
// The same for bfloat16 weights and rows, whose products the processor adds up in pairs; meanwhile AHEAD rows of weights
// from `next` on are fetched.
template <int ROWS, int COLS, int AHEAD>
void multiply_pairs(const bf16* x, const bf16* weight, const bf16* next, float* y, int64_t K, int64_t N) {
    using V = Vector<float>::type;
    constexpr int L = 16, SUMS = (ROWS * COLS + L - 1) / L * L;
    V sums[SUMS] = {};
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
        __m512bh w[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) {
            if (c < AHEAD) __builtin_prefetch(next + c * K + k);
            w[c] = (__m512bh)_mm512_loadu_si512(weight + c * K + k);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh a = (__m512bh)_mm512_loadu_si512(x + r * K + k);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; ++c) {
                V& sum = sums[r * COLS + c];
                sum = (V)_mm512_dpbf16_ps((__m512)sum, a, w[c]);
            }
        }
    }
    float totals[SUMS];
#pragma GCC unroll 8
    for (int first = 0; first < SUMS; first += L) {
        add_lanes<L, L>(sums + first);
        std::memcpy(totals + first, sums + first, sizeof(V));
    }
    for (; k < K; ++k)
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLS; ++c)
                totals[r * COLS + c] = std::fma(widen(x[r * K + k]), widen(weight[c * K + k]), totals[r * COLS + c]);
    for (int r = 0; r < ROWS; ++r) std::memcpy(y + r * N, totals + r * COLS, COLS * sizeof(float));
}

template <int ROWS, int COLS>
void multiply_pairs(const bf16* x, const bf16* weight, const bf16* next, float* y, int64_t K, int64_t N, int64_t ahead) {
    if (ahead == COLS) return multiply_pairs<ROWS, COLS, COLS>(x, weight, weight + COLS * K, y, K, N);
    if (ahead == 2) return multiply_pairs<ROWS, COLS, 2>(x, weight, next, y, K, N);
    if (ahead == 1) return multiply_pairs<ROWS, COLS, 1>(x, weight, next, y, K, N);
    multiply_pairs<ROWS, COLS, 0>(x, weight, next, y, K, N);
}

// Every four rows fetch their share of the tile after this one, see `fetch_ahead`.
template <int COLS>
void multiply_columns(const bf16* x, const bf16* weight, float* y, int64_t M, int64_t K, int64_t N) {
    const int64_t blocks = (M + 3) / 4, share = (COLS + blocks - 1) / blocks;
    for (int64_t b = 0; b < blocks; ++b, x += 4 * K, y += 4 * N) {
        const int64_t rows = M - 4 * b, done = b * share, ahead = COLS < 8 ? std::min(share, COLS - done) : 0;
        const bf16* next = weight + (COLS + done) * K;
        if (rows >= 4) multiply_pairs<4, COLS>(x, weight, next, y, K, N, ahead);
        if (rows == 3) multiply_pairs<3, COLS>(x, weight, next, y, K, N, ahead);
        if (rows == 2) multiply_pairs<2, COLS>(x, weight, next, y, K, N, ahead);
        if (rows == 1) multiply_pairs<1, COLS>(x, weight, next, y, K, N, ahead);
    }
}
#endif

template <int COLS, typename W, typename F>
void multiply_columns(const F* x, const W* weight, F* y, int64_t M, int64_t K, int64_t N) {
    multiply_rows<COLS>(x, weight, y, M, K, K, N);
}

template <int64_t COLS, typename X, typename W, typename F>
void multiply_tiles(const Team& team, const X* x, const W* weight, F* y, int64_t M, int64_t K, int64_t N) {
    team.each((N + COLS - 1) / COLS, [=](int64_t tile) {
        const int64_t n = tile * COLS;
        if (n + COLS <= N)
            multiply_columns<COLS>(x, weight + n * K, y + n, M, K, N);
        else
            for (int64_t c = n; c < N; ++c) multiply_columns<1>(x, weight + c * K, y + c, M, K, N);
    });
}

// Few rows wait for memory, which is the faster the more places it is read at; more rows need the registers.
template <typename X, typename W, typename F>
void multiply_all(const Team& team, const X* x, const W* weight, F* y, int64_t M, int64_t K, int64_t N) {
    if (M == 0) return;
    if (M <= 2)
        multiply_tiles<8>(team, x, weight, y, M, K, N);
    else
        multiply_tiles<4>(team, x, weight, y, M, K, N);
}

// y [M, N] of x [M, K] against weight [N, K].
template <typename W, typename F>
void multiply(const Team& team, const F* x, const W* weight, F* y, int64_t M, int64_t K, int64_t N) {
    multiply_all(team, x, weight, y, M, K, N);
}

#if defined(__AVX512BF16__)
// Rows are rounded to the weights' dtype, as torch keeps them.
inline void multiply(const Team& team, const float* x, const bf16* weight, float* y, int64_t M, int64_t K, int64_t N) {
    const Buffer<bf16> buffer = make_buffer<bf16>(M * K);
    bf16* rows = buffer.get();
    team.each(M, [=](int64_t m) {
#pragma omp simd
        for (int64_t i = 0; i < K; ++i) narrow(x[m * K + i], rows[m * K + i]);
    });
    multiply_all(team, static_cast<const bf16*>(rows), weight, y, M, K, N);
}
#endif

}  // namespace tandem
