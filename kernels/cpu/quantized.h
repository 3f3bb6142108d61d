// Products of rows with weights of 8 or 4 bits. Rows are rounded to 8 bits themselves, so that what is summed inside a
// group of inputs are integers, and exact; the groups follow one another in float32. So a row's result does not depend
// on its company, on threads or on the processor, bit for bit. The law and the layout stand in
// kernels/quantized_linear.py.
//
// A tile is 16 outputs side by side, one per lane: a weight that is read serves up to 8 rows, and no sum crosses lanes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "elementwise.h"
#include "team.h"

namespace tandem {

constexpr int64_t TILE_OUTPUTS = 16, WORD_BYTES = 4 * TILE_OUTPUTS, BLOCK_ROWS = 8, GROUP_INPUTS = 32;

// Weights of 16 outputs for 4 inputs (8 bits) or 8 (4 bits: those of the first 4 in the lower halves).
constexpr int64_t word_inputs(int bits) { return 32 / bits; }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

struct Sums {
    __m512i lanes;
};
struct Totals {
    __m512 lanes;
};
using Bytes = __m512i;

inline Sums fill(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes lower(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes upper(Bytes b) { return lower(_mm512_srli_epi16(b, 4)); }

template <int BITS>
constexpr int32_t kept_offset() {
    return 1 << (BITS - 1);
}

template <int BITS>
void add_products(Sums& sums, Bytes weights, int32_t inputs) {
    sums.lanes = _mm512_dpbusd_epi32(sums.lanes, weights, _mm512_set1_epi32(inputs));
}

inline void add_scaled(Totals& totals, Sums sums, const bf16* scales, float factor) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    totals.lanes = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.lanes), scale * _mm512_set1_ps(factor), totals.lanes);
}

inline void store(const Totals& totals, float* y) { _mm512_storeu_ps(y, totals.lanes); }

#elif defined(__AVX2__) && defined(__FMA__)

struct Sums {
    __m256i lanes[2];
};
struct Totals {
    __m256 lanes[2];
};
struct Bytes {
    __m256i halves[2];
};

inline Sums fill(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
inline Bytes load_bytes(const uint8_t* p) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
}
inline __m256i lower(__m256i half) { return _mm256_and_si256(half, _mm256_set1_epi8(15)); }
inline Bytes lower(Bytes b) { return {{lower(b.halves[0]), lower(b.halves[1])}}; }
inline Bytes upper(Bytes b) {
    return {{lower(_mm256_srli_epi16(b.halves[0], 4)), lower(_mm256_srli_epi16(b.halves[1], 4))}};
}

#if defined(__AVXVNNI__)
template <int BITS>
constexpr int32_t kept_offset() {
    return 1 << (BITS - 1);
}

template <int BITS>
__m256i add_half(__m256i sum, __m256i weights, __m256i inputs) {
    return _mm256_dpbusd_avx_epi32(sum, weights, inputs);
}
#else
template <int BITS>
constexpr int32_t kept_offset() {
    return BITS == 8 ? 0 : 1 << (BITS - 1);
}

// Pairs of products of unsigned with signed bytes saturate at 16 bits: 8-bit weights lose their sign first.
template <int BITS>
__m256i add_half(__m256i sum, __m256i weights, __m256i inputs) {
    if constexpr (BITS == 8) {
        weights = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
        inputs = _mm256_sign_epi8(inputs, weights);
        weights = _mm256_abs_epi8(weights);
    }
    const __m256i pairs = _mm256_maddubs_epi16(weights, inputs);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

template <int BITS>
void add_products(Sums& sums, Bytes weights, int32_t inputs) {
    for (int half = 0; half < 2; ++half)
        sums.lanes[half] = add_half<BITS>(sums.lanes[half], weights.halves[half], _mm256_set1_epi32(inputs));
}

inline void add_scaled(Totals& totals, Sums sums, const bf16* scales, float factor) {
    for (int half = 0; half < 2; ++half) {
        const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales) + half);
        const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(loaded), 16));
        totals.lanes[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.lanes[half]), scale * _mm256_set1_ps(factor),
                                             totals.lanes[half]);
    }
}

inline void store(const Totals& totals, float* y) {
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(y + 8 * half, totals.lanes[half]);
}

#else

struct Sums {
    int32_t lanes[TILE_OUTPUTS];
};
struct Totals {
    float lanes[TILE_OUTPUTS];
};
struct Bytes {
    uint8_t bytes[WORD_BYTES];
};

inline Sums fill(int32_t x) {
    Sums sums;
    std::fill_n(sums.lanes, TILE_OUTPUTS, x);
    return sums;
}
inline Bytes load_bytes(const uint8_t* p) {
    Bytes b;
    std::memcpy(b.bytes, p, sizeof b.bytes);
    return b;
}
inline Bytes lower(Bytes b) {
    for (uint8_t& byte : b.bytes) byte &= 15;
    return b;
}
inline Bytes upper(Bytes b) {
    for (uint8_t& byte : b.bytes) byte >>= 4;
    return b;
}

template <int BITS>
constexpr int32_t kept_offset() {
    return 1 << (BITS - 1);
}

template <int BITS>
void add_products(Sums& sums, const Bytes& weights, int32_t inputs) {
    int8_t x[4];
    std::memcpy(x, &inputs, sizeof x);
    for (int64_t lane = 0; lane < TILE_OUTPUTS; ++lane)
        for (int i = 0; i < 4; ++i) sums.lanes[lane] += int32_t(weights.bytes[4 * lane + i]) * x[i];
}

inline void add_scaled(Totals& totals, const Sums& sums, const bf16* scales, float factor) {
    for (int64_t lane = 0; lane < TILE_OUTPUTS; ++lane)
        totals.lanes[lane] = std::fma(float(sums.lanes[lane]), widen(scales[lane]) * factor, totals.lanes[lane]);
}

inline void store(const Totals& totals, float* y) { std::copy_n(totals.lanes, TILE_OUTPUTS, y); }

#endif

// Weights of `bits` bits, tiles of outputs one after the other: words [tiles, inputs / word_inputs, 64] of unsigned
// numbers that are 2^(bits - 1) too large, and scales [tiles, groups, 16]. Outputs are counted from `first`.
struct QuantizedMatrix {
    const uint8_t* words;
    const bf16* scales;
    int64_t bits, first;
};

// Up to 8 rows rounded to 8 bits, those of 4 inputs side by side: values [groups, 8, rows, 4], scales [groups, rows],
// and what the offset of the weights has to be made good with, [groups, rows].
struct RowBlock {
    int32_t* values;
    float* scales;
    int32_t* corrections;
    int64_t groups, rows;
};

// A group of one row; missing inputs are zeros. A number that is none makes the scale one.
template <typename F>
void quantize_group(const F* x, int64_t count, int32_t offset, const RowBlock& block, int64_t group, int64_t row) {
    float inputs[GROUP_INPUTS] = {};
    for (int64_t i = 0; i < count; ++i) inputs[i] = float(x[i]);
    float largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < GROUP_INPUTS; ++i) {
        largest = std::max(largest, std::fabs(inputs[i]));
        poison += inputs[i] * 0.0f;
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int8_t values[GROUP_INPUTS];
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < GROUP_INPUTS; ++i) {
        float value = inputs[i] * inverse;
        value = value > -127.0f ? value : -127.0f;
        value = value < 127.0f ? value : 127.0f;
        const int32_t rounded = int32_t(std::nearbyint(value));
        values[i] = int8_t(rounded);
        sum += rounded;
    }
    block.scales[group * block.rows + row] = largest / 127.0f + poison;
    block.corrections[group * block.rows + row] = -offset * sum;
    int32_t* out = block.values + group * (GROUP_INPUTS / 4) * block.rows + row;
    for (int64_t i = 0; i < GROUP_INPUTS / 4; ++i) std::memcpy(out + i * block.rows, values + 4 * i, 4);
}

// Rows [M, K] in blocks.
class QuantizedRows {
   public:
    template <typename F>
    QuantizedRows(const Team& team, const F* x, int64_t M, int64_t K, int32_t offset)
        : M_(M), groups_((K + GROUP_INPUTS - 1) / GROUP_INPUTS), numbers_(new int32_t[M * groups_ * NUMBERS]) {
        const auto quantize = [&](int64_t row) {
            for (int64_t g = 0; g < groups_; ++g)
                quantize_group(x + row * K + g * GROUP_INPUTS, std::min(GROUP_INPUTS, K - g * GROUP_INPUTS), offset,
                               block(row / BLOCK_ROWS), g, row % BLOCK_ROWS);
        };
        if (M * K >= PARALLEL_INPUTS)
            team.each(M, quantize);
        else
            for (int64_t row = 0; row < M; ++row) quantize(row);
    }

    int64_t num_blocks() const { return (M_ + BLOCK_ROWS - 1) / BLOCK_ROWS; }

    RowBlock block(int64_t index) const {
        const int64_t rows = std::min(BLOCK_ROWS, M_ - index * BLOCK_ROWS);
        int32_t* values = numbers_.get() + index * BLOCK_ROWS * groups_ * NUMBERS;
        int32_t* corrections = values + rows * groups_ * (GROUP_INPUTS / 4);
        return {values, reinterpret_cast<float*>(corrections + rows * groups_), corrections, groups_, rows};
    }

   private:
    static constexpr int64_t NUMBERS = GROUP_INPUTS / 4 + 2;  // of a row and group
    static constexpr int64_t PARALLEL_INPUTS = 1 << 13;
    int64_t M_, groups_;
    std::unique_ptr<int32_t[]> numbers_;
};

// How far ahead weights are asked for: the processor itself looks no further than a page.
constexpr int64_t AHEAD_BYTES = 8192;

// y [ROWS, 16] of a block and a tile.
template <int BITS, int ROWS>
void multiply_block(const RowBlock& block, const uint8_t* words, const bf16* scales, float* y) {
    Totals totals[ROWS] = {};
    const int32_t* values = block.values;
    for (int64_t g = 0; g < block.groups; ++g, scales += TILE_OUTPUTS) {
        Sums sums[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[r] = fill(block.corrections[g * ROWS + r]);
        for (int64_t word = 0; word < GROUP_INPUTS / word_inputs(BITS); ++word, words += WORD_BYTES) {
            __builtin_prefetch(words + AHEAD_BYTES);
            const Bytes bytes = load_bytes(words);
            if constexpr (BITS == 4) {
                const Bytes first = lower(bytes), second = upper(bytes);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    add_products<BITS>(sums[r], first, values[r]);
                    add_products<BITS>(sums[r], second, values[ROWS + r]);
                }
                values += 2 * ROWS;
            } else {
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) add_products<BITS>(sums[r], bytes, values[r]);
                values += ROWS;
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) add_scaled(totals[r], sums[r], scales, block.scales[g * ROWS + r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) store(totals[r], y + r * TILE_OUTPUTS);
}

template <int BITS, int ROWS = BLOCK_ROWS>
void multiply_any_block(const RowBlock& block, const uint8_t* words, const bf16* scales, float* y) {
    if (block.rows == ROWS) return multiply_block<BITS, ROWS>(block, words, scales, y);
    if constexpr (ROWS > 1) multiply_any_block<BITS, ROWS - 1>(block, words, scales, y);
}

template <int BITS, typename F>
void multiply_bits(const Team& team, const F* x, const QuantizedMatrix& weight, F* y, int64_t M, int64_t K, int64_t N) {
    const QuantizedRows rows(team, x, M, K, kept_offset<BITS>());
    const int64_t groups = (K + GROUP_INPUTS - 1) / GROUP_INPUTS, first_tile = weight.first / TILE_OUTPUTS;
    const int64_t tile_bytes = groups * GROUP_INPUTS / word_inputs(BITS) * WORD_BYTES, end = weight.first + N;
    team.each((end + TILE_OUTPUTS - 1) / TILE_OUTPUTS - first_tile, [&](int64_t index) {
        const int64_t tile = first_tile + index, start = tile * TILE_OUTPUTS;
        const int64_t begin = std::max(start, weight.first), stop = std::min(start + TILE_OUTPUTS, end);
        const bf16* scales = weight.scales + tile * groups * TILE_OUTPUTS;
        for (int64_t b = 0; b < rows.num_blocks(); ++b) {
            const RowBlock block = rows.block(b);
            float out[BLOCK_ROWS * TILE_OUTPUTS];
            multiply_any_block<BITS>(block, weight.words + tile * tile_bytes, scales, out);
            for (int64_t r = 0; r < block.rows; ++r)
                std::copy(out + r * TILE_OUTPUTS + begin - start, out + r * TILE_OUTPUTS + stop - start,
                          y + (b * BLOCK_ROWS + r) * N + begin - weight.first);
        }
    });
}

// y [M, N] of x [M, K] and outputs first .. first + N of the weights.
template <typename F>
void multiply(const Team& team, const F* x, const QuantizedMatrix& weight, F* y, int64_t M, int64_t K, int64_t N) {
    if (weight.bits == 8)
        multiply_bits<8>(team, x, weight, y, M, K, N);
    else
        multiply_bits<4>(team, x, weight, y, M, K, N);
}

// A group of one output's weights, at most 32; missing ones are zeros. words and scale are the group's first ones.
template <int BITS>
void store_group(const float* values, int64_t count, uint8_t* words, bf16* scale) {
    constexpr float OFFSET = 1 << (BITS - 1), LEAST = BITS == 8 ? -127 : -8, MOST = OFFSET - 1;
    float inputs[GROUP_INPUTS] = {}, low = 0, high = 0, poison = 0;
    std::copy_n(values, count, inputs);
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : poison)
    for (int64_t i = 0; i < GROUP_INPUTS; ++i) {
        low = std::min(low, inputs[i]);
        high = std::max(high, inputs[i]);
        poison += inputs[i] * 0.0f;
    }
    const float exact = BITS == 8 ? std::max(high, -low) / 127.0f : (high > -low ? high : low) / -8.0f;
    narrow(exact + poison, *scale);
    const float divisor = widen(*scale) == 0.0f ? 1.0f : widen(*scale);
    uint8_t numbers[GROUP_INPUTS];
#pragma omp simd
    for (int64_t i = 0; i < GROUP_INPUTS; ++i) {
        float value = std::nearbyint(inputs[i] / divisor);
        value = value > LEAST ? value : LEAST;
        value = value < MOST ? value : MOST;
        numbers[i] = uint8_t(int32_t(value + OFFSET));
    }
    for (int64_t word = 0; word < GROUP_INPUTS / word_inputs(BITS); ++word, words += WORD_BYTES)
        for (int64_t i = 0; i < 4; ++i) {
            const uint8_t* first = numbers + word * word_inputs(BITS) + i;
            words[i] = BITS == 8 ? first[0] : uint8_t(first[0] | first[4] << 4);
        }
}

// values [M, K] in place of the weights of outputs places [M], counted over all tiles.
template <int BITS>
void store_rows(const Team& team, const float* values, const int64_t* places, uint8_t* words, bf16* scales, int64_t M,
                int64_t K) {
    constexpr int64_t GROUP_BYTES = GROUP_INPUTS / word_inputs(BITS) * WORD_BYTES;
    const int64_t groups = (K + GROUP_INPUTS - 1) / GROUP_INPUTS;
    team.each(M, [=](int64_t row) {
        const int64_t tile = places[row] / TILE_OUTPUTS, lane = places[row] % TILE_OUTPUTS;
        for (int64_t g = 0; g < groups; ++g)
            store_group<BITS>(values + row * K + g * GROUP_INPUTS, std::min(GROUP_INPUTS, K - g * GROUP_INPUTS),
                              words + (tile * groups + g) * GROUP_BYTES + 4 * lane,
                              scales + (tile * groups + g) * TILE_OUTPUTS + lane);
    });
}

// The weights of the first output, y [K].
template <typename F>
void dequantize_row(const QuantizedMatrix& weight, F* y, int64_t K) {
    const int64_t groups = (K + GROUP_INPUTS - 1) / GROUP_INPUTS, inputs = word_inputs(weight.bits);
    const int64_t tile = weight.first / TILE_OUTPUTS, lane = weight.first % TILE_OUTPUTS;
    const uint8_t* words = weight.words + tile * groups * GROUP_INPUTS / inputs * WORD_BYTES + 4 * lane;
    const bf16* scales = weight.scales + tile * groups * TILE_OUTPUTS + lane;
    for (int64_t k = 0; k < K; ++k) {
        const uint8_t byte = words[k / inputs * WORD_BYTES + k % 4];
        const int32_t number = weight.bits == 8 ? byte - 128 : (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
        y[k] = number * widen(scales[k / GROUP_INPUTS * TILE_OUTPUTS]);
    }
}

}  // namespace tandem
