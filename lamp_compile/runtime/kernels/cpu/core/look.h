// First pass: scores from the high plane alone, what each sub-tile weighs, and the log-sum-exp. Where all is refined
// anyway (floor 1) the scores come from both planes.

// Everything that both passes and the end share, for one piece of work.
struct Work {
  const LampAttend *call;
  Rows rows;
  int64_t span;              // keys from rows.from on that there is room for: whole chunks
  int64_t pitch;             // from a row of scores to the next
  int stride;                // rows.count, padded
  float *z;                  // [count][pitch]: 2^(score - chunk's level)
  float *most, *sum;         // [span / CHUNK][stride]: the level of each chunk, its maximum or near it, and its sum
  float *weight;             // [count][span / SUBTILE]: the rule's statistic, relative to the chunk's level
  uint8_t *alive;            // [span / SUBTILE][tokens]: whether a token sees any key
  float *partial;            // [span / SEGMENT][count][Dv + SUMS]
  float lse[MOST_ROWS];      // of the look-ahead, base 2; -inf where nothing is seen
  float inverse[MOST_ROWS];  // one over the largest |y| e^y, for the relaxed rule
  float tau, level;
  int64_t next_head;  // the kv head of the same sequence that its thread most likely goes on with; -1 where none
  // Where a network decided, null elsewhere. Keys are then counted by the places of those sub-tiles that are read.
  const Ahead *ahead;
  const int32_t *order;  // the sub-tile at each place
  const uint8_t *hot;    // whether it is scored with both planes
};
LAMP_INLINE int64_t key_of(const Work &work, int64_t place) {
  return work.order ? (int64_t)work.order[place / SUBTILE] * SUBTILE : place;
}
// Whether the first pass leaves final scores.
LAMP_INLINE bool settled(const Work &work) { return work.level >= 1 || work.hot; }
// Behind the output of a partial result: sums over keys, then flags and counts.
enum {
  WEIGHT,
  CORRECTION,
  SCORES_HARD,
  SCORES_SOFT,
  VALUE_HARD,
  BOTH_HARD,
  BOTH_SOFT,
  KEY_SUMS,
  POISON = KEY_SUMS,
  ALIVE,
  REFINED,
  SUMS = 16  // rows of a partial result begin at cache lines
};

// Whether scores of a sub-tile are from both planes in the first pass.
LAMP_INLINE bool final_at_once(const Work &work, int64_t j) {
  return work.level >= 1 || (work.hot && work.hot[j / SUBTILE]);
}

LAMP_INLINE Vf scores(const LampAttend &call, const Rows &rows, int r, Vf products, Vf scale) {
  Vf y = products * scale * splat(rows.coefficient[r]);
  return call.softcap != 0 ? soft_cap(y, call.softcap) : y;
}

// Whether the rows from r0 on are all of one token, which sees the 32 keys from `key` on.
template <int ROWS>
LAMP_INLINE bool all_seen(const LampAttend &call, const Rows &rows, int r0, int64_t key) {
  const int last = r0 + ROWS < rows.count ? r0 + ROWS - 1 : rows.count - 1, token = rows.token[r0];
  return !call.mask && rows.token[last] == token && rows.low[token] <= key && key + SUBTILE <= rows.high[token];
}

// Scores of 32 keys and up to four rows. PLAIN: nothing is added to them, and no cap bends them.
template <int ROWS, bool PLAIN>
LAMP_APART void look_at_subtile(Work &work, int r0, int64_t j, const uint8_t *plane, const uint8_t *residual,
                                const Vf *scale, Feed &feed, Vf *most) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  const bool both = final_at_once(work, j);
  const int64_t key = key_of(work, j);
  alignas(64) int32_t products[ROWS * SUBTILE];
  if (both)
    fine_dots_with<ROWS>(call.planes, plane, residual, rows.q[r0], rows.sum8 + r0, feed, products);
  else
    dots_with<ROWS>(call.planes, plane, rows.q[r0], rows.sum8 + r0, feed, products);
  uint8_t *alive = work.alive + (j - rows.from) / SUBTILE * rows.tokens;
  if (PLAIN && all_seen<ROWS>(call, rows, r0, key)) {
    alive[rows.token[r0]] = 1;
    for (int i = 0; i < ROWS && r0 + i < rows.count; i++) {
      const int r = r0 + i;
      float *z = work.z + r * work.pitch + (j - rows.from);
      const Vf mean = splat(both ? 0.0f : rows.half_sum[r] * (1.0f / 16.0f));
      const Vf coefficient = splat(rows.coefficient[r] * (both ? 1.0f : 16.0f));
      Vf largest = most[r];
      for (int h = 0; h < 2; h++) {
        const Vf y = (floats(load(products + i * SUBTILE + h * LANES)) - mean) * scale[h] * coefficient;
        store(z + h * LANES, y);
        largest = larger(y, largest);
      }
      most[r] = largest;
    }
    return;
  }
  uint32_t seen = 0;
  for (int i = 0, known = -1; i < ROWS && r0 + i < rows.count; i++) {
    const int r = r0 + i, token = rows.token[r];
    if (heads_differ(call) || token != known) {
      seen = visible(call, rows, r, key);
      if (seen) alive[token] = 1;
      known = token;
    }
    float *z = work.z + r * work.pitch + (j - rows.from);
    // 16 times the high nibble, and the -1/2 that the residual nibble averages.
    const Vf unit = splat(both ? 1.0f : 16.0f), mean = splat(both ? 0.0f : rows.half_sum[r] / 16.0f);
    const Vf coefficient = splat(rows.coefficient[r]) * unit;
    for (int h = 0; h < 2; h++) {
      const Vf product = floats(load(products + i * SUBTILE + h * LANES)) - mean;
      Vf y = PLAIN ? product * scale[h] * coefficient : scores(call, rows, r, product * unit, scale[h]);
      if (!PLAIN && call.bias) {
        float added[LANES];
        for (int k = 0; k < LANES; k++) added[k] = bias_of(call, rows, r, key + h * LANES + k);
        y += load(added);
      }
      if (seen != ~0u) y = select(lanes_of(seen, h), y, splat(-__builtin_inff()));
      store(z + h * LANES, y);
      most[r] = larger(y, most[r]);
    }
  }
}

// What the LAMP rules ask of sixteen keys: |y| e^y, NaN where it cannot be known.
LAMP_INLINE Vf sensitivity(const Work &work, int64_t at, int r, Vf y, Vf z) {
  if (work.call->bias)
    for (int k = 0; k < LANES; k++) y[k] -= bias_of(*work.call, work.rows, r, work.rows.from + at + k);
  return select(z > splat(0.0f), magnitude(y) * splat(1.0f / LOG2E) * z, z);
}

// Turn scores into weights relative to the chunk's maximum; sum them and what the rule asks of each sub-tile.
template <bool SQUARES>
LAMP_APART void weigh_chunk(Work &work, int64_t chunk, int64_t keys, int r, float most) {
  constexpr int SUBTILES = CHUNK / SUBTILE;
  static_assert(SUBTILES == LANES, "a chunk's sub-tiles fill a vector");
  const int64_t first = chunk * CHUNK;
  float *z = work.z + r * work.pitch + first;
  if (!(most > -__builtin_inff())) most = 0;  // nothing seen, or NaN alone
  const Vf top = splat(most);
  const int count = (int)((keys + SUBTILE - 1) / SUBTILE);
  Vf sum = splat(0.0f), mass[SUBTILES];
  for (int s = 0; s < count; s++) {
    const Vf y0 = load(z + s * SUBTILE), y1 = load(z + s * SUBTILE + LANES);
    const Vf x0 = exp2(y0 - top), x1 = exp2(y1 - top);
    store(z + s * SUBTILE, x0);
    store(z + s * SUBTILE + LANES, x1);
    sum += x0 + x1;
    if (SQUARES) {
      mass[s] = x0 * x0 + x1 * x1;
    } else {
      const Vf m0 = sensitivity(work, first + s * SUBTILE, r, y0, x0);
      const Vf m1 = sensitivity(work, first + s * SUBTILE + LANES, r, y1, x1);
      mass[s] = select(m1 == m1, larger(m0, m1), m1);
      mass[s] = select(m0 == m0, mass[s], m0);
    }
  }
  for (int s = count; s < SUBTILES; s++) mass[s] = splat(0.0f);
  Vf weight;
  if (SQUARES) {
    weight = root(totals(mass));
  } else {
    for (int s = 0; s < SUBTILES; s++) weight[s] = largest(mass[s]) + total(mass[s]) * 0.0f;
  }
  store(work.weight + r * (work.span / SUBTILE) + first / SUBTILE, weight);
  work.most[chunk * work.stride + r] = most;
  work.sum[chunk * work.stride + r] = total(sum);
}

// How many keys from now are asked for: more where they take less time.
LAMP_INLINE int64_t ahead_of(const LampPlanes &planes) { return (planes.by_lanes ? 8 : 4) * SUBTILE; }

// Values of a piece's first run, a sub-tile at a time: with the last keys those that nothing else asks for.
LAMP_INLINE void ask_for_first_values(const Work &work, int64_t j) {
  const LampPlanes &planes = work.call->planes;
  const Rows &rows = work.rows;
  const int64_t at = rows.from + (MOST_TILES - (rows.to - j + SUBTILE - 1) / SUBTILE) * SUBTILE;
  if (at < rows.from + ahead_of(planes) || at >= rows.to || planes.tile != SUBTILE) return;
  const Place place = place_of(planes, rows.b, rows.g, key_of(work, at));
  ask_for(planes.v_high + value_at(planes, place), SUBTILE * planes.half_v);
}

// What the first pass reads of the sub-tile at j; behind the last one, values that the second pass begins with.
LAMP_INLINE void ask_ahead(const Work &work, int64_t j, Feed &feed) {
  const LampPlanes &planes = work.call->planes;
  const Rows &rows = work.rows;
  const bool keys = j < rows.to;
  if (!keys) j = rows.from + (j - rows.to) / SUBTILE * SUBTILE;
  const Place place = place_of(planes, rows.b, rows.g, key_of(work, j < rows.to ? j : rows.from));
  clear(feed, &feed);
  if (keys) {
    fetch(planes.k_scale + scale_at(planes, place), 2 * SUBTILE);
    push(feed, planes.k_high + key_at(planes, place), SUBTILE * planes.half_k);
    if (j + MOST_TILES * SUBTILE >= rows.to) ask_for_first_values(work, j);
    if (final_at_once(work, j)) push(feed, planes.k_residual + key_at(planes, place), SUBTILE * planes.half_k);
  } else {
    push(feed, planes.v_high + value_at(planes, place), SUBTILE * planes.half_v);
  }
}

// Keys of a piece that nobody has asked for.
LAMP_INLINE void ask_for_first_keys(const Work &work) {
  const LampPlanes &planes = work.call->planes;
  const Rows &rows = work.rows;
  for (int64_t j = rows.from; j < rows.from + ahead_of(planes) && j < rows.to; j += SUBTILE) {
    const Place place = place_of(planes, rows.b, rows.g, key_of(work, j));
    ask_for(planes.k_high + key_at(planes, place), SUBTILE * planes.half_k);
  }
}

// Scores of the keys from `first` to `end`, of one chunk, and the largest of each row.
template <bool PLAIN>
LAMP_INLINE void look_at_chunk(Work &work, int64_t first, int64_t end, Feed &feed, Vf *most) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  for (int64_t j = first; j < end; j += SUBTILE) {
    const Place place = place_of(call.planes, rows.b, rows.g, key_of(work, j));
    const uint8_t *plane = call.planes.k_high + key_at(call.planes, place);
    ask_ahead(work, j + ahead_of(call.planes), feed);
    const uint8_t *residual = call.planes.k_residual + key_at(call.planes, place);
    Vf scale[2];
    for (int h = 0; h < 2; h++) {
      scale[h] = halves(call.planes.k_scale + scale_at(call.planes, place) + h * LANES);
      scale[h] = select(finite(scale[h]), scale[h], splat(__builtin_nanf("")));
    }
    for (int r = 0; r < rows.count;) switch (block_rows(rows.count - r)) {
        case 4:
          look_at_subtile<4, PLAIN>(work, r, j, plane, residual, scale, feed, most);
          r += 4;
          break;
        case 2:
          look_at_subtile<2, PLAIN>(work, r, j, plane, residual, scale, feed, most);
          r += 2;
          break;
        default:
          look_at_subtile<1, PLAIN>(work, r, j, plane, residual, scale, feed, most);
          r += 1;
      }
  }
}

LAMP_INLINE float log2_of(float x) { return __builtin_log2f(x); }
LAMP_INLINE float exp2_of(float x) { return exp2(splat(x > 127.0f ? 127.0f : x))[0]; }

#if defined(LAMP_WHOLE)
#include "whole.h"
#else
struct Levels {};
LAMP_INLINE bool look_at_whole(Work &, int64_t, Feed &, Levels &) { return false; }
#endif

static void look_at_segment(Work &work, int64_t segment) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  Feed feed;
  Levels levels;
  clear(feed, &feed);
  const int64_t begin = rows.from + segment * SEGMENT;
  const int64_t behind = begin + SEGMENT < rows.to ? begin + SEGMENT : rows.to;
  if (!segment) ask_for_first_keys(work);
  for (int64_t first = begin; first < behind; first += CHUNK) {
    const int64_t end = first + CHUNK < rows.to ? first + CHUNK : rows.to;
    const int64_t chunk = (first - rows.from) / CHUNK;
    if (look_at_whole(work, first, feed, levels)) continue;
    Vf most[MOST_ROWS];
    for (int r = 0; r < rows.count; r++) most[r] = splat(-__builtin_inff());
    if (call.bias || call.softcap != 0)
      look_at_chunk<false>(work, first, end, feed, most);
    else
      look_at_chunk<true>(work, first, end, feed, most);
    for (int r = 0; r < rows.count; r++) {
      if (call.rule == LAMP_ENERGY)
        weigh_chunk<true>(work, chunk, end - first, r, largest(most[r]));
      else
        weigh_chunk<false>(work, chunk, end - first, r, largest(most[r]));
    }
  }
}

// The log-sum-exp of every row, sinks included, and what the relaxed rule divides by.
static void join_looks(Work &work) {
  const LampAttend &call = *work.call;
  Rows &rows = work.rows;
  const int64_t chunks = rows.to > rows.from ? (rows.to - rows.from + CHUNK - 1) / CHUNK : 0;
  for (int r = 0; r < rows.count; r++) {
    float most = -__builtin_inff(), sum = 0, heaviest = 0;
    for (int64_t c = 0; c < chunks; c++) {
      const float here = work.most[c * work.stride + r];
      const float there = work.sum[c * work.stride + r];
      if (there > 0 && here > most) most = here;
    }
    for (int64_t c = 0; c < chunks; c++) {
      const float there = work.sum[c * work.stride + r];
      if (there == 0) continue;
      sum += there * exp2_of(work.most[c * work.stride + r] - (most > -__builtin_inff() ? most : 0));
    }
    const bool seen = sum > 0 || sum != sum;
    float lse = seen ? (most > -__builtin_inff() ? most : 0) + log2_of(sum) : -__builtin_inff();
    if (seen && call.sinks) {
      const float sink = LOG2E * call.sinks[rows.head[r]];
      const float top = sink > lse ? sink : lse;
      lse = top + log2_of(exp2_of(lse - top) + exp2_of(sink - top)) + (lse - lse);
    }
    work.lse[r] = lse;
    if (call.rule != LAMP_RELAXED || !seen) continue;
    for (int64_t s = 0; s < chunks * (CHUNK / SUBTILE) && rows.from + s * SUBTILE < rows.to; s++) {
      const float here = work.most[s / (CHUNK / SUBTILE) * work.stride + r];
      const float m = work.weight[r * (work.span / SUBTILE) + s] * exp2_of(here - lse);
      heaviest = m > heaviest || m != m ? m : heaviest;
    }
    work.inverse[r] = 1.0f / (heaviest > 1.1754944e-38f || heaviest != heaviest ? heaviest : 1.1754944e-38f);
  }
}
