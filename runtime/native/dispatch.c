/* The levels of kernels, best first, and which of them a processor has. */
#include "kernels.h"

#include <string.h>

extern const struct qvl_kernels qvl_avx2, qvl_avxvnni, qvl_avx512vnni, qvl_avx512bf16, qvl_neon, qvl_neoni8mm;

/* setup.py defines QVL_HAVE_… for each file that the compiler could compile. Of two that a processor has, the first
 * is taken: on AMD's avx512bf16 comes before avx512vnni, on Intel's after it (see avx512bf16.c). */
static const struct qvl_kernels * const levels[] = {
#if defined(__x86_64__) && defined(__GNUC__)
#ifdef QVL_HAVE_AVX512VNNI
    &qvl_avx512vnni,
#endif
#ifdef QVL_HAVE_AVX512BF16
    &qvl_avx512bf16,
#endif
#ifdef QVL_HAVE_AVXVNNI
    &qvl_avxvnni,
#endif
#ifdef QVL_HAVE_AVX2
    &qvl_avx2,
#endif
#elif defined(__aarch64__) && defined(__GNUC__)
#ifdef QVL_HAVE_NEONI8MM
    &qvl_neoni8mm,
#endif
#ifdef QVL_HAVE_NEON
    &qvl_neon,
#endif
#endif
    NULL,
};

static int prefers(const struct qvl_kernels * level) {
#if defined(__x86_64__) && defined(__GNUC__)
    return strcmp(level->name, "avx512bf16") == 0 && __builtin_cpu_is("amd");
#else
    (void) level;
    return 0;
#endif
}

/* The level at a place in the list, those that this processor prefers first; NULL past the end. */
QVL_EXPORT const struct qvl_kernels * qvl_level(int index) {
    for (int wanted = 1; wanted >= 0; wanted--) {
        for (int i = 0; levels[i] != NULL; i++) {
            if (prefers(levels[i]) == wanted && index-- == 0) {
                return levels[i];
            }
        }
    }
    return NULL;
}
