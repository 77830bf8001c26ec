/* OpenMP as Clang calls it, by way of GNU's library. torch on Linux brings libgomp, and a process had better have one pool
 * of threads; Clang compiles the pragmas of kernels.c to calls of LLVM's runtime. Here is what kernels.c needs of that,
 * made of libgomp's own entry points (interface: openmp/runtime/src/kmp.h of LLVM, gomp's libgomp_g.h).
 */
#include <stdint.h>

#define HERE __attribute__((visibility("hidden"))) /* for this library alone, whatever else is in the process */
enum { CAPTURED = 64 };                            /* the most variables that a parallel region uses from around it */

int omp_get_thread_num(void);
int omp_get_num_threads(void);
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
void GOMP_barrier(void);

typedef void (*Region)(int32_t *thread, int32_t *bound, ...);
typedef struct {
    Region body;
    void *a[CAPTURED];
} Fork;

static _Thread_local int32_t wanted; /* threads of the next region; 0: as many as there are */

HERE int32_t __kmpc_global_thread_num(void *place) { return (void)place, omp_get_thread_num(); }
HERE void __kmpc_push_num_threads(void *place, int32_t thread, int32_t n) { (void)place, (void)thread, wanted = n; }
HERE void __kmpc_barrier(void *place, int32_t thread) { (void)place, (void)thread, GOMP_barrier(); }
HERE void __kmpc_for_static_fini(void *place, int32_t thread) { (void)place, (void)thread; }

static void run(void *data) { /* a region takes as many arguments as it has captured; the caller removes them */
    Fork *f = data;
    int32_t me = omp_get_thread_num(), bound = me;
    void **a = f->a;
    f->body(&me, &bound, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14],
            a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28], a[29],
            a[30], a[31], a[32], a[33], a[34], a[35], a[36], a[37], a[38], a[39], a[40], a[41], a[42], a[43], a[44],
            a[45], a[46], a[47], a[48], a[49], a[50], a[51], a[52], a[53], a[54], a[55], a[56], a[57], a[58], a[59],
            a[60], a[61], a[62], a[63]);
}

HERE void __kmpc_fork_call(void *place, int32_t n, Region body, ...) {
    Fork f = {body, {0}};
    unsigned threads = wanted;
    __builtin_va_list list;
    (void)place, wanted = 0;
    if (n > CAPTURED) __builtin_trap();
    __builtin_va_start(list, body);
    for (int32_t i = 0; i < n; i++) f.a[i] = __builtin_va_arg(list, void *);
    __builtin_va_end(list);
    GOMP_parallel(run, &f, threads, 0);
}

/* This thread's share of the iterations from *lower to *upper, in steps of 1, all in one piece. */
HERE void __kmpc_for_static_init_8(void *place, int32_t thread, int32_t schedule, int32_t *last, int64_t *lower,
                                   int64_t *upper, int64_t *stride, int64_t step, int64_t chunk) {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads(), n = *upper - *lower + 1, first = *lower;
    (void)place, (void)thread, (void)schedule, (void)step, (void)chunk;
    *stride = n;
    *lower = first + n * me / all;
    *upper = first + n * (me + 1) / all - 1;
    *last = me == all - 1;
}
