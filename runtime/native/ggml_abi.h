/* What the kernels need of ggml's binary interface, as of the pinned llama-cpp-python (ggml.h). */
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define QVL_EXPORT __declspec(dllexport)
#else
#define QVL_EXPORT __attribute__((visibility("default")))
#endif

enum { GGML_TYPE_F32 = 0, GGML_TYPE_F16 = 1, GGML_TYPE_Q8_0 = 8,
       GGML_TYPE_Q4_K = 12, GGML_TYPE_Q5_K = 13, GGML_TYPE_Q6_K = 14, GGML_TYPE_BF16 = 30 };

struct ggml_tensor {
    int type;
    void * buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    struct ggml_tensor * src[10];
    struct ggml_tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
    char padding[8];
};

/* count segments of size patches each, one after the other */
struct qvl_run {
    int64_t count, size;
};

struct qvl_params {
    int32_t failed; /* set by a kernel: out of memory */
    float scalar;   /* attention: the scale; norm: the epsilon */
    int32_t choice; /* attention: the number of runs; otherwise see QVL_FORMAT in kernels.h */
    int32_t next;   /* the next task that no thread has taken; 0 between runs */
    struct qvl_run runs[];
};

#if defined(__GNUC__)
/* A task of n_tasks for this thread, -1 when all are taken. Each of the nth threads is told that once, and the
 * last of them resets the count for the next run. Threads that are held up take fewer tasks. */
static inline int64_t qvl_next_task(struct qvl_params * params, int64_t n_tasks, int nth) {
    const int32_t task = __atomic_fetch_add(&params->next, 1, __ATOMIC_RELAXED);
    if (task == n_tasks + nth - 1) {
        __atomic_store_n(&params->next, 0, __ATOMIC_RELAXED);
    }
    return task < n_tasks ? task : -1;
}
#endif
