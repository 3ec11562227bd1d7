/* A ggml backend of kind ACCEL, as ggml's BLAS backend is one: it computes the decoder's products with many columns.
 *
 * The scheduler of a llama.cpp context asks its backends in turn which operations they support. This one takes
 * products with matrices of the file and runs the image encoder's kernels on them, as custom operations on a CPU
 * backend of its own, and so on the threads that compute the rest of the graph. */
#include "backend.h"

#include <stdlib.h>
#include <string.h>

struct state {
    const struct qvl_kernels * level;
    struct ggml_backend * cpu;
    char * scratch; /* columns in the format of the kernels */
    size_t scratch_bytes;
};

/* The nodes of our kernels for a graph of products. Columns that several products read are converted once. */
struct plan {
    int n;
    size_t bytes; /* of scratch */
    struct ggml_tensor * nodes;
    struct qvl_params * params;          /* of each node */
    const struct ggml_tensor ** columns; /* what a node converts; NULL where it multiplies */
};

static struct qvl_ggml ggml;
static const struct qvl_kernels * chosen;
static int64_t fewest_columns;
static QVL_THREAD_LOCAL int wanted; /* whether contexts that this thread opens get a backend */
static struct ggml_backend_dev device;
static struct ggml_backend_reg registry;

static struct ggml_tensor custom(const struct ggml_tensor * like, qvl_kernel * kernel, struct qvl_params * params) {
    const struct ggml_custom_op_params packed = { kernel, -1, params };
    struct ggml_tensor node = { .op = GGML_OP_CUSTOM, .flags = GGML_TENSOR_FLAG_COMPUTE, .data = like->data };
    memcpy(node.op_params, &packed, sizeof packed);
    memcpy(node.ne, like->ne, sizeof node.ne);
    memcpy(node.nb, like->nb, sizeof node.nb);
    return node;
}

static struct ggml_tensor * converted(struct plan * plan, const struct qvl_kernels * level, struct ggml_tensor * x,
                                      int format) {
    for (int i = 0; i < plan->n; i++) {
        if (plan->columns[i] == x && QVL_FORMAT(plan->params[i].choice) == format) {
            return &plan->nodes[i];
        }
    }
    struct ggml_tensor * node = &plan->nodes[plan->n];
    plan->columns[plan->n] = x;
    plan->params[plan->n].choice = format << 16;
    *node = custom(x, level->prepare, &plan->params[plan->n]);
    plan->n++;
    node->type = GGML_TYPE_I8;
    node->ne[0] = level->row_bytes(format, x->ne[0]);
    node->nb[0] = 1;
    node->nb[1] = (size_t) node->ne[0];
    node->nb[2] = node->nb[3] = node->nb[1] * (size_t) node->ne[1];
    node->src[0] = x;
    node->view_offs = plan->bytes; /* its place in scratch */
    plan->bytes += (node->nb[2] + 63) / 64 * 64;
    return node;
}

static void fill(struct plan * plan, const struct qvl_kernels * level, void * graph) {
    for (int i = 0; i < ggml.graph_n_nodes(graph); i++) {
        const struct ggml_tensor * op = ggml.graph_node(graph, i);
        if (op->op == GGML_OP_MUL_MAT && op->flags & GGML_TENSOR_FLAG_COMPUTE) {
            struct ggml_tensor * x = converted(plan, level, op->src[1], level->takes(op->src[0]->type));
            struct ggml_tensor * node = &plan->nodes[plan->n];
            *node = custom(op, level->linear, &plan->params[plan->n]);
            plan->n++;
            node->src[0] = op->src[0];
            node->src[1] = x;
        }
    }
}

static int run(const struct plan * plan, struct state * state) {
    if (plan->bytes > state->scratch_bytes) {
        free(state->scratch);
        state->scratch = malloc(plan->bytes);
        state->scratch_bytes = state->scratch == NULL ? 0 : plan->bytes;
    }
    const struct ggml_init_params params = { ggml.graph_overhead((size_t) plan->n, false) + 1024, NULL, true };
    void * context = plan->bytes > state->scratch_bytes ? NULL : ggml.init(params);
    if (context == NULL) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    void * graph = ggml.new_graph(context, (size_t) plan->n, false);
    for (int i = 0; i < plan->n; i++) {
        if (plan->columns[i] != NULL) {
            plan->nodes[i].data = state->scratch + plan->nodes[i].view_offs;
        }
        ggml.graph_add_node(graph, &plan->nodes[i]);
    }
    int status = ggml.graph_compute(state->cpu, graph);
    for (int i = 0; i < plan->n; i++) {
        status = plan->params[i].failed ? GGML_STATUS_ALLOC_FAILED : status;
    }
    ggml.free(context);
    return status;
}

static int graph_compute(struct ggml_backend * backend, void * graph) {
    struct state * state = backend->context;
    const size_t room = 2 * (size_t) ggml.graph_n_nodes(graph) + 1;
    struct plan plan = { 0 };
    int status = GGML_STATUS_ALLOC_FAILED;
    plan.nodes = calloc(room, sizeof *plan.nodes);
    plan.params = calloc(room, sizeof *plan.params);
    plan.columns = calloc(room, sizeof *plan.columns);
    if (plan.nodes != NULL && plan.params != NULL && plan.columns != NULL) {
        fill(&plan, state->level, graph);
        status = plan.n == 0 ? GGML_STATUS_SUCCESS : run(&plan, state);
    }
    free(plan.nodes);
    free(plan.params);
    free((void *) plan.columns);
    return status;
}

static const char * backend_name(struct ggml_backend * backend) {
    (void) backend;
    return "QVL";
}

static void free_backend(struct ggml_backend * backend) {
    struct state * state = backend->context;
    if (state != NULL) {
        if (state->cpu != NULL) {
            ggml.backend_free(state->cpu);
        }
        free(state->scratch);
        free(state);
    }
    free(backend);
}

static struct ggml_backend * init_backend(struct ggml_backend_dev * dev, const char * params) {
    static uint8_t guid[16] = { 'q', 'v', 'l' };
    struct ggml_backend * backend = calloc(1, sizeof *backend);
    struct state * state = calloc(1, sizeof *state);
    if (backend == NULL || state == NULL || (state->cpu = ggml.dev_init(ggml.cpu, params)) == NULL) {
        free(state);
        free(backend);
        return NULL;
    }
    state->level = chosen;
    backend->guid = guid;
    backend->get_name = backend_name;
    backend->free = free_backend;
    backend->graph_compute = graph_compute;
    backend->device = dev;
    backend->context = state;
    return backend;
}

static const char * device_name(struct ggml_backend_dev * dev) {
    (void) dev;
    return "QVL";
}

static void device_memory(struct ggml_backend_dev * dev, size_t * available, size_t * total) {
    (void) dev;
    *available = *total = 0;
}

/* Contexts that other threads open take it for one more CPU, which they pass over. */
static int device_type(struct ggml_backend_dev * dev) {
    (void) dev;
    return wanted ? GGML_DEVICE_ACCEL : GGML_DEVICE_CPU;
}

static void device_props(struct ggml_backend_dev * dev, struct ggml_backend_dev_props * props) {
    const struct ggml_backend_dev_props known = { .name = device_name(dev), .description = device_name(dev),
                                                  .type = device_type(dev), .buffer_from_host_ptr = true,
                                                  .mmap_support = true };
    *props = known;
}

static void * buffer_type(struct ggml_backend_dev * dev) {
    (void) dev;
    return ggml.cpu_buffer_type;
}

static void * buffer_from_host_ptr(struct ggml_backend_dev * dev, void * data, size_t size, size_t largest) {
    (void) dev;
    (void) largest;
    return ggml.buffer_from_ptr(data, size);
}

static bool supports_buft(struct ggml_backend_dev * dev, void * buft) {
    (void) dev;
    return ggml.buft_is_host(buft);
}

/* Types of matrices whose products come out at least as exact as ggml's. It multiplies those of float32 without
 * rounding the columns, and those of float16 with columns in float16, which is finer than bfloat16. */
static bool takes(int type) {
    const int format = type == GGML_TYPE_F32 ? QVL_F32 : chosen->takes(type);
    const bool bfloat16 = format == QVL_WIDE && chosen->row_bytes(QVL_WIDE, 64) == 64 * 2;
    return format != QVL_F32 && !(bfloat16 && type == GGML_TYPE_F16);
}

/* A matrix of the file times many columns; op_params[1] is a hint that asks for another algorithm. */
static bool supports_op(struct ggml_backend_dev * dev, const struct ggml_tensor * op) {
    (void) dev;
    const struct ggml_tensor *w = op->src[0], *x = op->src[1];
    return op->op == GGML_OP_MUL_MAT && op->op_params[1] == 0 && w->op == GGML_OP_NONE && w->view_src == NULL &&
           takes(w->type) && w->ne[2] == 1 && w->ne[3] == 1 && x->type == GGML_TYPE_F32 && x->nb[0] == 4 &&
           x->ne[2] == 1 && x->ne[3] == 1 && x->ne[1] >= fewest_columns;
}

static void set_n_threads(struct ggml_backend * backend, int n) {
    ggml.set_n_threads(((struct state *) backend->context)->cpu, n);
}

static void set_abort_callback(struct ggml_backend * backend, void * callback, void * data) {
    ggml.set_abort_callback(((struct state *) backend->context)->cpu, callback, data);
}

static const char * registry_name(struct ggml_backend_reg * reg) {
    (void) reg;
    return "QVL";
}

static size_t device_count(struct ggml_backend_reg * reg) {
    (void) reg;
    return 1;
}

static struct ggml_backend_dev * get_device(struct ggml_backend_reg * reg, size_t index) {
    (void) reg;
    (void) index;
    return &device;
}

static void * get_proc_address(struct ggml_backend_reg * reg, const char * name) {
    (void) reg;
    return strcmp(name, "ggml_backend_set_n_threads") == 0        ? (void *) set_n_threads
           : strcmp(name, "ggml_backend_set_abort_callback") == 0 ? (void *) set_abort_callback
                                                                  : NULL;
}

/* True if ggml's own CPU backend has the layout of backend.h: the last fields of its structs are where they should be. */
static bool fits(void) {
    struct ggml_backend_reg * reg = ggml.dev_reg(ggml.cpu);
    struct ggml_backend * cpu = ggml.dev_init(ggml.cpu, NULL);
    const bool same = cpu != NULL && cpu->device == ggml.cpu && ggml.get_device(cpu) == ggml.cpu &&
                      ggml.cpu->reg == reg && reg->api_version == GGML_BACKEND_API_VERSION &&
                      reg->get_device(reg, 0) == ggml.cpu;
    if (cpu != NULL) {
        ggml.backend_free(cpu);
    }
    return same;
}

/* The registry for ggml_backend_register, to be asked for once; NULL where ggml is of another build. */
QVL_EXPORT void * qvl_backend(const struct qvl_ggml * functions) {
    ggml = *functions;
    if (!fits()) {
        return NULL;
    }
    const struct ggml_backend_reg known = { GGML_BACKEND_API_VERSION, registry_name, device_count, get_device,
                                            get_proc_address, NULL };
    const struct ggml_backend_dev dev = {
        .get_name = device_name, .get_description = device_name, .get_memory = device_memory,
        .get_type = device_type, .get_props = device_props, .init_backend = init_backend,
        .get_buffer_type = buffer_type, .buffer_from_host_ptr = buffer_from_host_ptr,
        .supports_op = supports_op, .supports_buft = supports_buft, .reg = &registry,
    };
    registry = known;
    device = dev;
    return &registry;
}

/* Give contexts that this thread opens a backend at a level, for products of so many columns; NULL: give them none. */
QVL_EXPORT void qvl_backend_choose(const struct qvl_kernels * level, int64_t columns) {
    wanted = level != NULL;
    if (wanted) {
        chosen = level;
        fewest_columns = columns;
    }
}
