// 64-bit Arm with the dot product. Compiled with flags of its own (setup.py).
#include <arm_neon.h>

#include "table.h"

namespace lamp_neon_kernels {
#define LAMP_PRODUCTS "neon.h"
#include "kernels.inc"
}  // namespace lamp_neon_kernels

const Kernels lamp_neon = {"neon", lamp_neon_kernels::append, lamp_neon_kernels::attend,
                           lamp_neon_kernels::summarise};
