// y = x · Wᵀ for few rows: every weight is read from memory once and multiplied with all rows.

#include "products.h"

namespace {

using tandem::multiply_rows;

template <typename W, typename F>
void linear(const F* x, const W* weight, F* y, int64_t M, int64_t K, int64_t N, int num_threads) {
    constexpr int64_t COLS = 4;
    const int64_t tiles = (N + COLS - 1) / COLS;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t n = tile * COLS;
        if (n + COLS <= N)
            multiply_rows<COLS>(x, weight + n * K, y + n, M, K, K, N);
        else
            for (int64_t c = n; c < N; ++c) multiply_rows<1>(x, weight + c * K, y + c, M, K, K, N);
    }
}

}  // namespace

// x [M, K], weight [N, K], y [M, N], all contiguous.
extern "C" void linear_bfloat16(const float* x, const tandem::bf16* weight, float* y, int64_t M, int64_t K, int64_t N,
                                int num_threads) {
    linear(x, weight, y, M, K, N, num_threads);
}

extern "C" void linear_float32(const float* x, const float* weight, float* y, int64_t M, int64_t K, int64_t N,
                               int num_threads) {
    linear(x, weight, y, M, K, N, num_threads);
}

extern "C" void linear_float64(const double* x, const double* weight, double* y, int64_t M, int64_t K, int64_t N,
                               int num_threads) {
    linear(x, weight, y, M, K, N, num_threads);
}
