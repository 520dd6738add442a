// Planes by lanes (planes.h), where an instruction set has products with rows alone: a sub-tile at a time is copied.

template <int ROWS>
LAMP_APART void dots_by_lanes(const uint8_t *plane, int half, const int8_t *q, const int32_t *sum8, Feed &feed,
                              int32_t *out) {
  alignas(64) uint8_t rows[SUBTILE * MOST_DIM / 2];
  keys_of_lanes(plane, half, rows);
  dots<ROWS>(rows, half, q, sum8, feed, out);
}
template <int ROWS>
LAMP_APART void fine_dots_by_lanes(const uint8_t *high, const uint8_t *residual, int half, const int8_t *q,
                                   const int32_t *sum8, Feed &feed, int32_t *out) {
  alignas(64) uint8_t rows[2][SUBTILE * MOST_DIM / 2];
  keys_of_lanes(high, half, rows[0]);
  keys_of_lanes(residual, half, rows[1]);
  fine_dots<ROWS>(rows[0], rows[1], half, q, sum8, feed, out);
}

template <int ROWS>
LAMP_INLINE void place_weights_by_lanes(const Vi (*x)[2], uint8_t *to) {
  static_assert(WEIGHT_ROOM == SUBTILE, "weights lie as those of rows");
  place_weights<ROWS>(x, to);
}

// The values of up to MOST_TILES sub-tiles, as rows of 32 keys.
struct ValueRows {
  alignas(64) uint8_t bytes[MOST_TILES][SUBTILE * MOST_DIM / 2];
  const uint8_t *tiles[MOST_TILES];
};
LAMP_INLINE void copy_values(const uint8_t *const *tiles, int count, int half, ValueRows &to) {
  for (int t = 0; t < count; t++) {
    values_of_lanes(tiles[t], half, to.bytes[t]);
    to.tiles[t] = to.bytes[t];
  }
}
template <int ROWS>
LAMP_APART void values_by_lanes(const uint8_t *const *tiles, int count, int half, const uint8_t *w, Feed &feed,
                                int32_t *out) {
  ValueRows rows;
  copy_values(tiles, count, half, rows);
  values<ROWS>(rows.tiles, count, SUBTILE, half, w, feed, out);
}
template <int ROWS>
LAMP_APART void fine_values_by_lanes(const uint8_t *const *high, const uint8_t *const *residual, int count, int half,
                                     const uint8_t *w_upper, const uint8_t *w_lower, const uint8_t *w_eight,
                                     Feeds &feeds, int32_t *out) {
  ValueRows rows[2];
  copy_values(high, count, half, rows[0]);
  copy_values(residual, count, half, rows[1]);
  fine_values<ROWS>(rows[0].tiles, rows[1].tiles, count, SUBTILE, half, w_upper, w_lower, w_eight, feeds, out);
}
