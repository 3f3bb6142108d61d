// Products and transposes of small matrices that lie in the processor's cache, in 64-byte vectors. Rows are padded with
// zeros to whole tiles, so there are no remainders; every sum has one fixed order.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "products.h"

namespace tandem {

using Lanes = Vector<float>::type;
constexpr int64_t TILE = Vector<float>::lanes;
constexpr int64_t TILE_ROWS = 8;

inline int64_t pad(int64_t size) { return (size + TILE - 1) / TILE * TILE; }

inline void store(const Lanes& v, float* p) { std::memcpy(p, &v, sizeof v); }

// Memory of one thread, handed out piece by piece and kept between calls.
class Scratch {
   public:
    explicit Scratch(int64_t size) {
        if (int64_t(memory().size()) < size + TILE) memory().resize(size + TILE);
        const auto offset = reinterpret_cast<uintptr_t>(memory().data()) % (TILE * sizeof(float)) / sizeof(float);
        next_ = memory().data() + (offset == 0 ? 0 : TILE - offset);
    }
    float* take(int64_t size) {
        float* piece = next_;
        next_ += size;
        return piece;
    }

   private:
    static std::vector<float>& memory() {
        thread_local std::vector<float> memory;
        return memory;
    }
    float* next_;
};

// A matrix as a product reads it: element (i, k) at data[i * row + k * column].
struct Factor {
    const float* data;
    int64_t row, column;
};

inline Factor plain(const float* data, int64_t stride) { return {data, stride, 1}; }
inline Factor transposed(const float* data, int64_t stride) { return {data, 1, stride}; }

enum class Into { set, add, subtract };

// TILE_ROWS x (VECTORS * TILE) of `out`.
template <int VECTORS, Into INTO>
void product_tile(Factor a, const float* b, int64_t b_stride, int64_t K, float* out, int64_t stride) {
    Lanes sums[TILE_ROWS][VECTORS] = {};
    for (int64_t k = 0; k < K; ++k) {
        Lanes row[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) row[v] = load(b + k * b_stride + v * TILE);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; ++i) {
            const float x = a.data[i * a.row + k * a.column];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[i][v] += x * row[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            float* target = out + i * stride + v * TILE;
            if constexpr (INTO == Into::set) store(sums[i][v], target);
            if constexpr (INTO == Into::add) store(load(target) + sums[i][v], target);
            if constexpr (INTO == Into::subtract) store(load(target) - sums[i][v], target);
        }
}

// out [TILE_ROWS, N] of a [TILE_ROWS, K] and b [K, N]; N is a multiple of TILE.
template <Into INTO>
void product_rows(Factor a, const float* b, int64_t b_stride, int64_t K, int64_t N, float* out, int64_t stride) {
    int64_t n = 0;
    for (; n + 3 * TILE <= N; n += 3 * TILE) product_tile<3, INTO>(a, b + n, b_stride, K, out + n, stride);
    if (N - n == 2 * TILE) product_tile<2, INTO>(a, b + n, b_stride, K, out + n, stride);
    if (N - n == TILE) product_tile<1, INTO>(a, b + n, b_stride, K, out + n, stride);
}

// out [M, N] of a [M, K] and b [K, N]; M and N are multiples of TILE.
template <Into INTO>
void product(Factor a, const float* b, int64_t M, int64_t N, int64_t K, float* out) {
    for (int64_t i = 0; i < M; i += TILE_ROWS)
        product_rows<INTO>({a.data + i * a.row, a.row, a.column}, b, N, K, N, out + i * N, N);
}

// Lanes of a and b whose number has the bit S change places, from b's lower to a's upper half.
template <int S, int... J>
void exchange(Lanes& a, Lanes& b, std::integer_sequence<int, J...>) {
    const Lanes first = __builtin_shufflevector(a, b, (J & S ? int(TILE) + J - S : J)...);
    b = __builtin_shufflevector(a, b, (J & S ? int(TILE) + J : J + S)...);
    a = first;
}

template <int S>
void exchange_rows(Lanes* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < int(TILE); ++i)
        if ((i & S) == 0) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, int(TILE)>());
}

// out [N, M] of x [M, N]; both are multiples of TILE.
inline void transpose(const float* x, int64_t M, int64_t N, float* out) {
    for (int64_t m = 0; m < M; m += TILE)
        for (int64_t n = 0; n < N; n += TILE) {
            Lanes rows[TILE];
#pragma GCC unroll 16
            for (int i = 0; i < int(TILE); ++i) rows[i] = load(x + (m + i) * N + n);
            exchange_rows<1>(rows);
            exchange_rows<2>(rows);
            exchange_rows<4>(rows);
            exchange_rows<8>(rows);
#pragma GCC unroll 16
            for (int i = 0; i < int(TILE); ++i) store(rows[i], out + (n + i) * M + m);
        }
}

// Rows [count, dim] that lie `stride` apart into out [padded, pad(dim)], and zeros around them.
inline void load_rows(const float* x, int64_t stride, int64_t count, int64_t dim, int64_t padded, float* out) {
    const int64_t width = pad(dim);
    for (int64_t t = 0; t < padded; ++t) {
        const int64_t kept = t < count ? dim : 0;
        if (kept > 0) std::memcpy(out + t * width, x + t * stride, kept * sizeof(float));
        std::memset(out + t * width + kept, 0, (width - kept) * sizeof(float));
    }
}

inline void store_rows(const float* x, int64_t count, int64_t dim, float* out, int64_t stride) {
    for (int64_t t = 0; t < count; ++t) std::memcpy(out + t * stride, x + t * pad(dim), dim * sizeof(float));
}

}  // namespace tandem
