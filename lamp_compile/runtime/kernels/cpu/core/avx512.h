// Integer products with AVX-512 VNNI. What they compute: portable.h.

#define LAMP_LAMBDA __attribute__((always_inline))
// Inlined into what is around them, these loops lose their registers to it.
#define LAMP_APART static __attribute__((noinline))

// Within each 128 bits: vector i becomes the sums of four, of what were vectors 4 i to 4 i + 3.
template <int COUNT>
LAMP_INLINE void sum_lanes(__m512i *v) {
  for (int i = 0; i < COUNT / 2; i++)
    v[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < COUNT / 4; i++)
    v[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi64(v[2 * i], v[2 * i + 1]));
}

// The sums of 16 vectors, in order.
LAMP_INLINE __m512i sums_of_16(__m512i *v) {
  sum_lanes<16>(v);
  for (int i = 0; i < 2; i++)
    v[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x88),
                            _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(v[0], v[1], 0x88), _mm512_shuffle_i32x4(v[0], v[1], 0xdd));
}

// Sixteen vectors of four-byte words become sixteen of which word i holds what was vector i's.
LAMP_INLINE void transpose_words(__m512i *v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88),
                  d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Whole blocks of 64 bytes a key: keys are turned into lanes first, so that nothing is summed across them.
template <int ROWS, int HALF>
LAMP_APART void dots_by_lane(const uint8_t *plane, const uint8_t *next, const int8_t *q, const int32_t *sum8,
                             int32_t *out) {
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(8);
  for (int j = 0; j < SUBTILE; j += LANES) {
    __m512i sum[ROWS][4];  // four, because each product waits for the one before
    for (int r = 0; r < ROWS; r++) {
      sum[r][0] = _mm512_set1_epi32(-sum8[r]);  // nibbles are read as 0 to 15, 8 too much
      sum[r][1] = sum[r][2] = sum[r][3] = _mm512_setzero_si512();
    }
    for (int first = 0; first < HALF; first += 64) {
      __m512i words[16];
      for (int i = 0; i < 16; i++) {
        words[i] = _mm512_loadu_si512(plane + (j + i) * HALF + first);
        __builtin_prefetch(next + (j + i) * HALF + first);
      }
      transpose_words(words);
#pragma GCC unroll 16
      for (int w = 0; w < 16; w++) {
        // (x & 15) ^ 8: a nibble of two's complement, plus 8.
        const __m512i upper = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words[w], 4), low, flip, 0x6a);
        const __m512i lower = _mm512_ternarylogic_epi32(words[w], low, flip, 0x6a);
        for (int r = 0; r < ROWS; r++) {
          const int8_t *query = q + 2 * r * PADDED + first + 4 * w;
          int32_t four[2];
          __builtin_memcpy(four, query, 4);
          __builtin_memcpy(four + 1, query + PADDED, 4);
          __m512i *to = sum[r] + w % 2 * 2;
          to[0] = _mm512_dpbusd_epi32(to[0], upper, _mm512_set1_epi32(four[0]));
          to[1] = _mm512_dpbusd_epi32(to[1], lower, _mm512_set1_epi32(four[1]));
        }
      }
    }
    for (int r = 0; r < ROWS; r++)
      _mm512_storeu_si512(out + r * SUBTILE + j, _mm512_add_epi32(_mm512_add_epi32(sum[r][0], sum[r][1]),
                                                                  _mm512_add_epi32(sum[r][2], sum[r][3])));
  }
}

template <int ROWS, int BLOCKS>
LAMP_APART void dots_of(const uint8_t *plane, const uint8_t *next, int half, const int8_t *q, const int32_t *sum8,
                        int32_t *out) {
  constexpr int KEYS = 16 / ROWS;
  const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(8);
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
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; i++) {
      __m512i sum[ROWS];
      for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_si512();
      for (int b = 0; b < BLOCKS; b++) {
        const uint8_t *at = plane + (j + i) * half + 64 * b;
        __builtin_prefetch(next + (j + i) * half + 64 * b);
        const __m512i bytes = b == BLOCKS - 1 ? _mm512_maskz_loadu_epi8(tail, at) : _mm512_loadu_si512(at);
        // (x & 15) ^ 8: a nibble of two's complement, plus 8.
        const __m512i upper = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), low, flip, 0x6a);
        const __m512i lower = _mm512_ternarylogic_epi32(bytes, low, flip, 0x6a);
        for (int r = 0; r < ROWS; r++) {
          sum[r] = _mm512_dpbusd_epi32(sum[r], upper, query[r][0][b]);
          sum[r] = _mm512_dpbusd_epi32(sum[r], lower, query[r][1][b]);
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
LAMP_INLINE void dots(const uint8_t *plane, const uint8_t *next, int half, const int8_t *q, const int32_t *sum8,
                      int32_t *out) {
  if (ROWS > 1 && half == 64)
    dots_by_lane<ROWS, 64>(plane, next, q, sum8, out);
  else if (ROWS > 1 && half == 128)
    dots_by_lane<ROWS, 128>(plane, next, q, sum8, out);
  else if (half <= 64)
    dots_of<ROWS, 1>(plane, next, half, q, sum8, out);
  else
    dots_of<ROWS, 2>(plane, next, half, q, sum8, out);
}

// 64 bytes: 32 keys of two channels. In tiles of 32 keys they lie together.
template <bool TOGETHER>
LAMP_INLINE __m512i two_channels(const uint8_t *at, int64_t stride) {
  if (TOGETHER) return _mm512_loadu_si512(at);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at)),
                            _mm256_loadu_si256((const __m256i *)(at + stride)), 1);
}

// Adds the products of two channels: 16 * nibble times the weights of every row.
template <int ROWS, bool TOGETHER>
LAMP_INLINE void multiply(const uint8_t *const *tiles, const uint8_t *const *next, int count, int64_t at,
                          int64_t stride, const uint8_t *w, __m512i *upper, __m512i *lower) {
  const __m512i mask = _mm512_set1_epi8((char)0xf0);
  for (int t = 0; t < count; t++) {
    const __m512i bytes = two_channels<TOGETHER>(tiles[t] + at, stride);
    __builtin_prefetch(next[t] + at);
    const __m512i high = _mm512_and_si512(bytes, mask), low = _mm512_and_si512(_mm512_slli_epi16(bytes, 4), mask);
    for (int r = 0; r < ROWS; r++) {
      const __m512i weight =
          _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(w + (t * ROWS + r) * SUBTILE)));
      upper[r] = _mm512_dpbusd_epi32(upper[r], weight, high);
      lower[r] = _mm512_dpbusd_epi32(lower[r], weight, low);
    }
  }
}

// Sums over keys of 16 channels, from eight vectors of two; the last ones may be missing.
LAMP_INLINE void put_channels(__m512i *v, int pairs, int32_t *out) {
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int p = pairs; p < 8; p++) v[p] = _mm512_setzero_si512();
  sum_lanes<8>(v);
  const __m512i joined =
      _mm512_add_epi32(_mm512_shuffle_i32x4(v[0], v[1], 0x88), _mm512_shuffle_i32x4(v[0], v[1], 0xdd));
  _mm512_mask_storeu_epi32(out, (__mmask16)((1u << (2 * pairs)) - 1), _mm512_permutexvar_epi32(order, joined));
}

// All channels, sixteen at a time, each pair of two by `multiply_pair(where, upper, lower)`.
template <int ROWS, class Multiply>
LAMP_INLINE void all_channels(int64_t stride, int half, int32_t *out, Multiply multiply_pair) {
  __m512i sums[ROWS][2][8];
  for (int c = 0; c < half; c += 16) {
    const int pairs = half - c >= 16 ? 8 : (half - c) / 2;
    for (int p = 0; p < pairs; p++) {
      __m512i upper[ROWS], lower[ROWS];
      for (int r = 0; r < ROWS; r++) upper[r] = lower[r] = _mm512_setzero_si512();
      multiply_pair((c + 2 * p) * stride, upper, lower);
      for (int r = 0; r < ROWS; r++) {
        sums[r][0][p] = upper[r];
        sums[r][1][p] = lower[r];
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int part = 0; part < 2; part++) put_channels(sums[r][part], pairs, out + r * 2 * half + part * half + c);
  }
}

template <int ROWS, bool TOGETHER>
LAMP_APART void values_of(const uint8_t *const *tiles, const uint8_t *const *next, int count, int64_t stride, int half,
                          const uint8_t *w, int32_t *out) {
  all_channels<ROWS>(TOGETHER ? SUBTILE : stride, half, out,
                     [&](int64_t at, __m512i *upper, __m512i *lower)
                         LAMP_LAMBDA { multiply<ROWS, TOGETHER>(tiles, next, count, at, stride, w, upper, lower); });
}

template <int ROWS>
LAMP_INLINE void values(const uint8_t *const *tiles, const uint8_t *const *next, int count, int64_t stride, int half,
                        const uint8_t *w, int32_t *out) {
  if (stride == SUBTILE)
    values_of<ROWS, true>(tiles, next, count, stride, half, w, out);
  else
    values_of<ROWS, false>(tiles, next, count, stride, half, w, out);
}

// Adding the three products in this order keeps one sum: ((upper * 16 + eight) * 16 + lower).
template <int ROWS, bool TOGETHER>
LAMP_APART void fine_values_of(const uint8_t *const *high, const uint8_t *const *residual, int count, int64_t stride,
                               int half, const uint8_t *const *w, int32_t *out) {
  const uint8_t *const *planes[3] = {high, residual, high};
  all_channels<ROWS>(TOGETHER ? SUBTILE : stride, half, out,
                     [&](int64_t at, __m512i *upper, __m512i *lower) LAMP_LAMBDA {
                       for (int i = 0; i < 3; i++) {
                         for (int r = 0; r < ROWS; r++)
                           upper[r] = _mm512_slli_epi32(upper[r], 4), lower[r] = _mm512_slli_epi32(lower[r], 4);
                         multiply<ROWS, TOGETHER>(planes[i], planes[i], count, at, stride, w[i], upper, lower);
                       }
                     });
}

template <int ROWS>
LAMP_INLINE void fine_values(const uint8_t *const *high, const uint8_t *const *residual, int count, int64_t stride,
                             int half, const uint8_t *w_upper, const uint8_t *w_lower, const uint8_t *w_eight,
                             int32_t *out) {
  const uint8_t *const w[3] = {w_upper, w_eight, w_lower};
  if (stride == SUBTILE)
    fine_values_of<ROWS, true>(high, residual, count, stride, half, w, out);
  else
    fine_values_of<ROWS, false>(high, residual, count, stride, half, w, out);
}

LAMP_INLINE Vf halves(const uint16_t *from) { return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
