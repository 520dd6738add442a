// x86 with AVX-512 VNNI: Intel from Ice Lake, AMD from Zen 4 on. Compiled with flags of its own (setup.py).
#include <immintrin.h>

#include "table.h"

namespace lamp_avx512_kernels {
#define LAMP_PRODUCTS "avx512.h"
#include "kernels.inc"
}  // namespace lamp_avx512_kernels

const Kernels lamp_avx512 = {"avx512", lamp_avx512_kernels::append, lamp_avx512_kernels::attend,
                             lamp_avx512_kernels::summarise};
