// Products with planes by lanes (planes.h), with AVX-512 VNNI: sixteen sums each of another key or channel, and nothing
// to move or to add up across lanes. Two vectors share what is broadcast, and sixteen sums are under way at a time:
// eight would each wait for the product before (Zen 5, four cycles).

constexpr int FOUR_OF_32 = 4 * SUBTILE;  // bytes: four channels of 32 keys

LAMP_INLINE __m512i four_to_all(const void *at) { return _mm512_set1_epi32(*(const int32_t *)at); }

// In this order: what is put between products must not be moved together.
LAMP_INLINE void add_in_order(__m512i &sum, __m512i without_sign, __m512i with_sign) {
  __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(without_sign), "v"(with_sign));
}

// Sums of two vectors' products with four bytes of a query.
LAMP_INLINE void add_query(__m512i *sums, const __m512i *nibbles, const int8_t *query) {
  const __m512i four = four_to_all(query);
  add_in_order(sums[0], nibbles[0], four);
  add_in_order(sums[1], nibbles[1], four);
}

template <int ROWS, bool BOTH>
LAMP_APART void dots_of_lanes(const uint8_t *plane, const uint8_t *residual, int half, const int8_t *q,
                              const int32_t *sum8, Feed &feed, int32_t *out) {
  constexpr int ASKED = BOTH ? 2 : 1;
  __m512i sums[ROWS][2][2];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    sums[r][0][0] = sums[r][0][1] = _mm512_setzero_si512();
    sums[r][1][0] = sums[r][1][1] = _mm512_set1_epi32(-sum8[r] * ((BOTH ? SURPLUS_BOTH : SURPLUS) / SURPLUS));
  }
  for (int at = 0; at < SUBTILE * half; at += FOUR_OF_32, q += 4) {
    // Little at a time: what is taken may go on behind the end of a piece.
    const uint8_t *soon = take(feed, ASKED * FOUR_OF_32);
    __m512i upper[2], lower[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __m512i high = _mm512_loadu_si512(plane + at + 64 * h), x = flipped(high);
      const __m512i low = BOTH ? _mm512_loadu_si512(residual + at + 64 * h) : high;
      upper[h] = BOTH ? flipped(upper_of(high, low)) : _mm512_and_si512(x, _mm512_set1_epi8((char)0xf0));
      lower[h] = BOTH ? flipped(lower_of(high, low)) : lower_of(x);
    }
    for (int i = 0; i < ASKED; i++) ask_for_two(soon + i * FOUR_OF_32);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      add_query(sums[r][0], upper, q + 2 * r * PADDED);
      add_query(sums[r][1], lower, q + (2 * r + 1) * PADDED);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __m512i upper = BOTH ? sums[r][0][h] : _mm512_srai_epi32(sums[r][0][h], 4);
      _mm512_storeu_si512(out + r * SUBTILE + h * LANES, _mm512_add_epi32(upper, sums[r][1][h]));
    }
}

template <int ROWS>
LAMP_INLINE void dots_by_lanes(const uint8_t *plane, int half, const int8_t *q, const int32_t *sum8, Feed &feed,
                               int32_t *out) {
  dots_of_lanes<ROWS, false>(plane, plane, half, q, sum8, feed, out);
}
template <int ROWS>
LAMP_INLINE void fine_dots_by_lanes(const uint8_t *high, const uint8_t *residual, int half, const int8_t *q,
                                    const int32_t *sum8, Feed &feed, int32_t *out) {
  dots_of_lanes<ROWS, true>(high, residual, half, q, sum8, feed, out);
}

// A row's weights of 32 keys, in order of keys, and the next row's behind them. As place_weights.
template <int ROWS>
LAMP_INLINE void place_weights_by_lanes(const Vi (*x)[2], uint8_t *to) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int i = 0; i < ROWS; i += 2) {
    const __m512i rows = _mm512_permutexvar_epi32(order, bytes_of_two_rows<ROWS>(x, i));
    if (i + 1 == ROWS)
      _mm256_storeu_si256((__m256i *)(to + i * SUBTILE), _mm512_castsi512_si256(rows));
    else
      _mm512_storeu_si512(to + i * SUBTILE, rows);
  }
}

// Sixteen channels in each of VECTORS vectors, from c on: as multiply_coarse, and to `out`. Of what is read meanwhile
// all but one line in LEFT is asked for: what comes between products asks for the rest, which is the less the wider a
// head.
template <int ROWS, int VECTORS, int LEFT>
LAMP_APART void coarse_of_lanes(const uint8_t *const *tiles, int count, int half, int c, const uint8_t *w,
                                const int32_t *surplus, Feed &feed, int32_t *out) {
  constexpr int64_t asked = (8 - 8 / LEFT) * 64 * VECTORS;  // bytes, with a tile
  __m512i flip = _mm512_set1_epi8(8), mask = _mm512_set1_epi8(15);
  __asm__("" : "+v"(flip), "+v"(mask));  // what compilers know they make again for every tile
  __m512i upper[ROWS][VECTORS], lower[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) upper[r][v] = lower[r][v] = _mm512_setzero_si512();
  for (int t = 0; t < count; t++, w += ROWS * SUBTILE) {
    const uint8_t *at = tiles[t] + 4 * c;
    const uint8_t *soon = take(feed, asked);
#pragma GCC unroll 8
    for (int four = 0; four < SUBTILE / 4; four++, at += 4 * half) {
      __m512i high[VECTORS], low[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) {
        high[v] = _mm512_xor_si512(_mm512_loadu_si512(at + 64 * v), flip);
        low[v] = _mm512_and_si512(high[v], mask);
      }
      if (four % LEFT != LEFT - 1) {
        ask(soon + (four - four / LEFT) * 64 * VECTORS);
        if (VECTORS == 2) ask(soon + (four - four / LEFT) * 128 + 64);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const __m512i weight = four_to_all(w + r * SUBTILE + 4 * four);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) add_in_order(upper[r][v], weight, high[v]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) add_in_order(lower[r][v], weight, low[v]);
      }
    }
  }
  // What the tiles that are not there would have asked for.
  for (int t = count; t < MOST_TILES; t++) ask_for(take(feed, asked), asked);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      int32_t *to = out + r * 2 * half + c + v * LANES;
      _mm512_storeu_si512(to, _mm512_sub_epi32(upper[r][v], lower[r][v]));
      _mm512_storeu_si512(to + half,
                          _mm512_sub_epi32(_mm512_slli_epi32(lower[r][v], 4), _mm512_set1_epi32(16 * surplus[r])));
    }
}

template <int ROWS, int LEFT>
LAMP_INLINE void coarse_values(const uint8_t *const *tiles, int count, int half, const uint8_t *w, Feed &feed,
                               int32_t *out) {
  int32_t surplus[ROWS];
  surplus_of<ROWS, SUBTILE>(w, count, surplus);
  int c = 0;
  for (; c + 2 * LANES <= half; c += 2 * LANES)
    coarse_of_lanes<ROWS, 2, LEFT>(tiles, count, half, c, w, surplus, feed, out);
  if (c < half) coarse_of_lanes<ROWS, 1, LEFT>(tiles, count, half, c, w, surplus, feed, out);
}
template <int ROWS>
LAMP_INLINE void values_by_lanes(const uint8_t *const *tiles, int count, int half, const uint8_t *w, Feed &feed,
                                 int32_t *out) {
  if (half > 64)
    coarse_values<ROWS, 8>(tiles, count, half, w, feed, out);
  else
    coarse_values<ROWS, 4>(tiles, count, half, w, feed, out);
}

// Both planes of sixteen channels from c on, times both bytes of the weights of every row: as multiply_fine.
template <int ROWS>
LAMP_APART void fine_of_lanes(const uint8_t *const *high, const uint8_t *const *residual, int count, int half, int c,
                              const uint8_t *w_upper, const uint8_t *w_lower, const int32_t *surplus, Feeds &feeds,
                              int32_t *out) {
  const __m512i mask = _mm512_set1_epi8((char)0xf0);
  __m512i upper[ROWS][2], lower[ROWS][2];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) upper[r][0] = upper[r][1] = lower[r][0] = lower[r][1] = _mm512_setzero_si512();
  for (int t = 0; t < count; t++, w_upper += ROWS * SUBTILE, w_lower += ROWS * SUBTILE) {
    const uint8_t *soon = take(feeds.values, 8 * 64), *refined = take(feeds.refined, 8 * 64);
#pragma GCC unroll 8
    for (int four = 0; four < SUBTILE / 4; four++) {
      const int64_t at = 4 * ((int64_t)four * half + c);
      const __m512i coarse = _mm512_loadu_si512(high[t] + at);
      const __m512i fine = flipped(_mm512_loadu_si512(residual[t] + at));
      const __m512i above = _mm512_add_epi8(_mm512_and_si512(coarse, mask), upper_of(fine));
      const __m512i below = _mm512_add_epi8(_mm512_and_si512(_mm512_slli_epi16(coarse, 4), mask), lower_of(fine));
      ask(soon + 64 * four);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        if (r == ROWS / 2) ask(refined + 64 * four);
        const __m512i first = four_to_all(w_upper + r * SUBTILE + 4 * four);
        const __m512i second = four_to_all(w_lower + r * SUBTILE + 4 * four);
        add_in_order(upper[r][0], first, above);
        add_in_order(lower[r][0], first, below);
        add_in_order(upper[r][1], second, above);
        add_in_order(lower[r][1], second, below);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    const __m512i less = _mm512_set1_epi32(surplus[r]);
    int32_t *to = out + r * 2 * half + c;
    _mm512_storeu_si512(to, _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(upper[r][0], 8), upper[r][1]), less));
    _mm512_storeu_si512(to + half,
                        _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(lower[r][0], 8), lower[r][1]), less));
  }
}

template <int ROWS>
LAMP_INLINE void fine_values_by_lanes(const uint8_t *const *high, const uint8_t *const *residual, int count, int half,
                                      const uint8_t *w_upper, const uint8_t *w_lower, const uint8_t *, Feeds &feeds,
                                      int32_t *out) {
  int32_t above[ROWS], surplus[ROWS];
  surplus_of<ROWS, SUBTILE>(w_upper, count, above);
  surplus_of<ROWS, SUBTILE>(w_lower, count, surplus);
  for (int r = 0; r < ROWS; r++) surplus[r] += 256 * above[r];
  for (int c = 0; c < half; c += LANES)
    fine_of_lanes<ROWS>(high, residual, count, half, c, w_upper, w_lower, surplus, feeds, out);
}
