// x86 with AVX2, FMA and F16C: from Haswell and Zen on. Compiled with flags of its own (setup.py).
#include <immintrin.h>

#include "table.h"

namespace lamp_avx2_kernels {
#define LAMP_PRODUCTS "avx2.h"
#include "kernels.inc"
}  // namespace lamp_avx2_kernels

const Kernels lamp_avx2 = {"avx2", lamp_avx2_kernels::append, lamp_avx2_kernels::attend,
                           lamp_avx2_kernels::summarise};
