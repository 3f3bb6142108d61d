// RMSNorm, one row after the other; the order of a row's sum does not depend on the other rows.

#include <cmath>
#include <cstdint>

namespace {

template <typename F>
void rms_norm(const F* x, const F* scale, F* y, int64_t rows, int64_t dim, F eps) {
    for (int64_t r = 0; r < rows; ++r, x += dim, y += dim) {
        F sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < dim; ++i) sum += x[i] * x[i];
        const F factor = F(1) / std::sqrt(sum / dim + eps);
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) y[i] = x[i] * factor * scale[i];
    }
}

}  // namespace

// x, y [rows, dim], scale [dim], all contiguous.
extern "C" void rms_norm_float32(const float* x, const float* scale, float* y, int64_t rows, int64_t dim, double eps) {
    rms_norm(x, scale, y, rows, dim, float(eps));
}

extern "C" void rms_norm_float64(const double* x, const double* scale, double* y, int64_t rows, int64_t dim, double eps) {
    rms_norm(x, scale, y, rows, dim, eps);
}
