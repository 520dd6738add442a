// Any machine.
#if defined(__AVX512F__)
#include <immintrin.h>  // where it is compiled for the very machine it is compiled on
#endif

#include "table.h"

namespace lamp_portable_kernels {
#define LAMP_PRODUCTS "portable.h"
#include "kernels.inc"
}  // namespace lamp_portable_kernels

const Kernels lamp_portable = {"portable", lamp_portable_kernels::append, lamp_portable_kernels::attend,
                               lamp_portable_kernels::summarise};
