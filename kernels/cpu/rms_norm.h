// RMSNorm of one row; the order of its sum does not depend on the other rows.

#pragma once

#include <cmath>
#include <cstdint>

namespace tandem {

template <typename F>
void rms_norm_row(const F* x, const F* scale, F* y, int64_t dim, F eps) {
    F sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) sum += x[i] * x[i];
    const F factor = F(1) / std::sqrt(sum / dim + eps);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) y[i] = x[i] * factor * scale[i];
}

}  // namespace tandem
