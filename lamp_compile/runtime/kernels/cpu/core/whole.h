// First pass over chunks whose keys all rows see, with AVX-512. Integer products leave half of the execution units
// idle, so the scores and weights of sixteen keys are worked out between the products of the next sixteen. Weights
// cannot wait for the largest score of their chunk then: they are relative to a level that the keys before left.

constexpr int ABREAST = 4;               // rows that share the bytes of a key
constexpr int MOST_LEVELS = 16;          // rows of a piece that may be looked at like this
constexpr float FAR = 1048576.0f;        // times a level's weight: sums of squares stay far from the largest number
constexpr float MOST_LEVEL = 131072.0f;  // up to it a 64th of a power of two is exact

// What the weights of a segment's next chunk are relative to, in base 2: whole numbers.
struct Levels {
  bool known = false;
  float level[MOST_LEVELS];
};

#include "whole_weights.h"

// Products of sixteen keys, whose first 32 bytes are `bytes`; those of the keys at `after` are there in the end. The
// sixteen keys before are weighed on the way; LAST where those are the last ones of their sub-tile.
template <int HALF, bool LAST>
LAMP_INLINE void sixteen_keys(const uint8_t *plane, const uint8_t *after, const int8_t *q, Feed &feed,
                              const Weigher &weigher, Before<1> &before, Vf *sum, Vf *mass, __m512i (*bytes)[4]) {
  constexpr int EVERY = HALF / 64;
  __m512i sums[ABREAST][2];
#pragma GCC unroll 4
  for (int r = 0; r < ABREAST; r++) {
    sums[r][0] = _mm512_set1_epi32(weigher.begin[r]);
    sums[r][1] = _mm512_setzero_si512();
  }
  const Vf scale = scale_of(before.scale);
  Weighing weighing;
#pragma GCC unroll 4
  for (int first = 0; first < HALF; first += 32) {
    const uint8_t *soon = take(feed, 8 * 64), *later = first + 32 < HALF ? plane + first + 32 : after;
    __m512i next[2][4];
    // Taken out of the loop, addresses of the query would be spilled and read again.
    __asm__ volatile("" : "+r"(q));
#pragma GCC unroll 8
    for (int d = 0; d < 8; d++) {
      const int8_t *four = q + first + 4 * d;
      const __m512i x = flipped(bytes[d / 4][d % 4]), lower = lower_of(x);
      const __m512i upper = _mm512_and_si512(x, _mm512_set1_epi8((char)0xf0));
      add_rows<2>(sums, upper, lower, four);
      const int step = first / 4 + d;
      if (step % EVERY == 0) weigh_part<LAST>(weigher, before, scale, step / EVERY, weighing, sum, mass);
      add_rows<2>(sums + 2, upper, lower, four + 4 * PADDED);
      if (d < 4) {
        __m512i two[2];
        sixteen_of_four<HALF>(later + d * HALF, two);
        next[0][d] = two[0], next[1][d] = two[1];
      }
      if (d >= 6) transpose(next[d - 6]);
      ask(soon + 64 * d);
    }
#pragma GCC unroll 8
    for (int d = 0; d < 8; d++) bytes[d / 4][d % 4] = next[d / 4][d % 4];
  }
#pragma GCC unroll 4
  for (int r = 0; r < ABREAST; r++)
    before.product[r][0] = _mm512_add_epi32(sums[r][0], _mm512_slli_epi32(sums[r][1], 4));
}

// Before a chunk's first keys there are none to weigh: what is made of them is written over.
template <int VECTORS>
LAMP_INLINE void begin_before(const Work &work, int64_t first, int r0, const Place &place, Before<VECTORS> &before,
                              Vf *sum, Vf *mass) {
#pragma GCC unroll 4
  for (int r = 0; r < ABREAST; r++) {
    for (int v = 0; v < VECTORS; v++) before.product[r][v] = _mm512_setzero_si512();
    sum[r] = mass[r] = splat(0.0f);
  }
  before.scale = work.call->planes.k_scale + scale_at(work.call->planes, place);
  before.weight = work.z + r0 * work.pitch + (first - work.rows.from);
  before.pitch = work.pitch;
}

// Weights of a chunk's keys for four rows, their sums, and what is joined of the squares of the sub-tile before each.
template <int HALF>
LAMP_INLINE void weigh_keys(Work &work, int64_t first, int r0, Feed &feed, const Weigher &weigher, Vf *sum,
                            Vf *joined) {
  const LampPlanes &planes = work.call->planes;
  const Rows &rows = work.rows;
  Vf mass[ABREAST];
  __m512i bytes[2][4];
  Place place = place_of(planes, rows.b, rows.g, first);
  begin_keys<HALF>(planes.k_high + key_at(planes, place), bytes);
  Before<1> before;
  begin_before(work, first, r0, place, before, sum, mass);
  before.weight += LANES;
  for (int s = 0; s < CHUNK / SUBTILE; s++) {
    const int64_t j = first + s * SUBTILE;
    const Place next = j + SUBTILE < first + CHUNK ? place_of(planes, rows.b, rows.g, j + SUBTILE) : place;
    const uint8_t *plane = planes.k_high + key_at(planes, place), *after = planes.k_high + key_at(planes, next);
    if (!r0) ask_ahead(work, j + ahead_of(planes), feed);
    sixteen_keys<HALF, true>(plane, plane + LANES * HALF, rows.q[r0], feed, weigher, before, sum, mass, bytes);
    joined[s] = join_rows(mass);
#pragma GCC unroll 4
    for (int r = 0; r < ABREAST; r++) sum[r] = s ? sum[r] : splat(0.0f);
    before.scale = planes.k_scale + scale_at(planes, place);
    before.weight = work.z + r0 * work.pitch + (j - rows.from);
    sixteen_keys<HALF, false>(plane + LANES * HALF, after, rows.q[r0], feed, weigher, before, sum, mass, bytes);
    before.scale += LANES, before.weight += LANES;
    place = next;
  }
  const Vf scale = scale_of(before.scale);
  Weighing weighing;
#pragma GCC unroll 16
  for (int part = 0; part < 4 * ABREAST; part++) weigh_part<true>(weigher, before, scale, part, weighing, sum, mass);
  joined[CHUNK / SUBTILE] = join_rows(mass);
}

#include "whole_lanes.h"

// False where a weight was far above the level, or a NaN: nothing of it holds then.
template <int HALF, bool BY_LANES>
LAMP_APART bool weigh_whole(Work &work, int64_t first, int r0, Feed &feed, const float *level) {
  const Rows &rows = work.rows;
  Vf joined[CHUNK / SUBTILE + 1], sum[ABREAST];
  Weigher weigher;
  begin_weigher(rows, r0, level, weigher);
  if (BY_LANES)
    weigh_keys_by_lanes<HALF>(work, first, r0, feed, weigher, sum, joined);
  else
    weigh_keys<HALF>(work, first, r0, feed, weigher, sum, joined);
  __m512i weight[ABREAST];
  totals_by_row(joined + 1, weight);
  const int64_t at = (first - rows.from) / CHUNK * work.stride + r0;
  bool near = true;
#pragma GCC unroll 4
  for (int r = 0; r < ABREAST; r++) {
    const float all = total(sum[r]);
    near &= all < FAR;
    work.most[at + r] = level[r0 + r];
    work.sum[at + r] = all;
    store(work.weight + (r0 + r) * (work.span / SUBTILE) + (first - rows.from) / SUBTILE, root((Vf)weight[r]));
  }
  return near;
}

static bool weigh_rows(Work &work, int64_t first, int r0, Feed &feed, const float *level) {
  const int64_t half = work.call->planes.half_k;
  if (!work.call->planes.by_lanes)
    return half == 64 ? weigh_whole<64, false>(work, first, r0, feed, level)
                      : weigh_whole<128, false>(work, first, r0, feed, level);
  if (half == 32) return weigh_whole<32, true>(work, first, r0, feed, level);
  return half == 64 ? weigh_whole<64, true>(work, first, r0, feed, level)
                    : weigh_whole<128, true>(work, first, r0, feed, level);
}

// The largest scores of a segment's first keys.
static void begin_levels(Work &work, int64_t first, Feed &feed, Levels &levels) {
  const LampPlanes &planes = work.call->planes;
  const Rows &rows = work.rows;
  const Place place = place_of(planes, rows.b, rows.g, first);
  const uint8_t *plane = planes.k_high + key_at(planes, place);
  Vf scale[2], most[MOST_LEVELS];
  for (int h = 0; h < 2; h++) scale[h] = halves(planes.k_scale + scale_at(planes, place) + h * LANES);
  for (int r = 0; r < rows.count; r++) most[r] = splat(-__builtin_inff());
  for (int r = 0; r < rows.count; r += ABREAST)
    look_at_subtile<ABREAST, true>(work, r, first, plane, plane, scale, feed, most);
  levels.known = true;
  for (int r = 0; r < rows.count; r++) {
    levels.level[r] = __builtin_floorf(largest(most[r]));
    // Scores are worked out in another order than here: with millions, last bits would be powers of two apart.
    levels.known &= __builtin_fabsf(levels.level[r]) < MOST_LEVEL;
  }
}

// Whether all rows see all keys of the chunk, and nothing but products makes their scores.
LAMP_INLINE bool is_whole(const Work &work, int64_t first) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  if (call.mask || call.bias || call.softcap != 0 || call.rule != LAMP_ENERGY || settled(work) || work.order)
    return false;
  if (rows.count % ABREAST || rows.count > MOST_LEVELS) return false;
  const int64_t half = call.planes.half_k;
  if (half != 64 && half != 128 && !(half == 32 && call.planes.by_lanes)) return false;
  for (int t = 0; t < rows.tokens; t++)
    if (rows.low[t] > first || rows.high[t] < first + CHUNK) return false;
  return true;
}

// False where the chunk must be looked at in the common way.
static bool look_at_whole(Work &work, int64_t first, Feed &feed, Levels &levels) {
  const Rows &rows = work.rows;
  const bool whole = is_whole(work, first);
  if (whole && !levels.known) begin_levels(work, first, feed, levels);
  levels.known &= whole;
  for (int r = 0; levels.known && r < rows.count; r += ABREAST)
    levels.known = weigh_rows(work, first, r, feed, levels.level);
  if (!levels.known) return false;
  const int64_t chunk = (first - rows.from) / CHUNK;
  for (int r = 0; r < rows.count; r++) {
    const float sum = work.sum[chunk * work.stride + r];
    if (sum > 1) levels.level[r] += __builtin_floorf(log2_of(sum));
  }
  __builtin_memset(work.alive + chunk * (CHUNK / SUBTILE) * rows.tokens, 1, CHUNK / SUBTILE * rows.tokens);
  return true;
}
