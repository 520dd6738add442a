// Products with either layout of planes (planes.h); what they compute: portable.h.

template <int ROWS>
LAMP_INLINE void dots_with(const LampPlanes &planes, const uint8_t *plane, const int8_t *q, const int32_t *sum8,
                           Feed &feed, int32_t *out) {
  if (planes.by_lanes)
    dots_by_lanes<ROWS>(plane, (int)planes.half_k, q, sum8, feed, out);
  else
    dots<ROWS>(plane, (int)planes.half_k, q, sum8, feed, out);
}

template <int ROWS>
LAMP_INLINE void fine_dots_with(const LampPlanes &planes, const uint8_t *high, const uint8_t *residual, const int8_t *q,
                                const int32_t *sum8, Feed &feed, int32_t *out) {
  if (planes.by_lanes)
    fine_dots_by_lanes<ROWS>(high, residual, (int)planes.half_k, q, sum8, feed, out);
  else
    fine_dots<ROWS>(high, residual, (int)planes.half_k, q, sum8, feed, out);
}

// Weights of 32 keys of every row, in the n-th place.
template <int ROWS>
LAMP_INLINE void place_weights_for(const LampPlanes &planes, const Vi (*x)[2], int n, uint8_t *w) {
  if (planes.by_lanes)
    place_weights_by_lanes<ROWS>(x, w + n * ROWS * SUBTILE);
  else
    place_weights<ROWS>(x, w + n * ROWS * WEIGHT_ROOM);
}

template <int ROWS>
LAMP_INLINE void values_with(const LampPlanes &planes, const uint8_t *const *tiles, int count, const uint8_t *w,
                             Feed &feed, int32_t *out) {
  if (planes.by_lanes)
    values_by_lanes<ROWS>(tiles, count, (int)planes.half_v, w, feed, out);
  else
    values<ROWS>(tiles, count, planes.tile, (int)planes.half_v, w, feed, out);
}

template <int ROWS>
LAMP_INLINE void fine_values_with(const LampPlanes &planes, const uint8_t *const *high, const uint8_t *const *residual,
                                  int count, const uint8_t *w_upper, const uint8_t *w_lower, const uint8_t *w_eight,
                                  Feeds &feeds, int32_t *out) {
  const int half = (int)planes.half_v;
  if (planes.by_lanes)
    fine_values_by_lanes<ROWS>(high, residual, count, half, w_upper, w_lower, w_eight, feeds, out);
  else
    fine_values<ROWS>(high, residual, count, planes.tile, half, w_upper, w_lower, w_eight, feeds, out);
}
