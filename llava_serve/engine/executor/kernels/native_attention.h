// Attention of one token of a sequence to its pages, for the query heads that share a kv head.
//
// The compiler's command line gives QUERY and STORED (types of native_numbers.h), HEAD_DIM, GROUP (query heads per kv
// head) and PAGE_SIZE.

#pragma once

#include <algorithm>

#include "native_numbers.h"

struct Pages {  // of a sequence, in one kv head of a layer of the KV pool
    STORED* keys;
    STORED* values;
    const int32_t* pages;
    int64_t count, first;  // keys, and the first one within the window

    int64_t slot(int64_t position) const {
        return (static_cast<int64_t>(pages[position / PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE) * HEAD_DIM;
    }
};

constexpr int WIDTH_OF_VECTOR = HEAD_DIM % 16 == 0 ? 16 : HEAD_DIM % 8 == 0 ? 8 : HEAD_DIM % 4 == 0 ? 4 : 1;
constexpr int AHEAD = std::max(1, 4096 / static_cast<int>(HEAD_DIM * sizeof(STORED)));  // positions between
constexpr int VECTORS = HEAD_DIM / WIDTH_OF_VECTOR;
constexpr int TOGETHER = std::max(1, std::min(GROUP, 16 / VECTORS));  // heads whose sums are in registers together

typedef float Vector __attribute__((vector_size(4 * WIDTH_OF_VECTOR)));

// Fetches what is read AHEAD positions later: by itself a processor does not go beyond a page of 4096 bytes.
static inline void fetch(const STORED* head) {
    for (int at = 0; at < HEAD_DIM; at += 64 / sizeof(STORED)) __builtin_prefetch(head + at);
}

static inline Vector wide_vector(const float* numbers) { return load<Vector>(numbers); }

static inline Vector wide_vector(const bfloat16* numbers) {
    typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH_OF_VECTOR)));
    typedef uint32_t Words __attribute__((vector_size(4 * WIDTH_OF_VECTOR)));
    return (Vector)(__builtin_convertvector(load<Halves>(numbers), Words) << 16);
}

static inline Vector wide_vector(const float8* numbers) {
    float wide[WIDTH_OF_VECTOR];
#pragma omp simd
    for (int at = 0; at < WIDTH_OF_VECTOR; at++) wide[at] = widen(numbers[at]);
    return load<Vector>(wide);
}

// Adds the values of positions [first, count), each times its score, for COUNT heads from `member` on.
template <int COUNT>
static inline void add_values(
    const Pages& stored, const float* scores, int64_t most, int member, const float (&total)[GROUP],
    float (&out)[GROUP][HEAD_DIM]
) {
    Vector sums[COUNT][VECTORS] = {};
    for (int64_t begin = stored.first; begin < stored.count;) {
        const int64_t end = std::min(stored.count, (begin / PAGE_SIZE + 1) * PAGE_SIZE);
        const STORED* value = stored.values + stored.slot(begin);
        for (; begin < end; begin++, value += HEAD_DIM) {
            fetch(value + AHEAD * HEAD_DIM);
            for (int at = 0; at < VECTORS; at++) {
                const Vector wide = wide_vector(value + at * WIDTH_OF_VECTOR);
                for (int one = 0; one < COUNT; one++) sums[one][at] += wide * scores[(member + one) * most + begin];
            }
        }
    }
    for (int one = 0; one < COUNT; one++)
        for (int at = 0; at < VECTORS; at++) {
            const Vector scaled = sums[one][at] * total[member + one];
            std::memcpy(out[member + one] + at * WIDTH_OF_VECTOR, &scaled, sizeof scaled);
        }
}

// queries are scaled; slopes [GROUP] may be null; scores has room for GROUP times `most` numbers, at least `count`.
static inline void attend(
    const float (&queries)[GROUP][HEAD_DIM], const Pages& stored, const float* slopes, float of_values, float* scores,
    int64_t most, float (&out)[GROUP][HEAD_DIM]
) {
    const int64_t count = stored.count, first = stored.first;
    float total[GROUP];
    for (int64_t begin = first; begin < count;) {
        const int64_t end = std::min(count, (begin / PAGE_SIZE + 1) * PAGE_SIZE);
        const STORED* key = stored.keys + stored.slot(begin);
        for (; begin < end; begin++, key += HEAD_DIM) {
            fetch(key + AHEAD * HEAD_DIM);
            Vector wide[VECTORS];
            for (int at = 0; at < VECTORS; at++) wide[at] = wide_vector(key + at * WIDTH_OF_VECTOR);
            for (int member = 0; member < GROUP; member++) {
                Vector sum = {};
                for (int at = 0; at < VECTORS; at++)
                    sum += wide[at] * load<Vector>(queries[member] + at * WIDTH_OF_VECTOR);
                float score = 0;
                for (int lane = 0; lane < WIDTH_OF_VECTOR; lane++) score += sum[lane];
                if (slopes) score += slopes[member] * (begin - count + 1);
                scores[member * most + begin] = score;
            }
        }
    }
    for (int member = 0; member < GROUP; member++) {
        float* own = scores + member * most;
        float highest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : highest)
        for (int64_t at = first; at < count; at++) highest = own[at] > highest ? own[at] : highest;
#pragma omp simd reduction(+ : sum)
        for (int64_t at = first; at < count; at++) {
            own[at] = exp_negative(own[at] - highest);
            sum += own[at];
        }
        total[member] = of_values / sum;
    }
    int member = 0;
    for (; member + TOGETHER <= GROUP; member += TOGETHER) add_values<TOGETHER>(stored, scores, most, member, total, out);
    for (; member < GROUP; member++) add_values<1>(stored, scores, most, member, total, out);
}
