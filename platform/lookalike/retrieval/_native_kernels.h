/* The functions of _native.c; included once for each kind of processor, with NAME and TARGET set. */
#ifndef LOOKALIKE_STRUCTURES
#define LOOKALIKE_STRUCTURES
/* A graph over int8 codes: cosine of code and query = their integer product * scale, up to the query's own scale. */
typedef struct {
    const int8_t *codes;    /* [num_rows, dim], none of them -128 */
    const float *scales;    /* [num_rows] */
    const int32_t *links;   /* [num_rows, degree], padded with -1 */
    const int32_t *entries; /* [num_entries] rows at which every search begins */
    int64_t num_rows;
    int32_t dim, degree, num_entries;
} Graph;

/* A prefix store: dimension blocks, and the norm of each row's prefix at the end of each block. Several blocks may lie
 * side by side in one array, whose rows are then wider than a block's. */
typedef struct {
    const void *const *blocks;  /* [num_blocks] of [num_rows, width], float32, float16 or int8 */
    const int32_t *widths;      /* [num_blocks] */
    const int64_t *strides;     /* [num_blocks] bytes from one row to the next */
    const float *const *scales; /* [num_blocks] of [num_rows], factors of int8 codes */
    const float *norms;         /* [num_blocks, num_rows] */
    int64_t num_rows;
    int32_t num_blocks, dtype, dim; /* dim: of a query */
} Store;

/* Neighbouring blocks read as one. */
typedef struct {
    const char *at;
    const float *scales;
    int64_t stride;
    int32_t width, bytes, next; /* bytes: of a row; next: the block after */
} Run;

/* One step of a re-rank: read up to block `stop` - 1, keep the best. */
typedef struct {
    int32_t stop, keep;
    float margin;
} Step;

/* Memory of one thread for searches of a graph. */
typedef struct {
    uint8_t *seen;    /* [num_rows / 8 + 1], zero between searches */
    int32_t *touched; /* [num_rows] */
} Marks;
#endif

/* Best-first search (Malkov and Yashunin 2018, algorithm 2) on one layer, from all entries at once. Rows outside
 * `allowed` are walked over but not returned. Returns the number of scores computed, or -1 without memory. */
TARGET static int64_t NAME(graph_search)(const Graph *graph, const int8_t *queries, int32_t num_queries, int32_t ef,
                                         int32_t keep, const uint8_t *allowed, const Marks *marks, int64_t *rows,
                                         float *scores) {
    const int32_t dim = graph->dim, degree = graph->degree;
    const int8_t *codes = graph->codes;
    int64_t computed = 0;
    Found *beam = malloc(sizeof(Found) * ((int64_t)ef + keep + 2));
    uint8_t *expanded = malloc((int64_t)ef + 1);
    int32_t *fresh = malloc(sizeof(int32_t) * (degree + 1));
    if (!beam || !expanded || !fresh) {
        free(beam), free(expanded), free(fresh);
        return -1;
    }
    Found *answer = allowed ? beam + ef + 1 : beam;
    for (int32_t q = 0; q < num_queries; q++) {
        const int8_t *query = queries + (int64_t)q * dim;
        int size = 0, answers = 0, next = 0;
        int64_t touched = 0;
        for (int32_t i = 0; i < graph->num_entries; i++) {
            if (i + 2 * AHEAD < graph->num_entries)
                prefetch(codes + (int64_t)graph->entries[i + 2 * AHEAD] * dim, dim);
            int32_t row = graph->entries[i];
            marks->seen[row >> 3] |= (uint8_t)(1 << (row & 7));
            marks->touched[touched++] = row;
            Found one = {NAME(dot_int8)(query, codes + (int64_t)row * dim, dim) * graph->scales[row], row};
            insert(beam, expanded, &size, ef, one);
            if (allowed && is_allowed(allowed, row)) insert(answer, NULL, &answers, keep, one);
        }
        computed += graph->num_entries;
        while (next < size) {
            const int32_t *list = graph->links + (int64_t)beam[next].row * degree;
            int32_t count = 0;
            int nearest = ef;
            expanded[next] = 1;
            for (int32_t i = 0; i < degree && list[i] >= 0; i++) {
                int32_t row = list[i];
                const uint8_t bit = (uint8_t)(1 << (row & 7));
                if (marks->seen[row >> 3] & bit) continue;
                marks->seen[row >> 3] |= bit;
                marks->touched[touched++] = row;
                prefetch(codes + (int64_t)row * dim, dim);
                PREFETCH(graph->scales + row);
                fresh[count++] = row;
            }
            for (int32_t i = 0; i < count; i++) {
                int32_t row = fresh[i];
                Found one = {NAME(dot_int8)(query, codes + (int64_t)row * dim, dim) * graph->scales[row], row};
                int place = insert(beam, expanded, &size, ef, one);
                if (place >= 0 && place < nearest) nearest = place;
                if (allowed && is_allowed(allowed, row)) insert(answer, NULL, &answers, keep, one);
            }
            computed += count;
            next = nearest <= next ? nearest : next + 1;
            while (next < size && expanded[next]) next++;
            if (next < size) prefetch(graph->links + (int64_t)beam[next].row * degree, degree * sizeof(int32_t));
        }
        for (int64_t i = 0; i < touched; i++) marks->seen[marks->touched[i] >> 3] = 0;
        int found = allowed ? answers : size;
        for (int32_t i = 0; i < keep; i++) {
            rows[(int64_t)q * keep + i] = i < found ? answer[i].row : -1;
            scores[(int64_t)q * keep + i] = i < found ? answer[i].score : -INFINITY;
        }
    }
    free(beam), free(expanded), free(fresh);
    return computed;
}

/* The blocks from `block` to `stop` at most that lie side by side. */
INLINE Run NAME(run_from)(const Store *store, int32_t block, int32_t stop) {
    const int32_t size = store->dtype == FLOAT32 ? 4 : store->dtype == FLOAT16 ? 2 : 1;
    Run run = {store->blocks[block], store->scales[block], store->strides[block], store->widths[block], 0, block + 1};
    while (run.next < stop && store->strides[run.next] == run.stride &&
           store->blocks[run.next] == run.at + (int64_t)run.width * size)
        run.width += store->widths[run.next++];
    run.bytes = run.width * size;
    return run;
}

TARGET INLINE float NAME(dot_run)(const Store *store, const Run *run, const float *query, int64_t row) {
    const char *at = run->at + row * run->stride;
    if (store->dtype == FLOAT16) return NAME(dot_half)(query, (const uint16_t *)at, run->width);
    if (store->dtype == INT8) return NAME(dot_code)(query, (const int8_t *)at, run->width) * run->scales[row];
    return NAME(dot_float)(query, (const float *)at, run->width);
}

INLINE void NAME(prefetch_run)(const Run *run, int64_t row) {
    prefetch(run->at + row * run->stride, run->bytes < 8 * LINE ? run->bytes : 8 * LINE);
    if (run->scales) PREFETCH(run->scales + row);
}

/* The norm of a query's prefix at the end of each block. */
TARGET INLINE void NAME(prefix_norms)(const Store *store, const float *query, int32_t num_blocks, float *norms) {
    double square = 0;
    const float *at = query;
    for (int32_t b = 0; b < num_blocks; at += store->widths[b++]) {
        for (int32_t i = 0; i < store->widths[b]; i++) square += (double)at[i] * at[i];
        norms[b] = (float)sqrt(square);
    }
}

INLINE float NAME(cosine)(float dot, float one, float other) {
    float length = one * other;
    return length > 0 ? dot / length : 0; /* a prefix of length zero has no direction */
}

/* Each step adds the blocks up to its `stop` to the dot products of the survivors and keeps the best `keep` by cosine
 * there, without those more than `margin` below the k-th. `scores` are cosines at the end of block `first_block` - 1,
 * ignored if `first_block` is 0. Returns 0, or -1 without memory. */
TARGET static int32_t NAME(rerank)(const Store *store, const float *queries, int32_t num_queries, const int64_t *rows,
                                   const float *scores, int32_t num_candidates, int32_t first_block, const Step *steps,
                                   int32_t num_steps, int32_t k, int64_t *found_rows, float *found_scores) {
    const int64_t n = store->num_rows;
    const int32_t last = steps[num_steps - 1].stop;
    const int scored = first_block && steps[0].stop == first_block; /* the first step reads nothing: cosines are known */
    Found *survivors = malloc(sizeof(Found) * ((int64_t)num_candidates + 1));
    Found *best = malloc(sizeof(Found) * ((int64_t)num_candidates + 1));
    float *lengths = malloc(sizeof(float) * last);
    if (!survivors || !best || !lengths) {
        free(survivors), free(best), free(lengths);
        return -1;
    }
    for (int32_t q = 0; q < num_queries; q++) {
        const float *query = queries + (int64_t)q * store->dim, *at = query;
        const int64_t *line = rows + (int64_t)q * num_candidates;
        int32_t size = 0, block = 0;
        NAME(prefix_norms)(store, query, last, lengths);
        for (; block < first_block; block++) at += store->widths[block];
        for (int32_t i = 0; i < num_candidates; i++) {
            if (line[i] < 0) continue;
            float dot = 0; /* survivors carry dot products between steps */
            if (scored) dot = scores[(int64_t)q * num_candidates + i];
            else if (first_block)
                dot = scores[(int64_t)q * num_candidates + i] * lengths[first_block - 1] *
                      store->norms[(first_block - 1) * n + line[i]];
            survivors[size++] = (Found){dot, (int32_t)line[i]};
        }
        for (const Step *step = steps; step < steps + num_steps; step++) {
            const float *norms = store->norms + (int64_t)(step->stop - 1) * n;
            const float length = lengths[step->stop - 1];
            while (block < step->stop) {
                const Run run = NAME(run_from)(store, block, step->stop);
                for (int32_t i = 0; i < size; i++) {
                    if (i + AHEAD < size) {
                        NAME(prefetch_run)(&run, survivors[i + AHEAD].row);
                        PREFETCH(norms + survivors[i + AHEAD].row);
                    }
                    survivors[i].score += NAME(dot_run)(store, &run, at, survivors[i].row);
                }
                at += run.width;
                block = run.next;
            }
            const int most = step->keep < size ? step->keep : size;
            const int in_order = most < size || step->margin < INFINITY || step + 1 == steps + num_steps;
            int kept = 0;
            for (int32_t i = 0; i < size; i++) {
                Found one = survivors[i];
                if (!scored || step > steps) one.score = NAME(cosine)(one.score, length, norms[one.row]);
                if (!in_order || most > SORT_FROM) best[kept++] = one;
                else insert(best, NULL, &kept, most, one);
            }
            if (in_order && most > SORT_FROM) qsort(best, kept, sizeof(Found), compare);
            size = most;
            while (size > k && best[size - 1].score < best[k - 1].score - step->margin) size--;
            for (int32_t i = 0; i < size; i++)
                survivors[i] = (Found){best[i].score * length * norms[best[i].row], best[i].row};
        }
        for (int32_t i = 0; i < k; i++) {
            found_rows[(int64_t)q * k + i] = i < size ? best[i].row : -1;
            found_scores[(int64_t)q * k + i] = i < size ? best[i].score : -INFINITY;
        }
    }
    free(survivors), free(best), free(lengths);
    return 0;
}

/* int8 codes of a query's prefix, up to a scale that does not change the order. */
TARGET INLINE void NAME(quantise)(const float *query, int32_t dim, int8_t *codes) {
    float largest = 0;
    for (int32_t i = 0; i < dim; i++) largest = fmaxf(largest, fabsf(query[i]));
    const float inverse = largest > 0 ? 127 / largest : 0;
    for (int32_t i = 0; i < dim; i++) codes[i] = (int8_t)rintf(query[i] * inverse);
}

/* Graph search over the queries' prefixes, then the steps over the `keep` rows found. Returns the number of scores that
 * the graph computed, or -1 without memory. */
TARGET static int64_t NAME(search)(const Graph *graph, const Store *store, const float *queries, int32_t num_queries,
                                   int32_t ef, int32_t keep, const uint8_t *allowed, const Marks *marks,
                                   const Step *steps, int32_t num_steps, int32_t k, int64_t *found_rows,
                                   float *found_scores) {
    int64_t computed = 0;
    int8_t *codes = malloc(graph->dim);
    int64_t *rows = malloc(sizeof(int64_t) * keep);
    float *scores = malloc(sizeof(float) * keep);
    for (int32_t q = 0; q < num_queries && computed >= 0; q++) {
        const float *query = queries + (int64_t)q * store->dim;
        int64_t more = -1;
        if (codes && rows && scores) {
            NAME(quantise)(query, graph->dim, codes);
            more = NAME(graph_search)(graph, codes, 1, ef, keep, allowed, marks, rows, scores);
        }
        if (more < 0 || NAME(rerank)(store, query, 1, rows, scores, keep, 0, steps, num_steps, k,
                                     found_rows + (int64_t)q * k, found_scores + (int64_t)q * k) < 0)
            computed = -1;
        else computed += more;
    }
    free(codes), free(rows), free(scores);
    return computed;
}

/* The exact k best at the end of block `num_blocks` - 1 among all (allowed) rows, read chunk by chunk and block by
 * block. A row is dropped as soon as its dot product so far plus the product of the remaining lengths (Cauchy-Schwarz)
 * cannot reach the k-th best, as in Faiss's Panorama, with the norms that are stored anyway. Returns how many numbers
 * were read, or -1 without memory. */
TARGET static int64_t NAME(scan)(const Store *store, const float *queries, int32_t num_queries, int32_t num_blocks,
                                 const uint8_t *allowed, int32_t k, int64_t *found_rows, float *found_scores) {
    const int64_t n = store->num_rows;
    const float *whole = store->norms + (int64_t)(num_blocks - 1) * n;
    const float slack = 4e-6f;   /* largest rounding error of a cosine */
    const float rounding = 4e-7f; /* of the difference of two squared norms, relative to the larger */
    int64_t numbers = 0;
    Found *best = malloc(sizeof(Found) * ((int64_t)k + 1));
    float *lengths = malloc(sizeof(float) * num_blocks);
    if (!best || !lengths) {
        free(best), free(lengths);
        return -1;
    }
    for (int32_t q = 0; q < num_queries; q++) {
        const float *query = queries + (int64_t)q * store->dim;
        int kept = 0;
        NAME(prefix_norms)(store, query, num_blocks, lengths);
        const float length = lengths[num_blocks - 1];
        for (int64_t start = 0; start < n; start += CHUNK) {
            Found alive[CHUNK];
            int32_t size = 0;
            for (int64_t row = start; row < start + CHUNK && row < n; row++)
                if (is_allowed(allowed, row)) alive[size++] = (Found){0, (int32_t)row};
            const float *at = query;
            int32_t read = 0;
            for (int32_t block = 0; block < num_blocks && size;) {
                const Run run = NAME(run_from)(store, block, num_blocks);
                numbers += (int64_t)size * run.width;
                for (int32_t i = 0; i < size; i++) {
                    /* the processor prefetches all rows of a block by itself, as they lie in order; survivors do not */
                    if (size < CHUNK && i + AHEAD < size) NAME(prefetch_run)(&run, alive[i + AHEAD].row);
                    alive[i].score += NAME(dot_run)(store, &run, at, alive[i].row);
                }
                at += run.width;
                read += run.width;
                block = run.next;
                if (read < BOUND_FROM || block == num_blocks) continue;
                const float *norms = store->norms + (int64_t)(block - 1) * n;
                const float own = lengths[block - 1];
                const float rest = sqrtf(fmaxf(0, length * length * (1 + rounding) - own * own));
                const float kth = kept == k ? best[k - 1].score - slack : -INFINITY;
                int32_t left = 0;
                for (int32_t i = 0; i < size; i++) {
                    const int64_t row = alive[i].row;
                    float other = sqrtf(fmaxf(0, whole[row] * whole[row] * (1 + rounding) - norms[row] * norms[row]));
                    alive[left] = alive[i];
                    left += !(alive[i].score + rest * other < kth * length * whole[row]);
                }
                size = left;
            }
            for (int32_t i = 0; i < size; i++) {
                Found one = {NAME(cosine)(alive[i].score, length, whole[alive[i].row]), alive[i].row};
                insert(best, NULL, &kept, k, one);
            }
        }
        for (int32_t i = 0; i < k; i++) {
            found_rows[(int64_t)q * k + i] = i < kept ? best[i].row : -1;
            found_scores[(int64_t)q * k + i] = i < kept ? best[i].score : -INFINITY;
        }
    }
    free(best), free(lengths);
    return numbers;
}
