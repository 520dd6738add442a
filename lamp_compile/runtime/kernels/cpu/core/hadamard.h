// Hadamard rotations (runtime/rotation.py) by their base matrices, of order 1, 12 and 20. For callers of the core,
// which is handed one.
#pragma once
#include <vector>

#include "lamp_core.h"

namespace lamp {

// Of `dim` channels; base 0 where there is none.
inline LampRotation hadamard(int64_t dim) {
  static const auto paley = [](size_t prime) {
    const size_t order = prime + 1;
    std::vector<int8_t> made(order * order, 1);
    std::vector<bool> residue(order, false);
    for (size_t i = 1; i < prime; i++) residue[i * i % prime] = true;
    for (size_t i = 0; i < prime; i++) {
      made[(i + 1) * order] = -1;
      for (size_t j = 0; j < prime; j++)
        if (i != j && !residue[(j + prime - i) % prime]) made[(i + 1) * order + j + 1] = -1;
    }
    return made;
  };
  static const std::vector<int8_t> one(1, 1), twelve = paley(11), twenty = paley(19);
  for (const std::vector<int8_t> *base : {&one, &twelve, &twenty}) {
    const int64_t order = base == &one ? 1 : base == &twelve ? 12 : 20;
    if (dim > 0 && dim % order == 0 && !((dim / order) & (dim / order - 1))) return {base->data(), order};
  }
  return {nullptr, 0};
}

}  // namespace lamp
