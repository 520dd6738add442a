// First pass: scores from the high plane alone, what each sub-tile weighs, and the log-sum-exp. Where all is refined
// anyway (floor 1) the scores come from both planes.

// Everything that both passes and the end share, for one piece of work.
struct Work {
  const LampAttend *call;
  Rows rows;
  int64_t span;              // keys from rows.from on that there is room for: whole segments
  int stride;                // rows.count, padded
  float *z;                  // [count][span]: 2^(score - chunk's maximum)
  float *most, *sum;         // [span / CHUNK][stride]: of each chunk
  float *weight;             // [count][span / SUBTILE]: the rule's statistic, relative to the chunk's maximum
  uint8_t *alive;            // [span / SUBTILE][tokens]: whether a token sees any key
  float *partial;            // [span / SEGMENT][count][Dv + SUMS]
  float lse[MOST_ROWS];      // of the look-ahead, base 2; -inf where nothing is seen
  float inverse[MOST_ROWS];  // one over the largest |y| e^y, for the relaxed rule
  float tau, level;
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
  SUMS
};

LAMP_INLINE Vf scores(const LampAttend &call, const Rows &rows, int r, Vf products, Vf scale) {
  Vf y = products * scale * splat(rows.coefficient[r]);
  return call.softcap != 0 ? soft_cap(y, call.softcap) : y;
}

template <int ROWS>
LAMP_INLINE void look_at_subtile(Work &work, int r0, int64_t j, const uint8_t *plane, const uint8_t *next,
                                 const uint8_t *residual, const Vf *scale, Vf *most) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  const bool both = work.level >= 1 || (work.hot && work.hot[j / SUBTILE]);  // the scores are final at once
  const int64_t key = key_of(work, j);
  int32_t products[ROWS * SUBTILE], fine[ROWS * SUBTILE];
  dots<ROWS>(plane, next, (int)call.planes.half_k, rows.q[r0], rows.sum8 + r0, products);
  if (both) dots<ROWS>(residual, residual, (int)call.planes.half_k, rows.q[r0], rows.sum8 + r0, fine);
  uint8_t *alive = work.alive + (j - rows.from) / SUBTILE * rows.tokens;
  uint32_t seen = 0;
  for (int i = 0, known = -1; i < ROWS && r0 + i < rows.count; i++) {
    const int r = r0 + i, token = rows.token[r];
    if (heads_differ(call) || token != known) {
      seen = visible(call, rows, r, key);
      if (seen) alive[token] = 1;
      known = token;
    }
    float *z = work.z + r * work.span + (j - rows.from);
    for (int h = 0; h < 2; h++) {
      // 16 times the high nibble, and the -1/2 that the residual nibble averages.
      const int at = i * SUBTILE + h * LANES;
      const Vf low = both ? floats(load(fine + at)) : splat(-rows.half_sum[r]);
      Vf y = scores(call, rows, r, floats(load(products + at)) * splat(16.0f) + low, scale[h]);
      if (call.bias) {
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
LAMP_INLINE void weigh_chunk(Work &work, int64_t chunk, int64_t keys, int r, float most) {
  constexpr int SUBTILES = CHUNK / SUBTILE;
  static_assert(SUBTILES == LANES, "a chunk's sub-tiles fill a vector");
  const int64_t first = chunk * CHUNK;
  float *z = work.z + r * work.span + first;
  if (!(most > -__builtin_inff())) most = 0;  // nothing seen, or NaN alone
  const bool squares = work.call->rule == LAMP_ENERGY;
  Vf sum = splat(0.0f), mass[SUBTILES];
  for (int s = 0; s < SUBTILES; s++) {
    mass[s] = splat(0.0f);
    if (s * SUBTILE >= keys) continue;
    for (int h = 0; h < 2; h++) {
      const int at = s * SUBTILE + h * LANES;
      const Vf y = load(z + at), x = exp2(y - splat(most));
      store(z + at, x);
      sum += x;
      if (squares) {
        mass[s] += x * x;
      } else {
        const Vf m = sensitivity(work, first + at, r, y, x);
        mass[s] = select(m == m, larger(m, mass[s]), m);
      }
    }
  }
  Vf weight;
  if (squares) {
    weight = root(totals(mass));
  } else {
    for (int s = 0; s < SUBTILES; s++) weight[s] = largest(mass[s]) + total(mass[s]) * 0.0f;
  }
  store(work.weight + r * (work.span / SUBTILE) + first / SUBTILE, weight);
  work.most[chunk * work.stride + r] = most;
  work.sum[chunk * work.stride + r] = total(sum);
}

constexpr int AHEAD = 4 * SUBTILE;  // keys from now that are asked for

static void look_at_segment(Work &work, int64_t segment) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  const int64_t begin = rows.from + segment * SEGMENT;
  for (int64_t first = begin; first < begin + SEGMENT && first < rows.to; first += CHUNK) {
    const int64_t end = first + CHUNK < rows.to ? first + CHUNK : rows.to;
    const int64_t chunk = (first - rows.from) / CHUNK;
    Vf most[MOST_ROWS];
    for (int r = 0; r < rows.count; r++) most[r] = splat(-__builtin_inff());
    for (int64_t j = first; j < end; j += SUBTILE) {
      const Place place = place_of(call.planes, rows.b, rows.g, key_of(work, j));
      const Place ahead = place_of(call.planes, rows.b, rows.g, key_of(work, j + AHEAD < rows.to ? j + AHEAD : j));
      const uint8_t *plane = call.planes.k_high + key_at(call.planes, place);
      const uint8_t *next = call.planes.k_high + key_at(call.planes, ahead);
      fetch(call.planes.k_scale + scale_at(call.planes, ahead), 2 * SUBTILE);
      const uint8_t *residual = call.planes.k_residual + key_at(call.planes, place);
      Vf scale[2];
      for (int h = 0; h < 2; h++) {
        scale[h] = halves(call.planes.k_scale + scale_at(call.planes, place) + h * LANES);
        scale[h] = select(finite(scale[h]), scale[h], splat(__builtin_nanf("")));
      }
      for (int r = 0; r < rows.count;) switch (block_rows(rows.count - r)) {
          case 4:
            look_at_subtile<4>(work, r, j, plane, next, residual, scale, most);
            r += 4;
            break;
          case 2:
            look_at_subtile<2>(work, r, j, plane, next, residual, scale, most);
            r += 2;
            break;
          default:
            look_at_subtile<1>(work, r, j, plane, next, residual, scale, most);
            r += 1;
        }
    }
    const int64_t keys = (end - first + SUBTILE - 1) / SUBTILE * SUBTILE;
    for (int r = 0; r < rows.count; r++) weigh_chunk(work, chunk, keys, r, largest(most[r]));
  }
}

LAMP_INLINE float log2_of(float x) { return __builtin_log2f(x); }
LAMP_INLINE float exp2_of(float x) { return exp2(splat(x > 127.0f ? 127.0f : x))[0]; }

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
