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
  int64_t tile, score, order, all;
};

LAMP_INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

LAMP_INLINE AheadSizes ahead_sizes(const LampAttend &call, const LampPredict &gate) {
  const int64_t rows = call.heads / call.planes.kv_heads;
  AheadSizes s;
  s.tile = aligned(4 * (gate.tiles + LANES));
  s.score = (int64_t)sizeof(Vf) * rows * (call.subtile / gate.group);
  s.order = aligned(4 * (gate.tiles * (call.subtile / SUBTILE) + LANES));
  s.all = aligned(sizeof(Ahead)) + (3 + 3 * rows) * s.tile + s.score + 3 * s.order;
  return s;
}

// Natural logarithm of positive numbers, NaN for all others: the polynomial of Cephes' logf.
LAMP_INLINE Vf log_of(Vf x) {
  const Vi u = (Vi)select(x > splat(0.0f), x, splat(1.0f)), e = (u - splat(0x3f3504f3)) >> 23;
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
  return select(x > splat(0.0f), f + p + n * splat(0.693359375f), splat(__builtin_nanf("")));
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

// Vector p of the row at `at` of a [.., rank] matrix, of which `left` numbers are there; zeros behind the rank.
LAMP_INLINE Vf part_of(const void *from, int64_t dtype, int64_t at, int64_t rank, int p, int64_t left) {
  if (rank % LANES == 0 && dtype == LAMP_FLOAT16) return halves((const uint16_t *)from + at + p * LANES);
  return select(below_lane(rank - p * LANES), numbers(from, dtype, at + p * LANES, left - p * LANES), splat(0.0f));
}

// x [dim] times weights [dim, rank]: `out` of RANK_PARTS vectors, zeros behind the last.
template <int PARTS>
static void project_parts(const float *x, int dim, const void *weights, int64_t dtype, int64_t first, int64_t rank,
                          Vf *out) {
  Vf sum[PARTS][2];  // two, because each waits for the one before
  for (int p = 0; p < PARTS; p++) sum[p][0] = sum[p][1] = splat(0.0f);
  for (int c = 0; c < dim; c += 2)
    for (int i = 0; i < 2; i++)
      for (int p = 0; p < PARTS; p++)
        sum[p][i] += splat(x[c + i]) * part_of(weights, dtype, first + (c + i) * rank, rank, p, (dim - c - i) * rank);
  for (int p = 0; p < PARTS; p++) out[p] = sum[p][0] + sum[p][1];
}
static void project(const float *x, int dim, const void *weights, int64_t dtype, int64_t first, int64_t rank, Vf *out) {
  const auto by = rank <= LANES       ? project_parts<1>
                  : rank <= 2 * LANES ? project_parts<2>
                  : rank <= 3 * LANES ? project_parts<3>
                                      : project_parts<4>;
  by(x, dim, weights, dtype, first, rank, out);
}

// The queries of all rows as the gate sees them, scaled: [rows][RANK_PARTS].
static void project_rows(const LampAttend &call, const Rows &rows, const LampPredict &gate, Vf (*query)[RANK_PARTS]) {
  const int half = (int)call.planes.half_k;
  const int64_t rank = gate.rank;
  for (int r = 0; r < rows.count; r++) {
    const int64_t head = rows.head[r];
    float x[MOST_DIM];
    for (int c = 0; c < half; c++) {
      x[c] = rows.step[r] * (float)rows.q[r][c];
      x[half + c] = rows.step[r] * (float)rows.q[r][PADDED + c];
    }
    project(x, 2 * half, gate.query, gate.query_dtype, head * 2 * half * rank, rank, query[r]);
    for (int p = 0; p * LANES < rank; p++) {
      query[r][p] += numbers(gate.query_bias, LAMP_FLOAT32, head * rank + p * LANES, rank - p * LANES);
      query[r][p] *= splat(call.scale);
    }
  }
}

// Which of sixteen tiles' groups number i hold a key that the row sees: `seen` [LANES][subtile / 32] has a bit a key.
LAMP_INLINE Vi sees_groups(const uint32_t *seen, int64_t unit, int64_t group, int64_t i) {
  const uint32_t ones = (group == SUBTILE ? ~0u : (1u << group) - 1) << (i * group % SUBTILE);
  int32_t found[LANES];
  for (int k = 0; k < LANES; k++) found[k] = seen[k * unit + i * group / SUBTILE] & ones ? -1 : 0;
  Vi v;
  __builtin_memcpy(&v, found, sizeof v);
  return v;
}

// Log mass and log energy that the summaries of sixteen tiles from `t` on give them, for each row (gate.content), and
// whether the row sees any key of them; 0 where they are no numbers.
template <int PARTS>
static void score_tiles(const LampAttend &call, const Rows &rows, const LampPredict &gate,
                        const Vf (*query)[RANK_PARTS], int64_t t, int there, Vf *score, Vf *mass, Vf *energy,
                        Vi *alive) {
  const int per = (int)(call.subtile / gate.group), per_page = (int)(call.planes.tile / gate.group);
  const int64_t rank = gate.rank;
  const int64_t stored = (call.planes.table ? 1 : call.batch) * call.planes.kv_heads * call.planes.stored_tiles;
  const int64_t unit = call.subtile / SUBTILE;
  uint32_t bits[MOST_ROWS][LANES * (128 / SUBTILE)];
  const int different = heads_differ(call) ? rows.count : 1;
  for (int r = 0; r < different; r++)
    for (int64_t u = 0; u < LANES * unit; u++)
      bits[r][u] = u < there * unit ? visible(call, rows, r, t * call.subtile + u * SUBTILE) : 0;
  int64_t at[LANES];  // a tile lies in one page
  for (int k = 0; k < LANES; k++) {
    const Place place = place_of(call.planes, rows.b, rows.g, (t + (k < there ? k : 0)) * call.subtile);
    at[k] = (place.tile * per_page + place.offset / gate.group) * rank;
    fetch(gate.summary + at[k] + LANES * per * rank, 2 * per * rank);  // of the next sixteen, where pages lie in order
  }
  for (int i = 0; i < per; i++) {
    Vf summary[LANES][PARTS];
    for (int k = 0; k < LANES; k++)
      for (int p = 0; p < PARTS; p++)
        summary[k][p] = part_of(gate.summary, LAMP_FLOAT16, at[k] + i * rank, rank, p,
                                stored * per_page * rank - at[k] - i * rank);
    for (int r = 0; r < rows.count; r++) {
      Vf products[LANES];
      for (int k = 0; k < LANES; k++) {
        products[k] = query[r][0] * summary[k][0];
        for (int p = 1; p < PARTS; p++) products[k] += query[r][p] * summary[k][p];
      }
      const Vi seen = sees_groups(bits[different > 1 ? r : 0], unit, gate.group, i);
      score[r * per + i] = select(seen, totals(products), splat(LOWEST));
      alive[r] = i ? alive[r] | seen : seen;
    }
  }
  for (int r = 0; r < rows.count; r++) {
    Vf most = score[r * per], sum = splat(0.0f), squares = splat(0.0f);
    for (int i = 1; i < per; i++) most = larger(score[r * per + i], most);
    for (int i = 0; i < per; i++) {
      const Vf w = exp2((score[r * per + i] - most) * splat(LOG2E));
      sum += w;
      squares += w * w;
    }
    const Vf m = log_of(sum) + most, e = log_of(squares) * splat(0.5f) + most;
    mass[r] = select(m > splat(LOWEST / 2), m, splat(0.0f));
    energy[r] = select(e > splat(LOWEST / 2), e, splat(0.0f));
  }
}

// The bias by age, for sixteen tiles so many behind the newest.
LAMP_INLINE Vf by_age(const float *age, Vf back) {
  const Vf octave = smaller(log_of(larger(back, splat(0.0f)) + splat(1.0f)) * splat(LOG2E), splat((float)(AGES - 1)));
  const Vi point = __builtin_convertvector(octave, Vi);
  const Vf part = octave - floats(point);
  Vf low, high;
  for (int k = 0; k < LANES; k++) {
    low[k] = age[point[k]];
    high[k] = age[point[k] + 1 < AGES ? point[k] + 1 : point[k]];
  }
  return low + (high - low) * part;
}

// Of one row: `mass` and `energy` [tiles] by what the summaries said, into the log of its importance [tiles] in
// `energy` (gate.predict).
static void predict_row(const LampAttend &call, const Rows &rows, const Ahead &ahead, int r, const float *last,
                        const float *mean, const int32_t *alive, float *mass, float *energy) {
  const float *age = ahead.gate->age + rows.head[r] * AGES, *extra = ahead.gate->extra + rows.head[r] * EXTRAS;
  const int64_t tiles = ahead.last - ahead.first;
  int64_t oldest = 0, newest = tiles - 1;
  while (newest >= 0 && !alive[newest]) newest--;
  while (oldest < newest && !alive[oldest]) oldest++;
  Vf most = splat(-__builtin_inff()), sum = splat(0.0f);
  for (int64_t t = 0; t < tiles; t += LANES) {
    const Vf lane = Vf{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Vf bias = by_age(age, splat((float)(newest - t)) - lane);
    bias += select(lane == splat((float)(oldest - t)), splat(extra[SINK]), splat(0.0f));
    bias += load(last + t) * splat(extra[LAST]) + load(mean + t) * splat(extra[MEAN]);
    const Vf whole = select(load(alive + t) != splat(0), load(mass + t) + bias, splat(-__builtin_inff()));
    store(mass + t, whole);
    store(energy + t, load(energy + t) + bias);
    most = larger(whole, most);
  }
  const float top = largest(most) > -__builtin_inff() ? largest(most) : 0.0f;
  for (int64_t t = 0; t < tiles; t += LANES) sum += exp2((load(mass + t) - splat(top)) * splat(LOG2E));
  float lse = top + __builtin_logf(total(sum));
  if (call.sinks) {
    const float sink = call.sinks[rows.head[r]], higher = sink > lse ? sink : lse;
    lse = higher + __builtin_logf(__builtin_expf(lse - higher) + __builtin_expf(sink - higher));
  }
  for (int64_t t = 0; t < tiles; t += LANES) {
    const Vf y = load(energy + t) + splat(extra[OFFSET] - lse);
    store(energy + t, select(y > splat(0.0f), splat(0.0f), y));  // in this order NaN stays
  }
}

// Importance of all tiles by the most interested row: gate.predict and gate.hot_newest.
static void predict(const LampAttend &call, const Rows &rows, Ahead &ahead, char *memory) {
  const LampPredict &gate = *ahead.gate;
  const AheadSizes s = ahead_sizes(call, gate);
  const int64_t tiles = ahead.last - ahead.first, step = s.tile / 4;
  float *last = (float *)memory, *mean = last + step, *mass = mean + step, *energy = mass + rows.count * step;
  int32_t *alive = (int32_t *)(energy + rows.count * step);
  Vf *score = (Vf *)(alive + rows.count * step);
  float *out = ahead.importance + ahead.first;
  for (int64_t t = 0; t < gate.tiles; t++) ahead.importance[t] = DEAD;
  if (tiles <= 0) return;
  const float *history = gate.history + ((rows.b * call.planes.kv_heads + rows.g) * gate.tiles + ahead.first) * 2;
  for (int64_t t = 0; t < tiles; t++) {
    last[t] = history[2 * t] + LEAST;
    mean[t] = history[2 * t + 1] + LEAST;
  }
  for (int64_t t = tiles; t < tiles + LANES; t++) last[t] = mean[t] = 1;
  Vf query[MOST_ROWS][RANK_PARTS];
  project_rows(call, rows, gate, query);
  for (int64_t t = 0; t < tiles; t += LANES) {
    Vf m[MOST_ROWS], e[MOST_ROWS];
    Vi seen[MOST_ROWS];
    const int there = (int)(tiles - t < LANES ? tiles - t : LANES);
    const auto score_by = gate.rank <= LANES       ? score_tiles<1>
                          : gate.rank <= 2 * LANES ? score_tiles<2>
                          : gate.rank <= 3 * LANES ? score_tiles<3>
                                                   : score_tiles<4>;
    score_by(call, rows, gate, query, ahead.first + t, there, score, m, e, seen);
    for (int r = 0; r < rows.count; r++) {
      store(mass + r * step + t, m[r]);
      store(energy + r * step + t, e[r]);
      __builtin_memcpy(alive + r * step + t, &seen[r], sizeof seen[r]);
    }
    store(last + t, log_of(load(last + t)));
    store(mean + t, log_of(load(mean + t)));
  }
  for (int r = 0; r < rows.count; r++) {
    const int32_t *live = alive + r * step;
    float *y = energy + r * step;
    predict_row(call, rows, ahead, r, last, mean, live, mass + r * step, y);
    for (int64_t t = 0; t < tiles; t += LANES) {
      float x[LANES];
      store(x, exp2(load(y + t) * splat(LOG2E)));
      for (int64_t k = 0; k < LANES && t + k < tiles; k++)
        if (live[t + k] && (x[k] > out[t + k] || x[k] != x[k])) out[t + k] = x[k];
    }
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
