/* NEON with dot products (ARMv8.2): float32 by lanes of 4, bytes by sdot. The instruction is written as such: older
 * clangs declare its intrinsic only where all of a file is compiled for it. */
#include "kernels.h"

#if defined(__aarch64__) && defined(__GNUC__)

#if defined(__clang__)
QVL_TARGET("dotprod")
#else
QVL_TARGET("arch=armv8.2-a+dotprod")
#endif

#include "lanes128.h"

INLINE vi byte_dot(vi acc, vi w, vi x) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(w), "w"(x));
    return acc;
}

#include "level.h"

static int supported(void) { return has_dot_products(); }

QVL_LEVEL("neon", neon)

QVL_TARGET_END

#endif
