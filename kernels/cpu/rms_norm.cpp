#include "rms_norm.h"

namespace {

template <typename F>
void rms_norm(const F* x, const F* scale, F* y, int64_t rows, int64_t dim, F eps) {
    for (int64_t r = 0; r < rows; ++r) tandem::rms_norm_row(x + r * dim, scale, y + r * dim, dim, eps);
}

}  // namespace

// x, y [rows, dim], scale [dim], all contiguous.
extern "C" void rms_norm_float32(const float* x, const float* scale, float* y, int64_t rows, int64_t dim, double eps) {
    rms_norm(x, scale, y, rows, dim, float(eps));
}

extern "C" void rms_norm_float64(const double* x, const double* scale, double* y, int64_t rows, int64_t dim, double eps) {
    rms_norm(x, scale, y, rows, dim, eps);
}
