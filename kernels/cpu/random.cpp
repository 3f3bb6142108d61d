#include "random.h"

// seeds, positions [rows]; keys [2, rows].
extern "C" void row_keys_int64(const int64_t* seeds, const int64_t* positions, uint32_t* keys, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
        const tandem::RowKey key = tandem::row_key(seeds[r], positions[r]);
        keys[r] = key.first;
        keys[rows + r] = key.second;
    }
}
