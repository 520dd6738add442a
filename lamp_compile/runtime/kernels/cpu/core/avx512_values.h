// Products of weights and values with AVX-512 VNNI.

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

// All channels, sixteen at a time, two pairs of two by `multiply_pairs(where, sums)`, which leaves sums_of_two of upper
// and lower nibbles by row; `finish(r, upper, lower)` makes sums of channels of what it left of a row.
template <int ROWS, class Multiply, class Finish>
LAMP_INLINE void all_channels(int64_t stride, int half, int32_t *out, Multiply multiply_pairs, Finish finish) {
  __m512i sums[4][ROWS][2];
  for (int c = 0; c < half; c += 16) {
    const int pairs = half - c >= 16 ? 8 : (half - c) / 2;
    for (int p = 0; p < pairs; p += 2) {
      const int64_t first = c + 2 * p, at[2] = {first * stride, (p + 1 < pairs ? first + 2 : first) * stride};
      multiply_pairs(at, sums[p / 2]);
    }
    const __mmask16 there = (__mmask16)((1u << (2 * pairs)) - 1);
    for (int r = 0; r < ROWS; r++) {
      __m512i all[2];
      for (int part = 0; part < 2; part++) {
        const __m512i v[4] = {sums[0][r][part], sums[1][r][part], sums[2][r][part], sums[3][r][part]};
        all[part] = channels_of(v, pairs);
      }
      finish(r, all[0], all[1]);
      _mm512_mask_storeu_epi32(out + r * 2 * half + c, there, all[0]);
      _mm512_mask_storeu_epi32(out + r * 2 * half + half + c, there, all[1]);
    }
  }
}

constexpr int MOST_TILES = 16;

// Weights of 32 keys lie there twice, next to themselves, as two channels need them: broadcasts would wait for the
// products' units.
constexpr int WEIGHT_ROOM = 2 * SUBTILE;
// As bytes, of row i and the one behind it: within each 128 bits four keys and the four sixteen behind them, of one row
// and the next.
template <int ROWS>
LAMP_INLINE __m512i bytes_of_two_rows(const Vi (*x)[2], int i) {
  const int next = i + 1 < ROWS ? i + 1 : i;
  return _mm512_packus_epi16(_mm512_packs_epi32((__m512i)x[i][0], (__m512i)x[i][1]),
                             _mm512_packs_epi32((__m512i)x[next][0], (__m512i)x[next][1]));
}
// Weights of 0 to 255, of sixteen and sixteen keys of every row; what is above counts as 255. Written sixteen bytes at
// a time they could not be read at once.
template <int ROWS>
LAMP_INLINE void place_weights(const Vi (*x)[2], uint8_t *to) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
  for (int i = 0; i < ROWS; i += 2) {
    const __m512i bytes = bytes_of_two_rows<ROWS>(x, i);
    _mm512_store_si512(to + i * WEIGHT_ROOM, _mm512_permutexvar_epi32(order, bytes));
    if (i + 1 == ROWS) continue;
    const __m512i behind = _mm512_add_epi32(order, _mm512_set1_epi32(2));
    _mm512_store_si512(to + (i + 1) * WEIGHT_ROOM, _mm512_permutexvar_epi32(behind, bytes));
  }
}

// 8 times the sum of each row's weights, which is what a plus 8 makes too much; a row's 32 lie in the first of ROOM
// bytes.
template <int ROWS, int ROOM>
LAMP_INLINE void surplus_of(const uint8_t *w, int count, int32_t *to) {
  __m256i sum[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) sum[r] = _mm256_setzero_si256();
  for (int t = 0; t < count; t++)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const __m256i weights = _mm256_loadu_si256((const __m256i *)(w + (t * ROWS + r) * ROOM));
      sum[r] = _mm256_dpbusd_epi32(sum[r], weights, _mm256_set1_epi8(8));
    }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) to[r] = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(sum[r]));
}

// Runs `step(t)` for t from count - 1 down to 0. Written out: nobody foresees the end of a loop whose length is another
// in every call.
template <class Step>
LAMP_INLINE void each_tile(int count, Step step) {
#define LAMP_TILE(t) \
  case t + 1:        \
    step(t);         \
    [[fallthrough]]
  switch (count) {
    LAMP_TILE(15);
    LAMP_TILE(14);
    LAMP_TILE(13);
    LAMP_TILE(12);
    LAMP_TILE(11);
    LAMP_TILE(10);
    LAMP_TILE(9);
    LAMP_TILE(8);
    LAMP_TILE(7);
    LAMP_TILE(6);
    LAMP_TILE(5);
    LAMP_TILE(4);
    LAMP_TILE(3);
    LAMP_TILE(2);
    LAMP_TILE(1);
    LAMP_TILE(0);
    default:;
  }
#undef LAMP_TILE
}

// Two pairs of channels: 16 * nibble times the weights of every row. With the lower nibble's highest bit flipped, bytes
// are 16 times the upper nibble and the lower one, plus 8, and need no shift. Apart: around it, registers are short.
template <int ROWS, bool TOGETHER>
LAMP_APART void multiply_coarse(const uint8_t *const *tiles, int count, const int64_t *at, int64_t stride,
                                const uint8_t *w, const uint8_t *soon, __m512i (*sums)[2]) {
  __m512i flip = _mm512_set1_epi8(8), mask = _mm512_set1_epi8(15);
  __asm__("" : "+v"(flip), "+v"(mask));  // what compilers know they make again for every tile
  const int64_t at0 = at[0], at1 = at[1];
  __m512i upper[2][ROWS], lower[2][ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) upper[0][r] = lower[0][r] = upper[1][r] = lower[1][r] = _mm512_setzero_si512();
  each_tile(count, [&](int t) LAMP_LAMBDA {
    const __m512i high0 = _mm512_xor_si512(two_channels<TOGETHER>(tiles[t] + at0, stride), flip);
    const __m512i high1 = _mm512_xor_si512(two_channels<TOGETHER>(tiles[t] + at1, stride), flip);
    const __m512i low0 = _mm512_and_si512(high0, mask), low1 = _mm512_and_si512(high1, mask);
    if (t % 2 == 0) ask_for_two(soon + 64 * t);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const __m512i weight = _mm512_load_si512(w + (t * ROWS + r) * WEIGHT_ROOM);
      add_products(upper[0][r], weight, high0);
      add_products(lower[0][r], weight, low0);
      add_products(upper[1][r], weight, high1);
      add_products(lower[1][r], weight, low1);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    sums[r][0] = sums_of_two(upper[0][r], upper[1][r]);
    sums[r][1] = sums_of_two(lower[0][r], lower[1][r]);
  }
}

template <int ROWS, bool TOGETHER>
LAMP_APART void values_of(const uint8_t *const *tiles, int count, int64_t stride, int half, const uint8_t *w,
                          Feed &feed, int32_t *out) {
  int32_t surplus[ROWS];
  surplus_of<ROWS, WEIGHT_ROOM>(w, count, surplus);
  all_channels<ROWS>(
      TOGETHER ? SUBTILE : stride, half, out,
      [&](const int64_t *at, __m512i(*sums)[2]) LAMP_LAMBDA {
        // Half of what is read meanwhile: what comes between products asks for the rest.
        const uint8_t *soon = take(feed, 64 * MOST_TILES);
        // What the tiles that are not there would have asked for.
        for (int t = (count + 1) & -2; t < MOST_TILES; t += 2) ask_for_two(soon + 64 * t);
        multiply_coarse<ROWS, TOGETHER>(tiles, count, at, stride, w, soon, sums);
      },
      [&](int r, __m512i &upper, __m512i &lower) LAMP_LAMBDA {
        const int64_t bytes = half * 32 / ROWS;  // over all channels and rows a quarter of a run
        ask_for(take(feed, bytes), bytes);
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
                               int64_t stride, const uint8_t *w_upper, const uint8_t *w_lower, const uint8_t *soon,
                               const uint8_t *refined, __m512i *sums) {
  __m512i upper[ROWS], lower[ROWS], fine_upper[ROWS], fine_lower[ROWS];
  const __m512i mask = _mm512_set1_epi8((char)0xf0);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) upper[r] = lower[r] = fine_upper[r] = fine_lower[r] = _mm512_setzero_si512();
  for (int t = 0; t < count; t++) {
    const __m512i coarse = two_channels<TOGETHER>(high[t] + at, stride);
    const __m512i fine = flipped(two_channels<TOGETHER>(residual[t] + at, stride));
    // Sums, not unions: those become operations of three operands.
    const __m512i above = _mm512_add_epi8(_mm512_and_si512(coarse, mask), upper_of(fine));
    const __m512i below = _mm512_add_epi8(_mm512_and_si512(_mm512_slli_epi16(coarse, 4), mask), lower_of(fine));
    ask(soon + 64 * t);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      if (r == ROWS / 2) ask(refined + 64 * t);
      const int place = (t * ROWS + r) * WEIGHT_ROOM;
      const __m512i first = _mm512_load_si512(w_upper + place);
      const __m512i second = _mm512_load_si512(w_lower + place);
      add_products(upper[r], first, above);
      add_products(lower[r], first, below);
      add_products(fine_upper[r], second, above);
      add_products(fine_lower[r], second, below);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    sums[2 * r] = _mm512_add_epi32(_mm512_slli_epi32(upper[r], 8), fine_upper[r]);
    sums[2 * r + 1] = _mm512_add_epi32(_mm512_slli_epi32(lower[r], 8), fine_lower[r]);
  }
}

template <int ROWS, bool TOGETHER>
LAMP_APART void multiply_fine_pairs(const uint8_t *const *high, const uint8_t *const *residual, int count,
                                    const int64_t *at, int64_t stride, const uint8_t *w_upper, const uint8_t *w_lower,
                                    const uint8_t *soon, const uint8_t *refined, __m512i (*sums)[2]) {
  __m512i pair[2][2 * ROWS];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    multiply_fine<ROWS, TOGETHER>(high, residual, count, at[i], stride, w_upper, w_lower, soon + 64 * i * count,
                                  refined + 64 * i * count, pair[i]);
#pragma GCC unroll 8
  for (int r = 0; r < 2 * ROWS; r++) sums[r / 2][r % 2] = sums_of_two(pair[0][r], pair[1][r]);
}

template <int ROWS, bool TOGETHER>
LAMP_APART void fine_values_of(const uint8_t *const *high, const uint8_t *const *residual, int count, int64_t stride,
                               int half, const uint8_t *w_upper, const uint8_t *w_lower, Feeds &feeds, int32_t *out) {
  all_channels<ROWS>(
      TOGETHER ? SUBTILE : stride, half, out,
      [&](const int64_t *at, __m512i(*sums)[2]) LAMP_LAMBDA {
        const uint8_t *soon = take(feeds.values, 128 * count), *refined = take(feeds.refined, 128 * count);
        multiply_fine_pairs<ROWS, TOGETHER>(high, residual, count, at, stride, w_upper, w_lower, soon, refined, sums);
      },
      [](int, __m512i &, __m512i &) LAMP_LAMBDA {});
  int32_t above[ROWS], below[ROWS];
  surplus_of<ROWS, WEIGHT_ROOM>(w_upper, count, above);
  surplus_of<ROWS, WEIGHT_ROOM>(w_lower, count, below);
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
