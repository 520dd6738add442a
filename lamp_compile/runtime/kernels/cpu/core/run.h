// Second pass, with the log-sum-exp of the first at hand: runs of sub-tiles, and what is refined of them.

constexpr int RUN = MOST_TILES;  // sub-tiles whose cold weights share a step: 256 or 512 keys
static_assert(RUN <= LANES && CHUNK % (RUN * SUBTILE) == 0, "a run lies in one chunk, and is decided on at once");
constexpr int RUN_KEYS = RUN * SUBTILE;

// Where between two steps the weight of a key is cut: evenly spread over any stretch of keys, so that what is lost here
// is gained there, however small the weights are. The same again every 512 keys.
struct Cuts {
  static constexpr int PERIOD = 512;
  alignas(64) float at[PERIOD] = {};

  constexpr Cuts() {
    constexpr uint32_t GOLDEN = 2654435769u;  // 2^32 / golden ratio: of its multiples the fractions
    for (uint32_t i = 0; i < PERIOD; i++) at[i] = (float)(i * GOLDEN >> 8) * (1.0f / 16777216.0f);
  }
};
static constexpr Cuts CUTS;
// Of sixteen keys, from a multiple of sixteen on.
LAMP_INLINE Vf cuts_of(int64_t key) { return load(CUTS.at + (key & (Cuts::PERIOD - 1))); }

// What all rows share of 32 keys: the scales of values, squares of those of keys, and products of both squares.
struct Scales {
  Vf v[2], k_square[2], both[2];
};
LAMP_INLINE void square(Scales &scales, int h, Vf k) {
  scales.k_square[h] = k * k;
  scales.both[h] = scales.k_square[h] * (scales.v[h] * scales.v[h]);
}

// What all rows share of one run of sub-tiles. Sets of them have one bit each.
struct Run {
  int64_t first;  // key
  int count;      // sub-tiles
  const uint8_t *k_high[RUN], *k_residual[RUN], *v_high[RUN], *v_residual[RUN];
  const uint16_t *k_scale[RUN];
  Scales scales[RUN];
  uint32_t v_spoilt[RUN];  // keys whose value has no finite scale
  bool any_spoilt;
  float factor[MOST_ROWS];                        // from the chunk's weights to the row's
  uint32_t alive[MOST_ROWS], hot_for[MOST_ROWS];  // by token
  uint32_t hot;                                   // for any token
};

// The lowest of a set that is not empty; taken out of it.
LAMP_INLINE int take_lowest(uint32_t &set) {
  const int lowest = __builtin_ctz(set);
  set &= set - 1;
  return lowest;
}

// Whether a row wants units of decision refined, for the sixteen sub-tiles from `first` on (those of a unit alike). Not
// "above tau": NaN cannot be judged, so it is refined.
LAMP_INLINE Vi wanted(const Work &work, const Run &run, int64_t first, int r) {
  if (work.lse[r] == -__builtin_inff()) return splat(0);
  const int unit = (int)(work.call->subtile / SUBTILE);
  Vf weight = load(work.weight + r * (work.span / SUBTILE) + first) * splat(run.factor[r]);
  if (unit > 1) {
    for (int t = 0; t < LANES; t += unit) {
      float joined = 0;
      for (int s = t; s < t + unit; s++) {
        // Behind the last key there is nothing.
        const float w = work.rows.from + (first + s) * SUBTILE < work.rows.to ? weight[s] : 0.0f;
        if (work.call->rule == LAMP_ENERGY)
          joined += w * w;
        else
          joined = w > joined || w != w ? w : joined;
      }
      if (work.call->rule == LAMP_ENERGY) joined = __builtin_sqrtf(joined);
      for (int s = t; s < t + unit; s++) weight[s] = joined;
    }
  }
  if (work.call->rule == LAMP_STRICT) weight *= splat(2.0f);
  if (work.call->rule == LAMP_RELAXED) weight *= splat(work.inverse[r]);
  return ~(weight <= splat(work.tau));
}

// Of a run's sub-tiles those that a token sees any key of, in whole units of decision.
LAMP_INLINE uint32_t alive_for(const Work &work, const Run &run, int64_t base, int token) {
  const int tokens = work.rows.tokens, unit = (int)(work.call->subtile / SUBTILE);
  const uint8_t *alive = work.alive + base * tokens + token;
  uint32_t set = 0;
  if (tokens == 1 && run.count == RUN) {
    for (int t = 0; t < RUN; t += 8) set |= eight_bits(alive + t) << t;
  } else {
    for (int t = 0; t < run.count; t++) set |= (uint32_t)(alive[t * tokens] != 0) << t;
  }
  if (unit == 1) return set;
  uint32_t joined = 0;
  for (int t = 0; t < run.count; t += unit) {
    const uint32_t within = ((1u << unit) - 1) << t;
    if (set & within) joined |= within;
  }
  return joined & ((1u << run.count) - 1);
}

// Those of a run that a token's heads want refined; all of them when one asks for it.
LAMP_INLINE uint32_t hot_for(const Work &work, const Run &run, int64_t base, int token) {
  if (work.level >= 1) return ~0u;
  uint32_t set = 0;
  if (work.hot) {
    for (int t = 0; t < run.count; t++) set |= (uint32_t)(work.hot[base + t] != 0) << t;
    return set;
  }
  Vi hot = splat(0);
  for (int r = token * work.rows.group; r < (token + 1) * work.rows.group; r++) hot |= wanted(work, run, base, r);
  return signs_of(hot);
}

// Which sub-tiles of a run are alive and which are refined, for every token. Counts both, in units of decision, in the
// partial result of the token's first row.
LAMP_APART void decide(const Work &work, Run &run, float *partial) {
  const Rows &rows = work.rows;
  const int unit = (int)(work.call->subtile / SUBTILE), width = 2 * (int)work.call->planes.half_v + SUMS;
  const int64_t base = (run.first - rows.from) / SUBTILE;
  const float *most = work.most + base * SUBTILE / CHUNK * work.stride;
  for (int r = 0; r < rows.count; r += LANES) {
    const Vf lse = load(work.lse + r), x = exp2(smaller(splat(127.0f), load(most + r) - lse));
    store(run.factor + r, select(lse == splat(-__builtin_inff()), splat(0.0f), x));
  }
  run.hot = 0;
  uint32_t firsts = 0;  // sub-tiles that units begin with
  for (int t = 0; t < run.count; t += unit) firsts |= 1u << t;
  for (int token = 0; token < rows.tokens; token++) {
    run.alive[token] = alive_for(work, run, base, token);
    run.hot_for[token] = run.alive[token] & hot_for(work, run, base, token);
    run.hot |= run.hot_for[token];
    float *sums = partial + token * rows.group * width + width - SUMS;
    sums[ALIVE] += (float)__builtin_popcount(run.alive[token] & firsts);
    sums[REFINED] += (float)__builtin_popcount(run.hot_for[token] & firsts);
  }
}

// A scale of keys, 0 where it is not finite: that has spoilt the key's scores already.
LAMP_INLINE Vf known_halves(const uint16_t *from) {
  const Vf scale = halves(from);
  return select(finite(scale), scale, splat(0.0f));
}

// Scales that are not finite become 0. Those of a value spoil the rows that weigh it.
LAMP_APART void leave_out_bad(Run &run) {
  for (int t = 0; t < run.count; t++)
    for (int h = 0; h < 2; h++) {
      const Vi known = finite(run.scales[t].v[h]);
      for (int i = 0; i < LANES; i++)
        if (!known[i]) run.v_spoilt[t] |= 1u << (h * LANES + i);
      run.any_spoilt |= any(~known);
      run.scales[t].v[h] = select(known, run.scales[t].v[h], splat(0.0f));
      square(run.scales[t], h, known_halves(run.k_scale[t] + h * LANES));
    }
}

// What is to be asked for of the high plane of values with a sub-tile: with the first one of a tile all of it.
LAMP_INLINE void add_values(const LampPlanes &planes, const Run &run, int t, Feed &feed) {
  if (planes.tile == SUBTILE || !t || run.v_high[t] != run.v_high[t - 1] + SUBTILE)
    push(feed, run.v_high[t], planes.tile * planes.half_v);
}

LAMP_APART void open_run(const Work &work, int64_t first, int64_t end, Run &run, Feed &values) {
  const LampPlanes &planes = work.call->planes;
  const bool in_order = !planes.table && !work.order;
  run.first = first;
  run.count = 0;
  run.any_spoilt = false;
  Vf all = splat(0.0f);
  Place place = place_of(planes, work.rows.b, work.rows.g, key_of(work, first));
  for (int64_t j = first; j < first + RUN_KEYS && j < end; j += SUBTILE) {
    const int t = run.count++;
    const int64_t key = key_at(planes, place), value = value_at(planes, place), scale = scale_at(planes, place);
    run.k_high[t] = planes.k_high + key;
    run.k_residual[t] = planes.k_residual + key;
    run.v_high[t] = planes.v_high + value;
    run.v_residual[t] = planes.v_residual + value;
    run.k_scale[t] = planes.k_scale + scale;
    run.v_spoilt[t] = 0;
    add_values(planes, run, t, values);
    ask_for_two(take(values, 128));
    for (int h = 0; h < 2; h++) {
      const Vf k = halves(planes.k_scale + scale + h * LANES), v = halves(planes.v_scale + scale + h * LANES);
      run.scales[t].v[h] = v;
      square(run.scales[t], h, k);
      all += k + v;  // finite where they are: they were float16
    }
    if (in_order) {
      fetch(planes.v_scale + scale + RUN_KEYS, 2 * SUBTILE);
      advance(planes, place);
    } else {
      const int64_t later = key_of(work, j + RUN_KEYS < end ? j + RUN_KEYS : j);
      fetch(planes.v_scale + scale_at(planes, place_of(planes, work.rows.b, work.rows.g, later)), 2 * SUBTILE);
      if (j + SUBTILE < end) place = place_of(planes, work.rows.b, work.rows.g, key_of(work, j + SUBTILE));
    }
  }
  if (any(~finite(all))) leave_out_bad(run);
}

// Whether little of a run is refined, so that it lies anywhere.
LAMP_INLINE bool few_refined(const Run &run) { return __builtin_popcount(run.hot) <= 4; }

// What a run that is decided on will read of residual planes, in order. Of a few sub-tiles the first lines at once: the
// addresses of pages that lie anywhere take long to look up.
LAMP_APART void ask_for_refined(const Work &work, const Run &run, Feed &feed) {
  const LampPlanes &planes = work.call->planes;
  const bool few = few_refined(run);
  for (uint32_t hot = settled(work) ? 0 : run.hot; hot;) {
    const uint8_t *keys = run.k_residual[take_lowest(hot)];
    if (few) ask(keys);
    push(feed, keys, SUBTILE * planes.half_k);
  }
  for (uint32_t hot = run.hot; hot;) {
    const uint8_t *values = run.v_residual[take_lowest(hot)];
    if (planes.tile == SUBTILE) {
      if (few) ask(values);
      push(feed, values, planes.tile * planes.half_v);
    } else {
      for (int64_t c = 0; c < planes.half_v; c++) ask(values + c * planes.tile);
    }
  }
}

// What the next piece of its thread reads first, while a piece has no more values to ask for.
LAMP_APART void ask_for_next(const Work &work, Feed &feed) {
  const LampAttend &call = *work.call;
  const LampPlanes &planes = call.planes;
  const Rows &rows = work.rows;
  if (work.next_head < 0 || work.order) return;
  const int64_t size = call.dtype == LAMP_FLOAT32 ? 4 : 2;
  for (int r = 0; r < rows.count; r++) {
    const int64_t head = rows.head[r] + rows.group, token = rows.first_token + rows.token[r];
    const int64_t at = rows.b * call.q_strides[0] + head * call.q_strides[1] + token * call.q_strides[2];
    ask_for((const uint8_t *)call.q + size * at, 2 * planes.half_k * size);
  }
  for (int64_t j = rows.from; j < rows.from + RUN_KEYS && j < rows.to; j += SUBTILE) {
    const Place place = place_of(planes, rows.b, work.next_head, j);
    ask(planes.v_scale + scale_at(planes, place));
    if (j >= rows.from + ahead_of(planes)) continue;
    ask(planes.k_scale + scale_at(planes, place));
    push(feed, planes.k_high + key_at(planes, place), SUBTILE * planes.half_k);
  }
}
