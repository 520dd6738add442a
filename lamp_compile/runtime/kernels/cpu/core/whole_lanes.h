// Whole chunks of planes by lanes: products of 32 keys at a time, beside which the 32 keys before are weighed. Part of
// whole.h.

// Part `part` of 32: eight of each row, in turns of its first and its last sixteen keys.
LAMP_INLINE void weigh_part_of_32(const Weigher &weigher, const Before<2> &before, const Vf *scale, int part,
                                  Weighing *weighing, Vf *sum, Vf *mass) {
  const int r = part / 8, h = part % 2;
  Weighing &w = weighing[h];
  if (part % 8 / 2 == 0) weigh_scores(weigher, before.product[r][h], scale[h], r, w);
  if (part % 8 / 2 == 1) weigh_split(w);
  if (part % 8 / 2 == 2) weigh_join(w);
  if (part % 8 / 2 < 3) return;
  store(before.weight + r * before.pitch + h * LANES, w.x);
  if (!h) return;
  sum[r] += weighing[0].x + w.x;
  mass[r] = weighing[0].x * weighing[0].x + w.x * w.x;
}

// Products of the 32 keys at `plane`; as many bytes at `soon` are asked for.
template <int HALF>
LAMP_INLINE void weigh_32_keys(const uint8_t *plane, const uint8_t *soon, const int8_t *q, const Weigher &weigher,
                               Before<2> &before, Vf *sum, Vf *mass) {
  constexpr int STEPS = HALF / 4, PARTS = 8 * ABREAST;
  __m512i sums[ABREAST][2][2];
#pragma GCC unroll 4
  for (int r = 0; r < ABREAST; r++) {
    sums[r][0][0] = sums[r][0][1] = _mm512_set1_epi32(weigher.begin[r]);
    sums[r][1][0] = sums[r][1][1] = _mm512_setzero_si512();
  }
  const Vf scale[2] = {scale_of(before.scale), scale_of(before.scale + LANES)};
  Weighing weighing[2];
#pragma GCC unroll 32
  for (int step = 0; step < STEPS; step++) {
    const uint8_t *at = plane + step * FOUR_OF_32;
    const int8_t *four = q + 4 * step;
    __m512i upper[2], lower[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __m512i x = flipped(_mm512_loadu_si512(at + 64 * h));
      upper[h] = _mm512_and_si512(x, _mm512_set1_epi8((char)0xf0));
      lower[h] = lower_of(x);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ABREAST; r++) {
      add_query(sums[r][0], upper, four + 2 * r * PADDED);
      add_query(sums[r][1], lower, four + (2 * r + 1) * PADDED);
      if (r % 2) ask(soon + step * FOUR_OF_32 + 64 * (r / 2));
      // Of all parts as many as keep pace.
      const int now = 4 * step + r;
      for (int part = now * PARTS / (4 * STEPS); part < (now + 1) * PARTS / (4 * STEPS); part++)
        weigh_part_of_32(weigher, before, scale, part, weighing, sum, mass);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ABREAST; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
      before.product[r][h] = _mm512_add_epi32(sums[r][0][h], _mm512_slli_epi32(sums[r][1][h], 4));
}

// What is asked for with the sub-tile of key j: as much of one ahead of it, or what else is read soon.
LAMP_INLINE const uint8_t *asked_with(const Work &work, int64_t j, const uint8_t *plane, const uint16_t *scale,
                                      Feed &feed) {
  const LampPlanes &planes = work.call->planes;
  const int64_t bytes = SUBTILE * planes.half_k, ahead = ahead_of(planes);
  if (!planes.table && j + ahead + MOST_TILES * SUBTILE < work.rows.to) {
    fetch(scale + ahead, 2 * SUBTILE);
    return plane + ahead / SUBTILE * bytes;
  }
  ask_ahead(work, j + ahead, feed);
  return take(feed, bytes);
}

// As weigh_keys.
template <int HALF>
LAMP_INLINE void weigh_keys_by_lanes(Work &work, int64_t first, int r0, Feed &feed, const Weigher &weigher, Vf *sum,
                                     Vf *joined) {
  const LampPlanes &planes = work.call->planes;
  const Rows &rows = work.rows;
  Vf mass[ABREAST];
  Place place = place_of(planes, rows.b, rows.g, first);
  Before<2> before;
  begin_before(work, first, r0, place, before, sum, mass);
  for (int s = 0; s < CHUNK / SUBTILE; s++) {
    const int64_t j = first + s * SUBTILE;
    const uint8_t *plane = planes.k_high + key_at(planes, place);
    const uint16_t *scale = planes.k_scale + scale_at(planes, place);
    const uint8_t *soon = r0 ? plane : asked_with(work, j, plane, scale, feed);
    weigh_32_keys<HALF>(plane, soon, rows.q[r0], weigher, before, sum, mass);
    joined[s] = join_rows(mass);
#pragma GCC unroll 4
    for (int r = 0; r < ABREAST; r++) sum[r] = s ? sum[r] : splat(0.0f);
    before.scale = scale;
    before.weight = work.z + r0 * work.pitch + (j - rows.from);
    if (planes.table && s + 1 < CHUNK / SUBTILE)
      place = place_of(planes, rows.b, rows.g, j + SUBTILE);
    else
      advance(planes, place);
  }
  const Vf scale[2] = {scale_of(before.scale), scale_of(before.scale + LANES)};
  Weighing weighing[2];
#pragma GCC unroll 32
  for (int part = 0; part < 8 * ABREAST; part++) weigh_part_of_32(weigher, before, scale, part, weighing, sum, mass);
  joined[CHUNK / SUBTILE] = join_rows(mass);
}
