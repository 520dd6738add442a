// Integer products in plain C++: what every instruction set computes.
//
// dots:   out[r][j] = sum over channels of q[r][c] * nibble[j][c], for 32 keys of a K plane.
// fine_dots: out[r][j] = sum over channels of q[r][c] * (16 * high[j][c] + residual[j][c]), alike.
// values: out[r][c] = 16 * sum over tiles and keys of w[t][r][j] * nibble[t][c][j], for 32 keys of each tile of V.
// fine_values: out[r][c] = (256 * w_upper + w_lower) * (16 * high + residual), summed alike: fits into 32 bits for
//         MOST_FINE tiles, because the high plane holds -7 to 7. Where WEIGHTS_OF_EIGHT_BITS, the residual plane is
//         multiplied by 256 * w_eight.
// MOST_TILES: how many of V `values` takes at once, which share a scale of weights.
// feed: what will be read soon, which may be asked for in passing.
// q is [rows][2][PADDED] with zeros behind the channels, nibbles are -8 to 7, w is [tiles][rows][WEIGHT_ROOM], each as
// place_weights leaves it (here its 32 bytes). What ends in _by_lanes takes planes by lanes (planes.h), and 32 bytes of
// weights as place_weights_by_lanes leaves them.

LAMP_INLINE int upper_nibble(uint8_t b) { return (int8_t)b >> 4; }
LAMP_INLINE int lower_nibble(uint8_t b) { return (int8_t)(b << 4) >> 4; }

template <int ROWS>
LAMP_INLINE void dots(const uint8_t *plane, int half, const int8_t *q, const int32_t *, Feed &, int32_t *out) {
  for (int j = 0; j < SUBTILE; j++)
    for (int r = 0; r < ROWS; r++) {
      const int8_t *upper = q + r * 2 * PADDED, *lower = upper + PADDED;
      int32_t sum = 0;
      for (int c = 0; c < half; c++) {
        const uint8_t b = plane[j * half + c];
        sum += upper[c] * upper_nibble(b) + lower[c] * lower_nibble(b);
      }
      out[r * SUBTILE + j] = sum;
    }
}

constexpr int MOST_TILES = 8;
template <int ROWS>
LAMP_INLINE void values(const uint8_t *const *tiles, int count, int64_t stride, int half, const uint8_t *w, Feed &,
                        int32_t *out) {
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < half; c++) {
      int32_t upper = 0, lower = 0;
      for (int t = 0; t < count; t++) {
        const uint8_t *row = tiles[t] + c * stride, *weight = w + (t * ROWS + r) * SUBTILE;
        for (int j = 0; j < SUBTILE; j++) {
          upper += weight[j] * upper_nibble(row[j]);
          lower += weight[j] * lower_nibble(row[j]);
        }
      }
      out[r * 2 * half + c] = 16 * upper;
      out[r * 2 * half + half + c] = 16 * lower;
    }
}

LAMP_INLINE Vf halves(const uint16_t *from) {
  float x[LANES];
  for (int i = 0; i < LANES; i++) x[i] = half_to_float(from[i]);
  return load(x);
}

#include "fine_by_parts.h"
