/* The inner loops of retrieval: graph search over int8 prefixes, re-rank and funnel, exact scan with bounds.
 *
 * native.py calls these functions through ctypes, without the GIL, and checks shapes and types; nothing here does. All
 * are deterministic, and a score depends only on its row and query: equal rows get equal scores. The order everywhere is
 * descending score, then ascending row. On x86-64 each function exists twice, for any processor and for AVX2 with FMA
 * and F16C; each call chooses.
 */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define EXPORT __declspec(dllexport)
#define INLINE static __forceinline
#define PREFETCH(address) ((void)0)
#endif

enum { LINE = 64, AHEAD = 4, SORT_FROM = 256, CHUNK = 512, BOUND_FROM = 32, FLOAT32 = 0, FLOAT16 = 1, INT8 = 2 };

typedef struct {
    float score;
    int32_t row;
} Found;

INLINE int better(Found a, Found b) { return a.score > b.score || (a.score == b.score && a.row < b.row); }

static int compare(const void *a, const void *b) {
    return better(*(const Found *)a, *(const Found *)b) ? -1 : better(*(const Found *)b, *(const Found *)a);
}

/* Insert `one` into the sorted list of at most `most`. Returns its place, or -1 if the list is full of better ones. */
INLINE int insert(Found *list, uint8_t *marks, int *size, int most, Found one) {
    if (*size == most && (most == 0 || !better(one, list[most - 1]))) return -1;
    int low = 0, high = *size;
    while (low < high) {
        int middle = (low + high) >> 1;
        if (better(list[middle], one)) low = middle + 1;
        else high = middle;
    }
    int moved = (*size < most ? *size : most - 1) - low;
    if (moved > 0) {
        memmove(list + low + 1, list + low, sizeof(Found) * moved);
        if (marks) memmove(marks + low + 1, marks + low, moved);
    }
    list[low] = one;
    if (marks) marks[low] = 0;
    if (*size < most) ++*size;
    return low;
}

INLINE int is_allowed(const uint8_t *allowed, int64_t row) { return !allowed || (allowed[row >> 3] >> (row & 7) & 1); }

INLINE void prefetch(const void *address, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += LINE) PREFETCH((const char *)address + at);
}

INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    union { uint32_t bits; float value; } one;
    one.bits = rest << 13;
    one.value *= 0x1p112f; /* moves the exponent, which is right for subnormal halves too; stored numbers are finite */
    one.bits |= sign;
    return one.value;
}

static int32_t portable; /* tests set it to run the code for any processor */

#define NAME(function) function##_any
INLINE int32_t dot_int8_any(const int8_t *a, const int8_t *b, int32_t width) {
    int32_t sum = 0;
    for (int32_t i = 0; i < width; i++) sum += (int32_t)a[i] * b[i];
    return sum;
}
INLINE float dot_float_any(const float *query, const float *row, int32_t width) {
    float sums[8] = {0}, sum = 0;
    int32_t i = 0;
    for (; i + 8 <= width; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += query[i + j] * row[i + j];
    for (; i < width; i++) sum += query[i] * row[i];
    for (int j = 0; j < 8; j++) sum += sums[j];
    return sum;
}
INLINE float dot_half_any(const float *query, const uint16_t *row, int32_t width) {
    float sums[8] = {0}, sum = 0;
    int32_t i = 0;
    for (; i + 8 <= width; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += query[i + j] * half_to_float(row[i + j]);
    for (; i < width; i++) sum += query[i] * half_to_float(row[i]);
    for (int j = 0; j < 8; j++) sum += sums[j];
    return sum;
}
INLINE float dot_code_any(const float *query, const int8_t *row, int32_t width) {
    float sums[8] = {0}, sum = 0;
    int32_t i = 0;
    for (; i + 8 <= width; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += query[i + j] * (float)row[i + j];
    for (; i < width; i++) sum += query[i] * (float)row[i];
    for (int j = 0; j < 8; j++) sum += sums[j];
    return sum;
}
#define TARGET
#include "_native_kernels.h"
#undef TARGET
#undef NAME

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_AVX2_BUILD 1
#define NAME(function) function##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
TARGET INLINE float sum_of_8(__m256 all) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
TARGET INLINE int32_t dot_int8_avx2(const int8_t *a, const int8_t *b, int32_t width) {
    __m256i sums = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi16(1);
    int32_t i = 0;
    for (; i + 32 <= width; i += 32) { /* |a| * (b with a's sign): codes are never -128, so pairs fit 16 bits */
        __m256i x = _mm256_loadu_si256((const __m256i *)(a + i)), y = _mm256_loadu_si256((const __m256i *)(b + i));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, ones));
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
    for (; i < width; i++) sum += (int32_t)a[i] * b[i];
    return sum;
}
TARGET INLINE float dot_float_avx2(const float *query, const float *row, int32_t width) {
    __m256 one = _mm256_setzero_ps(), two = _mm256_setzero_ps();
    int32_t i = 0;
    for (; i + 16 <= width; i += 16) {
        one = _mm256_fmadd_ps(_mm256_loadu_ps(query + i), _mm256_loadu_ps(row + i), one);
        two = _mm256_fmadd_ps(_mm256_loadu_ps(query + i + 8), _mm256_loadu_ps(row + i + 8), two);
    }
    float sum = sum_of_8(_mm256_add_ps(one, two));
    for (; i < width; i++) sum += query[i] * row[i];
    return sum;
}
TARGET INLINE float dot_half_avx2(const float *query, const uint16_t *row, int32_t width) {
    __m256 one = _mm256_setzero_ps(), two = _mm256_setzero_ps();
    int32_t i = 0;
    for (; i + 16 <= width; i += 16) {
        const __m128i *at = (const __m128i *)(row + i);
        one = _mm256_fmadd_ps(_mm256_loadu_ps(query + i), _mm256_cvtph_ps(_mm_loadu_si128(at)), one);
        two = _mm256_fmadd_ps(_mm256_loadu_ps(query + i + 8), _mm256_cvtph_ps(_mm_loadu_si128(at + 1)), two);
    }
    float sum = sum_of_8(_mm256_add_ps(one, two));
    for (; i < width; i++) sum += query[i] * _cvtsh_ss(row[i]);
    return sum;
}
TARGET INLINE float dot_code_avx2(const float *query, const int8_t *row, int32_t width) {
    __m256 one = _mm256_setzero_ps(), two = _mm256_setzero_ps();
    int32_t i = 0;
    for (; i + 16 <= width; i += 16) {
        const __m128i codes = _mm_loadu_si128((const __m128i *)(row + i));
        const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
        const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)));
        one = _mm256_fmadd_ps(_mm256_loadu_ps(query + i), low, one);
        two = _mm256_fmadd_ps(_mm256_loadu_ps(query + i + 8), high, two);
    }
    float sum = sum_of_8(_mm256_add_ps(one, two));
    for (; i < width; i++) sum += query[i] * (float)row[i];
    return sum;
}
#include "_native_kernels.h"
#undef TARGET
#undef NAME
static int has_avx2(void) {
    return !portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#define CALL(function, ...) (has_avx2() ? function##_avx2(__VA_ARGS__) : function##_any(__VA_ARGS__))
#else
#define CALL(function, ...) function##_any(__VA_ARGS__)
#endif

EXPORT int32_t lookalike_portable(int32_t on) {
    portable = on;
    return 0;
}

EXPORT int64_t lookalike_graph_search(const Graph *graph, const int8_t *queries, int32_t num_queries, int32_t ef,
                                      int32_t keep, const uint8_t *allowed, const Marks *marks,
                                      int64_t *rows, float *scores) {
    return CALL(graph_search, graph, queries, num_queries, ef, keep, allowed, marks, rows, scores);
}

EXPORT int32_t lookalike_rerank(const Store *store, const float *queries, int32_t num_queries, const int64_t *rows,
                                const float *scores, int32_t num_candidates, int32_t first_block, const Step *steps,
                                int32_t num_steps, int32_t k, int64_t *found_rows, float *found_scores) {
    return CALL(rerank, store, queries, num_queries, rows, scores, num_candidates, first_block, steps, num_steps, k,
                found_rows, found_scores);
}

EXPORT int64_t lookalike_search(const Graph *graph, const Store *store, const float *queries, int32_t num_queries,
                                int32_t ef, int32_t keep, const uint8_t *allowed, const Marks *marks, const Step *steps,
                                int32_t num_steps, int32_t k, int64_t *found_rows, float *found_scores) {
    return CALL(search, graph, store, queries, num_queries, ef, keep, allowed, marks, steps, num_steps, k, found_rows,
                found_scores);
}

EXPORT int64_t lookalike_scan(const Store *store, const float *queries, int32_t num_queries, int32_t num_blocks,
                              const uint8_t *allowed, int32_t k, int64_t *found_rows, float *found_scores) {
    return CALL(scan, store, queries, num_queries, num_blocks, allowed, k, found_rows, found_scores);
}

/* Mark in `reached` the rows that `links` lead to from `start`; `stack` has room for all rows. Returns the newly marked. */
EXPORT int64_t lookalike_reach(const int32_t *links, int32_t degree, int64_t start, uint8_t *reached, int32_t *stack) {
    int64_t size = 0, count = 0;
    if (reached[start]) return 0;
    reached[start] = 1;
    stack[size++] = (int32_t)start;
    while (size) {
        const int32_t *list = links + (int64_t)stack[--size] * degree;
        count++;
        for (int32_t i = 0; i < degree && list[i] >= 0; i++)
            if (!reached[list[i]]) {
                reached[list[i]] = 1;
                stack[size++] = list[i];
            }
    }
    return count;
}

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Inner loops of retrieval; see native.py.", -1,
                                        NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
