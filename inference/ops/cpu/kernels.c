/* The functions that kernels.py wraps, in bfloat16 with float32 sums: as reference.py has them, but fused, and rounded
 * only where a result is. Compiled on the machine that runs them; GCC and Clang both know these vectors, and split them
 * up where the processor's are shorter.
 *
 * A weight (N, K) lies packed in panels of WIDTH rows, zeros behind the last row and the last k. For two k at a time a
 * panel has two lines, each a cache line with AVX-512: of the first LANES rows and of the others, each row's two values
 * side by side, so that a shift and a mask make a float32 vector for either k. That is also how a processor's matrix
 * tiles take it. A product's sum runs over k in order whatever the number of rows, so a row's result does not depend on
 * the other rows, except where tiles multiply, or fixed point, which few rows do not go in.
 *
 * A weight of 8 or 4 bits lies in the same panels, and becomes lines of bfloat16, which hold every value of it: for few
 * rows in registers, otherwise a chunk of a panel at a time, in the nearest cache, for all rows that are multiplied; there
 * as floats, or as pairs, tiles or fixed point take it. The sums of a group, or of a chunk of it, are scaled and added up,
 * as reference.w8a16_gemm and w4a16_gemm have it.
 *
 * Shapes as in model.py. `threads` are those of torch, whose OpenMP library this one shares.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(_OPENMP) && defined(__clang__)
#include "clang_openmp.h"
#elif defined(_OPENMP)
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef __AVX512F__
enum { LANES = 16, ROWS = 12 }; /* of a product at once: ROWS * 2 sums and a line's two halves fill the registers */
#else
enum { LANES = 8, ROWS = 6 };
#endif
enum { WIDTH = 2 * LANES, AHEAD = 64 /* lines that are fetched before they are needed */ };

#define INLINE static inline __attribute__((always_inline))
typedef uint16_t bf16;
typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t vb __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int8_t vc __attribute__((vector_size(LANES), aligned(1), may_alias));

int64_t panel_width(void) { return WIDTH; }

/* Asks for huge pages: at once for what nothing was written to yet, by and by for the rest; or not at all. */
void use_huge_pages(void *data, int64_t bytes) {
#ifdef __linux__
    const uintptr_t huge = 1 << 21, begin = ((uintptr_t)data + huge - 1) / huge * huge, end = ((uintptr_t)data + bytes) / huge * huge;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
    (void)data, (void)bytes;
}

INLINE int64_t in_wholes(int64_t n, int64_t whole) { return (n + whole - 1) / whole; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t even(int64_t k) { return k + (k & 1); }

/* ------------------------------------------------------------------------------------------------------- numbers */

INLINE float widen(bf16 x) {
    union { uint32_t u; float f; } bits = {(uint32_t)x << 16};
    return bits.f;
}

INLINE bf16 narrow(float x) { /* to the nearest, ties to even */
    union { float f; uint32_t u; } bits = {x};
    if (x != x) return 0x7fc0;
    return (bits.u + 0x7fff + (bits.u >> 16 & 1)) >> 16;
}

#ifdef __AVX512F__ /* one instruction each, which GCC makes two of, and more */
INLINE vu longer(vh x) { return (vu)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE vh shorter(vu x) { return (vh)_mm512_cvtepi32_epi16((__m512i)x); }
#else
INLINE vu longer(vh x) { return __builtin_convertvector(x, vu); }
INLINE vh shorter(vu x) { return __builtin_convertvector(x, vh); }
#endif

INLINE vf widen_v(const bf16 *x) { return (vf)(longer(*(const vh *)x) << 16); }

INLINE vf select_v(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vu bits_v(vf x) { /* of x as bfloat16, in the low halves */
    vu bits = (vu)x;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vi nan = x != x;
    return (vu)((nan & 0x7fc0) | (~nan & (vi)bits));
}

INLINE vu whole_v(vf x) { return (vu)(x + 12582912.f); } /* the nearest whole number, in 16 bits: 1.5 * 2^23 rounds */

/* Two lines of bfloat16 as four of floats: both lines' first k, and their second. */
INLINE void split_lines(vu a, vu b, vu *lines) {
    lines[0] = a << 16, lines[1] = b << 16;
    lines[2] = a & 0xffff0000u, lines[3] = b & 0xffff0000u;
}

INLINE void narrow_v(vf x, bf16 *out) { *(vh *)out = shorter(bits_v(x)); }

INLINE vf max_v(vf a, vf b) { return select_v(a > b, a, b); }

/* exp to about 2 units in the last place, for x <= 88; 0 below -87.3, NaN stays NaN. x = n log(2) + r, where |r| is at
 * most log(2) / 2, and a polynomial of Taylor's for exp(r). */
INLINE vf exp_v(vf x) {
    vf n = (x * 1.44269504f + 12582912.f) - 12582912.f; /* 1.5 * 2^23: rounds to a whole number */
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* log(2) in two parts, the first exact in n * it */
    vf p = r * (1.f / 5040) + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + .5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    vi whole = __builtin_convertvector(select_v(x > -87.3f, n, (vf){0}), vi);
    vf y = p * (vf)((whole + 127) << 23);
    return select_v(x <= -87.3f, (vf){0}, select_v(x > 88.f, x * INFINITY, select_v(x == x, y, x)));
}

INLINE vf silu_v(vf x) { /* x / (1 + exp(-x)); nothing below -87, but NaN of -infinity, as in torch */
    vf y = x / (1.f + exp_v(select_v(x >= -87.f, -x, (vf){0})));
    return select_v(x < -87.f, x * 0.f, y);
}

INLINE float sum_v(vf x) { /* of halves, halves of these, ... */
    float part[LANES];
    *(vf *)part = x;
#pragma GCC unroll 4
    for (int n = LANES / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) part[i] += part[i + n];
    return part[0];
}

/* ------------------------------------------------------------------------------------------------ matrix products */

/* A packed weight (n, k), or a stack of them. Its scales, float or bfloat16, are for blocks of `rows` rows and `block` k:
 * (blocks of rows, blocks of k) where whole panels share one; with rows 1 lines, (panels, blocks of k, WIDTH). zeros:
 * INT4's zero points, in such lines, or none, for 8. has_nan: whether an FP8 number may be NaN. stack_*: bytes from a
 * weight to the next one. */
enum { BF16, FP8, INT8, INT4, INT4_ZEROS /* which kernels take for one of its own */ };
typedef struct {
    const void *data, *scales;
    const uint8_t *zeros;
    int64_t n, k, form, rows, block, bf16_scales, has_nan, stack_data, stack_scales, stack_zeros;
} Matrix;

INLINE Matrix of_stack(const Matrix *w, int64_t e) {
    Matrix one = *w;
    one.data = (const char *)w->data + e * w->stack_data;
    if (w->scales) one.scales = (const char *)w->scales + e * w->stack_scales;
    if (w->zeros) one.zeros = w->zeros + e * w->stack_zeros;
    return one;
}

/* Bytes of so many k of a panel. */
INLINE int64_t panel_bytes(int64_t form, int64_t k) {
    return form == BF16 ? 2 * WIDTH * k : form >= INT4 ? WIDTH / 2 * k : WIDTH * k;
}

INLINE int with_zeros(const Matrix *w) { return w->zeros ? INT4_ZEROS : (int)w->form; }

/* Two lines of 8 bits, or four of 4, lie together, so that few instructions make them lines of bfloat16: */
typedef struct {
    int byte, shift;
} Place;

/* where they have what row i of the panel has for k, 0 to 1, or 0 to 3. */
INLINE Place place_of(int form, int i, int k) {
    const int line = i / LANES, lane = i % LANES, number = 2 * lane + k % 2, pair = k / 2;
#if defined(__AVX512VBMI__)
    if (form == FP8) return (Place){number / 8 * 16 + line * 8 + number % 8, 0};
#endif
    if (form == FP8) return (Place){2 * number + 1 - line, 0}; /* both lines in turn, the second one first */
    if (form == INT8) return (Place){(2 * line + k) * LANES + lane, 0}; /* each line's first k, and its second */
#if defined(__AVX512BW__)
    return (Place){2 * number + pair, 4 * line};
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Place){number / 8 * 16 + line * 8 + number % 8, 4 * pair};
#else
    return (Place){(2 * line + k % 2) * LANES + lane, 4 * pair};
#endif
}

/* w (n, k) to panels; in place where n is a multiple of WIDTH and k even. INT4: k a multiple of 4, w (n, k / 2) with
 * the even k in the low half of a byte. scratch: (threads, panel_bytes(form, even(k))). What fills them up is any
 * number. Returns whether one of FP8 is NaN. */
int64_t pack(const void *w, int64_t n, int64_t k, int form, void *out, void *scratch, int threads) {
    const int64_t size = panel_bytes(form, even(k));
    int64_t has_nan = 0;
    const uint8_t filling = form == FP8 ? 0x38 : 0; /* 1, as nothing would be unusual */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < in_wholes(n, WIDTH); p++) {
        uint8_t *panel = (uint8_t *)scratch + omp_get_thread_num() * size;
        for (int i = 0; i < WIDTH; i++) {
            const int64_t row = p * WIDTH + i;
            if (form == BF16) {
                const bf16 *from = (const bf16 *)w + row * k;
                bf16 *column = (bf16 *)panel + i / LANES * WIDTH + i % LANES * 2;
                for (int64_t j = 0; j < even(k); j++)
                    column[j / 2 * 2 * WIDTH + j % 2] = row < n && j < k ? from[j] : 0;
            } else if (form == INT4) {
                const uint8_t *from = (const uint8_t *)w + row * (k / 2);
                Place to[4];
                for (int l = 0; l < 4; l++) to[l] = place_of(form, i, l);
                for (int64_t j = 0; j < k; j += 4) {
                    uint8_t *four = panel + j * WIDTH / 2;
                    for (int l = 0; l < 4; l++) {
                        const int nibble = row < n ? from[(j + l) / 2] >> 4 * (l % 2) & 15 : 0;
                        four[to[l].byte] = (four[to[l].byte] & (0xf0 >> to[l].shift)) | nibble << to[l].shift;
                    }
                }
            } else {
                const uint8_t *from = (const uint8_t *)w + least(row, n - 1) * k; /* no larger than the others */
                uint8_t *first = panel + place_of(form, i, 0).byte, *second = panel + place_of(form, i, 1).byte;
                for (int64_t j = 0; j < k; j += 2) {
                    first[j * WIDTH] = from[j];
                    second[j * WIDTH] = j + 1 < k ? from[j + 1] : filling;
                }
            }
        }
        int64_t found = 0;
        for (int64_t i = 0; i < size && form == FP8; i++) found |= (panel[i] & 0x7f) == 0x7f;
        if (found) __atomic_store_n(&has_nan, 1, __ATOMIC_RELAXED);
        memcpy((char *)out + p * size, panel, size);
    }
    return has_nan;
}

/* e4m3 as bfloat16, of any byte. */
INLINE bf16 widen_e4m3(uint8_t x) {
    const int sign = x >> 7 << 15, bits = x & 0x7f;
    if (bits == 0x7f) return sign | 0x7fc0;
    if (bits > 7) return sign | ((bits << 4) + (120 << 7)); /* its exponent is 7 larger, and bfloat16's 127 */
    return sign | narrow(bits * 0x1p-9f);
}

typedef int16_t vs __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

#if defined(__AVX512VBMI__)
/* The lower bytes of all positive e4m3 as bfloat16, and the upper ones. */
static uint8_t E4M3[2][128] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_e4m3(void) {
    for (int x = 0; x < 128; x++) E4M3[0][x] = widen_e4m3(x) & 255, E4M3[1][x] = widen_e4m3(x) >> 8;
}

/* Two lines of e4m3: each byte of a number is looked up, and the sign added. */
INLINE void widen_fp8(const uint8_t *from, vu *lines) {
    const __m512i x = _mm512_loadu_si512(from);
    const __m512i lower[2] = {_mm512_load_si512(E4M3[0]), _mm512_load_si512(E4M3[0] + 64)};
    const __m512i upper[2] = {_mm512_load_si512(E4M3[1]), _mm512_load_si512(E4M3[1] + 64)};
    const __m512i low = _mm512_permutex2var_epi8(lower[0], x, lower[1]);
    const __m512i size = _mm512_permutex2var_epi8(upper[0], x, upper[1]);
    const __m512i high = _mm512_ternarylogic_epi32(size, x, _mm512_set1_epi8(-128), 0xf8); /* size | (x & sign) */
    lines[0] = (vu)_mm512_unpacklo_epi8(low, high);
    lines[1] = (vu)_mm512_unpackhi_epi8(low, high);
}
#else
/* Which of these are zero, subnormal or NaN: a bit for each, or for some of them. */
INLINE uint64_t unusual(const uint8_t *from) {
#if defined(__AVX512BW__)
    __m512i x = _mm512_add_epi8(_mm512_loadu_si512(from), _mm512_set1_epi8(1));
    return _mm512_cmplt_epu8_mask(_mm512_and_si512(x, _mm512_set1_epi8(0x7f)), _mm512_set1_epi8(9));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    __m256i x = _mm256_add_epi8(_mm256_loadu_si256((const __m256i *)from), _mm256_set1_epi8(1));
    x = _mm256_cmpgt_epi8(_mm256_set1_epi8(9), _mm256_and_si256(x, _mm256_set1_epi8(0x7f)));
    return (uint32_t)_mm256_movemask_epi8(x);
#else
    uint64_t found = 0;
    for (int i = 0; i < 2 * WIDTH; i++) found |= (uint64_t)((uint8_t)(from[i] + 1) % 128 < 9) << i;
    return found;
#endif
}

/* Two lines of e4m3. A shift brings sign, exponent and mantissa into place; the few others are made one by one. */
INLINE void widen_fp8(const uint8_t *from, vu *lines) {
    const vs x = *(const vs *)from, mask = (vs){0} + (int16_t)0x87f0;
    lines[0] = (vu)((x >> 4 & mask) + (120 << 7));
    lines[1] = (vu)((x << 8 >> 4 & mask) + (120 << 7));
    uint64_t left = unusual(from);
    if (__builtin_expect(left != 0, 0)) {
        bf16 numbers[2 * WIDTH];
        memcpy(numbers, lines, sizeof(numbers));
        for (; left; left &= left - 1) {
            const int at = __builtin_ctzll(left);
            numbers[(at % 2 ? 0 : WIDTH) + at / 2] = widen_e4m3(from[at]);
        }
        memcpy(lines, numbers, sizeof(numbers));
    }
}
#endif

/* A line of bfloat16 of values for the first k and for the second, which it can hold. */
INLINE vu join_v(vf first, vf second) { return (vu)first >> 16 | (vu)second; }

#if defined(__AVX512F__) /* one instruction each, which GCC makes many of */
INLINE vi longer_int8(const uint8_t *x) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)); }
#elif defined(__AVX2__)
INLINE vi longer_int8(const uint8_t *x) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)); }
#else
INLINE vi longer_int8(const uint8_t *x) { return __builtin_convertvector(*(const vc *)x, vi); }
#endif

INLINE vf float_of_int8(const uint8_t *x) { return __builtin_convertvector(longer_int8(x), vf); }

INLINE void widen_int8(const uint8_t *from, vu *lines) {
    lines[0] = join_v(float_of_int8(from), float_of_int8(from + LANES));
    lines[1] = join_v(float_of_int8(from + 2 * LANES), float_of_int8(from + 3 * LANES));
}

/* The zero points of a panel's rows as widen_int4 takes them. */
typedef struct {
    uint8_t bytes[4 * WIDTH] __attribute__((aligned(64)));
} Zeros;

#if defined(__AVX512BW__)
static const bf16 NUMBERS[32] = { /* 0 to 15 */
    0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160,
    0x4170, /* and -16 to -1 */ 0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0,
    0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
};
static const bf16 LESS_8[32] = { /* -8 to 7, twice */
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0,
    0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
    0x40c0, 0x40e0,
};

INLINE void zeros_of(const uint8_t *zeros, Zeros *z) { /* of each number of the two lines */
    for (int line = 0; line < 2; line++) {
        const __m512i one = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(zeros + line * LANES)));
        _mm512_store_si512(z->bytes + line * 2 * WIDTH, _mm512_or_si512(one, _mm512_slli_epi32(one, 16)));
    }
}

/* The five lowest bits of a number look it up. Without zero points the fifth, which is another number's, does not count. */
INLINE void widen_int4(int form, const uint8_t *from, const Zeros *zeros, vu *lines) {
    const __m512i table = _mm512_loadu_si512(form == INT4 ? LESS_8 : NUMBERS);
#pragma GCC unroll 4
    for (int l = 0; l < 4; l++) {
        vs number = *(const vs *)from >> 4 * l;
        if (form == INT4_ZEROS) number = (number & 15) - *(const vs *)(zeros->bytes + l % 2 * 2 * WIDTH);
        lines[l] = (vu)_mm512_permutexvar_epi16((__m512i)number, table);
    }
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
INLINE void zeros_of(const uint8_t *zeros, Zeros *z) {
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < 2; j++) z->bytes[place_of(INT4, i, j).byte] = zeros[i];
}

/* Each byte of a number is looked up: without zero points that of -8 to 7, otherwise of 0 to 15, with the sign added. */
INLINE void widen_int4(int form, const uint8_t *from, const Zeros *zeros, vu *lines) {
    const __m256i x = _mm256_loadu_si256((const __m256i *)from), fifteen = _mm256_set1_epi8(15);
    const __m256i sign = _mm256_set1_epi8(-128);
    const __m256i upper = _mm256_broadcastsi128_si256(
        form == INT4 ? _mm_setr_epi8(-63, -64, -64, -64, -64, -64, -64, -65, 0, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40)
                     : _mm_setr_epi8(0, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41));
    const __m256i lower = _mm256_broadcastsi128_si256(
        form == INT4 ? _mm_setr_epi8(0, -32, -64, -96, -128, 0x40, 0, -128, 0, -128, 0, 0x40, -128, -96, -64, -32)
                     : _mm_setr_epi8(0, -128, 0, 0x40, -128, -96, -64, -32, 0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70));
#pragma GCC unroll 2
    for (int l = 0; l < 2; l++) {
        __m256i number = _mm256_and_si256(l ? _mm256_srli_epi16(x, 4) : x, fifteen), size = number;
        if (form == INT4_ZEROS) {
            number = _mm256_sub_epi8(number, _mm256_load_si256((const __m256i *)zeros->bytes));
            size = _mm256_abs_epi8(number);
        }
        __m256i low = _mm256_shuffle_epi8(lower, size), high = _mm256_shuffle_epi8(upper, size);
        if (form == INT4_ZEROS) high = _mm256_or_si256(high, _mm256_and_si256(number, sign));
        lines[2 * l] = (vu)_mm256_unpacklo_epi8(low, high);
        lines[2 * l + 1] = (vu)_mm256_unpackhi_epi8(low, high);
    }
}
#else
INLINE void zeros_of(const uint8_t *zeros, Zeros *z) { memcpy(z->bytes, zeros, WIDTH); }

INLINE void widen_int4(int form, const uint8_t *from, const Zeros *zeros, vu *lines) {
    for (int i = 0; i < 2; i++, from += WIDTH) {
        const vb eight = (vb){0} + 8, zero = form == INT4 ? eight : *(const vb *)(zeros->bytes + i * LANES), a = *(const vb *)from;
        const vb b = *(const vb *)(from + LANES);
        lines[i] = join_v(__builtin_convertvector((vc)((a & 15) - zero), vf),
                          __builtin_convertvector((vc)((b & 15) - zero), vf));
        lines[i + 2] = join_v(__builtin_convertvector((vc)((a >> 4) - zero), vf),
                              __builtin_convertvector((vc)((b >> 4) - zero), vf));
    }
}
#endif

/* How rows of x are multiplied, and lie: as floats, interleaved in blocks; as pairs of bfloat16, interleaved too; in fixed
 * point, which weights of 8 or 4 bits are multiplied in; or in tiles. */
typedef enum { FLOATS, PAIRS, FIXED, TILES } Way;
enum { TILE = 16, TILE_K = 32 }; /* rows and k of a tile */

/* Fixed point, as reference.fixed_point has it: FIXED_K numbers of a row are whole ones of FIXED_BITS bits and a sign, times
 * a power of two that the largest of them gives. Weights are whole numbers too, e4m3 of as many bits by the largest in a
 * panel's rows of a block. Pairs of 16 bits are multiplied and added up in 32 bits, which hold all sums, 2^13 * 1.875 * 2^12
 * * 32 < 2^31, and so is nothing rounded; of pairs an instruction takes twice as many numbers as of floats. Rows lie
 * interleaved, FIXED_PAIRS pairs and the power of two in turn. A NaN or an infinity makes its row's results NaN, and numbers
 * in a group whose largest is below 2^-114 are zeros. */
enum { FIXED_K = 32, FIXED_PAIRS = FIXED_K / 2, FIXED_BITS = 13 };

/* Bytes of so many numbers of x. */
INLINE int64_t bytes_of(Way way, int64_t n) {
    return way == FLOATS ? n * 4 : way == FIXED ? n / FIXED_K * (FIXED_PAIRS + 1) * 4 : n * 2;
}

#if defined(__AVX512VBMI__)
enum { MAY_ENLARGE = 0 }; /* its table has any number */
#else
enum { MAY_ENLARGE = 1 };
#endif

/* Two lines of e4m3 as bfloat16 2^-120 times as large, of any byte but NaN, as they lie without VBMI. A shift brings
 * sign, exponent and mantissa into place, and those of a subnormal number are one of a float's. */
INLINE void small_fp8(const uint8_t *from, vu *lines) {
    const vs bytes = *(const vs *)from, mask = (vs){0} + (int16_t)0x87f0;
    lines[0] = (vu)(bytes >> 4 & mask);
    lines[1] = (vu)(bytes << 8 >> 4 & mask);
}

/* Lines of 8 bits, two, or of 4, four, as bfloat16. */
INLINE void widen_lines(int form, const uint8_t *from, const Zeros *zeros, vu *lines) {
    if (form == FP8) widen_fp8(from, lines);
    else if (form == INT8) widen_int8(from, lines);
    else widen_int4(form, from, zeros, lines);
}

/* Instructions that add up bfloat16's products in float32, twice as many as those of floats. They take subnormal numbers
 * for zeros. kernels.py says where they are slow. */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__) && !defined(SLOW_PAIRS)
#define HAS_PAIRS
#endif

#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define HAS_FIXED
/* Sums with the products of two pairs each of 16 bits. */
INLINE vi add_pairs(vi sums, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
    return sums + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

/* A line of whole numbers of those for the first k and for the second. */
INLINE vu join_whole(vu first, vu second) { return (first & 0xffff) | second << 16; }

/* Lines of 8 bits, two, or of 4, four, as whole numbers of 16; e4m3 so many times as large. */
INLINE void whole_lines(int form, const uint8_t *from, const Zeros *zeros, float times, vu *lines) {
    if (form == FP8) {
        const int small = MAY_ENLARGE && times <= 32; /* subnormal numbers are less than a half then */
        const float factor = small ? times * 0x1p120f : times;
        if (small) small_fp8(from, lines);
        else widen_fp8(from, lines);
        for (int i = 0; i < 2; i++) {
            const vf first = (vf)(lines[i] << 16), second = (vf)(lines[i] & 0xffff0000u);
            lines[i] = join_whole(whole_v(first * factor), whole_v(second * factor));
        }
    } else if (form == INT8)
        for (int i = 0; i < 2; i++, from += 2 * LANES)
            lines[i] = join_whole((vu)longer_int8(from), (vu)longer_int8(from + LANES));
    else
#if defined(__AVX512F__)
        for (int l = 0; l < 4; l++) {
            const vs nibble = *(const vs *)from >> 4 * l & 15;
            if (form == INT4) lines[l] = (vu)(nibble - 8);
            else lines[l] = (vu)(nibble - *(const vs *)(zeros->bytes + l % 2 * 2 * WIDTH));
        }
#else
        for (int l = 0; l < 2; l++) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)from), none = _mm256_setzero_si256();
            const __m256i zero = form == INT4 ? _mm256_set1_epi8(8) : _mm256_load_si256((const __m256i *)zeros->bytes);
            const __m256i nibble = _mm256_and_si256(l ? _mm256_srli_epi16(x, 4) : x, _mm256_set1_epi8(15));
            const __m256i number = _mm256_sub_epi8(nibble, zero);
            lines[2 * l] = (vu)_mm256_srai_epi16(_mm256_unpacklo_epi8(none, number), 8);
            lines[2 * l + 1] = (vu)_mm256_srai_epi16(_mm256_unpackhi_epi8(none, number), 8);
        }
#endif
}
#else
INLINE void whole_lines(int form, const uint8_t *from, const Zeros *zeros, float times, vu *lines) {
    (void)form, (void)from, (void)zeros, (void)times, (void)lines;
}
#endif

/* k of some panels of bfloat16, `stride` bytes from a panel to the next; whether their product is added to what there is;
 * and from where on memory is fetched meanwhile, so many bytes a k, and to the next panel. */
typedef struct {
    const uint8_t *lines;
    int64_t stride, k;
    int more;
    const uint8_t *ahead;
    int64_t ahead_step, ahead_stride;
} Part;

/* r rows' k by a line of floats, its low half and its high one, added to every p-th of the sums. */
INLINE void multiply_floats(const float *x, vf first, vf second, int r, int p, vf *low, vf *high) {
#pragma GCC unroll 12
    for (int i = 0; i < r; i++) {
        low[i * p] += x[i] * first;
        high[i * p] += x[i] * second;
    }
}

/* r rows' two k by two lines, added to every p-th of the sums. */
INLINE void multiply_lines(const float *x, vu a, vu b, Way way, int r, int p, vf *low, vf *high) {
#ifdef HAS_PAIRS
    if (way == PAIRS) {
#pragma GCC unroll 12
        for (int i = 0; i < r; i++) {
            const __m512bh pair = (__m512bh)_mm512_set1_ps(x[i]);
            low[i * p] = (vf)_mm512_dpbf16_ps((__m512)low[i * p], (__m512bh)a, pair);
            high[i * p] = (vf)_mm512_dpbf16_ps((__m512)high[i * p], (__m512bh)b, pair);
        }
        return;
    }
#endif
    (void)way;
    multiply_floats(x, (vf)(a << 16), (vf)(b << 16), r, p, low, high);
    multiply_floats(x + r, (vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), r, p, low, high);
}

/* Two lines of e4m3 as floats 2^-120 times as large, of any byte but NaN; multiplied and added as multiply_lines does. */
INLINE void multiply_small(const float *x, const uint8_t *from, int r, int p, vf *low, vf *high) {
    vu small[2];
    small_fp8(from, small);
    multiply_lines(x, small[0], small[1], FLOATS, r, p, low, high);
}

/* Two lines of int8 that need not become bfloat16. */
INLINE void multiply_int8(const float *x, const uint8_t *from, int r, int p, vf *low, vf *high) {
    multiply_floats(x, float_of_int8(from), float_of_int8(from + 2 * LANES), r, p, low, high);
    multiply_floats(x + r, float_of_int8(from + LANES), float_of_int8(from + 3 * LANES), r, p, low, high);
}

/* r rows of x, interleaved, by p panels: sums to out (r, p * WIDTH), or added there. way, r and p are constants where it
 * is used. */
INLINE void product_of(const float *x, const Part *w, Way way, int r, int p, float *out) {
    vf low[ROWS], high[ROWS];
    const int pair = way == PAIRS ? r : 2 * r; /* numbers of x */
    const int64_t k = w->k, stride = w->stride, of_panel = w->ahead_stride, of_step = w->ahead_step * 2;
    const uint8_t *from = w->lines, *ahead = w->ahead;
    for (int i = 0; i < r * p; i++) {
        low[i] = w->more ? *(vf *)(out + i * WIDTH) : (vf){0};
        high[i] = w->more ? *(vf *)(out + i * WIDTH + LANES) : (vf){0};
    }
    for (int64_t j = 0; j < k; j += 2, x += pair, from += panel_bytes(BF16, 2), ahead += of_step)
#pragma GCC unroll 4
        for (int q = 0; q < p; q++) {
            const uint8_t *lines = from + q * stride;
            __builtin_prefetch(ahead + q * of_panel);
            if (LANES == 16 && p > 1) __builtin_prefetch(ahead + q * of_panel + 64);
            multiply_lines(x, *(const vu *)lines, *(const vu *)(lines + 2 * WIDTH), way, r, p, low + q, high + q);
        }
    for (int i = 0; i < r * p; i++, out += WIDTH) *(vf *)out = low[i], *(vf *)(out + LANES) = high[i];
}

/* Panels that r rows take at once: few rows need several, or a sum waits for the one before and memory for both. */
INLINE int panels_at_once(int r, int64_t left) {
    int p = r * 4 <= ROWS ? 4 : r * 2 <= ROWS ? 2 : 1;
    while (p > left) p /= 2;
    return p;
}

/* A compiler may not make one function of these and their callers: registers would not be enough. */
#define APART static __attribute__((noinline, noclone)) void

/* CASE(r, way) for every way and number of rows that a block may have, where both become constants. */
#define UP_TO_6(CASE, way) CASE(1, way) CASE(2, way) CASE(3, way) CASE(4, way) CASE(5, way) CASE(6, way)
#define UP_TO_12(CASE, way) \
    UP_TO_6(CASE, way) CASE(7, way) CASE(8, way) CASE(9, way) CASE(10, way) CASE(11, way) CASE(12, way)
#ifdef __AVX512F__
#define UP_TO_ROWS UP_TO_12
#else
#define UP_TO_ROWS UP_TO_6
#endif
#ifdef HAS_PAIRS
#define BY_ROWS(r, way, CASE)                           \
    if (way == PAIRS) switch (r) { UP_TO_ROWS(CASE, PAIRS) } \
    else switch (r) { UP_TO_ROWS(CASE, FLOATS) }
#else
#define BY_ROWS(r, way, CASE) switch (r) { UP_TO_ROWS(CASE, FLOATS) }
#endif

APART product(const float *x, int r, const Part *w, Way way, int p, float *out) {
    (void)way;
#define CASE(r, way)                                                          \
    case r:                                                                   \
        if (r * 4 <= ROWS && p == 4) product_of(x, w, way, r, 4, out);        \
        else if (r * 2 <= ROWS && p == 2) product_of(x, w, way, r, 2, out);   \
        else product_of(x, w, way, r, 1, out);                                \
        return;
    BY_ROWS(r, way, CASE)
#undef CASE
}

/* k of a panel as lines of floats, of bfloat16 or of whole numbers, as the way is, that blocks of rows take from a cache;
 * each `block` k have their scales (blocks, WIDTH), or there are none. Memory is fetched meanwhile, so many bytes a k. */
typedef struct {
    const void *lines;
    int64_t k, block;
    const float *scales;
    const uint8_t *ahead;
    int64_t ahead_step;
} Chunk;

/* r rows of x, interleaved, by a chunk, to out (r, WIDTH): each block's sums times its scales are added there, or without
 * scales those that are there go on. way and r are constants where it is used. */
INLINE void chunk_of(const float *x, const Chunk *w, Way way, int r, float *out) {
    const int pair = way == PAIRS ? r : 2 * r; /* numbers of x */
    const int64_t of_step = w->ahead_step * 2;
    const float *scales = w->scales;
    const vf *lines = (const vf *)w->lines;
    const uint8_t *ahead = w->ahead;
    for (int64_t at = 0; at < w->k; at += w->block, scales += WIDTH) {
        vf low[ROWS], high[ROWS];
        for (int i = 0; i < r; i++) {
            low[i] = scales ? (vf){0} : *(vf *)(out + i * WIDTH);
            high[i] = scales ? (vf){0} : *(vf *)(out + i * WIDTH + LANES);
        }
        for (int64_t j = 0; j < least(w->block, w->k - at); j += 2, x += pair, ahead += of_step) {
            __builtin_prefetch(ahead);
            if (way == PAIRS) {
                multiply_lines(x, (vu)lines[0], (vu)lines[1], way, r, 1, low, high);
                lines += 2;
                continue;
            }
            multiply_floats(x, lines[0], lines[1], r, 1, low, high);
            multiply_floats(x + r, lines[2], lines[3], r, 1, low, high);
            lines += 4;
        }
        if (!scales) {
            for (int i = 0; i < r; i++) *(vf *)(out + i * WIDTH) = low[i], *(vf *)(out + i * WIDTH + LANES) = high[i];
            return;
        }
        for (int i = 0; i < r; i++) {
            *(vf *)(out + i * WIDTH) += low[i] * *(const vf *)scales;
            *(vf *)(out + i * WIDTH + LANES) += high[i] * *(const vf *)(scales + LANES);
        }
    }
}

#ifdef HAS_FIXED
/* The same in fixed point. */
INLINE void fixed_chunk_of(const float *x, const Chunk *w, int r, float *out) {
    const vi *lines = (const vi *)w->lines;
    const uint8_t *ahead = w->ahead;
    for (int64_t at = 0; at < w->k; at += FIXED_K, x += r) {
        const float *scales = w->scales + at / w->block * WIDTH;
        vi low[ROWS], high[ROWS];
        for (int i = 0; i < r; i++) low[i] = high[i] = (vi){0};
        for (int j = 0; j < FIXED_PAIRS; j++, x += r, lines += 2, ahead += 2 * w->ahead_step) {
            const vi first = lines[0], second = lines[1];
            __builtin_prefetch(ahead);
#pragma GCC unroll 12
            for (int i = 0; i < r; i++) {
                const vi pair = (vi){0} + ((const int32_t *)x)[i];
                low[i] = add_pairs(low[i], first, pair);
                high[i] = add_pairs(high[i], second, pair);
            }
        }
        const vf first = *(const vf *)scales, second = *(const vf *)(scales + LANES);
        for (int i = 0; i < r; i++) { /* in this order no product is too small for a float that the sum is not */
            *(vf *)(out + i * WIDTH) += __builtin_convertvector(low[i], vf) * x[i] * first;
            *(vf *)(out + i * WIDTH + LANES) += __builtin_convertvector(high[i], vf) * x[i] * second;
        }
    }
}
#endif

/* The same of any way and number of rows. */
APART multiply_chunk(const float *x, int r, const Chunk *w, Way way, float *out) {
    (void)way;
#ifdef HAS_FIXED
    if (way == FIXED) {
#define CASE(r, way) case r: fixed_chunk_of(x, w, r, out); return;
        switch (r) { UP_TO_ROWS(CASE, FIXED) }
#undef CASE
    }
#endif
#define CASE(r, way) case r: chunk_of(x, w, way, r, out); return;
    BY_ROWS(r, way, CASE)
#undef CASE
}

enum {
    CHUNK = 4096 / WIDTH, /* k of a panel that are multiplied, or widened, together, at most: 16 KiB as floats */
    CHUNK_BLOCKS = CHUNK / 32, /* of scales, that a chunk may have, at most */
    BLOCKS = 32, /* of rows, that what a chunk was widened to serves */
    WIDENED_BLOCKS = 8, /* of rows, from which on bfloat16 is widened for them all, by floats */
    STREAMED = LANES == 16 ? 3 : 4, /* rows that take panels of 8 or 4 bits as they lie, at most: more widen them first */
};

/* Scales of the first or second line of panel p, for its block `at` of so many blocks of k. */
INLINE vf scales_v(const Matrix *w, int64_t p, int64_t at, int64_t blocks, int line) {
    const int64_t place = w->rows == 1 ? (p * blocks + at) * WIDTH + line * LANES : p * WIDTH / w->rows * blocks + at;
    const bf16 *half = (const bf16 *)w->scales + place;
    const float *whole = (const float *)w->scales + place;
    if (w->rows > 1) return (vf){0} + (w->bf16_scales ? widen(*half) : *whole);
    return w->bf16_scales ? widen_v(half) : *(const vf *)whole;
}

/* Whether this thread computes with subnormal floats: some libraries let it take zeros for them. */
INLINE int keeps_subnormal(void) {
    volatile float tiny = 0x1p-140f, small = 0x1p-70f;
    return tiny * 0x1p100f > 0 && small * small > 0;
}

/* n floats times 2^100: whether their products with numbers 2^-120 times as large, and sums of these, are the exact ones
 * 2^-20 times as large. They are where all but zeros lie in [2^-90, 2^28): a product of 24 bits by 4 is a multiple of
 * 2^-142 then, which a subnormal float holds, and 2^24 times the largest is no infinity. */
INLINE int enlarge(const float *x, int64_t n, float *out) {
    const int32_t least_bits = (127 - 90) << 23, most_bits = ((127 + 28) << 23) - 1;
    vi wrong = (vi){0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vi size = *(const vi *)(x + i) & 0x7fffffff;
        wrong |= ((size < least_bits) & (size != 0)) | (size > most_bits);
        *(vf *)(out + i) = *(const vf *)(x + i) * 0x1p100f;
    }
    for (; i < n; i++) {
        union { float f; int32_t u; } bits = {x[i]};
        const int32_t size = bits.u & 0x7fffffff;
        wrong[0] |= -((size < least_bits && size) || size > most_bits);
        out[i] = x[i] * 0x1p100f;
    }
    return sum_v(__builtin_convertvector(wrong, vf)) == 0;
}

/* Panels of 8 or 4 bits that r rows take at once, as they lie. */
INLINE int panels_streamed(int r) { return r * 4 <= ROWS ? 4 : r * 2 <= ROWS ? 2 : 1; }

/* r rows of x, interleaved, by n_panels of 8 or 4 bits from `panel` on: sums to out (r, panels_streamed(r) * WIDTH), where
 * there are fewer panels with the first one's in the place of the others'. form, way and r are constants where it is used. */
INLINE void stream_of(const float *x, const Matrix *w, int64_t panel, int n_panels, int form, Way way, int r, float *out) {
    const int P = panels_streamed(r);
    vf low[ROWS], high[ROWS], all_low[ROWS], all_high[ROWS];
    float larger[CHUNK * STREAMED] __attribute__((aligned(64)));
    const int step = form >= INT4 ? 4 : 2, pair = way == PAIRS ? r : 2 * r;
    const int64_t k = even(w->k), blocks = in_wholes(w->k, w->block), size = panel_bytes(form, k);
    const int may_enlarge = MAY_ENLARGE && form == FP8 && way == FLOATS && !w->has_nan && keeps_subnormal();
    const uint8_t *from = (const uint8_t *)w->data + panel * size;
    int64_t panels[4], apart[4]; /* numbers of panels, and bytes from the first one */
    for (int q = 0; q < P; q++) panels[q] = panel + (q < n_panels ? q : 0), apart[q] = (panels[q] - panel) * size;
    for (int i = 0; i < r * P; i++) all_low[i] = all_high[i] = (vf){0};
    for (int64_t at = 0, n; at < blocks; at++) {
        Zeros zeros[4];
        for (int q = 0; q < P && form == INT4_ZEROS; q++)
            zeros_of(w->zeros + (panels[q] * blocks + at) * WIDTH, zeros + q);
        for (int64_t left = least(w->block, k - at * w->block); left; left -= n, x += n / 2 * pair) {
            n = least(CHUNK, left);
            const int small = may_enlarge && enlarge(x, n * r, larger);
            const float *y = small ? larger : x;
            for (int i = 0; i < r * P; i++) low[i] = high[i] = (vf){0};
#define STEPS(multiplied)                                                                                        \
    for (int64_t j = 0; j < n; j += step, y += step / 2 * pair, from += panel_bytes(form, step))                 \
        _Pragma("GCC unroll 4") for (int q = 0; q < P; q++) {                                                    \
            const uint8_t *lines = from + apart[q];                                                              \
            __builtin_prefetch(lines + AHEAD * 2 * WIDTH);                                                       \
            multiplied;                                                                                          \
        }
            if (small) STEPS(multiply_small(y, lines, r, P, low + q, high + q))
            else if (form == INT8 && way == FLOATS) STEPS(multiply_int8(y, lines, r, P, low + q, high + q))
            else STEPS({
                vu of[4];
                widen_lines(form, lines, zeros + q, of);
                multiply_lines(y, of[0], of[1], way, r, P, low + q, high + q);
                if (step == 4) multiply_lines(y + pair, of[2], of[3], way, r, P, low + q, high + q);
            })
#undef STEPS
#pragma GCC unroll 4
            for (int q = 0; q < P; q++) {
                const vf first = scales_v(w, panels[q], at, blocks, 0), second = scales_v(w, panels[q], at, blocks, 1);
                for (int i = q; i < r * P; i += P) {
                    if (small) low[i] *= 0x1p20f, high[i] *= 0x1p20f;
                    all_low[i] += low[i] * first;
                    all_high[i] += high[i] * second;
                }
            }
        }
    }
    for (int i = 0; i < r * P; i++, out += WIDTH) *(vf *)out = all_low[i], *(vf *)(out + LANES) = all_high[i];
}

/* The same of any form and way, for up to STREAMED rows. */
APART stream(const float *x, int r, const Matrix *w, int64_t panel, int n_panels, Way way, float *out) {
    const int form = with_zeros(w);
    (void)way;
#define CASE(r, way)                                                                 \
    case r:                                                                          \
        switch (form) {                                                              \
        case FP8: stream_of(x, w, panel, n_panels, FP8, way, r, out); return;        \
        case INT8: stream_of(x, w, panel, n_panels, INT8, way, r, out); return;      \
        case INT4: stream_of(x, w, panel, n_panels, INT4, way, r, out); return;      \
        default: stream_of(x, w, panel, n_panels, INT4_ZEROS, way, r, out); return;  \
        }
#ifdef HAS_PAIRS
    if (way == PAIRS) switch (r) { CASE(1, PAIRS) CASE(2, PAIRS) CASE(3, PAIRS) }
#endif
#ifdef __AVX512F__
    switch (r) { CASE(1, FLOATS) CASE(2, FLOATS) CASE(3, FLOATS) }
#else
    switch (r) { CASE(1, FLOATS) CASE(2, FLOATS) CASE(3, FLOATS) CASE(4, FLOATS) }
#endif
#undef CASE
}

/* n rows go in blocks of ROWS at most, as equal as can be: block b's first row. */
INLINE int64_t blocks_of(int64_t n) { return in_wholes(n, ROWS); }
INLINE int64_t block_start(int64_t n, int64_t b) { return n * b / blocks_of(n); }

/* A row of x (k) to row i of r in fixed point: (k / FIXED_K, FIXED_PAIRS + 1, r). */
static void interleave_fixed(const void *x, int is_float, int64_t k, int i, int r, float *out) {
    for (int64_t j = 0; j < k; j += FIXED_K, out += (FIXED_PAIRS + 1) * r) {
        vf numbers[FIXED_K / LANES];
        vi most = {0};
        for (int l = 0; l < FIXED_K / LANES; l++) {
            const int64_t at = j + l * LANES;
            numbers[l] = is_float ? *(const vf *)((const float *)x + at) : widen_v((const bf16 *)x + at);
            const vi size = (vi)numbers[l] & 0x7fffffff;
            most = (vi)select_v(size > most, (vf)size, (vf)most);
        }
        int32_t largest = 0;
        for (int l = 0; l < LANES; l++) largest = most[l] > largest ? most[l] : largest;
        const int32_t exponent = largest >> 23, counts = exponent >= FIXED_BITS;
        const union { int32_t u; float f; } up = {counts ? (253 + FIXED_BITS - exponent) << 23 : 0};
        const union { int32_t u; float f; } down = {counts ? (exponent - FIXED_BITS + 1) << 23 : 0};
        uint16_t whole[FIXED_K];
        for (int l = 0; l < FIXED_K / LANES; l++) *(vh *)(whole + l * LANES) = shorter(whole_v(numbers[l] * up.f) & 0xffff);
        for (int l = 0; l < FIXED_PAIRS; l++) memcpy(out + l * r + i, whole + 2 * l, sizeof(float));
        out[FIXED_PAIRS * r + i] = exponent == 255 ? NAN : down.f;
    }
}

/* Row `row` of x (·, k) to row i of r that lie interleaved: (even(k), r) floats, (even(k) / 2, r) pairs, in fixed point, or,
 * where k fills tiles, (k / TILE_K, r, TILE_K) bfloat16. */
INLINE void interleave(const void *x, int is_float, int64_t row, int64_t stride, int64_t k, int i, int r, Way way,
                       void *out) {
    float *to = (float *)out + i;
    const bf16 *half = (const bf16 *)x + row * stride;
    if (way == FIXED) {
        interleave_fixed(is_float ? (const void *)((const float *)x + row * stride) : half, is_float, k, i, r, out);
        return;
    }
    if (way == TILES) {
        for (int64_t j = 0; j < k; j += TILE_K) memcpy((bf16 *)out + j * r + i * TILE_K, half + j, TILE_K * sizeof(bf16));
        return;
    }
    if (way == PAIRS) {
        for (int64_t j = 0; j < k / 2; j++) memcpy(to + j * r, half + 2 * j, sizeof(float));
        if (k & 1) memcpy(to + k / 2 * r, (bf16[2]){half[k - 1], 0}, sizeof(float));
        return;
    }
    if (is_float) {
        const float *from = (const float *)x + row * stride;
        for (int64_t j = 0; j < k; j++) to[j * r] = from[j];
    } else
        for (int64_t j = 0; j < k; j++) to[j * r] = widen(half[j]);
    if (k & 1) to[k * r] = 0;
}

/* This thread's share [*begin, *end) of n things. */
INLINE void my_share(int64_t n, int64_t *begin, int64_t *end) {
    int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    *begin = n * me / all;
    *end = n * (me + 1) / all;
}

enum { TAKEN = 4 /* panels that a thread takes at a time, at most: as many as few rows of an expert take together */ };

/* Whether there are panels of n that this thread has to multiply so many rows by: [*begin, *end), both 0 at first. Of few
 * rows, which wait for memory, it is the same share each time, and near where a thread has its own; else the next ones,
 * so that none waits for a slower one. */
INLINE int take_panels(int64_t n, int64_t rows, int64_t *next, int64_t *begin, int64_t *end) {
    if (rows > 2 * ROWS) {
        const int64_t left = n - __atomic_load_n(next, __ATOMIC_RELAXED), share = left / (2 * omp_get_num_threads());
        const int64_t some = share < 1 ? 1 : least(share, TAKEN);
        *begin = __atomic_fetch_add(next, some, __ATOMIC_RELAXED);
        *end = least(*begin + some, n);
    } else if (*end == 0) my_share(n, begin, end);
    else return 0;
    return *begin < *end;
}

INLINE void narrow_row(const float *x, int64_t n, bf16 *y) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) narrow_v(*(const vf *)(x + j), y + j);
    for (; j < n; j++) y[j] = narrow(x[j]);
}

/* Where a product's rows go: row i to the place i, or assignments[i] / top, of y, rounded or not, or added up there. */
typedef struct {
    enum { ROUNDED, STORED, ADDED } how;
    void *y;
    int64_t stride;
    const int64_t *assignments;
    int64_t top;
} Target;

/* Stores a block of r rows of sums, `line` numbers apart, of each the first `width`: at row `first`, column `column`,
 * of the target. */
static void store_rows(const float *sums, int64_t first, int64_t r, int64_t width, int64_t line, int64_t column,
                       Target to) {
    for (int64_t i = 0; i < r; i++, sums += line) {
        const int64_t place = to.assignments ? to.assignments[first + i] / to.top : first + i;
        float *y = (float *)to.y + place * to.stride + column;
        if (to.how == ROUNDED) narrow_row(sums, width, (bf16 *)to.y + place * to.stride + column);
        else if (to.how == STORED) memcpy(y, sums, width * sizeof(float));
        else for (int64_t j = 0; j < width; j++) y[j] += sums[j];
    }
}

/* What makes e4m3 whole numbers of FIXED_BITS bits, of n bytes none of which is NaN. */
INLINE float times_of(const uint8_t *from, int64_t n) {
    uint8_t largest = 8; /* the least normal number: those below it are whole with it */
    for (int64_t i = 0; i < n; i++) {
        const uint8_t size = from[i] & 0x7f;
        largest = size > largest ? size : largest;
    }
    const union { uint32_t u; float f; } times = {(127 + 6 + FIXED_BITS - (largest >> 3)) << 23};
    return times.f;
}

/* k lines of a panel to lines of floats, or for another way of bfloat16 or whole numbers, e4m3 so many times as large.
 * Memory so far behind is fetched meanwhile. */
static void widen_panel(int form, const uint8_t *from, int64_t k, const Zeros *zeros, int64_t ahead, Way way, float times,
                        vu *lines) {
#define LINES(form, step)                                                          \
    for (int64_t j = 0; j < k; j += step, from += 2 * WIDTH) {                     \
        vu out[4];                                                                 \
        __builtin_prefetch(from + ahead);                                          \
        if (way == FIXED) whole_lines(form, from, zeros, times, out);              \
        else widen_lines(form, from, zeros, out);                                  \
        for (int i = 0; i < step && way != FLOATS; i++) *lines++ = out[i];         \
        for (int i = 0; i < step && way == FLOATS; i += 2, lines += 4)             \
            split_lines(out[i], out[i + 1], lines);                                \
    }
    if (form == FP8) LINES(FP8, 2)
    else if (form == INT8) LINES(INT8, 2)
    else if (form == INT4) LINES(INT4, 4)
    else LINES(INT4_ZEROS, 4)
#undef LINES
}

/* A chunk of panel p of a plain weight from k0 on, as lines of floats. */
static Chunk widen_plain(const Matrix *w, int64_t p, int64_t k0, vu *lines) {
    const int64_t k = even(w->k), n = least(CHUNK, k - k0);
    const vu *from = (const vu *)((const uint8_t *)w->data + (p * k + k0) * panel_bytes(BF16, 1));
    for (int64_t j = 0; j < n; j += 2) split_lines(from[j], from[j + 1], lines + 2 * j);
    return (Chunk){lines, n, n, 0, 0, 0};
}

/* A chunk of panel p from k0 on, the start of a block or of a part of one: its lines, and the scales of its blocks. */
INLINE Chunk widen_chunk(const Matrix *w, int64_t p, int64_t k0, int64_t ahead, Way way, void *lines, float *scales) {
    const int64_t k = even(w->k), blocks = in_wholes(w->k, w->block), several = least(CHUNK / w->block, CHUNK_BLOCKS);
    const int64_t n = least(several > 1 ? several * w->block : least(CHUNK, w->block - k0 % w->block), k - k0);
    const int64_t line = WIDTH * (way == FLOATS ? sizeof(float) : sizeof(bf16));
    const uint8_t *from = (const uint8_t *)w->data + p * panel_bytes(w->form, k) + k0 * panel_bytes(w->form, 1);
    for (int64_t j = 0; j < n; j += w->block) {
        const int64_t at = (k0 + j) / w->block;
        float *own = scales + j / w->block * WIDTH;
        Zeros zeros;
        if (w->zeros) zeros_of(w->zeros + (p * blocks + at) * WIDTH, &zeros);
        const int64_t of_block = least(w->block, n - j);
        const uint8_t *first = from + panel_bytes(w->form, j);
        const float times = way == FIXED && w->form == FP8 ? times_of(first, panel_bytes(FP8, of_block)) : 1;
        widen_panel(with_zeros(w), first, of_block, &zeros, ahead, way, times, (vu *)((char *)lines + j * line));
        for (int i = 0; i < 2; i++) *(vf *)(own + i * LANES) = scales_v(w, p, at, blocks, i) * (1 / times);
    }
    return (Chunk){lines, n, w->block, scales, 0, 0};
}

/* Rows of x, interleaved in blocks, by the panels [begin, end) of w. */
static void multiply(const void *x, int64_t rows, const Matrix *w, int64_t begin, int64_t end, Way way, Target to) {
    const int64_t k = even(w->k), blocks = blocks_of(rows), of_k = panel_bytes(w->form, 1), size = panel_bytes(w->form, k);
    const int is_quantised = w->form != BF16, streams = is_quantised && rows <= STREAMED && way != FIXED;
    const int direct = !is_quantised && (way != FLOATS || blocks < WIDENED_BLOCKS), widens = !direct && !streams;
    for (int64_t p; rows && begin < end; begin += p) {
        p = streams    ? least(panels_streamed(rows), end - begin)
            : direct   ? panels_at_once(in_wholes(rows, blocks), end - begin)
                       : 1;
        const int64_t column = begin * WIDTH, width = least(p * WIDTH, w->n - column);
        const int64_t line = (streams ? panels_streamed(rows) : p) * WIDTH; /* of sums */
        const uint8_t *own = (const uint8_t *)w->data + begin * size;
        for (int64_t b0 = 0; b0 < blocks; b0 += BLOCKS) {
            float lines[CHUNK * WIDTH] __attribute__((aligned(64))), scales[CHUNK_BLOCKS * WIDTH];
            float sums[BLOCKS * ROWS * WIDTH] __attribute__((aligned(64)));
            const int64_t n_blocks = least(BLOCKS, blocks - b0);
            int64_t starts[BLOCKS + 1]; /* of these blocks: rows */
            for (int64_t b = 0; b <= n_blocks; b++) starts[b] = block_start(rows, b0 + b);
            const int64_t row = starts[0];
            if (streams) stream(x, rows, w, begin, p, way, sums);
            for (int64_t b = 0; b < n_blocks && direct; b++) {
                const int64_t first = starts[b], r = starts[b + 1] - first;
                const float *from = (const float *)((const char *)x + bytes_of(way, first * k));
                const uint8_t *next = own + size + (b0 + b) * (size / blocks); /* all blocks together fetch the next panel */
                const Part part = {own, size, k, 0, blocks > 1 ? next : own + AHEAD * 2 * WIDTH, in_wholes(of_k, blocks), size};
                product(from, r, &part, way, p, sums + (first - row) * line);
            }
            if (widens) memset(sums, 0, (starts[n_blocks] - row) * line * sizeof(float));
            for (int64_t k0 = 0, n; k0 < k && widens; k0 += n) {
                Chunk chunk = is_quantised ? widen_chunk(w, begin, k0, 0, way, lines, scales)
                                           : widen_plain(w, begin, k0, (vu *)lines);
                n = chunk.k;
                chunk.ahead_step = in_wholes(of_k, n_blocks);
                chunk.ahead = own + (k0 + n) * of_k + (n_blocks > 1 ? 0 : AHEAD * 2 * WIDTH); /* one takes less than memory */
                for (int64_t b = 0, share = n * of_k / n_blocks; b < n_blocks; b++, chunk.ahead += share) {
                    const int64_t first = starts[b], r = starts[b + 1] - first;
                    const char *from = (const char *)x + bytes_of(way, first * k + k0 * r);
                    multiply_chunk((const float *)from, r, &chunk, way, sums + (first - row) * line);
                }
            }
            for (int64_t b = 0; b < n_blocks; b++) {
                const int64_t first = starts[b], r = starts[b + 1] - first;
                store_rows(sums + (first - row) * line, first, r, width, line, column, to);
            }
        }
    }
}

/* Whether rows are multiplied as pairs: AVX512_BF16. */
int64_t may_use_pairs(void) {
#ifdef HAS_PAIRS
    return 1;
#endif
    return 0;
}

/* The matrix unit of Intel's servers (AMX) multiplies tiles of 16 rows of x and 16 of w, 32 k at a time. It adds up in
 * float32, takes subnormal numbers for zeros, and gains from a few rows on. For it the rows of x lie in blocks of two
 * tiles, of which the last may be short: (blocks, k / 32, rows, 32). */
enum {
    TILE_ROWS = 4,  /* the least that gain */
    TILES_AHEAD = 4 /* steps of the loop that a panel is fetched before it is needed */
};
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

static int granted;

/* A process has to ask for the registers, or an instruction for tiles ends it: once, as the library is opened. */
__attribute__((constructor)) static void ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static _Thread_local int64_t shaped; /* for blocks of so many rows; 0: for none */

/* Shapes for blocks of r rows, at most two tiles of them: 0 to 3 sums (r, WIDTH), 4 and 5 x, 6 and 7 w. */
static void shape_tiles(int64_t r) {
    if (r == shaped) return;
    shaped = r;
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shapes
        __attribute__((aligned(64))) = {.palette = 1};
    const uint8_t first = least(r, TILE), second = r > TILE ? r - TILE : TILE;
    const uint8_t rows[8] = {first, first, second, second, first, second, TILE_K / 2, TILE_K / 2};
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = rows[i];
    _tile_loadconfig(&shapes);
}

static void release_tiles(void) {
    if (shaped) _tile_release();
    shaped = 0;
}

/* A block of r rows of x by k lines of a panel: sums (r, WIDTH), or, with `more`, added there. `fresh`: the lines come
 * from memory, and are fetched ahead. */
INLINE void product_in_tiles(const bf16 *x, int64_t r, const bf16 *w, int64_t k, int fresh, int more, float *out) {
    shape_tiles(r);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (more) {
        _tile_loadd(0, out, WIDTH * sizeof(float));
        _tile_loadd(1, out + LANES, WIDTH * sizeof(float));
        if (r > TILE) {
            _tile_loadd(2, out + TILE * WIDTH, WIDTH * sizeof(float));
            _tile_loadd(3, out + TILE * WIDTH + LANES, WIDTH * sizeof(float));
        }
    }
    for (int64_t j = 0; j < k; j += TILE_K, x += r * TILE_K, w += TILE_K * WIDTH) {
        if (fresh)
            for (int i = 0; i < TILE_K; i++) __builtin_prefetch(w + (TILES_AHEAD * TILE_K + i) * WIDTH, 0, 2);
        _tile_loadd(6, w, 2 * WIDTH * sizeof(bf16));
        _tile_loadd(7, w + WIDTH, 2 * WIDTH * sizeof(bf16));
        _tile_loadd(4, x, TILE_K * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (r > TILE) {
            _tile_loadd(5, x + TILE * TILE_K, TILE_K * sizeof(bf16));
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, WIDTH * sizeof(float));
    _tile_stored(1, out + LANES, WIDTH * sizeof(float));
    if (r > TILE) {
        _tile_stored(2, out + TILE * WIDTH, WIDTH * sizeof(float));
        _tile_stored(3, out + TILE * WIDTH + LANES, WIDTH * sizeof(float));
    }
}

/* As multiply, of rows in tiles. A panel of 8 or 4 bits is widened a chunk at a time, for ROWS_WIDENED rows. */
static void multiply_in_tiles(const bf16 *x, int64_t rows, const Matrix *w, int64_t begin, int64_t end, Target to) {
    enum { ROWS_WIDENED = 8 * 2 * TILE };
    const int is_plain = w->form == BF16;
    const int64_t k = w->k;
    for (; begin < end; begin++)
        for (int64_t row = 0; row < rows; row += ROWS_WIDENED) {
            bf16 widened[CHUNK * WIDTH] __attribute__((aligned(64)));
            float scales[CHUNK_BLOCKS * WIDTH], part[2 * TILE * WIDTH] __attribute__((aligned(64)));
            float sums[ROWS_WIDENED * WIDTH] __attribute__((aligned(64)));
            const int64_t last = least(row + ROWS_WIDENED, rows), column = begin * WIDTH;
            for (int64_t k0 = 0, n; k0 < k; k0 += n) {
                const bf16 *lines = is_plain ? (const bf16 *)w->data + begin * k * WIDTH : widened;
                Chunk chunk = {.k = k, .block = k};
                if (!is_plain)
                    chunk = widen_chunk(w, begin, k0, row ? 0 : AHEAD * 2 * WIDTH, TILES, widened, scales);
                n = chunk.k;
                for (int64_t first = row; first < last; first += 2 * TILE)
                    for (int64_t at = 0; at < n; at += chunk.block) {
                        const int64_t r = least(2 * TILE, rows - first), of_block = least(chunk.block, n - at);
                        float *sum = sums + (first - row) * WIDTH;
                        product_in_tiles(x + first * k + (k0 + at) * r, r, lines + at * WIDTH, of_block,
                                         is_plain && first == 0, 0, is_plain ? sum : part);
                        for (int64_t i = 0; i < r * WIDTH && !is_plain; i += LANES) {
                            const vf before = k0 + at ? *(vf *)(sum + i) : (vf){0};
                            const float *own = scales + at / chunk.block * WIDTH;
                            *(vf *)(sum + i) = before + *(vf *)(part + i) * *(vf *)(own + i % WIDTH);
                        }
                    }
            }
            store_rows(sums, row, last - row, least(WIDTH, w->n - column), WIDTH, column, to);
        }
}
#else
enum { granted = 0 };
static void release_tiles(void) {}
INLINE void product_in_tiles(const bf16 *x, int64_t r, const bf16 *w, int64_t k, int fresh, int more, float *out) {
    (void)x, (void)r, (void)w, (void)k, (void)fresh, (void)more, (void)out;
}
static void multiply_in_tiles(const bf16 *x, int64_t rows, const Matrix *w, int64_t begin, int64_t end, Target to) {
    (void)x, (void)rows, (void)w, (void)begin, (void)end, (void)to;
}
#endif

/* Whether this process may use tiles. */
int64_t may_use_tiles(void) { return granted; }

/* How rows with so many k are multiplied where they are bfloat16, and units for it may be used. */
INLINE Way way_of_k(int64_t k) { return may_use_pairs() ? PAIRS : granted && k % TILE_K == 0 ? TILES : FLOATS; }

/* Whether rows are multiplied in fixed point by weights of 8 or 4 bits: where there is no unit for bfloat16 to use. */
int64_t may_use_fixed(void) {
#ifdef HAS_FIXED
    return !granted && !may_use_pairs();
#endif
    return 0;
}

/* How so many rows are multiplied by w, if they are bfloat16 and units, or fixed point, may be used. */
INLINE Way way_of(int64_t rows, const Matrix *w) {
    const int fits_tiles = rows >= TILE_ROWS && (w->form == BF16 || w->block % TILE_K == 0);
    const int fits_fixed = rows > STREAMED && w->form != BF16 && !w->has_nan && w->block % FIXED_K == 0 && w->k % FIXED_K == 0;
    const Way way = way_of_k(w->k);
    if (may_use_fixed() && fits_fixed) return FIXED;
    return way == TILES && !fits_tiles ? FLOATS : way;
}

/* Copies a row of k numbers to row i of x, whose rows lie in tiles. */
INLINE void put_in_tiles(const bf16 *row, int64_t k, int64_t i, int64_t rows, bf16 *x) {
    const int64_t first = i / (2 * TILE) * 2 * TILE;
    interleave(row, 0, 0, 0, k, i - first, least(2 * TILE, rows - first), TILES, x + first * k);
}

/* x (t, k) by w (n, k) to y (t, n), either bf16 or float; with `units`, in those of the processor for bfloat16.
 * scratch: (min(t, chunk), even(k)) floats, half as many for pairs; chunk, a multiple of ROWS, and of two tiles
 * where those multiply, is how many rows are multiplied by all of w before the next ones come. */
void linear(const void *x, int x_float, int64_t t, int64_t stride, const Matrix *w, void *y, int y_float,
            float *scratch, int64_t chunk, int units, int threads) {
    const int64_t n = w->n, k = w->k, size = even(k);
    const Way way = units && !x_float ? way_of(t, w) : FLOATS;
    int64_t next[2] = {0, 0}; /* panel, of this chunk and of the one after it */
#pragma omp parallel num_threads(threads)
    for (int64_t t0 = 0, turn = 0; t0 < t; t0 += chunk, turn = !turn) {
        const int64_t rows = least(chunk, t - t0);
        const bf16 *row = (const bf16 *)x + t0 * stride; /* if it is one, its pairs need not be laid out */
        const int is_ready = way == PAIRS && rows == 1 && k == size && (uintptr_t)row % sizeof(float) == 0;
        const void *from = is_ready ? (const void *)row : (const void *)scratch;
        char *at = (char *)y + t0 * n * (y_float ? sizeof(float) : sizeof(bf16));
        const Target to = {y_float ? STORED : ROUNDED, at, n, 0, 0};
        int64_t begin = 0, end = 0;
        if (t0) {
#pragma omp barrier
        }
        if (!is_ready) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows; i++) {
                if (way == TILES) {
                    put_in_tiles((const bf16 *)x + (t0 + i) * stride, k, i, rows, (bf16 *)scratch);
                    continue;
                }
                int64_t b = i * blocks_of(rows) / rows;
                while (block_start(rows, b + 1) <= i) b++;
                const int64_t first = block_start(rows, b), r = block_start(rows, b + 1) - first;
                interleave(x, x_float, t0 + i, stride, k, i - first, r, way, (char *)scratch + bytes_of(way, first * size));
            }
        }
        if (omp_get_thread_num() == 0) next[!turn] = 0;
        while (take_panels(in_wholes(n, WIDTH), rows, next + turn, &begin, &end)) {
            if (way == TILES) multiply_in_tiles((const bf16 *)from, rows, w, begin, end, to);
            else multiply(from, rows, w, begin, end, way, to);
        }
        release_tiles();
    }
}

/* -------------------------------------------------------------------------------------------- mixture of experts */

/* silu(gate) * up, each of n values, times weight. */
INLINE void swiglu(const float *gate, const float *up, int64_t n, float weight, float *out) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        *(vf *)(out + j) = silu_v(*(const vf *)(gate + j)) * *(const vf *)(up + j) * weight;
    for (; j < n; j++) {
        vf one = silu_v((vf){gate[j]});
        out[j] = one[0] * up[j] * weight;
    }
}

/* gate_up (t, 2 half) bf16, of which the first `inter` of each half count, to (t, inter) bf16. */
void silu_mul(const bf16 *gate_up, int64_t t, int64_t half, int64_t inter, bf16 *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < t; i++) {
        const bf16 *gate = gate_up + i * 2 * half, *up = gate + half;
        for (int64_t j = 0; j < inter; j += LANES) {
            if (j + LANES <= inter) {
                narrow_v(silu_v(widen_v(gate + j)) * widen_v(up + j), y + i * inter + j);
                continue;
            }
            for (int64_t l = j; l < inter; l++) {
                vf one = silu_v((vf){widen(gate[l])});
                y[i * inter + l] = narrow(one[0] * widen(up[l]));
            }
        }
    }
}

/* Which rows each expert multiplies: order (t * top) is the assignments a = token * top + k of experts [first, first +
 * n_experts), expert by expert, tokens in order; expert e's are starts[e] to starts[e + 1]. */
static void sort_by_expert(const int64_t *ids, int64_t n, int64_t first, int64_t n_experts, int64_t *order,
                           int64_t *starts) {
    memset(starts, 0, (n_experts + 1) * sizeof(int64_t));
    for (int64_t a = 0; a < n; a++)
        if (ids[a] >= first && ids[a] < first + n_experts) starts[ids[a] - first + 1]++;
    for (int64_t e = 0; e < n_experts; e++) starts[e + 1] += starts[e];
    for (int64_t a = 0; a < n; a++)
        if (ids[a] >= first && ids[a] < first + n_experts) order[starts[ids[a] - first]++] = a;
    for (int64_t e = n_experts; e > 0; e--) starts[e] = starts[e - 1];
    starts[0] = 0;
}

/* Both of its products go one way. */
INLINE Way way_of_expert(int64_t rows, const Matrix *w13, const Matrix *w2) {
    const Way way = way_of(rows, w13);
    return way_of(rows, w2) == way ? way : FLOATS;
}

/* x (t, h) through the experts [first, first + n_experts) that ids (t, top) name, weighted and summed, with
 * `shared` (t, h) added if there is one: y (t, h). w13 (n_experts, 2 half, h), of which the first `inter` of each half
 * count, and w2 (n_experts, h, inter), each expert's rows from a panel on.
 *
 * Experts go in bundles of at most `bundle` rows, or one alone that has more: rows of x, interleaved, by w13; SwiGLU,
 * times the router's weight; by w2, added up. Panels are taken for all experts of a bundle: nobody else adds to their columns.
 * With `units` an expert's rows go through those of the processor for bfloat16, with SwiGLU's result rounded, or in fixed
 * point.
 * scratch: (rows, even(h) + 2 half + even(inter)) floats, rows the most of a bundle, and sums (t, h) floats; numbers:
 * t * top + n_experts + 1. */
void experts(const bf16 *x, int64_t t, int64_t stride, int64_t h, const int64_t *ids, const float *weights, int64_t top,
             int64_t first, int64_t n_experts, const Matrix *w13, const Matrix *w2, const bf16 *shared, bf16 *y,
             int64_t bundle, float *sums, float *scratch, int64_t *numbers, int units, int threads) {
    const int64_t inter = w2->k, two_halves = w13->n, half = two_halves / 2;
    int64_t *starts = numbers, *order = numbers + n_experts + 1;
    const int64_t size_h = even(h), size_i = even(inter);
    int64_t next13 = 0, next2 = 0; /* panels */
    sort_by_expert(ids, t * top, first, n_experts, order, starts);
    const int64_t mean = starts[n_experts] / n_experts; /* rows of an expert */
#pragma omp parallel num_threads(threads)
    {
        int64_t begin, end, e1;
        my_share(t * h, &begin, &end);
        memset(sums + begin, 0, (end - begin) * sizeof(float));
        for (int64_t e0 = 0; e0 < n_experts; e0 = e1) {
            e1 = e0 + 1;
            while (e1 < n_experts && starts[e1 + 1] - starts[e0] <= bundle) e1++;
            const int64_t n = starts[e1] - starts[e0];
            const int64_t *own = order + starts[e0]; /* assignments, whose rows are those of: */
            float *rows = scratch, *gate_up = rows + n * size_h, *middle = gate_up + n * two_halves;
            if (n == 0) continue;
#pragma omp barrier
            for (int64_t e = e0; e < e1; e++) {
                const int64_t at = starts[e] - starts[e0], count = starts[e + 1] - starts[e];
                const Way way = units ? way_of_expert(count, w13, w2) : FLOATS;
#pragma omp for schedule(static) nowait
                for (int64_t b = 0; b < blocks_of(count); b++) {
                    const int64_t row = at + block_start(count, b), r = at + block_start(count, b + 1) - row;
                    for (int64_t i = 0; i < r; i++) {
                        const int64_t token = own[row + i] / top;
                        float *to = rows + at * size_h;
                        if (way == TILES) put_in_tiles(x + token * stride, h, row + i - at, count, (bf16 *)to);
                        else interleave(x, 0, token, stride, h, i, r, way,
                                        (char *)to + bytes_of(way, (row - at) * size_h));
                    }
                }
            }
#pragma omp barrier
            if (omp_get_thread_num() == 0) next2 = 0;
            for (begin = end = 0; take_panels(in_wholes(two_halves, WIDTH), mean, &next13, &begin, &end);)
                for (int64_t e = e0; e < e1; e++) {
                    const int64_t at = starts[e] - starts[e0], count = starts[e + 1] - starts[e];
                    const Target to = {STORED, gate_up + at * two_halves, two_halves, 0, 0};
                    const float *from = rows + at * size_h;
                    const Matrix own13 = of_stack(w13, e);
                    const Way way = units ? way_of_expert(count, w13, w2) : FLOATS;
                    if (way == TILES) multiply_in_tiles((const bf16 *)from, count, &own13, begin, end, to);
                    else multiply(from, count, &own13, begin, end, way, to);
                }
            release_tiles();
#pragma omp barrier
            for (int64_t e = e0; e < e1; e++) {
                const int64_t at = starts[e] - starts[e0], count = starts[e + 1] - starts[e];
                const Way way = units ? way_of_expert(count, w13, w2) : FLOATS;
#pragma omp for schedule(static) nowait
                for (int64_t b = 0; b < blocks_of(count); b++) {
                    const int64_t row = at + block_start(count, b), r = at + block_start(count, b + 1) - row;
                    for (int64_t i = 0; i < r; i++) {
                        float *gate = gate_up + (row + i) * two_halves;
                        swiglu(gate, gate + half, inter, weights[own[row + i]], gate);
                        float *to = middle + at * size_i;
                        if (way == PAIRS || way == TILES) /* rounded where it is: the float that is read is never behind */
                            narrow_row(gate, inter, (bf16 *)gate);
                        if (way == TILES) put_in_tiles((bf16 *)gate, inter, row + i - at, count, (bf16 *)to);
                        else interleave(gate, way == FLOATS || way == FIXED, 0, 0, inter, i, r, way,
                                        (char *)to + bytes_of(way, (row - at) * size_i));
                    }
                }
            }
#pragma omp barrier
            if (omp_get_thread_num() == 0) next13 = 0;
            for (begin = end = 0; take_panels(in_wholes(h, WIDTH), mean, &next2, &begin, &end);)
                for (int64_t e = e0; e < e1; e++) {
                    const int64_t at = starts[e] - starts[e0], count = starts[e + 1] - starts[e];
                    const Target to = {ADDED, sums, h, own + at, top};
                    const float *from = middle + at * size_i;
                    const Matrix own2 = of_stack(w2, e);
                    const Way way = units ? way_of_expert(count, w13, w2) : FLOATS;
                    if (way == TILES) multiply_in_tiles((const bf16 *)from, count, &own2, begin, end, to);
                    else multiply(from, count, &own2, begin, end, way, to);
                }
            release_tiles();
        }
#pragma omp barrier
        my_share(t, &begin, &end);
        for (; begin < end; begin++) {
            float *sum = sums + begin * h;
            if (shared)
                for (int64_t j = 0; j < h; j++) sum[j] += widen(shared[begin * h + j]);
            narrow_row(sum, h, y + begin * h);
        }
    }
}

/* Whether a comes before b: NaN is the largest of numbers, as torch sorts, so that it is chosen and seen. */
INLINE int above(float a, float b) { return a > b || (a != a && b == b); }

/* Router logits (t, e) float to weights (t, top) float and ids (t, top), largest first: see reference.route. Scores are
 * sigmoids, or a softmax; with groups > 1 only the `kept` worthiest groups are chosen from, a group's worth being its
 * two best choices (best_two) or its best. scratch: (threads, 2 e + groups) floats. */
void route(const float *logits, int64_t t, int64_t e, const float *bias, int sigmoid, int groups, int kept,
           int best_two, int top, int normalise, float factor, float *weights, int64_t *ids, float *scratch,
           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < t; i++) {
        float *scores = scratch + omp_get_thread_num() * (2 * e + groups), *choice = scores + e, *worth = choice + e;
        const float *row = logits + i * e;
        float largest = -INFINITY, total = 0;
        for (int64_t j = 0; j < e; j++) largest = row[j] > largest ? row[j] : largest;
        for (int64_t j = 0; j < e; j++) total += scores[j] = sigmoid ? 1 / (1 + expf(-row[j])) : expf(row[j] - largest);
        for (int64_t j = 0; j < e; j++) {
            if (!sigmoid) scores[j] /= total;
            choice[j] = scores[j] + (bias ? bias[j] : 0);
        }
        int64_t size = e / groups;
        for (int g = 0; g < groups && groups > 1; g++) {
            float best = -INFINITY, second = -INFINITY;
            for (int64_t j = g * size; j < (g + 1) * size; j++) {
                float c = choice[j];
                if (above(c, best)) second = best, best = c;
                else if (above(c, second)) second = c;
            }
            worth[g] = best_two ? best + second : best;
        }
        for (int g = 0; g < groups && groups > 1; g++) {
            int place = 0; /* of equals the first is kept */
            for (int o = 0; o < groups; o++)
                place += above(worth[o], worth[g]) || (o < g && !above(worth[g], worth[o]));
            for (int64_t j = g * size; j < (g + 1) * size && place >= kept; j++) choice[j] = -INFINITY;
        }
        total = 0;
        for (int k = 0; k < top; k++) {
            int64_t best = -1;
            for (int64_t j = 0; j < e; j++) { /* not one that is taken already, of equals the first */
                int taken = 0;
                for (int l = 0; l < k; l++) taken |= ids[i * top + l] == j;
                if (!taken && (best < 0 || above(choice[j], choice[best]))) best = j;
            }
            ids[i * top + k] = best;
            total += weights[i * top + k] = scores[best];
        }
        for (int k = 0; k < top; k++) weights[i * top + k] *= normalise ? factor / (total + 1e-20f) : factor;
    }
}

/* ------------------------------------------------------------------------------------- norms, rotation, the cache */

INLINE float mean_square(const bf16 *x, int64_t n) {
    vf sums = {0};
    float rest = 0;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) sums += widen_v(x + j) * widen_v(x + j);
    for (; j < n; j++) rest += widen(x[j]) * widen(x[j]);
    return (sum_v(sums) + rest) / n;
}

/* row (n) / rms(row) * weight, rounded. */
INLINE void normed(const bf16 *row, int64_t n, const float *weight, float eps, bf16 *y) {
    const float factor = 1 / sqrtf(mean_square(row, n) + eps);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) narrow_v(widen_v(row + j) * factor * *(const vf *)(weight + j), y + j);
    for (; j < n; j++) y[j] = narrow(widen(row[j]) * factor * weight[j]);
}

INLINE void widen_row(const bf16 *x, int64_t n, float *out) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) *(vf *)(out + j) = widen_v(x + j);
    for (; j < n; j++) out[j] = widen(x[j]);
}

/* x (t, h), rows `stride` apart, + delta (t, h), if there is one: the sum, rounded, to total (t, h), and its RMSNorm to
 * y (t, h). */
void norm(const bf16 *x, int64_t t, int64_t stride, int64_t h, const bf16 *delta, const float *weight, float eps,
          bf16 *y, bf16 *total, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < t; i++) {
        const bf16 *from = x + i * stride;
        if (delta) {
            const bf16 *more = delta + i * h;
            int64_t j = 0;
            for (; j + LANES <= h; j += LANES) narrow_v(widen_v(from + j) + widen_v(more + j), total + i * h + j);
            for (; j < h; j++) total[i * h + j] = narrow(widen(from[j]) + widen(more[j]));
            from = total + i * h;
        }
        normed(from, h, weight, eps, y + i * h);
    }
}

INLINE void rotate(const bf16 *x, const float *cos, const float *sin, int64_t pairs, bf16 *y) {
    for (int64_t j = 0; j < pairs; j++) {
        float a = widen(x[2 * j]), b = widen(x[2 * j + 1]);
        y[2 * j] = narrow(a * cos[j] - b * sin[j]);
        y[2 * j + 1] = narrow(a * sin[j] + b * cos[j]);
    }
}

/* The latents of reference.norm_latents: kv (t, c + r), rows kv_stride apart, to latents (slots, c + r). */
void write_latents(const bf16 *kv, int64_t t, int64_t kv_stride, int64_t c, int64_t r, const float *weight, float eps,
                   const float *cos, const float *sin, const int64_t *slots, bf16 *latents, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < t; i++) {
        if (slots[i] < 0) continue;
        bf16 *out = latents + slots[i] * (c + r);
        normed(kv + i * kv_stride, c, weight, eps, out);
        rotate(kv + i * kv_stride + c, cos + i * r / 2, sin + i * r / 2, r / 2, out + c);
    }
}

/* q (t, n, r), tokens q_stride and heads head_stride apart, rotated to out (t, n, r). */
void rotary(const bf16 *q, int64_t t, int64_t n, int64_t r, int64_t q_stride, int64_t head_stride, const float *cos,
            const float *sin, bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < t; i++)
        for (int64_t h = 0; h < n; h++)
            rotate(q + i * q_stride + h * head_stride, cos + i * r / 2, sin + i * r / 2, r / 2, out + (i * n + h) * r);
}

/* ---------------------------------------------------------------------------------------------------- attention */

#ifdef __AVX512F__
enum { VECTORS = 4 };
#else
enum { VECTORS = 2 };
#endif
enum {
    KEYS = 64,                  /* of a sequence that are widened, scored and summed up together */
    SPLIT = 256,                /* of a sequence that one thread goes through, more where that made too many parts */
    BLOCK = 8,                  /* groups of queries that it does so for */
    PARTS = 64,                 /* splits times blocks of a sequence, unless it has more blocks */
    COLUMNS = VECTORS * LANES,  /* of values and for so many queries, summed up at once */
    QUERIES = 4,
};

/* A sequence that decodes. Its queries, rows x heads, lie in groups of LANES, the last filled up, and these in blocks;
 * its keys in splits of `split`; a part is what one split came to for one group. */
typedef struct {
    int64_t b, row, n, keys, split, splits, groups, blocks, first_group, first_part;
} Sequence;

/* A query row of one of them. */
typedef struct {
    const Sequence *s;
    int64_t i;
} Row;

/* Those of the batch that have at most `most` rows, to list, and a last one that only says where more would begin. */
static int64_t decoding(const int32_t *bounds, const int32_t *lengths, int64_t batch, int64_t most, int64_t heads,
                        Sequence *list) {
    Sequence *s = list;
    s->first_group = s->first_part = 0;
    for (int64_t b = 0; b < batch; b++) {
        s->b = b, s->row = bounds[b], s->n = bounds[b + 1] - bounds[b], s->keys = lengths[b];
        if (s->n > most) continue;
        s->groups = in_wholes(s->n * heads, LANES);
        s->blocks = in_wholes(s->groups, BLOCK);
        s->split = in_wholes(in_wholes(s->keys, s->blocks < PARTS ? PARTS / s->blocks : 1), KEYS) * KEYS;
        if (s->split < SPLIT) s->split = SPLIT;
        s->splits = in_wholes(s->keys, s->split);
        s[1].first_group = s->first_group + s->groups;
        s[1].first_part = s->first_part + s->groups * s->splits;
        s++;
    }
    return s - list;
}

/* Floats of mla's scratch: queries, twice, parts, and each thread's tile, scores and joined results. */
typedef struct {
    int64_t wide, row, queries, parts, thread;
} Sizes;

static Sizes sizes_of(const Sequence *end, int64_t c, int64_t r) {
    Sizes s;
    s.wide = in_wholes(c, COLUMNS) * COLUMNS; /* values, filled up: with what lies behind them in a row */
    s.row = s.wide > c + r ? s.wide : c + r;
    s.queries = end->first_group * LANES * (c + r);
    s.parts = end->first_part * LANES * (s.wide + 2);
    s.thread = KEYS * (s.row + LANES) + QUERIES * s.wide;
    return s;
}

/* How many numbers mla's list of a batch of so many sequences and rows takes. */
int64_t mla_numbers(int64_t batch, int64_t rows) {
    return ((batch + 1) * sizeof(Sequence) + rows * sizeof(Row)) / sizeof(int64_t);
}

/* How many floats of scratch mla needs. list: mla_numbers, whose rows may be left out here. */
int64_t mla_floats(const int32_t *bounds, const int32_t *lengths, int64_t batch, int64_t most, int64_t heads, int64_t c,
                   int64_t r, int64_t threads, void *list) {
    Sizes s = sizes_of((Sequence *)list + decoding(bounds, lengths, batch, most, heads, list), c, r);
    return 2 * s.queries + s.parts + threads * s.thread;
}

/* n <= 8 numbers, from q[i][j] on, of r <= 3 queries by n rows of w (c), added to out (r, c). */
INLINE void absorb_of(const bf16 *const *q, int64_t j, const bf16 *w, int64_t c, int r, int n, float *out) {
    vf x[3][8];
    for (int i = 0; i < r; i++)
        for (int l = 0; l < n; l++) x[i][l] = (vf){0} + widen(q[i][j + l]);
    int64_t at = 0;
    for (; at + LANES <= c; at += LANES) {
        vf sums[3];
        for (int i = 0; i < r; i++) sums[i] = *(const vf *)(out + i * c + at);
#pragma GCC unroll 8
        for (int l = 0; l < n; l++) {
            const vf value = widen_v(w + l * c + at);
            if (at % WIDTH == 0) __builtin_prefetch(w + (n + l) * c + at);
#pragma GCC unroll 3
            for (int i = 0; i < r; i++) sums[i] += x[i][l] * value;
        }
        for (int i = 0; i < r; i++) *(vf *)(out + i * c + at) = sums[i];
    }
    for (; at < c; at++)
        for (int i = 0; i < r; i++)
            for (int l = 0; l < n; l++) out[i * c + at] += widen(q[i][j + l]) * widen(w[l * c + at]);
}

/* r <= 3 queries (d) by w (d, c) to out (r, c): some rows of w at a time, which lie one behind the other. */
INLINE void absorb(const bf16 *const *q, const bf16 *w, int64_t d, int64_t c, int r, float *out) {
    const int n = r == 1 ? 8 : 4; /* as many as registers hold numbers for */
    int64_t j = 0;
    memset(out, 0, r * c * sizeof(float));
    for (; j + n <= d; j += n) absorb_of(q, j, w + j * c, c, r, n, out);
    for (; j < d; j++) absorb_of(q, j, w + j * c, c, r, 1, out);
}

/* r <= QUERIES rows of o (wide) by n <= 4 rows of w (c), to out[i] (n). */
INLINE void expand_of(const float *o, int64_t wide, const bf16 *w, int64_t c, int r, int n, bf16 *const *out) {
    vf sums[QUERIES][4];
    for (int i = 0; i < r; i++)
        for (int v = 0; v < n; v++) sums[i][v] = (vf){0};
    int64_t j = 0;
    for (; j + LANES <= c; j += LANES)
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) {
            vf value = widen_v(w + v * c + j);
            __builtin_prefetch(w + (v + n) * c + j);
#pragma GCC unroll 4
            for (int i = 0; i < r; i++) sums[i][v] += *(const vf *)(o + i * wide + j) * value;
        }
    for (int i = 0; i < r; i++)
        for (int v = 0; v < n; v++) {
            float sum = sum_v(sums[i][v]);
            for (int64_t l = j; l < c; l++) sum += o[i * wide + l] * widen(w[v * c + l]);
            out[i][v] = narrow(sum);
        }
}

/* r <= QUERIES rows of o (wide) by w (dv, c) transposed, to out[i] (dv). */
INLINE void expand(const float *o, int64_t wide, const bf16 *w, int64_t dv, int64_t c, int r, bf16 **out) {
    for (int64_t v = 0; v < dv;) {
        int n = v + 4 <= dv ? 4 : 1;
        if (n == 4) expand_of(o, wide, w + v * c, c, r, 4, out);
        else expand_of(o, wide, w + v * c, c, r, 1, out);
        for (int i = 0; i < r; i++) out[i] += n;
        v += n;
    }
}

/* One group of queries (d, LANES) over n <= KEYS keys of the tile (KEYS, row): its running maxima, totals and sums
 * (LANES, wide). seen: the last key that each query sees, counted from the tile's first. p: (KEYS, LANES). Meanwhile
 * the latents from `next` on are fetched, if there are any. */
static void attend(const float *q, const float *tile, int64_t n, int64_t d, int64_t row, vi seen, int64_t lanes,
                   int64_t wide, float *p, vf *most, vf *total, float *sums, const bf16 *next) {
    vf largest = *most;
    for (int64_t k0 = 0; k0 < n; k0 += LANES) {
        vf scores[LANES];
#pragma GCC unroll 16
        for (int k = 0; k < LANES; k++) scores[k] = (vf){0};
        for (int64_t j = 0; j < d; j++) {
            vf query = *(const vf *)(q + j * LANES);
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) scores[k] += tile[(k0 + k) * row + j] * query;
        }
        for (int k = 0; k < LANES && k0 + k < n; k++) {
            vf score = select_v(seen >= (int32_t)(k0 + k), scores[k], (vf){0} - INFINITY);
            largest = max_v(largest, score);
            *(vf *)(p + (k0 + k) * LANES) = score;
        }
    }
    vf base = select_v(largest == -INFINITY, (vf){0}, largest), kept = exp_v(*most - base);
    *total *= kept;
    *most = largest;
    for (int64_t k = 0; k < n; k++) {
        vf *weight = (vf *)(p + k * LANES);
        *weight = exp_v(*weight - base);
        *total += *weight;
    }
    const int64_t line = 32, share = next ? KEYS * d / line / (in_wholes(lanes, QUERIES) * (wide / COLUMNS)) + 1 : 0;
    for (int64_t at = 0; at < wide; at += COLUMNS) /* these columns of all keys stay in the nearest cache */
        for (int64_t i0 = 0; i0 < lanes; i0 += QUERIES) {
            vf acc[QUERIES][VECTORS];
#pragma GCC unroll 4
            for (int i = 0; i < QUERIES; i++)
                for (int v = 0; v < VECTORS; v++)
                    acc[i][v] = *(vf *)(sums + (i0 + i) * wide + at + v * LANES) * kept[i0 + i];
            for (int64_t k = 0; k < n; k++) {
                const float *value = tile + k * row + at, *weight = p + k * LANES + i0;
                if (k < share) __builtin_prefetch(next + k * line, 0, 2);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    vf some = *(const vf *)(value + v * LANES);
#pragma GCC unroll 4
                    for (int i = 0; i < QUERIES; i++) acc[i][v] += weight[i] * some;
                }
            }
            if (next) next += share * line;
#pragma GCC unroll 4
            for (int i = 0; i < QUERIES; i++)
                for (int v = 0; v < VECTORS; v++) *(vf *)(sums + (i0 + i) * wide + at + v * LANES) = acc[i][v];
        }
}

/* Lane l of n parts, `step` apart, as one: out (wide). */
static void join(const float *parts, int64_t step, int64_t n, int64_t l, int64_t wide, float *out) {
    float largest = -INFINITY, total = 0;
    for (int64_t k = 0; k < n; k++) largest = fmaxf(largest, parts[k * step + LANES * wide + l]);
    for (int64_t k = 0; k < n; k++) {
        const float *part = parts + k * step, factor = expf(part[LANES * wide + l] - largest);
        total += factor * part[LANES * (wide + 1) + l];
        for (int64_t j = 0; j < wide; j += LANES) {
            vf sum = *(const vf *)(part + l * wide + j) * factor;
            if (k) sum += *(const vf *)(out + j);
            *(vf *)(out + j) = sum;
        }
    }
    for (int64_t j = 0; j < wide; j += LANES) *(vf *)(out + j) /= total;
}

/* Absorbed attention, as reference.mla_absorbed, of the sequences with at most `most` query rows: their rows of out
 * (T, heads, dv). q_nope (T, heads, dn), tokens q_stride and heads head_stride apart, q_pe (T, heads, r), latents
 * (pages of `page` tokens, c + r), pages (batch, width), w_uk (heads, dn, c), w_uv (heads, dv, c).
 *
 * W^UK moves into the queries, which are turned so that LANES of them are the lanes of vectors: one value of a key
 * meets them all. Then the keys: a thread takes SPLIT of a sequence and widens each once for all heads. What the parts
 * of a sequence came to is joined in front of W^UV. numbers: mla_numbers. */
void mla(const bf16 *q_nope, int64_t q_stride, int64_t head_stride, const bf16 *q_pe, const bf16 *latents, int64_t page,
         const int32_t *pages, int64_t width, const int32_t *bounds, const int32_t *lengths, const int64_t *positions,
         int64_t batch, int64_t most, int64_t heads, int64_t dn, int64_t r, int64_t c, int64_t dv, const bf16 *w_uk,
         const bf16 *w_uv, float scale, bf16 *out, void *numbers, float *scratch, int threads) {
    Sequence *list = numbers;
    const int64_t n_sequences = decoding(bounds, lengths, batch, most, heads, list), d = c + r;
    const Sizes sizes = sizes_of(list + n_sequences, c, r);
    const int64_t wide = sizes.wide, row = sizes.row;
    Row *rows = (Row *)(list + batch + 1);
    int64_t n_tasks = 0, n_rows = 0, next_task = 0;
    for (const Sequence *s = list; s < list + n_sequences; s++) {
        n_tasks += s->splits * s->blocks;
        for (int64_t i = 0; i < s->n; i++) rows[n_rows++] = (Row){s, i};
    }
    float *absorbed = scratch, *queries = absorbed + sizes.queries, *parts = queries + sizes.queries;
    float *tiles = parts + sizes.parts;
#pragma omp parallel num_threads(threads)
    {
        float *tile = tiles + omp_get_thread_num() * sizes.thread, *p = tile + KEYS * row, *joined = p + KEYS * LANES;
#pragma omp for schedule(static)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t at = 0; at < n_rows; at += 3) {
                const Row *some = rows + at;
                const bf16 *q[3], *w = w_uk + h * dn * c;
                int n = n_rows - at < 3 ? n_rows - at : 3;
                for (int i = 0; i < n; i++) q[i] = q_nope + (some[i].s->row + some[i].i) * q_stride + h * head_stride;
                if (n == 1) absorb(q, w, dn, c, 1, joined);
                else if (n == 2) absorb(q, w, dn, c, 2, joined);
                else absorb(q, w, dn, c, 3, joined);
                for (int i = 0; i < n; i++) {
                    float *to = absorbed + ((at + i) * heads + h) * d;
                    for (int64_t j = 0; j < c; j++) to[j] = joined[i * c + j] * scale;
                    const bf16 *pe = q_pe + ((some[i].s->row + some[i].i) * heads + h) * r;
                    for (int64_t j = 0; j < r; j++) to[c + j] = widen(pe[j]) * scale;
                }
            }
#pragma omp for schedule(static)
        for (int64_t g = 0; g < list[n_sequences].first_group; g++) {
            const Sequence *s = list;
            int64_t row0 = 0; /* the sequence's first among rows */
            for (; g >= s[1].first_group; s++) row0 += s->n;
            for (int64_t j = 0; j < d; j++)
                for (int64_t l = 0; l < LANES; l++) {
                    int64_t m = (g - s->first_group) * LANES + l;
                    queries[(g * d + j) * LANES + l] = m < s->n * heads ? absorbed[(row0 * heads + m) * d + j] : 0;
                }
        }
        for (int64_t i = 0; i < KEYS * row; i++) tile[i] = 0; /* so that what fills it up is no NaN */
        for (int64_t task; (task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < n_tasks;) {
            const Sequence *s = list;
            int64_t left = task;
            for (; left >= s->splits * s->blocks; s++) left -= s->splits * s->blocks;
            const int64_t split = left / s->blocks, g0 = left % s->blocks * BLOCK, g1 = least(g0 + BLOCK, s->groups);
            const int64_t stop = (split + 1) * s->split < s->keys ? (split + 1) * s->split : s->keys;
            float *mine = parts + (s->first_part + split * s->groups) * LANES * (wide + 2);
            for (int64_t g = g0; g < g1; g++) {
                float *part = mine + g * LANES * (wide + 2);
                memset(part, 0, LANES * (wide + 2) * sizeof(float));
                *(vf *)(part + LANES * wide) = (vf){0} - INFINITY;
            }
            for (int64_t key = split * s->split; key < stop; key += KEYS) {
                const int64_t n = stop - key < KEYS ? stop - key : KEYS;
                const int32_t *own = pages + s->b * width;
                for (int64_t k = key; k < key + n; k++)
                    widen_row(latents + (own[k / page] * page + k % page) * d, d, tile + (k - key) * row);
                const bf16 *next = key + KEYS < stop ? latents + own[(key + KEYS) / page] * page * d : 0;
                for (int64_t g = g0; g < g1; g++) {
                    const int64_t lanes = s->n * heads - g * LANES < LANES ? s->n * heads - g * LANES : LANES;
                    vi seen = {0};
                    for (int l = 0; l < lanes; l++) seen[l] = positions[s->row + (g * LANES + l) / heads] - key;
                    if (positions[s->row + (g * LANES + lanes - 1) / heads] < key) continue; /* all rows are before it */
                    float *part = mine + g * LANES * (wide + 2);
                    attend(queries + (s->first_group + g) * d * LANES, tile, n, d, row, seen, lanes, wide, p,
                           (vf *)(part + LANES * wide), (vf *)(part + LANES * (wide + 1)), part, g > g0 ? 0 : next);
                }
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t at = 0; at < n_rows; at += QUERIES) {
                int n = n_rows - at < QUERIES ? n_rows - at : QUERIES;
                bf16 *to[QUERIES];
                for (int i = 0; i < n; i++) {
                    const Sequence *s = rows[at + i].s;
                    int64_t m = rows[at + i].i * heads + h, size = LANES * (wide + 2), l = m % LANES;
                    const float *first = parts + (s->first_part + m / LANES) * size;
                    join(first, s->groups * size, s->splits, l, wide, joined + i * wide);
                    to[i] = out + ((s->row + rows[at + i].i) * heads + h) * dv;
                }
                const bf16 *w = w_uv + h * dv * c;
                if (n == 1) expand(joined, wide, w, dv, c, 1, to);
                else if (n == 2) expand(joined, wide, w, dv, c, 2, to);
                else if (n == 3) expand(joined, wide, w, dv, c, 3, to);
                else expand(joined, wide, w, dv, c, 4, to);
            }
    }
}

/* ------------------------------------------------------------------------------------- attention of many query rows */

enum { BLOCK_KEYS = 256 }; /* of a head, that are expanded, scored and summed up together */

/* Sizes of mla_prefill: c, dn + r and dv filled up; blocks of query rows, and into how many tasks a head's are split; and
 * bytes of its scratch: latents in panels, and what each thread has. summed: what becomes keys or values. */
typedef struct {
    Way way;
    int64_t c, d, values, blocks, splits;
    int64_t latents, weights, keys, summed, queries, sums, scores, thread;
} Many;

static Many many_of(int64_t n, int64_t length, int64_t heads, int64_t dn, int64_t r, int64_t c, int64_t dv, int units,
                    int threads) {
    Many m = {FLOATS, even(c), even(dn) + even(r), in_wholes(dv, WIDTH) * WIDTH, blocks_of(n), 1, 0, 0, 0, 0, 0, 0, 0, 0};
    const int fit = way_of_k(c) == way_of_k(dn) && way_of_k(dn) == way_of_k(r);
    if (units && fit) m.way = way_of_k(c);
    if (heads < threads) m.splits = least(in_wholes(threads, heads), m.blocks);
    const int64_t rows = in_wholes(m.blocks, m.splits) * ROWS, of_x = bytes_of(m.way, 1), line = 64;
    m.latents = in_wholes(length, WIDTH) * WIDTH * (m.c + even(r)) * sizeof(bf16);
    m.weights = in_wholes((dn + dv) * m.c * of_x, line) * line;
    m.keys = BLOCK_KEYS * (m.d + m.values) * sizeof(bf16);
    m.summed = (dn > dv ? dn : dv) * WIDTH * sizeof(float);
    m.queries = in_wholes(rows * m.d * of_x, line) * line;
    m.sums = in_wholes(rows * (m.values + 2) * sizeof(float), line) * line;
    m.scores = 2 * ROWS * BLOCK_KEYS * sizeof(float);
    m.thread = m.weights + m.keys + m.summed + m.queries + m.sums + m.scores;
    return m;
}

/* How many bytes of scratch mla_prefill needs. */
int64_t prefill_bytes(int64_t n, int64_t length, int64_t heads, int64_t dn, int64_t r, int64_t c, int64_t dv, int units,
                      int threads) {
    const Many m = many_of(n, length, heads, dn, r, c, dv, units, threads);
    return 64 + m.latents + threads * m.thread;
}

/* Interleaves blocks [b0, b1) of the rows of x (n, k), `stride` apart: its k go to k `at` and on of rows of `wide`. */
static void interleave_blocks(const bf16 *x, int64_t n, int64_t k, int64_t stride, int64_t wide, int64_t at, int64_t b0,
                              int64_t b1, Way way, char *out) {
    const int64_t row = block_start(n, b0);
    for (int64_t b = b0; b < b1; b++) {
        const int64_t first = block_start(n, b), r = block_start(n, b + 1) - first;
        char *to = out + bytes_of(way, (first - row) * wide + at * r);
        for (int64_t i = 0; i < r; i++) interleave(x, 0, first + i, stride, k, i, r, way, to);
    }
}

/* x, r <= ROWS rows interleaved, by one panel of k that is near: sums to out (r, WIDTH), or, with `more`, added there. */
INLINE void by_panel(const void *x, int r, const bf16 *panel, int64_t k, int more, Way way, float *out) {
    if (way == TILES) {
        product_in_tiles(x, r, panel, k, 0, more, out);
        return;
    }
    const Part part = {(const uint8_t *)panel, 0, k, more, (const uint8_t *)panel, 0, 0};
    product(x, r, &part, way, 1, out);
}

/* x, n rows interleaved in blocks, by one panel of k: sums (n, WIDTH). */
static void blocks_by_panel(const char *x, int64_t n, const bf16 *panel, int64_t k, Way way, float *out) {
    for (int64_t b = 0; b < blocks_of(n); b++) {
        const int64_t first = block_start(n, b), r = block_start(n, b + 1) - first;
        by_panel(x + bytes_of(way, first * k), r, panel, k, 0, way, out + first * WIDTH);
    }
}

/* Row i of r: its scores (panels, r, WIDTH), times scale, become the weights of the softmax, interleaved, of the first
 * `seen` keys alone. Updates the row's maximum *most and its sum of weights *total; returns the factor of its sums so far. */
INLINE float weigh(float *scores, int64_t panels, int i, int r, int64_t seen, float scale, Way way, float *most,
                   float *total, float *weights) {
    vf largest = (vf){0} + *most, sum = {0};
    vi lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    for (int64_t k = 0; k < panels * WIDTH; k += LANES) {
        vf *at = (vf *)(scores + (k / WIDTH * r + i) * WIDTH + k % WIDTH), score = *at * scale;
        if (k + LANES > seen) score = select_v(lane < (int32_t)(seen - k), score, (vf){0} - INFINITY);
        largest = max_v(largest, score);
        *at = score;
    }
    float base = largest[0];
    for (int l = 1; l < LANES; l++) base = largest[l] > base ? largest[l] : base;
    const float before = *most;
    *most = base;
    if (base == -INFINITY) base = 0;
    for (int64_t k = 0; k < panels * WIDTH; k += LANES) {
        vf weight = exp_v(*(vf *)(scores + (k / WIDTH * r + i) * WIDTH + k % WIDTH) - base);
        if (way != FLOATS) {
            bf16 rounded[LANES];
            const vu bits = bits_v(weight);
            *(vh *)rounded = shorter(bits);
            weight = (vf)(bits << 16);
            if (way == TILES) memcpy((bf16 *)weights + (k / TILE_K * r + i) * TILE_K + k % TILE_K, rounded, sizeof(rounded));
            for (int l = 0; l < LANES / 2 && way == PAIRS; l++)
                memcpy(weights + (k / 2 + l) * r + i, rounded + 2 * l, sizeof(float));
        } else
            for (int l = 0; l < LANES; l++) weights[(k + l) * r + i] = weight[l];
        sum += weight;
    }
    const float kept = exp_v((vf){0} + (before - base))[0];
    *total = *total * kept + sum_v(sum);
    return kept;
}

/* As reference.mla_expanded, of one sequence's n rows: q_nope (n, heads, dn), tokens q_stride and heads head_stride
 * apart, q_pe (n, heads, r), `length` latents (pages of `page` tokens, c + r), w_uk (heads, dn, c), w_uv (heads, dv, c),
 * to out (n, heads, dv).
 *
 * The latents are put in panels once; of each head, BLOCK_KEYS of them at a time, keys and values are expanded, rounded
 * to bfloat16 and put in panels too, and all rows that see them are multiplied by them, in blocks. With `units` in
 * those of the processor for bfloat16, the weights rounded. scratch: prefill_bytes. */
void mla_prefill(const bf16 *q_nope, int64_t q_stride, int64_t head_stride, const bf16 *q_pe, const bf16 *latents,
                 int64_t page, const int32_t *pages, int64_t length, const int64_t *positions, int64_t n, int64_t heads,
                 int64_t dn, int64_t r, int64_t c, int64_t dv, const bf16 *w_uk, const bf16 *w_uv, float scale, bf16 *out,
                 void *scratch, int units, int threads) {
    const Many m = many_of(n, length, heads, dn, r, c, dv, units, threads);
    const Way way = m.way;
    const int64_t of_x = bytes_of(way, 1), of_panel = (m.c + even(r)) * WIDTH;
    bf16 *packed = (bf16 *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    int64_t next_task = 0;
#pragma omp parallel num_threads(threads)
    {
        char *weights = (char *)packed + m.latents + omp_get_thread_num() * m.thread;
        bf16 *keys = (bf16 *)(weights + m.weights), *values = keys + BLOCK_KEYS * m.d;
        float *summed = (float *)((char *)keys + m.keys);
        char *queries = (char *)summed + m.summed;
        float *sums = (float *)(queries + m.queries), *scores = (float *)((char *)sums + m.sums);
        float *chosen = scores + ROWS * BLOCK_KEYS;
        memset(values, 0, BLOCK_KEYS * m.values * sizeof(bf16)); /* what fills them up is no NaN */
#pragma omp for schedule(static)
        for (int64_t p = 0; p < in_wholes(length, WIDTH); p++) {
            bf16 *panel = packed + p * of_panel;
            memset(panel, 0, of_panel * sizeof(bf16));
            for (int64_t key = p * WIDTH; key < least(length, (p + 1) * WIDTH); key++) {
                const bf16 *row = latents + (pages[key / page] * page + key % page) * (c + r);
                bf16 *column = panel + key % WIDTH * 2, *turned = column + m.c * WIDTH;
                for (int64_t j = 0; j < c; j++) column[j / 2 * 2 * WIDTH + j % 2] = row[j];
                for (int64_t j = 0; j < r; j++) turned[j / 2 * 2 * WIDTH + j % 2] = row[c + j];
            }
        }
        for (int64_t task; (task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < heads * m.splits;) {
            const int64_t h = task / m.splits, b0 = m.blocks * (task % m.splits) / m.splits;
            const int64_t b1 = m.blocks * (task % m.splits + 1) / m.splits, row = block_start(n, b0);
            const int64_t rows = block_start(n, b1) - row;
            float *most = sums + rows * m.values, *total = most + rows;
            int64_t last = 0;
            for (int64_t i = 0; i < rows; i++) {
                most[i] = -INFINITY, total[i] = 0;
                last = positions[row + i] > last ? positions[row + i] : last;
            }
            memset(sums, 0, rows * m.values * sizeof(float));
            interleave_blocks(w_uk + h * dn * c, dn, c, c, m.c, 0, 0, blocks_of(dn), way, weights);
            interleave_blocks(w_uv + h * dv * c, dv, c, c, m.c, 0, 0, blocks_of(dv), way, weights + dn * m.c * of_x);
            interleave_blocks(q_nope + h * head_stride, n, dn, q_stride, m.d, 0, b0, b1, way, queries);
            interleave_blocks(q_pe + h * r, n, r, heads * r, m.d, even(dn), b0, b1, way, queries);
            for (int64_t key = 0; key <= last; key += BLOCK_KEYS) {
                const int64_t panels = in_wholes(least(BLOCK_KEYS, least(length, last + 1) - key), WIDTH);
                for (int64_t p = 0; p < panels; p++) {
                    const bf16 *panel = packed + (key / WIDTH + p) * of_panel;
                    vu *to = (vu *)(keys + p * WIDTH * m.d);
                    blocks_by_panel(weights, dn, panel, m.c, way, summed);
                    for (int64_t j = 0; j < dn; j += 2)
                        for (int i = 0; i < WIDTH; i += LANES, to++) {
                            *to = bits_v(*(vf *)(summed + j * WIDTH + i));
                            if (j + 1 < dn) *to |= bits_v(*(vf *)(summed + (j + 1) * WIDTH + i)) << 16;
                        }
                    memcpy(to, panel + m.c * WIDTH, even(r) * WIDTH * sizeof(bf16));
                    blocks_by_panel(weights + dn * m.c * of_x, dv, panel, m.c, way, summed);
                    for (int64_t v = 0; v < dv; v++) {
                        bf16 rounded[WIDTH], *column = values + v / WIDTH * BLOCK_KEYS * WIDTH + v % WIDTH * 2;
                        for (int i = 0; i < WIDTH; i += LANES) narrow_v(*(vf *)(summed + v * WIDTH + i), rounded + i);
                        for (int i = 0; i < WIDTH; i += 2)
                            memcpy(column + (p * WIDTH + i) * WIDTH, rounded + i, 2 * sizeof(bf16));
                    }
                }
                for (int64_t b = b0; b < b1; b++) {
                    const int64_t first = block_start(n, b), count = block_start(n, b + 1) - first, own = first - row;
                    int64_t seen = 0;
                    for (int64_t i = first; i < first + count; i++)
                        seen = positions[i] + 1 - key > seen ? positions[i] + 1 - key : seen;
                    const int64_t used = least(in_wholes(seen, WIDTH), panels);
                    float *acc = sums + own * m.values;
                    if (used == 0) continue;
                    for (int64_t p = 0; p < used; p++)
                        by_panel(queries + own * m.d * of_x, count, keys + p * WIDTH * m.d, m.d, 0, way,
                                 scores + p * count * WIDTH);
                    for (int64_t i = 0; i < count; i++) {
                        const float kept = weigh(scores, used, i, count, positions[first + i] + 1 - key, scale, way,
                                                 most + own + i, total + own + i, chosen);
                        for (int64_t v = 0; v < m.values && kept != 1; v += LANES)
                            *(vf *)(acc + (v / WIDTH * count + i) * WIDTH + v % WIDTH) *= kept;
                    }
                    for (int64_t v = 0; v < m.values; v += WIDTH)
                        by_panel(chosen, count, values + v * BLOCK_KEYS, used * WIDTH, 1, way, acc + v * count);
                }
            }
            for (int64_t b = b0; b < b1; b++) {
                const int64_t first = block_start(n, b), count = block_start(n, b + 1) - first, own = first - row;
                for (int64_t i = 0; i < count; i++)
                    for (int64_t v = 0; v < dv; v += WIDTH) {
                        float *acc = sums + own * m.values + (v * count + i * WIDTH);
                        for (int l = 0; l < WIDTH; l += LANES) *(vf *)(acc + l) /= total[own + i];
                        narrow_row(acc, least(WIDTH, dv - v), out + ((first + i) * heads + h) * dv + v);
                    }
            }
        }
        release_tiles();
    }
}
