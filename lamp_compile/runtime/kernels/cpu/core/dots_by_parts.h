// Scores with both planes, from those with one.

template <int ROWS>
LAMP_INLINE void dots_by_parts(const uint8_t *high, const uint8_t *residual, int half, const int8_t *q,
                               const int32_t *sum8, Feed &feed, int32_t *out) {
  int32_t fine[ROWS * SUBTILE];
  dots<ROWS>(high, half, q, sum8, feed, out);
  dots<ROWS>(residual, half, q, sum8, feed, fine);
  for (int i = 0; i < ROWS * SUBTILE; i++) out[i] = out[i] * 16 + fine[i];
}
