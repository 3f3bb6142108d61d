// y = x · Wᵀ for few rows: every weight is read from memory once and multiplied with all rows.

#include "products.h"

namespace {

template <typename W, typename F>
void linear(const F* x, const W* weight, F* y, int64_t M, int64_t K, int64_t N, int num_threads) {
    tandem::multiply(tandem::Team(num_threads), x, weight, y, M, K, N);
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
