// Hadamard rotations (runtime/rotation.py): R = (Sylvester of order 2^n) x (base matrix), over sqrt(D).

constexpr int MOST_DIM = 256;

// x R in place, or x R^T when `back`.
LAMP_INLINE void rotate(const LampRotation &kind, int dim, bool back, float *x) {
  if (!kind.base) return;
  const int base = (int)kind.base;
  for (int step = base; step < dim; step *= 2)
    for (int first = 0; first < dim; first += 2 * step)
      for (int i = first; i < first + step; i++) {
        const float a = x[i], b = x[i + step];
        x[i] = a + b;
        x[i + step] = a - b;
      }
  const float norm = 1.0f / __builtin_sqrtf((float)dim);
  for (int first = 0; first < dim; first += base) {
    float turned[32];
    for (int j = 0; j < base; j++) {
      float sum = 0;
      for (int i = 0; i < base; i++) sum += x[first + i] * (float)(back ? kind.signs[j * base + i] : kind.signs[i * base + j]);
      turned[j] = sum * norm;
    }
    for (int j = 0; j < base; j++) x[first + j] = turned[j];
  }
}
