// Look-ahead networks (runtime/network/gate.py, audit.py): which sub-tiles matter, said before any key is read. For one
// token of each sequence. "Tile" is a unit of decision here, call.subtile keys.

constexpr int AGES = 16, MOST_RANK = 64, RANK_PARTS = MOST_RANK / LANES;
constexpr float LOWEST = -1e30f, LEAST = 1e-4f, DEAD = -1.0f;
enum { SINK, OFFSET, LAST, MEAN, EXTRAS };                           // of `extra`
enum { EXCESS, EXPENSE, HELD, TRUST_FLAGS, TRUST_STEPS, EXACT_STEPS, DROPPED, TRUST_FIELDS };  // of `trust`
constexpr int AUDIT_WINDOW = 16;

// What is known of one sequence and kv head before its keys are read.
struct Ahead {
  const LampPredict *gate;
  int64_t first, last;  // tiles that the row can see; outside nothing is live
  float *importance;    // [tiles]: DEAD where no key is live
  int32_t *order;       // the sub-tiles of 32 keys that are read, ascending
  uint8_t *hot;         // whether each of these is scored with both planes
  int64_t count;        // of them
  float *square;        // the energy that each turned out to have
  bool believed, use, whole;
  float skip_below;  // importance at and below which tiles may be skipped; below 0 none
};

struct AheadSizes {
  int64_t tile, score, order, alive, all;
};

LAMP_INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

LAMP_INLINE AheadSizes ahead_sizes(const LampAttend &call, const LampPredict &gate) {
  const int64_t rows = call.heads / call.planes.kv_heads;
  AheadSizes s;
  s.tile = aligned(4 * (gate.tiles + LANES));
  s.score = aligned(4 * (gate.tiles * (call.subtile / gate.group) + 2 * LANES));
  s.order = aligned(4 * (gate.tiles * (call.subtile / SUBTILE) + LANES));
  s.alive = aligned(gate.tiles * rows);
  s.all = aligned(sizeof(Ahead)) + 7 * s.tile + (rows + 1) * s.score + 3 * s.order + s.alive;
  return s;
}

// Natural logarithm of positive numbers, NaN for NaN: the polynomial of Cephes' logf.
LAMP_INLINE Vf log_of(Vf x) {
  const Vi u = (Vi)x, e = (u - splat(0x3f3504f3)) >> 23;
  const Vf f = bits(u - (e << 23)) - splat(1.0f), z = f * f, n = floats(e);
  Vf p = splat(7.0376836292e-2f);
  p = p * f + splat(-1.1514610310e-1f);
  p = p * f + splat(1.1676998740e-1f);
  p = p * f + splat(-1.2420140846e-1f);
  p = p * f + splat(1.4249322787e-1f);
  p = p * f + splat(-1.6668057665e-1f);
  p = p * f + splat(2.0000714765e-1f);
  p = p * f + splat(-2.4999993993e-1f);
  p = p * f + splat(3.3333331174e-1f);
  p = p * f * z + n * splat(-2.12194440e-4f) - splat(0.5f) * z;
  return select(x == x, f + p + n * splat(0.693359375f), x);
}

// Sixteen of `left` numbers from `at` on, zeros behind the last; never reads past it.
LAMP_INLINE Vf numbers(const void *from, int64_t dtype, int64_t at, int64_t left) {
  if (left < LANES) {
    float x[LANES] = {0};
    read_row(from, dtype, at, (int)left, x);
    return load(x);
  }
  if (dtype == LAMP_FLOAT32) return load((const float *)from + at);
  if (dtype == LAMP_FLOAT16) return halves((const uint16_t *)from + at);
  float x[LANES];
  read_row(from, dtype, at, LANES, x);
  return load(x);
}

LAMP_INLINE Vi below_lane(int64_t count) {
  return Vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < splat((int32_t)(count > LANES ? LANES : count));
}

// x [dim] times weights [dim, rank]: `out` of RANK_PARTS vectors, zeros behind the last.
LAMP_INLINE void project(const float *x, int dim, const void *weights, int64_t dtype, int64_t first, int64_t rank,
                         Vf *out) {
  const int parts = (int)((rank + LANES - 1) / LANES);
  for (int p = 0; p < parts; p++) out[p] = splat(0.0f);
  for (int c = 0; c < dim; c++)
    for (int p = 0; p < parts; p++) {
      const int64_t at = c * rank + p * LANES;
      out[p] += splat(x[c]) * numbers(weights, dtype, first + at, dim * rank - at);
    }
  for (int p = 0; p < parts; p++) out[p] = select(below_lane(rank - p * LANES), out[p], splat(0.0f));
}

// The summaries of all heads' scores: `score` [rows][stride] for the groups of tiles first to last.
static void score_groups(const LampAttend &call, const Rows &rows, const LampPredict &gate, const Ahead &ahead,
                         float *score, int64_t stride, uint8_t *alive) {
  const int64_t per = call.subtile / gate.group, rank = gate.rank, per_page = call.planes.tile / gate.group;
  const int64_t count = (ahead.last - ahead.first) * per, dim = 2 * call.planes.half_k;
  const int64_t stored = (call.planes.table ? 1 : call.batch) * call.planes.kv_heads * call.planes.stored_tiles;
  const int parts = (int)((rank + LANES - 1) / LANES);
  Vf query[MOST_ROWS][RANK_PARTS];
  for (int r = 0; r < rows.count; r++) {
    const int64_t head = rows.head[r];
    float x[MOST_DIM];
    for (int c = 0; c < dim / 2; c++) {
      x[c] = rows.step[r] * (float)rows.q[r][c];
      x[dim / 2 + c] = rows.step[r] * (float)rows.q[r][PADDED + c];
    }
    project(x, (int)dim, gate.query, gate.query_dtype, head * dim * rank, rank, query[r]);
    for (int p = 0; p < parts; p++) {
      query[r][p] += numbers(gate.query_bias, LAMP_FLOAT32, head * rank + p * LANES, rank - p * LANES);
      query[r][p] *= splat(call.scale);
    }
  }
  for (int64_t g = 0; g < count; g += LANES) {
    Vf summary[LANES][RANK_PARTS];
    const int there = (int)(count - g < LANES ? count - g : LANES);
    for (int i = 0; i < LANES; i++) {
      const int64_t key = (ahead.first * per + g + (i < there ? i : 0)) * gate.group;
      const Place place = place_of(call.planes, rows.b, rows.g, key);
      const int64_t at = (place.tile * per_page + place.offset / gate.group) * rank;
      for (int p = 0; p < parts; p++)
        summary[i][p] = select(
            below_lane(rank - p * LANES),
            numbers(gate.summary, LAMP_FLOAT16, at + p * LANES, stored * per_page * rank - at - p * LANES),
            splat(0.0f));
    }
    for (int r = 0; r < rows.count; r++) {
      Vf products[LANES];
      for (int i = 0; i < LANES; i++) {
        products[i] = query[r][0] * summary[i][0];
        for (int p = 1; p < parts; p++) products[i] += query[r][p] * summary[i][p];
      }
      store(score + r * stride + g, totals(products));
    }
  }
  // What a row does not see says nothing.
  for (int r = 0; r < rows.count; r++) {
    if (r && !call.mask) {
      __builtin_memcpy(alive + r * gate.tiles, alive, ahead.last - ahead.first);
    }
    for (int64_t j = ahead.first * call.subtile, g = 0; g < count; j += SUBTILE) {
      const uint32_t seen = visible(call, rows, r, j);
      const uint32_t ones = gate.group == SUBTILE ? ~0u : (1u << gate.group) - 1;
      if (r == 0 || call.mask) {
        uint8_t &tile = alive[r * gate.tiles + g / per];
        if (g % per == 0) tile = 0;
        tile |= seen != 0;
      }
      for (int i = 0; i < SUBTILE / gate.group; i++, g++)
        if (!(seen >> (i * gate.group) & ones)) score[r * stride + g] = LOWEST;
    }
  }
}

// Log mass and log energy of each tile by what its groups score, not normalised; 0 where they are no numbers.
LAMP_INLINE void join_groups(float *score, float *weight, int64_t tiles, int64_t per, float *mass, float *energy,
                             float *peak) {
  for (int64_t t = 0; t < tiles; t++) {
    float most = score[t * per];
    for (int64_t i = 1; i < per; i++) most = score[t * per + i] > most ? score[t * per + i] : most;
    peak[t] = most;
    for (int64_t i = 0; i < per; i++) weight[t * per + i] = (score[t * per + i] - most) * LOG2E;
  }
  for (int64_t g = 0; g < tiles * per; g += LANES) store(weight + g, exp2(load(weight + g)));
  for (int64_t t = 0; t < tiles; t++) {
    float sum = 0, squares = 0;
    for (int64_t i = 0; i < per; i++) {
      const float w = weight[t * per + i];
      sum += w;
      squares += w * w;
    }
    mass[t] = sum;
    energy[t] = squares;
  }
  for (int64_t t = 0; t < tiles; t += LANES) {
    const Vf m = log_of(load(mass + t)) + load(peak + t);
    const Vf e = log_of(load(energy + t)) * splat(0.5f) + load(peak + t);
    store(mass + t, select(m > splat(LOWEST / 2), m, splat(0.0f)));
    store(energy + t, select(e > splat(LOWEST / 2), e, splat(0.0f)));
  }
}

// Importance of all tiles by the most interested row: gate.predict and gate.hot_newest.
static void predict(const LampAttend &call, const Rows &rows, Ahead &ahead, char *memory) {
  const LampPredict &gate = *ahead.gate;
  const AheadSizes s = ahead_sizes(call, gate);
  const int64_t tiles = ahead.last - ahead.first, per = call.subtile / gate.group, stride = s.score / 4;
  float *mass = (float *)memory, *energy = mass + s.tile / 4, *peak = energy + s.tile / 4, *last = peak + s.tile / 4,
        *mean = last + s.tile / 4, *bias = mean + s.tile / 4, *score = bias + s.tile / 4, *weight = score + rows.count * stride;
  uint8_t *alive = (uint8_t *)(weight + stride);
  float *out = ahead.importance + ahead.first;
  for (int64_t t = 0; t < gate.tiles; t++) ahead.importance[t] = DEAD;
  if (tiles <= 0) return;
  score_groups(call, rows, gate, ahead, score, stride, alive);
  const float *history = gate.history + ((rows.b * call.planes.kv_heads + rows.g) * gate.tiles + ahead.first) * 2;
  for (int64_t t = 0; t < tiles; t++) {
    last[t] = history[2 * t] + LEAST;
    mean[t] = history[2 * t + 1] + LEAST;
  }
  for (int64_t t = tiles; t < tiles + LANES; t++) last[t] = mean[t] = mass[t] = energy[t] = peak[t] = 1;
  for (int64_t t = 0; t < tiles; t += LANES) {
    store(last + t, log_of(load(last + t)));
    store(mean + t, log_of(load(mean + t)));
  }
  for (int r = 0; r < rows.count; r++) {
    const uint8_t *live = alive + r * gate.tiles;
    const float *age = gate.age + rows.head[r] * AGES, *extra = gate.extra + rows.head[r] * EXTRAS;
    int64_t oldest = 0, newest = tiles - 1;
    while (newest >= 0 && !live[newest]) newest--;
    while (oldest < tiles && !live[oldest]) oldest++;
    if (newest < 0) continue;
    join_groups(score + r * stride, weight, tiles, per, mass, energy, peak);
    float most = -__builtin_inff(), sum = 0;
    for (int64_t t = 0; t < tiles; t += LANES) {
      const Vf lane = Vf{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const Vf back = larger(splat((float)(newest - t)) - lane, splat(0.0f)) + splat(1.0f);
      store(peak + t, smaller(log_of(back) * splat(LOG2E), splat((float)(AGES - 1))));
    }
    for (int64_t t = 0; t < tiles; t++) {
      const int point = (int)peak[t], next = point + 1 < AGES ? point + 1 : point;
      const float part = peak[t] - (float)point;
      bias[t] = age[point] * (1 - part) + age[next] * part + (t == oldest ? extra[SINK] : 0.0f);
      bias[t] += last[t] * extra[LAST] + mean[t] * extra[MEAN];
      mass[t] = live[t] ? mass[t] + bias[t] : -__builtin_inff();
      most = mass[t] > most ? mass[t] : most;
    }
    if (!(most > -__builtin_inff())) most = 0;
    for (int64_t t = 0; t < tiles; t += LANES) {
      const Vf w = exp2((load(mass + t) - splat(most)) * splat(LOG2E));
      sum += total(select(below_lane(tiles - t), w, splat(0.0f)));
    }
    float lse = most + __builtin_logf(sum);
    if (call.sinks) {
      const float sink = call.sinks[rows.head[r]], top = sink > lse ? sink : lse;
      lse = top + __builtin_logf(__builtin_expf(lse - top) + __builtin_expf(sink - top));
    }
    for (int64_t t = 0; t < tiles; t += LANES) {
      const Vf y = load(energy + t) + load(bias + t) + splat(extra[OFFSET] - lse);
      // In this order NaN stays.
      store(energy + t, exp2(select(y > splat(0.0f), splat(0.0f), y) * splat(LOG2E)));
    }
    for (int64_t t = 0; t < tiles; t++)
      if (live[t] && (energy[t] > out[t] || energy[t] != energy[t])) out[t] = energy[t];
  }
  for (int64_t t = tiles - 1; t >= 0; t--)
    if (out[t] != DEAD) {  // not whole yet: no summary speaks for it
      out[t] = 1;
      break;
    }
}

LAMP_INLINE int64_t length_of(const LampAttend &call, int64_t b) {
  const int64_t length = call.lengths.data ? integer(call.lengths, b) : call.keys;
  return length < call.keys ? length : call.keys;
}

// Whether the gate is believed, what it says, and what is read because of it. `rows` then counts what is read.
static Ahead *look_forward(const LampAttend &call, const LampPredict &gate, Rows &rows, float level, char *memory) {
  const AheadSizes s = ahead_sizes(call, gate);
  Ahead &ahead = *(Ahead *)memory;
  char *at = memory + aligned(sizeof(Ahead));
  ahead.gate = &gate;
  ahead.importance = (float *)at, at += s.tile;
  ahead.order = (int32_t *)at, at += s.order;
  ahead.square = (float *)at, at += s.order;
  ahead.hot = (uint8_t *)at, at += s.order;
  ahead.count = 0;
  const bool sees = rows.high[0] > rows.low[0];
  ahead.first = sees ? rows.low[0] / call.subtile : 0;
  ahead.last = sees ? (rows.high[0] + call.subtile - 1) / call.subtile : 0;
  const int64_t bg = rows.b * call.planes.kv_heads + rows.g, length = length_of(call, rows.b);
  const float *trust = gate.trust + bg * TRUST_FIELDS, raised = call.state[bg * 4 + 1];
  ahead.believed = trust[HELD] == 0 && length <= gate.trained && !(raised > 0);
  ahead.use = ahead.believed;
  ahead.whole = (int64_t)trust[TRUST_STEPS] % AUDIT_WINDOW == 0;
  ahead.skip_below = -1;
  if (gate.skip > 0) {
    const float tiles = (float)length / (float)call.subtile;
    ahead.skip_below = gate.skip / ((tiles > 1 ? tiles : 1) * __builtin_sqrtf((float)call.subtile) * gate.margin[rows.g]);
  }
  if (!ahead.believed) return &ahead;
  predict(call, rows, ahead, at);
  for (int64_t t = ahead.first; t < ahead.last; t++) ahead.use &= __builtin_fabsf(ahead.importance[t]) <= 3.4028235e38f;
  if (!ahead.use) return &ahead;
  const float tau = call.tau[rows.b * call.tau_stride + rows.g];
  const bool all = level >= 1, skips = ahead.skip_below >= 0 && !ahead.whole && !all;
  for (int64_t t = ahead.first; t < ahead.last; t++) {
    const float importance = ahead.importance[t];
    if (importance == DEAD || (skips && importance <= ahead.skip_below)) continue;
    for (int64_t j = t * call.subtile; j < (t + 1) * call.subtile && j < rows.high[0]; j += SUBTILE) {
      ahead.order[ahead.count] = (int32_t)(j / SUBTILE);
      ahead.hot[ahead.count++] = all || !(importance <= tau);
    }
  }
  rows.from = 0;
  rows.to = ahead.count * SUBTILE;
  return &ahead;
}
