// A matrix of a layer as the decoder meets it: weights of a served dtype, or of few bits.

#pragma once

#include "products.h"
#include "quantized.h"

namespace tandem {

// Weights [outputs, inputs] of type W; with scales (else null) they are of `bits` bits, as quantized.h reads them.
template <typename W>
struct Matrix {
    const void* weights;
    const bf16* scales;
    int64_t bits;

    const W* plain() const { return static_cast<const W*>(weights); }
    QuantizedMatrix quantized(int64_t first) const {
        return {static_cast<const uint8_t*>(weights), scales, bits, first};
    }

    // The first output of one of several matrices that lie one after the other.
    int64_t start_of(int64_t index, int64_t outputs) const {
        return index * (scales == nullptr ? outputs : (outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS * TILE_OUTPUTS);
    }

    // y [inputs]: the weights of one output.
    template <typename F>
    void read(int64_t output, F* y, int64_t inputs) const {
        if (scales != nullptr) return dequantize_row(quantized(output), y, inputs);
        for (int64_t i = 0; i < inputs; ++i) y[i] = widen(plain()[output * inputs + i]);
    }
};

// y [M, N] of x [M, K] and the outputs first .. first + N.
template <typename W, typename F>
void multiply(const Team& team, const F* x, const Matrix<W>& matrix, F* y, int64_t M, int64_t K, int64_t N,
              int64_t first = 0) {
    if (matrix.scales != nullptr)
        multiply(team, x, matrix.quantized(first), y, M, K, N);
    else
        multiply(team, x, matrix.plain() + first * K, y, M, K, N);
}

}  // namespace tandem
