// Row-wise loops of a training step: norms, gates and their gradients in float32. What all rows add up to (gradients of
// scales) is summed in blocks of fixed size, so results do not depend on the number of threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elementwise.h"
#include "torch_threads.h"

namespace tandem {

constexpr int64_t ROW_BLOCK = 128;

// body(row) for all rows.
template <typename Body>
void for_rows(int64_t rows, int num_threads, const Body& body) {
    share((rows + ROW_BLOCK - 1) / ROW_BLOCK, num_threads, [&](int64_t block) {
        const int64_t end = std::min(rows, (block + 1) * ROW_BLOCK);
        for (int64_t row = block * ROW_BLOCK; row < end; ++row) body(row);
    });
}

// total [dim] of what the blocks have added up in sums [blocks, dim].
inline void add_blocks(const std::vector<float>& sums, int64_t dim, float* total) {
    std::fill_n(total, dim, 0.0f);
    for (size_t first = 0; first < sums.size(); first += dim)
        for (int64_t i = 0; i < dim; ++i) total[i] += sums[first + i];
}

// body(row, sum) for all rows, where sum [dim] is what the row adds to; all sums together go to total.
template <typename Body>
void for_rows(int64_t rows, int num_threads, int64_t dim, float* total, const Body& body) {
    std::vector<float> sums((rows + ROW_BLOCK - 1) / ROW_BLOCK * dim);
    for_rows(rows, num_threads, [&](int64_t row) { body(row, sums.data() + row / ROW_BLOCK * dim); });
    add_blocks(sums, dim, total);
}

inline float dot(const float* x, const float* y, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += x[i] * y[i];
    return sum;
}

inline float rms_factor(const float* x, int64_t dim, float eps) {
    return 1.0f / std::sqrt(dot(x, x, dim) / dim + eps);
}

// Gradient of silu(x) = x · sigmoid(x), from x and its sigmoid.
inline float silu_slope(float x, float sigmoid) { return sigmoid * (1.0f + x * (1.0f - sigmoid)); }

}  // namespace tandem
