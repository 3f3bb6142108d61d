// y = x · Wᵀ for weights of few bits: kernels/quantized_linear.py has the contract and the law.

#include "quantized.h"

// x [M, K], y [M, N], contiguous; outputs first .. first + N of the weights.
extern "C" void quantized_linear_float32(const float* x, const uint8_t* words, const tandem::bf16* scales, float* y,
                                         int64_t bits, int64_t first, int64_t M, int64_t K, int64_t N,
                                         int num_threads) {
    const tandem::QuantizedMatrix weight{words, scales, bits, first};
    tandem::multiply(tandem::Team(num_threads), x, weight, y, M, K, N);
}

// values [M, K] to the outputs places [M], counted over all tiles.
extern "C" void store_quantized_float32(const float* values, const int64_t* places, uint8_t* words,
                                        tandem::bf16* scales, int64_t bits, int64_t M, int64_t K, int num_threads) {
    const auto store = bits == 8 ? tandem::store_rows<8> : tandem::store_rows<4>;
    store(tandem::Team(num_threads), values, places, words, scales, M, K);
}
