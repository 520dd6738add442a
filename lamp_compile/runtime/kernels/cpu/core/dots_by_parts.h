// Scores with both planes, from those with one.

template <int ROWS>
LAMP_INLINE void dots_by_parts(const uint8_t *high, const uint8_t *residual, int half, const int8_t *q,
                               const int32_t *sum8, int32_t *out) {
  int32_t fine[ROWS * SUBTILE];
  dots<ROWS>(high, high, half, q, sum8, out);
  dots<ROWS>(residual, residual, half, q, sum8, fine);
  for (int i = 0; i < ROWS * SUBTILE; i++) out[i] = out[i] * 16 + fine[i];
}
