/* All kernels for the instructions that the including file has defined, and their table. */
#include "attention.h"
#include "linear.h"
#include "norm.h"

#define QVL_JOIN(a, b) a##b
#define QVL_LEVEL(name, symbol)                                                                                       \
    const struct qvl_kernels QVL_JOIN(qvl_, symbol) = { name, supported, attention, linear, norm, prepare, MAX_DIM,   \
                                                        takes, row_bytes };
