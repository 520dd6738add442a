// Sixteen floats at a time, in the compilers' own vector types, so that one text serves every instruction set. Included
// inside each instruction set's namespace: nothing here may be shared between files compiled with different flags.

typedef float Vf __attribute__((vector_size(64)));
typedef int32_t Vi __attribute__((vector_size(64)));
typedef uint8_t Vb __attribute__((vector_size(16)));
constexpr int LANES = 16;

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define LAMP_PAIR(a, b, ...) __builtin_shuffle(a, b, Vi{__VA_ARGS__})
#else
#define LAMP_PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

#define LAMP_INLINE static inline __attribute__((always_inline))
// Inlined into what is around them, some loops lose their registers to it.
#define LAMP_APART static __attribute__((noinline))

LAMP_INLINE Vf splat(float x) { return Vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
LAMP_INLINE Vi splat(int32_t x) { return Vi{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
LAMP_INLINE Vf load(const float *from) {
  Vf v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
LAMP_INLINE Vi load(const int32_t *from) {
  Vi v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
LAMP_INLINE void store(float *to, Vf v) { __builtin_memcpy(to, &v, sizeof v); }
// The lowest byte of each.
#if !defined(__AVX512F__) && defined(__AVX2__)
LAMP_INLINE void store_bytes(void *to, Vi v) {
  __m256i x[2];
  __builtin_memcpy(x, &v, sizeof x);
  for (int i = 0; i < 2; i++) x[i] = _mm256_and_si256(x[i], _mm256_set1_epi32(255));
  // Within each 128 bits words of both come together, so what is packed is put in order at the end.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x[0], x[1]), 0xd8);
  _mm_storeu_si128((__m128i *)to, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
LAMP_INLINE void store_bytes(void *to, Vi v) {
  const Vb bytes = __builtin_convertvector(v, Vb);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}
#endif
LAMP_INLINE Vf floats(Vi v) { return __builtin_convertvector(v, Vf); }
LAMP_INLINE Vi whole(Vf v) { return __builtin_convertvector(v, Vi); }
LAMP_INLINE Vf bits(Vi v) { return (Vf)v; }
// Compilers pick lanes of a vector wider than the machine's one by one; bits they take as wide as they can.
LAMP_INLINE Vf select(Vi where, Vf a, Vf b) {
#if defined(__AVX512F__)
  return where ? a : b;
#else
  return (Vf)(((Vi)a & where) | ((Vi)b & ~where));
#endif
}
// Comparisons of vectors wider than the machine's they make one by one, too: `each` takes as many as it has room for.
template <class Part, class Each>
LAMP_INLINE Vf by_parts(Vf a, Vf b, Each each) {
  Part x[sizeof(Vf) / sizeof(Part)], y[sizeof(Vf) / sizeof(Part)];
  __builtin_memcpy(x, &a, sizeof x);
  __builtin_memcpy(y, &b, sizeof y);
  for (size_t i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = each(x[i], y[i]);
  __builtin_memcpy(&a, x, sizeof x);
  return a;
}
// b where either is NaN.
#if defined(__AVX512F__)
LAMP_INLINE Vf larger(Vf a, Vf b) { return (Vf)_mm512_max_ps((__m512)a, (__m512)b); }
LAMP_INLINE Vf smaller(Vf a, Vf b) { return (Vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
LAMP_INLINE Vf larger(Vf a, Vf b) { return by_parts<__m256>(a, b, _mm256_max_ps); }
LAMP_INLINE Vf smaller(Vf a, Vf b) { return by_parts<__m256>(a, b, _mm256_min_ps); }
#elif defined(__ARM_NEON)
LAMP_INLINE float32x4_t larger_part(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
LAMP_INLINE float32x4_t smaller_part(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
LAMP_INLINE Vf larger(Vf a, Vf b) { return by_parts<float32x4_t>(a, b, larger_part); }
LAMP_INLINE Vf smaller(Vf a, Vf b) { return by_parts<float32x4_t>(a, b, smaller_part); }
#else
LAMP_INLINE Vf larger(Vf a, Vf b) { return select(a > b, a, b); }
LAMP_INLINE Vf smaller(Vf a, Vf b) { return select(a < b, a, b); }
#endif
// 0 for NaN.
#if !defined(__AVX512F__) && defined(__AVX2__)
LAMP_INLINE __m256 numbers_part(__m256 a, __m256) { return _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q)); }
LAMP_INLINE Vf numbers(Vf v) { return by_parts<__m256>(v, v, numbers_part); }
#elif defined(__ARM_NEON)
LAMP_INLINE float32x4_t numbers_part(float32x4_t a, float32x4_t) {
  return vbslq_f32(vceqq_f32(a, a), a, vdupq_n_f32(0));
}
LAMP_INLINE Vf numbers(Vf v) { return by_parts<float32x4_t>(v, v, numbers_part); }
#else
LAMP_INLINE Vf numbers(Vf v) { return select(v == v, v, splat(0.0f)); }
#endif
LAMP_INLINE Vf magnitude(Vf v) { return (Vf)((Vi)v & splat(0x7fffffff)); }
LAMP_INLINE Vi finite(Vf v) { return ((Vi)v & splat(0x7f800000)) != splat(0x7f800000); }

#if defined(__AVX512F__)
LAMP_INLINE float total(Vf v) { return _mm512_reduce_add_ps((__m512)v); }
LAMP_INLINE float largest(Vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
LAMP_INLINE float total(Vf v) {
  float a[LANES];
  store(a, v);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) a[i] += a[i + step];
  return a[0];
}
LAMP_INLINE float largest(Vf v) {
  float a[LANES];
  store(a, v);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) a[i] = a[i + step] > a[i] ? a[i + step] : a[i];
  return a[0];
}
#endif
// The totals of sixteen vectors, in order: a transposition on the way costs three shuffles a vector.
LAMP_INLINE Vf totals(Vf *v) {
  for (int i = 0; i < 8; i++) {
    const Vf a = v[2 * i], b = v[2 * i + 1];
    v[i] = LAMP_PAIR(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           LAMP_PAIR(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 4; i++) {
    const Vf a = v[2 * i], b = v[2 * i + 1];
    v[i] = LAMP_PAIR(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           LAMP_PAIR(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; i++) {
    const Vf a = v[2 * i], b = v[2 * i + 1];
    v[i] = LAMP_PAIR(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           LAMP_PAIR(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  return LAMP_PAIR(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         LAMP_PAIR(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
LAMP_INLINE Vf root(Vf v) {
  for (int i = 0; i < LANES; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
#if defined(__AVX512F__)
LAMP_INLINE bool any(Vi v) { return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0; }
#else
LAMP_INLINE bool any(Vi v) {
  int64_t a[8], found = 0;
  __builtin_memcpy(a, &v, sizeof v);
  for (int i = 0; i < 8; i++) found |= a[i];
  return found != 0;
}
#endif

// The signs of sixteen numbers, one bit each.
#if defined(__AVX512F__)
LAMP_INLINE uint32_t signs_of(Vi v) { return _mm512_cmplt_epi32_mask((__m512i)v, _mm512_setzero_si512()); }
#else
LAMP_INLINE uint32_t signs_of(Vi v) {
  uint32_t found = 0;
  for (int i = 0; i < LANES; i++) found |= (uint32_t)v[i] >> 31 << i;
  return found;
}
#endif

// 2^x to two units in the last place, for x up to 127; from -127 down 0, or a number too small to be normal; NaN for
// NaN. Polynomials: with AVX-512 one of degree 5 fitted to 2^f on [0, 1), elsewhere that of Cephes' exp2f on
// [-1/2, 1/2].
LAMP_INLINE Vf exp2(Vf x) {
#if defined(__AVX512F__)
  // x - floor(x), of an infinity 0; the instruction at the end takes floor(x) by itself.
  const Vf part = (Vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vf q = splat(1.8671307e-3f);
  q = q * part + splat(9.0170288e-3f);
  q = q * part + splat(5.5799913e-2f);
  q = q * part + splat(2.4016444e-1f);
  q = q * part + splat(6.9315130e-1f);
  q = q * part + splat(1.0f);
  return (Vf)_mm512_scalef_ps((__m512)q, (__m512)x);
#else
  x = larger(splat(-127.0f), x);
  // 1.5 * 2^23 rounds what is added to it to a whole number; with 127 more, its last bits are that number's exponent.
  const Vf magic = splat(12582912.0f + 127.0f);
  const Vf shifted = x + magic, f = x - (shifted - magic);
  Vf p = splat(1.535336188319500e-4f);
  p = p * f + splat(1.339887440266574e-3f);
  p = p * f + splat(9.618437357674640e-3f);
  p = p * f + splat(5.550332471162809e-2f);
  p = p * f + splat(2.402264791363012e-1f);
  p = p * f + splat(6.931472028550421e-1f);
  p = p * f + splat(1.0f);
  return p * bits((Vi)shifted << 23);
#endif
}

LAMP_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  uint32_t u;
  float f;
  if (exponent == 31) {
    u = sign | 0x7f800000 | fraction << 13;
  } else if (exponent) {
    u = sign | (exponent + 112) << 23 | fraction << 13;
  } else {  // subnormal: fraction * 2^-24
    f = (float)fraction * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  __builtin_memcpy(&f, &u, 4);
  return f;
}

// Rounds to the nearest, ties to even, as torch does.
LAMP_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // from 65520 on: infinity
  if (u < 0x38800000) {                       // below 2^-14: subnormal, in steps of 2^-24
    float x;
    __builtin_memcpy(&x, &u, 4);
    const float stepped = x * 16777216.0f + 12582912.0f;
    uint32_t steps;
    __builtin_memcpy(&steps, &stepped, 4);
    return sign | (uint16_t)(steps - 0x4b400000);
  }
  u += 0xfff + (u >> 13 & 1);
  return sign | (uint16_t)((u - 0x38000000) >> 13);
}

LAMP_INLINE float bfloat_to_float(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
LAMP_INLINE uint16_t float_to_bfloat(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 64);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

LAMP_INLINE void read_row(const void *from, int64_t dtype, int64_t first, int count, float *to) {
  if (dtype == LAMP_FLOAT32) {
    __builtin_memcpy(to, (const float *)from + first, sizeof(float) * count);
  } else {
    const uint16_t *row = (const uint16_t *)from + first;
    if (dtype == LAMP_BFLOAT16)
      for (int i = 0; i < count; i++) to[i] = bfloat_to_float(row[i]);
    else
      for (int i = 0; i < count; i++) to[i] = half_to_float(row[i]);
  }
}
LAMP_INLINE void write_row(void *to, int64_t dtype, int64_t first, int count, const float *from) {
  if (dtype == LAMP_FLOAT32) {
    __builtin_memcpy((float *)to + first, from, sizeof(float) * count);
  } else {
    uint16_t *row = (uint16_t *)to + first;
    if (dtype == LAMP_BFLOAT16)
      for (int i = 0; i < count; i++) row[i] = float_to_bfloat(from[i]);
    else
      for (int i = 0; i < count; i++) row[i] = float_to_half(from[i]);
  }
}
