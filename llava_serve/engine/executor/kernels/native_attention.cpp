// Decode attention on a CPU: `decode_attention` in twins.py. It can write the newest token's keys and values first.

#include <vector>

#include "native_attention.h"

struct Tensor {  // [sequences, heads, HEAD_DIM] of a step; strides in numbers
    const QUERY* data;
    int64_t by_sequence, by_head;

    const QUERY* at(int64_t sequence, int64_t head) const { return data + sequence * by_sequence + head * by_head; }
};

// keys and values [kv_heads, positions, HEAD_DIM], table [sequences, table_width] and out are contiguous but for the
// kv heads, which are kv_head_stride numbers apart. new_keys and new_values without data are not written; slopes
// [heads] and scales [2, kv_heads] may be null; a window of 0 is all keys.
extern "C" void decode_attention(
    const QUERY* query_data, int64_t query_by_sequence, int64_t query_by_head, const QUERY* new_keys_data,
    int64_t new_keys_by_sequence, int64_t new_keys_by_head, const QUERY* new_values_data,
    int64_t new_values_by_sequence, int64_t new_values_by_head, STORED* keys, STORED* values, int64_t kv_head_stride,
    const int32_t* table, int64_t table_width, const int32_t* used, const float* slopes, const float* scales,
    QUERY* out, int64_t sequences, int64_t kv_heads, float scaling, int64_t window, int threads
) {
    const Tensor query{query_data, query_by_sequence, query_by_head};
    const Tensor new_keys{new_keys_data, new_keys_by_sequence, new_keys_by_head};
    const Tensor new_values{new_values_data, new_values_by_sequence, new_values_by_head};
    const int64_t most = *std::max_element(used, used + sequences);
    // A thread takes the sequences of one head one after the other: what pages they share stays in its cache.
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(GROUP * most);
#pragma omp for collapse(2) schedule(static)
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
            for (int64_t row = 0; row < sequences; row++) {
                const int64_t count = used[row], first = window && count > window ? count - window : 0;
                const int64_t head = kv_head * kv_head_stride;
                const Pages stored{keys + head, values + head, table + row * table_width, count, first};
                if (new_keys.data) {
                    const int64_t slot = stored.slot(count - 1);
                    std::memcpy(stored.keys + slot, new_keys.at(row, kv_head), HEAD_DIM * sizeof(STORED));
                    std::memcpy(stored.values + slot, new_values.at(row, kv_head), HEAD_DIM * sizeof(STORED));
                }
                const float of_keys = scales ? scales[kv_head] : 1.0f;
                const float of_values = scales ? scales[kv_heads + kv_head] : 1.0f;
                float queries[GROUP][HEAD_DIM], attended[GROUP][HEAD_DIM];
                for (int member = 0; member < GROUP; member++) {
                    const QUERY* one = query.at(row, kv_head * GROUP + member);
                    for (int at = 0; at < HEAD_DIM; at++) queries[member][at] = widen(one[at]) * scaling * of_keys;
                }
                const float* own_slopes = slopes ? slopes + kv_head * GROUP : nullptr;
                attend(queries, stored, own_slopes, of_values, scores.data(), most, attended);
                for (int member = 0; member < GROUP; member++) {
                    QUERY* result = out + ((row * kv_heads + kv_head) * GROUP + member) * HEAD_DIM;
                    for (int at = 0; at < HEAD_DIM; at++) narrow(attended[member][at], result + at);
                }
            }
        }
    }
}
