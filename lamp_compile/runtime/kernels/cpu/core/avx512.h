// Integer products with AVX-512 VNNI. What they compute: portable.h.

#define LAMP_WHOLE  // whole.h is written in what follows
#define LAMP_LAMBDA __attribute__((always_inline))

// Adds to each of 16 sums four products of unsigned with signed bytes. Compilers know the instruction too, but copy its
// sums about (gcc 12).
LAMP_INLINE void add_products(__m512i &sum, __m512i without_sign, __m512i with_sign) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(without_sign), "v"(with_sign));
}

// Sums of pairs of words: within each 128 bits the sums of `a` and `b` come next to each other.
LAMP_INLINE __m512i sums_of_two(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
LAMP_INLINE __m512i sums_of_four(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Within each 128 bits: vector i becomes the sums of four, of what were vectors 4 i to 4 i + 3.
template <int COUNT>
LAMP_INLINE void sum_lanes(__m512i *v) {
  for (int i = 0; i < COUNT / 2; i++) v[i] = sums_of_two(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < COUNT / 4; i++) v[i] = sums_of_four(v[2 * i], v[2 * i + 1]);
}

// The sums of 16 vectors, in order.
LAMP_INLINE __m512i sums_of_16(__m512i *v) {
  sum_lanes<16>(v);
  for (int i = 0; i < 2; i++)
    v[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x88),
                            _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(v[0], v[1], 0x88), _mm512_shuffle_i32x4(v[0], v[1], 0xdd));
}

// Nibbles as bytes that a product takes without a sign. Of one plane, with the highest bit of each nibble flipped: a
// nibble plus 8. Of both: 16 times the high nibble and the residual one, plus 136. Operations of two operands, where
// there is a choice: those of three wait for products (Zen 4).
constexpr int SURPLUS = 8, SURPLUS_BOTH = 136;
LAMP_INLINE __m512i flipped(__m512i x) { return _mm512_xor_si512(x, _mm512_set1_epi8((char)0x88)); }
LAMP_INLINE __m512i upper_of(__m512i x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
LAMP_INLINE __m512i lower_of(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
// Bits of `a` above each nibble's border, of `b` below.
LAMP_INLINE __m512i joined(__m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8((char)0xf0), a, b, 0xca);
}
LAMP_INLINE __m512i upper_of(__m512i high, __m512i residual) { return joined(high, _mm512_srli_epi16(residual, 4)); }
LAMP_INLINE __m512i lower_of(__m512i high, __m512i residual) { return joined(_mm512_slli_epi16(high, 4), residual); }

// 32 bytes from `at` of four keys, four apart, as two vectors: sixteen of each key, in order of keys.
template <int HALF>
LAMP_INLINE void sixteen_of_four(const uint8_t *at, __m512i *to) {
  __m512i pair[2];
  // An insertion would take the products' units, a load into one half does not.
  for (int i = 0; i < 2; i++) {
    const uint8_t *from = at + 8 * i * HALF;
    const __m512i half = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from));
    pair[i] = _mm512_mask_loadu_epi64(half, 0xf0, from + 4 * HALF - 32);
  }
  to[0] = _mm512_shuffle_i32x4(pair[0], pair[1], 0x88);
  to[1] = _mm512_shuffle_i32x4(pair[0], pair[1], 0xdd);
}

// Adds to the sums of sixteen keys the products of four channels of each with four of a query. In this order: what is
// put between products, so that it runs beside them, must not be moved together.
LAMP_INLINE void add_four(__m512i &sum, __m512i nibbles, const int8_t *query) {
  __asm__ volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(nibbles), "m"(*(const int32_t *)query));
}

// Four vectors of four keys by sixteen channels, as four of sixteen keys by four channels.
LAMP_INLINE void transpose(__m512i *v) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, c), v[1] = _mm512_unpackhi_epi64(a, c);
  v[2] = _mm512_unpacklo_epi64(b, d), v[3] = _mm512_unpackhi_epi64(b, d);
}

// The first 32 bytes of sixteen keys.
template <int HALF>
LAMP_INLINE void begin_keys(const uint8_t *plane, __m512i (*bytes)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512i two[2];
    sixteen_of_four<HALF>(plane + i * HALF, two);
    bytes[0][i] = two[0], bytes[1][i] = two[1];
  }
  transpose(bytes[0]);
  transpose(bytes[1]);
}

// Products of four channels of sixteen keys: 16 times the upper nibbles and, apart, the lower ones.
template <int ROWS>
LAMP_INLINE void add_rows(__m512i (*sums)[2], __m512i upper, __m512i lower, const int8_t *query) {
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    add_four(sums[r][0], upper, query + 2 * r * PADDED);
    add_four(sums[r][1], lower, query + (2 * r + 1) * PADDED);
  }
}

// Whole blocks of 64 bytes a key: lanes become keys, and nothing is summed across them.
template <int ROWS, int HALF, bool BOTH>
LAMP_APART void dots_by_key(const uint8_t *plane, const uint8_t *residual, const int8_t *q, const int32_t *sum8,
                            Feed &feed, int32_t *out) {
  constexpr int ASKED = BOTH ? 2 : 1;
  for (int j = 0; j < SUBTILE; j += LANES) {
    __m512i sums[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      sums[r][0] = _mm512_setzero_si512();
      sums[r][1] = _mm512_set1_epi32(-sum8[r] * ((BOTH ? SURPLUS_BOTH : SURPLUS) / SURPLUS));
    }
#pragma GCC unroll 4
    for (int first = 0; first < HALF; first += 32) {
      const uint8_t *soon = take(feed, ASKED * 8 * 64);
      __m512i bytes[2][4], more[2][4];
      // Taken out of the loop, addresses would be spilled and read again.
      __asm__ volatile("" : "+r"(q), "+r"(plane), "+r"(residual));
      begin_keys<HALF>(plane + j * HALF + first, bytes);
      if (BOTH) begin_keys<HALF>(residual + j * HALF + first, more);
#pragma GCC unroll 8
      for (int d = 0; d < 8; d++) {
        const __m512i high = bytes[d / 4][d % 4], low = BOTH ? more[d / 4][d % 4] : high, x = flipped(high);
        const __m512i above = _mm512_and_si512(x, _mm512_set1_epi8((char)0xf0));
        add_rows<ROWS>(sums, BOTH ? flipped(upper_of(high, low)) : above,
                       BOTH ? flipped(lower_of(high, low)) : lower_of(x), q + first + 4 * d);
        for (int i = 0; i < ASKED; i++) ask(soon + 64 * (ASKED * d + i));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const __m512i upper = BOTH ? sums[r][0] : _mm512_srai_epi32(sums[r][0], 4);
      _mm512_storeu_si512(out + r * SUBTILE + j, _mm512_add_epi32(upper, sums[r][1]));
    }
  }
}

template <int ROWS, int BLOCKS>
LAMP_APART void dots_of(const uint8_t *plane, int half, const int8_t *q, const int32_t *sum8, Feed &feed,
                        int32_t *out) {
  constexpr int KEYS = 16 / ROWS;
  const int left = half - 64 * (BLOCKS - 1);
  const __mmask64 tail = left == 64 ? ~0ull : (1ull << left) - 1;
  __m512i query[ROWS][2][BLOCKS];
  for (int r = 0; r < ROWS; r++)
    for (int part = 0; part < 2; part++)
      for (int b = 0; b < BLOCKS; b++) query[r][part][b] = _mm512_loadu_si512(q + (2 * r + part) * PADDED + 64 * b);
  // Nibbles are read as 0 to 15, 8 too much.
  int32_t repeated[16];
  for (int i = 0; i < 16; i++) repeated[i] = sum8[i / KEYS];
  const __m512i correction = _mm512_loadu_si512(repeated);
  for (int j = 0; j < SUBTILE; j += KEYS) {
    __m512i acc[16];
    const uint8_t *soon = take(feed, KEYS * half);
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; i++) {
      __m512i sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_si512();
      for (int b = 0; b < BLOCKS; b++) {
        const uint8_t *at = plane + (j + i) * half + 64 * b;
        ask(soon + i * half + 64 * b);
        const __m512i bytes = b == BLOCKS - 1 ? _mm512_maskz_loadu_epi8(tail, at) : _mm512_loadu_si512(at);
        const __m512i upper = upper_of(flipped(bytes)), lower = lower_of(flipped(bytes));
        for (int r = 0; r < ROWS; r++) {
          add_products(sum[r], upper, query[r][0][b]);
          add_products(sum[r], lower, query[r][1][b]);
        }
      }
      for (int r = 0; r < ROWS; r++) acc[r * KEYS + i] = sum[r];
    }
    const __m512i found = _mm512_sub_epi32(sums_of_16(acc), correction);
    if (ROWS == 1) {
      _mm512_storeu_si512(out + j, found);
    } else if (ROWS == 2) {
      _mm256_storeu_si256((__m256i *)(out + j), _mm512_castsi512_si256(found));
      _mm256_storeu_si256((__m256i *)(out + SUBTILE + j), _mm512_extracti64x4_epi64(found, 1));
    } else {
      _mm_storeu_si128((__m128i *)(out + j), _mm512_castsi512_si128(found));
      _mm_storeu_si128((__m128i *)(out + SUBTILE + j), _mm512_extracti32x4_epi32(found, 1));
      _mm_storeu_si128((__m128i *)(out + 2 * SUBTILE + j), _mm512_extracti32x4_epi32(found, 2));
      _mm_storeu_si128((__m128i *)(out + 3 * SUBTILE + j), _mm512_extracti32x4_epi32(found, 3));
    }
  }
}

template <int ROWS>
LAMP_INLINE void dots(const uint8_t *plane, int half, const int8_t *q, const int32_t *sum8, Feed &feed, int32_t *out) {
  if (ROWS > 1 && half == 64)
    dots_by_key<ROWS, 64, false>(plane, plane, q, sum8, feed, out);
  else if (ROWS > 1 && half == 128)
    dots_by_key<ROWS, 128, false>(plane, plane, q, sum8, feed, out);
  else if (half <= 64)
    dots_of<ROWS, 1>(plane, half, q, sum8, feed, out);
  else
    dots_of<ROWS, 2>(plane, half, q, sum8, feed, out);
}

#include "dots_by_parts.h"

template <int ROWS>
LAMP_INLINE void fine_dots(const uint8_t *high, const uint8_t *residual, int half, const int8_t *q, const int32_t *sum8,
                           Feed &feed, int32_t *out) {
  if (ROWS > 1 && half == 64)
    dots_by_key<ROWS, 64, true>(high, residual, q, sum8, feed, out);
  else if (ROWS > 1 && half == 128)
    dots_by_key<ROWS, 128, true>(high, residual, q, sum8, feed, out);
  else
    dots_by_parts<ROWS>(high, residual, half, q, sum8, feed, out);
}

#include "avx512_values.h"
#include "avx512_lanes.h"

LAMP_INLINE Vf halves(const uint16_t *from) { return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
