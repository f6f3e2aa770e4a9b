// Decode attention on a CPU: `decode_attention` in twins.py. It can write the newest token's keys and values first.
//
// The compiler's command line gives QUERY and STORED (types below), HEAD_DIM, GROUP (query heads per kv head) and
// PAGE_SIZE. All sums are in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bfloat16 {
    uint16_t bits;
};

struct float8 {  // e4m3fn
    uint8_t bits;
};

static inline float from_bits(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

static inline uint32_t to_bits(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

static inline float widen(float number) { return number; }

static inline float widen(bfloat16 number) { return from_bits(static_cast<uint32_t>(number.bits) << 16); }

static inline float widen(float8 number) {
    const uint32_t magnitude = number.bits & 0x7f, sign = static_cast<uint32_t>(number.bits & 0x80) << 24;
    const float number_ = from_bits(magnitude << 20) * 0x1p120f;  // the exponent's bias is 7, in float32 127
    return from_bits(to_bits(magnitude == 0x7f ? NAN : number_) | sign);
}

static inline void narrow(float number, float* out) { *out = number; }

static inline void narrow(float number, bfloat16* out) {  // to the nearest, of two the even one
    const uint32_t bits = to_bits(number);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    out->bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp of a number that is not above 0, to a unit in the last place of float32 or two: unlike the library's, the
// compiler makes vectors of it. NaN stays NaN.
static inline float exp_negative(float x) {
    const float least = -87.0f;
    x = x < least ? least : x;
    const float whole = std::rint(x * 1.44269504f);
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float power = 1.98756915e-4f;
    power = power * rest + 1.39819995e-3f;
    power = power * rest + 8.33345190e-3f;
    power = power * rest + 4.16657962e-2f;
    power = power * rest + 1.66666655e-1f;
    power = power * rest + 5.00000012e-1f;
    power = power * rest * rest + rest + 1.0f;
    return power * from_bits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
}

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
    int64_t most = 0;
    for (int64_t row = 0; row < sequences; row++) most = used[row] > most ? used[row] : most;
    // A thread takes the sequences of one head one after the other: what pages they share stays in its cache.
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(GROUP * most);
#pragma omp for collapse(2) schedule(static)
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
            for (int64_t row = 0; row < sequences; row++) {
                STORED* own_keys = keys + kv_head * kv_head_stride;
                STORED* own_values = values + kv_head * kv_head_stride;
                const int32_t* pages = table + row * table_width;
                const int64_t count = used[row], first = window && count > window ? count - window : 0;
                if (new_keys.data) {
                    const int64_t last = count - 1, page = pages[last / PAGE_SIZE];
                    const int64_t target = (page * PAGE_SIZE + last % PAGE_SIZE) * HEAD_DIM;
                    std::memcpy(own_keys + target, new_keys.at(row, kv_head), HEAD_DIM * sizeof(STORED));
                    std::memcpy(own_values + target, new_values.at(row, kv_head), HEAD_DIM * sizeof(STORED));
                }
                const float of_keys = scales ? scales[kv_head] : 1.0f;
                const float of_values = scales ? scales[kv_heads + kv_head] : 1.0f;
                float queries[GROUP][HEAD_DIM], sums[GROUP][HEAD_DIM] = {}, top[GROUP], total[GROUP];
                for (int member = 0; member < GROUP; member++) {
                    const QUERY* one = query.at(row, kv_head * GROUP + member);
                    for (int at = 0; at < HEAD_DIM; at++) queries[member][at] = widen(one[at]) * scaling * of_keys;
                    top[member] = -INFINITY;
                }
                for (int64_t begin = first; begin < count;) {
                    const int64_t page = begin / PAGE_SIZE, end = std::min(count, (page + 1) * PAGE_SIZE);
                    const int64_t slot = static_cast<int64_t>(pages[page]) * PAGE_SIZE - page * PAGE_SIZE;
                    for (int64_t position = begin; position < end; position++) {
                        const STORED* key = own_keys + (slot + position) * HEAD_DIM;
                        float wide[HEAD_DIM];
#pragma omp simd
                        for (int at = 0; at < HEAD_DIM; at++) wide[at] = widen(key[at]);
                        for (int member = 0; member < GROUP; member++) {
                            float score = 0;
#pragma omp simd reduction(+ : score)
                            for (int at = 0; at < HEAD_DIM; at++) score += queries[member][at] * wide[at];
                            if (slopes) score += slopes[kv_head * GROUP + member] * (position - count + 1);
                            scores[member * most + position] = score;
                        }
                    }
                    begin = end;
                }
                for (int member = 0; member < GROUP; member++) {
                    float* own = scores.data() + member * most;
                    float highest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : highest)
                    for (int64_t at = first; at < count; at++) highest = own[at] > highest ? own[at] : highest;
#pragma omp simd reduction(+ : sum)
                    for (int64_t at = first; at < count; at++) {
                        own[at] = exp_negative(own[at] - highest);
                        sum += own[at];
                    }
                    top[member] = highest;
                    total[member] = of_values / sum;
                }
                for (int64_t begin = first; begin < count;) {
                    const int64_t page = begin / PAGE_SIZE, end = std::min(count, (page + 1) * PAGE_SIZE);
                    const int64_t slot = static_cast<int64_t>(pages[page]) * PAGE_SIZE - page * PAGE_SIZE;
                    for (int64_t position = begin; position < end; position++) {
                        const STORED* value = own_values + (slot + position) * HEAD_DIM;
                        for (int member = 0; member < GROUP; member++) {
                            const float share = scores[member * most + position];
#pragma omp simd
                            for (int at = 0; at < HEAD_DIM; at++) sums[member][at] += share * widen(value[at]);
                        }
                    }
                    begin = end;
                }
                for (int member = 0; member < GROUP; member++) {
                    QUERY* result = out + ((row * kv_heads + kv_head) * GROUP + member) * HEAD_DIM;
                    for (int at = 0; at < HEAD_DIM; at++) narrow(sums[member][at] * total[member], result + at);
                }
            }
        }
    }
}
