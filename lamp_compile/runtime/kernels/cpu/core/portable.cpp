// Any machine. What vectors.h does with its instructions is for where this is compiled for one that surely has them.
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "table.h"

namespace lamp_portable_kernels {
#define LAMP_PRODUCTS "portable.h"
#include "kernels.inc"
}  // namespace lamp_portable_kernels

const Kernels lamp_portable = {"portable", lamp_portable_kernels::append, lamp_portable_kernels::attend,
                               lamp_portable_kernels::summarise};
