/* ggml's interface for backends: its functions, and the layout of ggml-backend-impl.h as of the pinned
 * llama-cpp-python. Pointers that are only handed on are void. */
#pragma once

#include "kernels.h"

#include <stdbool.h>

#if defined(_MSC_VER)
#define QVL_THREAD_LOCAL __declspec(thread)
#else
#define QVL_THREAD_LOCAL _Thread_local
#endif

enum { GGML_BACKEND_API_VERSION = 2, GGML_TENSOR_FLAG_COMPUTE = 16, GGML_TYPE_I8 = 24 };
enum { GGML_OP_NONE = 0, GGML_OP_MUL_MAT = 29, GGML_OP_CUSTOM = 95 };
enum { GGML_DEVICE_CPU = 0, GGML_DEVICE_ACCEL = 3 }; /* enum ggml_backend_dev_type */
enum { GGML_STATUS_ALLOC_FAILED = -2, GGML_STATUS_SUCCESS = 0 };

typedef void qvl_kernel(struct ggml_tensor * dst, int ith, int nth, void * userdata);
typedef void unused(void);

struct ggml_init_params {
    size_t mem_size;
    void * mem_buffer;
    bool no_alloc;
};

struct ggml_custom_op_params {
    qvl_kernel * fun;
    int n_tasks;
    void * userdata;
};

struct ggml_backend_dev_props {
    const char *name, *description;
    size_t memory_free, memory_total;
    int type;
    const char * device_id;
    bool async, host_buffer, buffer_from_host_ptr, events, mmap_support;
};

struct ggml_backend_dev;

struct ggml_backend {
    void * guid;
    const char * (*get_name)(struct ggml_backend *);
    void (*free)(struct ggml_backend *);
    unused *set_tensor_async, *get_tensor_async, *set_tensor_2d_async, *get_tensor_2d_async, *cpy_tensor_async;
    unused *synchronize, *graph_plan_create, *graph_plan_free, *graph_plan_update, *graph_plan_compute;
    int (*graph_compute)(struct ggml_backend *, void * graph);
    unused *event_record, *event_wait, *graph_optimize;
    struct ggml_backend_dev * device;
    void * context;
};

struct ggml_backend_reg {
    int api_version;
    const char * (*get_name)(struct ggml_backend_reg *);
    size_t (*get_device_count)(struct ggml_backend_reg *);
    struct ggml_backend_dev * (*get_device)(struct ggml_backend_reg *, size_t index);
    void * (*get_proc_address)(struct ggml_backend_reg *, const char * name);
    void * context;
};

struct ggml_backend_dev {
    const char * (*get_name)(struct ggml_backend_dev *);
    const char * (*get_description)(struct ggml_backend_dev *);
    void (*get_memory)(struct ggml_backend_dev *, size_t * available, size_t * total);
    int (*get_type)(struct ggml_backend_dev *);
    void (*get_props)(struct ggml_backend_dev *, struct ggml_backend_dev_props *);
    struct ggml_backend * (*init_backend)(struct ggml_backend_dev *, const char * params);
    void * (*get_buffer_type)(struct ggml_backend_dev *);
    void * (*get_host_buffer_type)(struct ggml_backend_dev *);
    void * (*buffer_from_host_ptr)(struct ggml_backend_dev *, void * data, size_t size, size_t max_tensor_size);
    bool (*supports_op)(struct ggml_backend_dev *, const struct ggml_tensor * op);
    bool (*supports_buft)(struct ggml_backend_dev *, void * buffer_type);
    bool (*offload_op)(struct ggml_backend_dev *, const struct ggml_tensor * op);
    unused *event_new, *event_free, *event_synchronize;
    struct ggml_backend_reg * reg;
    void * context;
};

/* Addresses in the ggml that is loaded, in the order of runtime/llama/products.py. */
struct qvl_ggml {
    struct ggml_backend_dev * cpu;
    void * cpu_buffer_type;
    struct ggml_backend_reg * (*dev_reg)(struct ggml_backend_dev *); /* ggml_backend_dev_backend_reg */
    struct ggml_backend_dev * (*get_device)(struct ggml_backend *);
    struct ggml_backend * (*dev_init)(struct ggml_backend_dev *, const char * params);
    void (*backend_free)(struct ggml_backend *);
    bool (*buft_is_host)(void * buffer_type);
    void * (*buffer_from_ptr)(void * data, size_t size); /* ggml_backend_cpu_buffer_from_ptr */
    int (*graph_compute)(struct ggml_backend *, void * graph);
    void (*set_n_threads)(struct ggml_backend *, int n);
    void (*set_abort_callback)(struct ggml_backend *, void * callback, void * data);
    void * (*init)(struct ggml_init_params);
    void (*free)(void * context);
    size_t (*graph_overhead)(size_t size, bool grads);
    void * (*new_graph)(void * context, size_t size, bool grads);
    void (*graph_add_node)(void * graph, struct ggml_tensor * node);
    int (*graph_n_nodes)(void * graph);
    struct ggml_tensor * (*graph_node)(void * graph, int i);
};
