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
  for (int i = 0; i < 2; i++)
    pair[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(at + 8 * i * HALF))),
                                 _mm256_loadu_si256((const __m256i *)(at + 8 * i * HALF + 4 * HALF)), 1);
  to[0] = _mm512_shuffle_i32x4(pair[0], pair[1], 0x88);
  to[1] = _mm512_shuffle_i32x4(pair[0], pair[1], 0xdd);
}

// Adds the products of sixteen channels of sixteen keys: four vectors of four keys to a row.
template <int ROWS>
LAMP_INLINE void multiply_keys(const __m512i *nibbles, const int8_t *q, __m512i (*sums)[4]) {
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    const __m512i query = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(q + 2 * r * PADDED)));
    for (int i = 0; i < 4; i++) add_products(sums[r][i], nibbles[i], query);
  }
}

// Whole blocks of 64 bytes a key: lanes become keys, four channels to each, and little is summed across them.
template <int ROWS, int HALF, bool BOTH>
LAMP_APART void dots_by_lane(const uint8_t *plane, const uint8_t *residual, const int8_t *q, const int32_t *sum8,
                             Feed &feed, int32_t *out) {
  for (int j = 0; j < SUBTILE; j += LANES) {
    __m512i sums[ROWS][4];
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < 4; i++) sums[r][i] = _mm512_setzero_si512();
    for (int first = 0; first < HALF; first += 32) {
      constexpr int SOON = (BOTH ? 16 : 8) * 64;
      const uint8_t *soon = take(feed, SOON);
      // Taken out of the loop, the query's vectors would be spilled and read again.
      __asm__ volatile("" : "+r"(q), "+r"(plane), "+r"(residual));
      __m512i bytes[4][2], more[4][2], nibbles[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        sixteen_of_four<HALF>(plane + (j + i) * HALF + first, bytes[i]);
        if (BOTH) sixteen_of_four<HALF>(residual + (j + i) * HALF + first, more[i]);
        for (int b = 0; b < 2 && !BOTH; b++) bytes[i][b] = flipped(bytes[i][b]);
        for (int n = 0; n < SOON / 4; n += 64) ask(soon + i * (SOON / 4) + n);
      }
#pragma GCC unroll 2
      for (int b = 0; b < 2; b++) {
        const int8_t *query = q + first + 16 * b;
        for (int i = 0; i < 4; i++)
          nibbles[i] = BOTH ? flipped(upper_of(bytes[i][b], more[i][b])) : upper_of(bytes[i][b]);
        multiply_keys<ROWS>(nibbles, query, sums);
        for (int i = 0; i < 4; i++)
          nibbles[i] = BOTH ? flipped(lower_of(bytes[i][b], more[i][b])) : lower_of(bytes[i][b]);
        multiply_keys<ROWS>(nibbles, query + PADDED, sums);
      }
    }
    for (int r = 0; r < ROWS; r++) {
      sum_lanes<4>(sums[r]);
      const int32_t surplus = sum8[r] * ((BOTH ? SURPLUS_BOTH : SURPLUS) / SURPLUS);
      _mm512_storeu_si512(out + r * SUBTILE + j, _mm512_sub_epi32(sums[r][0], _mm512_set1_epi32(surplus)));
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
    dots_by_lane<ROWS, 64, false>(plane, plane, q, sum8, feed, out);
  else if (ROWS > 1 && half == 128)
    dots_by_lane<ROWS, 128, false>(plane, plane, q, sum8, feed, out);
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
    dots_by_lane<ROWS, 64, true>(high, residual, q, sum8, feed, out);
  else if (ROWS > 1 && half == 128)
    dots_by_lane<ROWS, 128, true>(high, residual, q, sum8, feed, out);
  else
    dots_by_parts<ROWS>(high, residual, half, q, sum8, feed, out);
}

// 64 bytes: 32 keys of two channels. In tiles of 32 keys they lie together.
template <bool TOGETHER>
LAMP_INLINE __m512i two_channels(const uint8_t *at, int64_t stride) {
  if (TOGETHER) return _mm512_loadu_si512(at);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at)),
                            _mm256_loadu_si256((const __m256i *)(at + stride)), 1);
}

// Sums over keys of sixteen channels, from four vectors of four; the last ones may be missing.
LAMP_INLINE __m512i channels_of(const __m512i *v, int pairs) {
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  const __m512i zero = _mm512_setzero_si512();
  const __m512i a = sums_of_four(v[0], pairs > 2 ? v[1] : zero);
  const __m512i b = pairs > 4 ? sums_of_four(v[2], pairs > 6 ? v[3] : zero) : zero;
  const __m512i joined = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  return _mm512_permutexvar_epi32(order, joined);
}

// All channels, sixteen at a time, two pairs of two by `multiply_pairs(where, upper, lower)`; `finish(r, upper, lower)`
// makes sums of channels of what it left of a row.
template <int ROWS, class Multiply, class Finish>
LAMP_INLINE void all_channels(int64_t stride, int half, int32_t *out, Multiply multiply_pairs, Finish finish) {
  __m512i sums[ROWS][2][4];
  for (int c = 0; c < half; c += 16) {
    const int pairs = half - c >= 16 ? 8 : (half - c) / 2;
    for (int p = 0; p < pairs; p += 2) {
      const int64_t first = c + 2 * p, at[2] = {first * stride, (p + 1 < pairs ? first + 2 : first) * stride};
      __m512i upper[2][ROWS], lower[2][ROWS];
      for (int i = 0; i < 2; i++)
        for (int r = 0; r < ROWS; r++) upper[i][r] = lower[i][r] = _mm512_setzero_si512();
      multiply_pairs(at, upper, lower);
      for (int r = 0; r < ROWS; r++) {
        sums[r][0][p / 2] = sums_of_two(upper[0][r], upper[1][r]);
        sums[r][1][p / 2] = sums_of_two(lower[0][r], lower[1][r]);
      }
    }
    const __mmask16 there = (__mmask16)((1u << (2 * pairs)) - 1);
    for (int r = 0; r < ROWS; r++) {
      __m512i upper = channels_of(sums[r][0], pairs), lower = channels_of(sums[r][1], pairs);
      finish(r, upper, lower);
      _mm512_mask_storeu_epi32(out + r * 2 * half + c, there, upper);
      _mm512_mask_storeu_epi32(out + r * 2 * half + half + c, there, lower);
    }
  }
}

constexpr int MOST_TILES = 16;

// Weights of 32 keys next to themselves, as two channels need them: broadcasts would wait for the products' units.
LAMP_INLINE void twice_over(const uint8_t *w, int count, uint8_t *to) {
  for (int i = 0; i < count * SUBTILE; i += SUBTILE)
    _mm512_store_si512(to + 2 * i, _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(w + i))));
}

// 8 times the sum of each row's weights, which is what a plus 8 makes too much.
template <int ROWS>
LAMP_INLINE void surplus_of(const uint8_t *twice, int count, int32_t *to) {
  __m512i sum[ROWS];
  for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_si512();
  for (int t = 0; t < count; t++)
    for (int r = 0; r < ROWS; r++)
      add_products(sum[r], _mm512_load_si512(twice + (t * ROWS + r) * 2 * SUBTILE), _mm512_set1_epi8(4));
  for (int r = 0; r < ROWS; r++) to[r] = _mm512_reduce_add_epi32(sum[r]);
}

// Two pairs of channels: 16 * nibble times the weights of every row. With the lower nibble's highest bit flipped, bytes
// are 16 times the upper nibble and the lower one, plus 8, and need no shift.
template <int ROWS, bool TOGETHER>
LAMP_APART void values_of(const uint8_t *const *tiles, int count, int64_t stride, int half, const uint8_t *w,
                          Feed &feed, int32_t *out) {
  alignas(64) uint8_t twice[MOST_TILES * ROWS * 2 * SUBTILE];
  twice_over(w, count * ROWS, twice);
  int32_t surplus[ROWS];
  surplus_of<ROWS>(twice, count, surplus);
  all_channels<ROWS>(
      TOGETHER ? SUBTILE : stride, half, out,
      [&](const int64_t *at, __m512i(*upper)[ROWS], __m512i(*lower)[ROWS]) LAMP_LAMBDA {
        const __m512i flip = _mm512_set1_epi8(8), mask = _mm512_set1_epi8(15);
        const uint8_t *soon = take(feed, 128 * MOST_TILES);
        for (int t = 128 * count; t < 128 * MOST_TILES; t += 64) ask(soon + t);
        for (int t = 0; t < count; t++) {
          __m512i high[2], low[2];
          for (int i = 0; i < 2; i++) {
            high[i] = _mm512_xor_si512(two_channels<TOGETHER>(tiles[t] + at[i], stride), flip);
            low[i] = _mm512_and_si512(high[i], mask);
            ask(soon + 128 * t + 64 * i);
          }
          for (int r = 0; r < ROWS; r++) {
            const __m512i weight = _mm512_load_si512(twice + (t * ROWS + r) * 2 * SUBTILE);
            for (int i = 0; i < 2; i++) {
              add_products(upper[i][r], weight, high[i]);
              add_products(lower[i][r], weight, low[i]);
            }
          }
        }
      },
      [&](int r, __m512i &upper, __m512i &lower) LAMP_LAMBDA {
        upper = _mm512_sub_epi32(upper, lower);
        lower = _mm512_sub_epi32(_mm512_slli_epi32(lower, 4), _mm512_set1_epi32(16 * surplus[r]));
      });
}

template <int ROWS>
LAMP_INLINE void values(const uint8_t *const *tiles, int count, int64_t stride, int half, const uint8_t *w, Feed &feed,
                        int32_t *out) {
  if (stride == SUBTILE)
    values_of<ROWS, true>(tiles, count, stride, half, w, feed, out);
  else
    values_of<ROWS, false>(tiles, count, stride, half, w, feed, out);
}

// Both planes of two channels: 16 times the high nibble and the residual one, plus 8, times both bytes of the weights
// of every row.
template <int ROWS, bool TOGETHER>
LAMP_INLINE void multiply_fine(const uint8_t *const *high, const uint8_t *const *residual, int count, int64_t at,
                               int64_t stride, const uint8_t *w_upper, const uint8_t *w_lower, Feeds &feeds,
                               __m512i *upper, __m512i *lower) {
  __m512i fine_upper[ROWS], fine_lower[ROWS];
  for (int r = 0; r < ROWS; r++) fine_upper[r] = fine_lower[r] = _mm512_setzero_si512();
  const uint8_t *soon = take(feeds.values, 64 * count), *refined = take(feeds.refined, 64 * count);
  for (int t = 0; t < count; t++) {
    ask(soon + 64 * t);
    ask(refined + 64 * t);
    const __m512i coarse = two_channels<TOGETHER>(high[t] + at, stride);
    const __m512i fine = two_channels<TOGETHER>(residual[t] + at, stride);
    const __m512i flipped_fine = flipped(fine), mask = _mm512_set1_epi8((char)0xf0);
    const __m512i above = _mm512_or_si512(_mm512_and_si512(coarse, mask), upper_of(flipped_fine));
    const __m512i below = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(coarse, 4), mask), lower_of(flipped_fine));
    for (int r = 0; r < ROWS; r++) {
      const int place = (t * ROWS + r) * 2 * SUBTILE;
      const __m512i first = _mm512_load_si512(w_upper + place);
      const __m512i second = _mm512_load_si512(w_lower + place);
      add_products(upper[r], first, above);
      add_products(lower[r], first, below);
      add_products(fine_upper[r], second, above);
      add_products(fine_lower[r], second, below);
    }
  }
  for (int r = 0; r < ROWS; r++) {
    upper[r] = _mm512_add_epi32(_mm512_slli_epi32(upper[r], 8), fine_upper[r]);
    lower[r] = _mm512_add_epi32(_mm512_slli_epi32(lower[r], 8), fine_lower[r]);
  }
}

template <int ROWS, bool TOGETHER>
LAMP_APART void fine_values_of(const uint8_t *const *high, const uint8_t *const *residual, int count, int64_t stride,
                               int half, const uint8_t *w_upper, const uint8_t *w_lower, Feeds &feeds, int32_t *out) {
  alignas(64) uint8_t upper_twice[MOST_FINE * ROWS * 2 * SUBTILE], lower_twice[MOST_FINE * ROWS * 2 * SUBTILE];
  twice_over(w_upper, count * ROWS, upper_twice);
  twice_over(w_lower, count * ROWS, lower_twice);
  all_channels<ROWS>(
      TOGETHER ? SUBTILE : stride, half, out,
      [&](const int64_t *at, __m512i(*upper)[ROWS], __m512i(*lower)[ROWS]) LAMP_LAMBDA {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
          multiply_fine<ROWS, TOGETHER>(high, residual, count, at[i], stride, upper_twice, lower_twice, feeds, upper[i],
                                        lower[i]);
      },
      [](int, __m512i &, __m512i &) LAMP_LAMBDA {});
  int32_t above[ROWS], below[ROWS];
  surplus_of<ROWS>(upper_twice, count, above);
  surplus_of<ROWS>(lower_twice, count, below);
  for (int r = 0; r < ROWS; r++) {
    const int32_t surplus = 256 * above[r] + below[r];
    for (int c = 0; c < 2 * half; c++) out[r * 2 * half + c] -= surplus;
  }
}

constexpr bool WEIGHTS_OF_EIGHT_BITS = false;  // fine_values takes 16 bits of weight for both planes
template <int ROWS>
LAMP_INLINE void fine_values(const uint8_t *const *high, const uint8_t *const *residual, int count, int64_t stride,
                             int half, const uint8_t *w_upper, const uint8_t *w_lower, const uint8_t *, Feeds &feeds,
                             int32_t *out) {
  if (stride == SUBTILE)
    fine_values_of<ROWS, true>(high, residual, count, stride, half, w_upper, w_lower, feeds, out);
  else
    fine_values_of<ROWS, false>(high, residual, count, stride, half, w_upper, w_lower, feeds, out);
}

LAMP_INLINE Vf halves(const uint16_t *from) { return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
