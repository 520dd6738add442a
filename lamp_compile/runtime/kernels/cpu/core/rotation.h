// Hadamard rotations (runtime/rotation.py): R = (Sylvester of order 2^n) x (base matrix), over sqrt(D).

constexpr int MOST_DIM = LAMP_MOST_DIM;

// Sylvester's matrix of order 16 times the lanes of a vector.
#if defined(__AVX512F__)
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
#else
// In parts of 128 bits: compilers move lanes of a vector wider than the machine's one by one.
typedef float V4 __attribute__((vector_size(16)));
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
typedef int32_t I4 __attribute__((vector_size(16)));
#define LAMP_FOUR(x, a, b, c, d) __builtin_shuffle(x, I4{a, b, c, d})
#else
#define LAMP_FOUR(x, a, b, c, d) __builtin_shufflevector(x, x, a, b, c, d)
#endif
LAMP_INLINE Vf double_lanes(Vf x) {
  V4 v[4];
  __builtin_memcpy(v, &x, sizeof v);
  for (int i = 0; i < 4; i++) {
    v[i] = LAMP_FOUR(v[i], 1, 0, 3, 2) + v[i] * V4{1, -1, 1, -1};
    v[i] = LAMP_FOUR(v[i], 2, 3, 0, 1) + v[i] * V4{1, 1, -1, -1};
  }
  const V4 a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
  v[0] = a + c, v[1] = b + d, v[2] = a - c, v[3] = b - d;
  __builtin_memcpy(&x, v, sizeof v);
  return x;
}
#undef LAMP_FOUR
#endif

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

constexpr int MOST_BASE = 2 * LANES;

// A base matrix, or its transpose, in floats: row i is what channel i of a block goes to.
struct Base {
  alignas(64) float row[MOST_BASE][MOST_BASE];
  int8_t signs[MOST_BASE * MOST_BASE];
  int order;
};

// Made anew where it is not the one of the thread's row before; nobody says that what lies at an address stays the
// same.
LAMP_APART const Base &base_of(const LampRotation &kind, bool back) {
  static thread_local Base kept[4];
  const int order = (int)kind.base;
  Base &base = kept[2 * (order > LANES) + back];
  if (base.order == order && !__builtin_memcmp(base.signs, kind.signs, order * order)) return base;
  base.order = order;
  __builtin_memcpy(base.signs, kind.signs, order * order);
  for (int i = 0; i < order; i++)
    for (int j = 0; j < order; j++) base.row[i][j] = (float)kind.signs[back ? j * order + i : i * order + j];
  return base;
}

// COUNT blocks of channels times a base matrix.
template <int COUNT, int VECTORS>
LAMP_APART void rotate_blocks(const Base &base, float norm, float *x) {
  const int order = base.order;
  Vf sum[COUNT][VECTORS];
#pragma GCC unroll 4
  for (int b = 0; b < COUNT; b++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) sum[b][v] = splat(0.0f);
  for (int i = 0; i < order; i++)
#pragma GCC unroll 4
    for (int b = 0; b < COUNT; b++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) sum[b][v] += splat(x[b * order + i]) * load(base.row[i] + v * LANES);
  for (int b = 0; b < COUNT; b++) {
    float turned[MOST_BASE];
    for (int v = 0; v < VECTORS; v++) store(turned + v * LANES, sum[b][v] * splat(norm));
    __builtin_memcpy(x + b * order, turned, sizeof(float) * order);
  }
}

template <int VECTORS>
LAMP_INLINE void rotate_all_blocks(const Base &base, int count, float norm, float *x) {
  int b = 0;
  for (; b + 4 <= count; b += 4) rotate_blocks<4, VECTORS>(base, norm, x + b * base.order);
  for (; b < count; b++) rotate_blocks<1, VECTORS>(base, norm, x + b * base.order);
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
  if (base > LANES)
    rotate_all_blocks<2>(base_of(kind, back), dim / base, norm, x);
  else
    rotate_all_blocks<1>(base_of(kind, back), dim / base, norm, x);
}
