// Integer products with AVX2. What they compute: portable.h. Sixteen-bit sums hold all there is to add: see the
// asserts.

LAMP_INLINE __m256i sums_of_8(__m256i *v) {
  for (int i = 0; i < 4; i++) v[i] = _mm256_hadd_epi32(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 2; i++) v[i] = _mm256_hadd_epi32(v[2 * i], v[2 * i + 1]);
  return _mm256_add_epi32(_mm256_permute2x128_si256(v[0], v[1], 0x20), _mm256_permute2x128_si256(v[0], v[1], 0x31));
}

// Up to 32 bytes, zeros behind them; never reads past the last.
LAMP_INLINE __m256i bytes_of(const uint8_t *at, int count) {
  if (count >= 32) return _mm256_loadu_si256((const __m256i *)at);
  if (count % 4 == 0) {
    const __m256i word = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_epi32((const int *)at, _mm256_cmpgt_epi32(_mm256_set1_epi32(count / 4), word));
  }
  uint8_t padded[32] = {0};
  __builtin_memcpy(padded, at, count);
  return _mm256_loadu_si256((const __m256i *)padded);
}

template <int ROWS>
LAMP_INLINE void dots(const uint8_t *plane, int half, const int8_t *q, const int32_t *sum8, Feed &feed, int32_t *out) {
  constexpr int KEYS = 8 / ROWS;
  static_assert(2 * 2 * 15 * 127 * (PADDED / 32) < 32768, "products of a whole row fit into sixteen bits");
  const __m256i low = _mm256_set1_epi8(15), flip = _mm256_set1_epi8(8), ones = _mm256_set1_epi16(1);
  int32_t repeated[8];
  for (int i = 0; i < 8; i++) repeated[i] = sum8[i / KEYS];
  const __m256i correction = _mm256_loadu_si256((const __m256i *)repeated);
  for (int j = 0; j < SUBTILE; j += KEYS) {
    __m256i acc[8];
    const uint8_t *soon = take(feed, KEYS * half);
    for (int i = 0; i < KEYS; i++) {
      __m256i sum[ROWS];
      for (int c = 0; c < half; c += 64) ask(soon + i * half + c);
      for (int r = 0; r < ROWS; r++) sum[r] = _mm256_setzero_si256();
      for (int c = 0; c < half; c += 32) {
        const __m256i bytes = bytes_of(plane + (j + i) * half + c, half - c);
        const __m256i upper = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), flip);
        const __m256i lower = _mm256_xor_si256(_mm256_and_si256(bytes, low), flip);
        for (int r = 0; r < ROWS; r++) {
          const __m256i *query = (const __m256i *)(q + 2 * r * PADDED + c);
          const __m256i above = _mm256_maddubs_epi16(upper, _mm256_loadu_si256(query));
          const __m256i below = _mm256_maddubs_epi16(lower, _mm256_loadu_si256(query + PADDED / 32));
          sum[r] = _mm256_add_epi16(sum[r], _mm256_add_epi16(above, below));
        }
      }
      for (int r = 0; r < ROWS; r++) acc[r * KEYS + i] = _mm256_madd_epi16(sum[r], ones);
    }
    int32_t found[8];
    _mm256_storeu_si256((__m256i *)found, _mm256_sub_epi32(sums_of_8(acc), correction));
    for (int r = 0; r < ROWS; r++) __builtin_memcpy(out + r * SUBTILE + j, found + r * KEYS, KEYS * sizeof(int32_t));
  }
}

constexpr int MOST_TILES = 8;
template <int ROWS>
LAMP_INLINE void values(const uint8_t *const *tiles, int count, int64_t stride, int half, const uint8_t *w, Feed &feed,
                        int32_t *out) {
  static_assert(2 * 255 * 8 * MOST_TILES < 32768, "products of all sub-tiles fit into sixteen bits");
  const __m256i low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8), ones = _mm256_set1_epi16(1);
  __m256i sums[ROWS][2][8];  // one channel each
  for (int c = 0; c < half; c += 8) {
    const int channels = half - c >= 8 ? 8 : half - c;
    for (int p = 0; p < channels; p++) {
      __m256i upper[ROWS], lower[ROWS];
      for (int r = 0; r < ROWS; r++) upper[r] = lower[r] = _mm256_setzero_si256();
      const uint8_t *soon = p % 2 ? nullptr : take(feed, 64 * count);
      for (int t = 0; t < count; t++) {
        if (soon) ask(soon + 64 * t);
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(tiles[t] + (c + p) * stride));
        const __m256i high =
            _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), eight), eight);
        const __m256i less = _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(bytes, low), eight), eight);
        for (int r = 0; r < ROWS; r++) {
          const __m256i weight = _mm256_loadu_si256((const __m256i *)(w + (t * ROWS + r) * SUBTILE));
          upper[r] = _mm256_add_epi16(upper[r], _mm256_maddubs_epi16(weight, high));
          lower[r] = _mm256_add_epi16(lower[r], _mm256_maddubs_epi16(weight, less));
        }
      }
      for (int r = 0; r < ROWS; r++) {
        sums[r][0][p] = _mm256_madd_epi16(upper[r], ones);
        sums[r][1][p] = _mm256_madd_epi16(lower[r], ones);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int part = 0; part < 2; part++) {
        for (int p = channels; p < 8; p++) sums[r][part][p] = _mm256_setzero_si256();
        int32_t found[8];
        _mm256_storeu_si256((__m256i *)found, _mm256_slli_epi32(sums_of_8(sums[r][part]), 4));
        __builtin_memcpy(out + r * 2 * half + part * half + c, found, channels * sizeof(int32_t));
      }
  }
}

LAMP_INLINE Vf halves(const uint16_t *from) {
  float x[LANES];
  _mm256_storeu_ps(x, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
  _mm256_storeu_ps(x + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8))));
  return load(x);
}

#include "fine_by_parts.h"
