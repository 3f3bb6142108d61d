// What a verify step emits: kernels/speculative.py has the contract and the law.

#include <algorithm>
#include <cstdint>

// token_ids, window [N]; widths [requests]; stop_ids [requests, num_stops]; room [requests]. by_request [requests, widest];
// lens [2, requests]: match_lens, then accept_lens.
extern "C" void accept_int64(const int64_t* token_ids, const int64_t* window, const int64_t* widths,
                             const int64_t* stop_ids, const int64_t* room, int64_t* by_request, int64_t* lens,
                             int64_t requests, int64_t widest, int64_t num_stops) {
    for (int64_t b = 0; b < requests; ++b) {
        const int64_t width = widths[b], *stops = stop_ids + b * num_stops;
        for (int64_t t = 0; t < widest; ++t) by_request[b * widest + t] = token_ids[std::min(t, width - 1)];
        int64_t matched = 1;
        while (matched < width && token_ids[matched - 1] == window[matched]) ++matched;
        int64_t emitted = 1;
        while (emitted < std::min(matched, room[b]) &&
               std::find(stops, stops + num_stops, token_ids[emitted - 1]) == stops + num_stops)
            ++emitted;
        lens[b] = matched;
        lens[requests + b] = emitted;
        token_ids += width;
        window += width;
    }
}
