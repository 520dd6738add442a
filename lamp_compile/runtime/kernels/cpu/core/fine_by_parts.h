// Products with both planes, from those with one (portable.h): 16 bits of weight on the high plane, 8 on the residual.
#include "dots_by_parts.h"

template <int ROWS>
LAMP_INLINE void fine_dots(const uint8_t *high, const uint8_t *residual, int half, const int8_t *q, const int32_t *sum8,
                           Feed &feed, int32_t *out) {
  dots_by_parts<ROWS>(high, residual, half, q, sum8, feed, out);
}

// Bytes that the weights of 32 keys of one row take.
constexpr int WEIGHT_ROOM = SUBTILE;
// Weights of 0 to 255, of sixteen and sixteen keys of every row, as `values` takes them. What is above counts as 255.
template <int ROWS>
LAMP_INLINE void place_weights(const Vi (*x)[2], uint8_t *to) {
  for (int i = 0; i < 2 * ROWS; i++) {
    const Vi top = splat(255), above = x[i / 2][i % 2] > top;
    const Vb bytes = __builtin_convertvector((x[i / 2][i % 2] & ~above) | (top & above), Vb);
    __builtin_memcpy(to + i * LANES, &bytes, sizeof bytes);
  }
}

constexpr bool WEIGHTS_OF_EIGHT_BITS = true;
static_assert(MOST_FINE <= MOST_TILES, "both are products of one plane here");

template <int ROWS>
LAMP_INLINE void fine_values(const uint8_t *const *high, const uint8_t *const *residual, int count, int64_t stride,
                             int half, const uint8_t *w_upper, const uint8_t *w_lower, const uint8_t *w_eight,
                             Feeds &feeds, int32_t *out) {
  int32_t part[ROWS * MOST_DIM];
  values<ROWS>(high, count, stride, half, w_upper, feeds.values, out);
  values<ROWS>(residual, count, stride, half, w_eight, feeds.refined, part);
  for (int i = 0; i < ROWS * 2 * half; i++) out[i] = out[i] * 16 + part[i];
  values<ROWS>(high, count, stride, half, w_lower, feeds.refined, part);
  for (int i = 0; i < ROWS * 2 * half; i++) out[i] = out[i] * 16 + part[i];
}

#include "lanes_by_rows.h"
