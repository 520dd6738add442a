// Hadamard rotations (runtime/rotation.py): R = (Sylvester of order 2^n) x (base matrix), over sqrt(D).

constexpr int MOST_DIM = LAMP_MOST_DIM;

// Sylvester's matrix of order 16 times the lanes of a vector.
LAMP_INLINE Vf double_lanes(Vf x) {
#define LAMP_STEP(step, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)               \
  {                                                                                   \
    const Vi lane = Vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};         \
    const Vf other = LAMP_PAIR(x, x, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p); \
    x = other + select((lane & splat(step)) != splat(0), -x, x);                      \
  }
  LAMP_STEP(1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
  LAMP_STEP(2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
  LAMP_STEP(4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
  LAMP_STEP(8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#undef LAMP_STEP
  return x;
}

// COUNT vectors of channels, a power of two; the matrix is its own transpose.
template <int COUNT>
LAMP_INLINE void rotate_vectors(float *x) {
  Vf v[COUNT];
  const Vf norm = splat(1.0f / __builtin_sqrtf((float)(COUNT * LANES)));
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i++) v[i] = double_lanes(load(x + i * LANES));
#pragma GCC unroll 4
  for (int step = 1; step < COUNT; step *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < COUNT / 2; i++) {
      const int at = i / step * 2 * step + i % step;
      const Vf a = v[at], b = v[at + step];
      v[at] = a + b;
      v[at + step] = a - b;
    }
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; i++) store(x + i * LANES, v[i] * norm);
}

// x R in place, or x R^T when `back`.
LAMP_INLINE void rotate(const LampRotation &kind, int dim, bool back, float *x) {
  if (!kind.base) return;
  const int base = (int)kind.base;
  if (base == 1) switch (dim) {
      case 16:
        return rotate_vectors<1>(x);
      case 32:
        return rotate_vectors<2>(x);
      case 64:
        return rotate_vectors<4>(x);
      case 128:
        return rotate_vectors<8>(x);
      case 256:
        return rotate_vectors<16>(x);
      default:
        break;
    }
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
      for (int i = 0; i < base; i++)
        sum += x[first + i] * (float)(back ? kind.signs[j * base + i] : kind.signs[i * base + j]);
      turned[j] = sum * norm;
    }
    for (int j = 0; j < base; j++) x[first + j] = turned[j];
  }
}
