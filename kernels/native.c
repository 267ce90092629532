// Kernels for the few rows of a decode step on a CPU. `native.py` compiles and binds this file; `ops.py`, `linear.py`
// and `attention/torch_backend.py` specify each function and are used where this file is not.
//
// For processors with AVX512: narrower ones have too few registers for 16 sums at once, and torch is faster there.
// Arithmetic is in float32. `bf16` says that a tensor's elements are bfloat16, else they are float32. Sizes of rows are
// multiples of 16.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float vf_memory __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh_memory __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t vb_memory __attribute__((vector_size(16), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

// -- threads: torch's own team (libgomp), so that no second one competes for the cores --------------------------------

typedef void (*Unit)(const void *job, long index);
typedef struct { Unit unit; const void *job; long next, count; } Work;
static void (*start_team)(void (*)(void *), void *, unsigned, unsigned);

void set_team(void *gomp_parallel) { *(void **)&start_team = gomp_parallel; }

static void take_units(void *data) {
    Work *work = data;
    for (long i; (i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count;) work->unit(work->job, i);
}

static void run(Unit unit, const void *job, long count, long threads) {
    Work work = {unit, job, 0, count};
    if (threads > 1 && count > 1 && start_team) start_team(take_units, &work, (unsigned)threads, 0);
    else take_units(&work);
}

// -- vectors ----------------------------------------------------------------------------------------------------------

INLINE vf load(const void *p, long i, int bf16) {
    if (!bf16) return *(const vf_memory *)((const float *)p + i);
    // GCC 12 makes five instructions of __builtin_convertvector.
    return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const uint16_t *)p + i))) << 16);
}

INLINE void store(void *p, long i, vf x, int bf16) {
    if (!bf16) { *(vf_memory *)((float *)p + i) = x; return; }
    vu bits = (vu)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    vu nan = (vu)(x != x);
    rounded = (rounded & ~nan) | ((bits | 0x400000) & nan);
    *(vh_memory *)((uint16_t *)p + i) = __builtin_convertvector(rounded >> 16, vh_memory);
}

INLINE vf all(float x) { return (vf){} + x; }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// Sixteen sums of 16 lanes each: lane i of the result is the sum of acc[i].
#define SUM16(NAME, V)                                                                                                 \
    INLINE V NAME(V *a) {                                                                                              \
        UNROLL for (int i = 0; i < 8; i++)                                                                             \
            a[i] = SHUFFLE(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                   \
                   SHUFFLE(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);              \
        UNROLL for (int i = 0; i < 4; i++)                                                                             \
            a[i] = SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +                 \
                   SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);                \
        UNROLL for (int i = 0; i < 2; i++)                                                                             \
            a[i] = SHUFFLE(a[i], a[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +                 \
                   SHUFFLE(a[i], a[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);                \
        return SHUFFLE(a[0], a[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +                        \
               SHUFFLE(a[0], a[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);                         \
    }
SUM16(sum16, vf)
SUM16(sum16_int, vi)

INLINE float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float largest(vf x) { return _mm512_reduce_max_ps((__m512)x); }  // passes over some NaN

INLINE vf exponential(vf x) {  // Cephes' expf; NaN stays NaN
    x = choose(x > 88.0f, all(88.0f), choose(x < -87.0f, all(-87.0f), x));
    vf n = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
    vi exponent = (vi)n - 0x4b400000;
    n -= 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    return (y * r * r + r + 1.0f) * (vf)((exponent + 127) << 23);
}

// -- norms, activations and their quantization to unsigned bytes ------------------------------------------------------

// `quantize.quantize`: a row of `size` floats to bytes and its scale.
static void quantize_row(const float *x, long size, uint8_t *values, float *scale) {
    vi most = {};  // magnitudes in the order of their bits, in which NaN is the largest: the scale must not hide it
    for (long i = 0; i < size; i += 16) {
        vi a = (vi)load(x, i, 0) & 0x7fffffff, larger = a > most;
        most = (larger & a) | (~larger & most);
    }
    union { int32_t bits; float value; } found = {_mm512_reduce_max_epi32((__m512i)most)};
    float magnitude = found.value < 1e-12f ? 1e-12f : found.value;
    for (long i = 0; i < size; i += 16) {
        vi rounded = __builtin_convertvector(load(x, i, 0) * (127.0f / magnitude) + 128.5f, vi);
        *(vb_memory *)(values + i) = __builtin_convertvector(rounded, vb_memory);
    }
    *scale = magnitude / 127.0f;
}

// `ops.add_rms_norm` of rows; `delta` may be null. Where `values` is not, the result is quantized and `out` is one row.
void add_rms_norm(const void *delta, void *residual, const float *weight, float eps, long rows, long size, long bf16,
                  void *out, uint8_t *values, float *scales) {
    for (long r = 0; r < rows; r++) {
        vf square = {};
        long at = r * size, to = values ? 0 : at;
        for (long i = at; i < at + size; i += 16) {
            if (delta) store(residual, i, load(residual, i, bf16) + load(delta, i, bf16), bf16);
            square += load(residual, i, bf16) * load(residual, i, bf16);
        }
        vf scale = all(1.0f / sqrtf(sum(square) / size + eps));
        for (long i = 0; i < size; i += 16)
            store(out, to + i, load(residual, at + i, bf16) * scale * load(weight, i, 0), bf16 && !values);
        if (values) quantize_row(out, size, values + at, scales + r);
    }
}

// `ops.gate_mul` with silu: rows of 2 * size to rows of size. `values`: as above.
void silu_mul(const void *gate_up, long rows, long size, long bf16, void *out, uint8_t *values, float *scales) {
    for (long r = 0; r < rows; r++) {
        long gate = 2 * r * size, at = r * size, to = values ? 0 : at;
        for (long i = 0; i < size; i += 16) {
            vf x = load(gate_up, gate + i, bf16);
            x = x / (1.0f + exponential(-x)) * load(gate_up, gate + size + i, bf16);
            store(out, to + i, x, bf16 && !values);
        }
        if (values) quantize_row(out, size, values + at, scales + r);
    }
}

// RMSNorm of one head, in place.
INLINE void norm_head(void *x, long at, long dim, const float *weight, float eps, long bf16) {
    vf square = {};
    for (long i = at; i < at + dim; i += 16) square += load(x, i, bf16) * load(x, i, bf16);
    vf scale = all(1.0f / sqrtf(sum(square) / dim + eps));
    for (long i = 0; i < dim; i += 16)
        store(x, at + i, load(x, at + i, bf16) * scale * load(weight, i, 0), bf16);
}

// `ops.rope_write` in place: queries and keys of `qkv` are normed and rotated; keys and values go to their slots.
void rope_write(void *qkv, long rows, long heads, long kv_heads, long dim, long half, const float *cos,
                const float *sin, long angles_stride, const float *norm, float eps, long norm_rotated,
                const int64_t *slots, void *keys, void *values, long bf16) {
    for (long r = 0; r < rows; r++, cos += angles_stride, sin += angles_stride) {
        for (long h = 0; h < heads + 2 * kv_heads; h++) {
            long at = (r * (heads + 2 * kv_heads) + h) * dim;
            if (h < heads + kv_heads) {
                if (norm && !norm_rotated) norm_head(qkv, at, dim, norm + h * dim, eps, bf16);
                for (long i = 0; i < half; i += 16) {
                    vf a = load(qkv, at + i, bf16), b = load(qkv, at + half + i, bf16);
                    vf c = load(cos, i, 0), s = load(sin, i, 0);
                    store(qkv, at + i, a * c - b * s, bf16);
                    store(qkv, at + half + i, b * c + a * s, bf16);
                }
                if (norm && norm_rotated) norm_head(qkv, at, dim, norm + h * dim, eps, bf16);
            }
            if (h < heads) continue;
            long to = (slots[r] * kv_heads + (h - heads) % kv_heads) * dim;
            for (long i = 0; i < dim; i += 16)
                store(h < heads + kv_heads ? keys : values, to + i, load(qkv, at + i, bf16), bf16);
        }
    }
}

// -- products ---------------------------------------------------------------------------------------------------------

// 16 dot products: row r with vector c at r * (16 / rows) + c. `bf16`: the vectors'.
INLINE vf dots(const float *const *x, const void *const *w, const int rows, long size, const int bf16) {
    const int vectors = 16 / rows;
    vf acc[16] = {};
    for (long i = 0; i < size; i += 16) {
        UNROLL for (int c = 0; c < vectors; c++) {
            vf b = load(w[c], i, bf16);
            UNROLL for (int r = 0; r < rows; r++) acc[r * vectors + c] += load(x[r], i, 0) * b;
        }
    }
    return sum16(acc);
}

typedef struct {
    const void *x, *weight;
    const float *bias, *x_scales, *scales;  // scales: of int8, for each row and each output
    const int32_t *sums;                    // of int8: of each output's weights
    float *out;
    long rows, outputs, inputs;
} Product;
enum { CHANNELS = 64 };  // outputs of a unit

INLINE vi int8_dots(const void *const *x, const void *const *w, const int rows, long size) {
    const int channels = 16 / rows;
    vi acc[16] = {};
    for (long i = 0; i < size; i += 64) {
        UNROLL for (int c = 0; c < channels; c++) {
            UNROLL for (int r = 0; r < rows; r++) {
                vi *to = acc + r * channels + c;
#ifdef __AVX512VNNI__
                __m512i a = _mm512_loadu_si512((const char *)x[r] + i), b = _mm512_loadu_si512((const char *)w[c] + i);
                *to = (vi)_mm512_dpbusd_epi32((__m512i)*to, a, b);
#else  // --quantization int8 is refused here
                for (int j = 0; j < 64; j++)
                    (*to)[j & 15] += ((const uint8_t *)x[r])[i + j] * ((const int8_t *)w[c])[i + j];
#endif
            }
        }
    }
    return sum16_int(acc);
}

INLINE void product(const Product *p, long row, const int rows, long n, long last, const int element) {
    const int channels = 16 / rows, size = element == 1 ? 1 : 4;
    const void *x[8], *w[16];
    float found[16];
    for (int r = 0; r < rows; r++)
        x[r] = (const char *)p->x + (row + r < p->rows ? row + r : row) * p->inputs * size;
    for (; n < last; n += channels) {
        for (int c = 0; c < channels; c++)
            w[c] = (const char *)p->weight + (n + c < last ? n + c : n) * p->inputs * element;
        if (element == 1) {
            vi sums = int8_dots(x, w, rows, p->inputs);
            for (int i = 0; i < 16; i++) {
                long r = row + i / channels, c = n + i % channels;
                if (r >= p->rows || c >= last) continue;
                found[i] = (float)(sums[i] - 128 * p->sums[c]) * p->scales[c] * p->x_scales[r];
            }
        } else store(found, 0, dots((const float *const *)x, w, rows, p->inputs, 1), 0);
        for (int r = 0; r < rows && row + r < p->rows; r++) {
            float *out = p->out + (row + r) * p->outputs + n;
            for (int c = 0; c < channels && n + c < last; c++)
                out[c] = found[r * channels + c] + (p->bias ? p->bias[n + c] : 0.0f);
        }
    }
}

INLINE void product_block(const Product *p, long block, const int element) {
    long first = block * CHANNELS, last = first + CHANNELS < p->outputs ? first + CHANNELS : p->outputs;
    for (long n = first; n < last; n += 16) {
        long stop = n + 16 < last ? n + 16 : last;
        for (long row = 0, left; (left = p->rows - row) > 0; row += 8) {
            if (left == 1) product(p, row, 1, n, stop, element);
            else if (left == 2) product(p, row, 2, n, stop, element);
            else if (left <= 4) product(p, row, 4, n, stop, element);
            else product(p, row, 8, n, stop, element);
        }
    }
}

static void bf16_unit(const void *job, long block) { product_block(job, block, 2); }
static void int8_unit(const void *job, long block) { product_block(job, block, 1); }

// `x @ weight.T + bias` in float32, of a weight in bfloat16; or with `sums`, of one in int8 and of unsigned rows with a
// zero point of 128 (`quantize.quantize`).
void linear(const void *x, const void *weight, const float *bias, float *out, long rows, long outputs, long inputs,
            const float *x_scales, const float *scales, const int32_t *sums, long threads) {
    Product p = {x, weight, bias, x_scales, scales, sums, out, rows, outputs, inputs};
    run(sums ? int8_unit : bf16_unit, &p, (outputs + CHANNELS - 1) / CHANNELS, threads);
}

// -- attention of decodes over pages: online softmax (Milakov & Gimelshein, 2018) -------------------------------------

typedef struct {  // of one layer
    const void *keys, *values;  // [pages, page_size, kv_heads, dim]
    const float *sinks;         // [heads] or null
    long page_size, heads, kv_heads, dim, bf16;
    float scale, softcap;  // softcap: 0 is none
} Layer;

typedef struct {  // of one step: each item is a run of keys that `count` queries read
    const int32_t *table;    // page table
    const int32_t *queries;  // of all items, concatenated: each query of an item
    const int32_t *first, *count, *row, *start, *stop;  // of each item: its queries, its row of `table`, its keys
    long columns, shared, own;  // the first `shared` items have several queries; then each query has one of its own
} Plan;

typedef struct {
    const Layer *layer;
    const Plan *plan;
    void *out;
    float *state;  // [queries, heads, 2 * dim + 16]: scaled query, sum of values, maximum and denominator
} Attention;

// Scores of up to 16 keys for `rows` query rows, and their values summed.
INLINE void attend(const Layer *l, float *const *state, const int rows, const void *const *k, const void *const *v,
                   long keys, const int bf16) {
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vi seen = lanes < (int32_t)keys;
    const int vectors = 16 / rows;
    float weights[4][16];
    for (int at = 0; at < 16; at += vectors) {
        float found[16] = {};
        if (at < keys) store(found, 0, dots((const float *const *)state, k + at, rows, l->dim, bf16), 0);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int c = 0; c < vectors; c++) weights[r][at + c] = found[r * vectors + c];
    }
    for (int r = 0; r < rows; r++) {
        float *sums = state[r] + l->dim, *running = sums + l->dim;
        vf score = load(weights[r], 0, 0);
        if (l->softcap > 0) score = l->softcap - 2 * l->softcap / (exponential(score * (2 / l->softcap)) + 1.0f);
        float most = largest(choose(seen, score, all(-INFINITY)));
        if (most > running[0]) {
            vf less = exponential(all(running[0] - most));
            running[0] = most;
            running[1] *= less[0];
            for (long d = 0; d < l->dim; d += 16) store(sums, d, load(sums, d, 0) * less, 0);
        }
        score = choose(seen, exponential(score - running[0]), all(0));
        running[1] += sum(score);
        store(weights[r], 0, score, 0);
    }
    for (long d = 0; d < l->dim; d += 16) {
        vf acc[4];
        for (int r = 0; r < rows; r++) acc[r] = load(state[r] + l->dim, d, 0);
        for (long j = 0; j < keys; j++) {
            vf x = load(v[j], d, bf16);
            UNROLL for (int r = 0; r < rows; r++) acc[r] += weights[r][j] * x;
        }
        for (int r = 0; r < rows; r++) store(state[r] + l->dim, d, acc[r], 0);
    }
}

INLINE void attend_item(const Attention *a, long item, long head, const int bf16) {
    const Layer *l = a->layer;
    const Plan *p = a->plan;
    long group = l->heads / l->kv_heads, rows = p->count[item] * group, width = 2 * l->dim + 16;
    long token = l->kv_heads * l->dim, bytes = bf16 ? 2 : 4;
    const int32_t *pages = p->table + p->row[item] * p->columns;
    for (long at = p->start[item], keys; at < p->stop[item]; at += keys) {
        long offset = at % l->page_size;
        keys = l->page_size - offset < 16 ? l->page_size - offset : 16;
        if (p->stop[item] - at < keys) keys = p->stop[item] - at;
        long from = (((long)pages[at / l->page_size] * l->page_size + offset) * l->kv_heads + head) * l->dim;
        const void *k[16], *v[16];
        for (long j = 0; j < 16; j++) {  // beyond the last key its own place: another may hold a NaN
            long place = (from + (j < keys ? j : keys - 1) * token) * bytes;
            k[j] = (const char *)l->keys + place;
            v[j] = (const char *)l->values + place;
        }
        for (long row = 0; row < rows; row += 4) {
            float *state[4];
            for (long r = 0; r < 4 && row + r < rows; r++) {
                long query = p->queries[p->first[item] + (row + r) / group];
                state[r] = a->state + (query * l->heads + head * group + (row + r) % group) * width;
            }
            long left = rows - row;
            if (left >= 4) attend(l, state, 4, k, v, keys, bf16);
            else {
                if (left >= 2) attend(l, state, 2, k, v, keys, bf16);
                if (left & 1) attend(l, state + left - 1, 1, k, v, keys, bf16);
            }
        }
    }
}

static void attend_run(const Attention *a, long item, long head) {
    if (a->layer->bf16) attend_item(a, item, head, 1);
    else attend_item(a, item, head, 0);
}

static void attend_shared(const void *job, long head) {  // all shared runs in one head
    const Attention *a = job;
    for (long i = 0; i < a->plan->shared; i++) attend_run(a, i, head);
}

static void attend_own(const void *job, long index) {  // the keys of one query alone in one head, and its result
    const Attention *a = job;
    const Layer *l = a->layer;
    long item = a->plan->shared + index / l->kv_heads, head = index % l->kv_heads, group = l->heads / l->kv_heads;
    attend_run(a, item, head);
    long query = a->plan->queries[a->plan->first[item]];
    for (long h = head * group; h < (head + 1) * group; h++) {
        const float *sums = a->state + (query * l->heads + h) * (2 * l->dim + 16) + l->dim, *running = sums + l->dim;
        float total = running[1];
        if (l->sinks) total += expf(l->sinks[h] - running[0]);
        for (long d = 0; d < l->dim; d += 16)
            store(a->out, (query * l->heads + h) * l->dim + d, load(sums, d, 0) / total, l->bf16);
    }
}

// Queries [T, heads, dim] with `q_stride` elements between tokens; `out` is contiguous.
void attention(const Layer *l, const Plan *p, const void *q, long q_stride, void *out, float *state, long threads) {
    Attention a = {l, p, out, state};
    for (long t = 0; t < p->own; t++) {
        for (long h = 0; h < l->heads; h++) {
            float *here = state + (t * l->heads + h) * (2 * l->dim + 16);
            for (long d = 0; d < l->dim; d += 16) {
                store(here, d, load(q, t * q_stride + h * l->dim + d, l->bf16) * l->scale, 0);
                store(here, l->dim + d, (vf){}, 0);
            }
            here[2 * l->dim] = -INFINITY;
            here[2 * l->dim + 1] = 0;
        }
    }
    if (p->shared) run(attend_shared, &a, l->kv_heads, threads);
    run(attend_own, &a, p->own * l->kv_heads, threads);
}
