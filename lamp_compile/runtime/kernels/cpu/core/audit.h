// What the weights of a step say of the prediction it went by (runtime/network/audit.py): history and trust, in place.

constexpr float SLACK = 4, MOST_EXCESS = 20, LAVISH_LIMIT = 2.5f, CEILING = 1e4f, DECAY = 0.9f;
constexpr int HOLD_STEPS = 64, MISSED = 1, LAVISH = 2, NO_NUMBER = 4, TOO_LONG = 8;

// The energy of each sub-tile that was read, by the row that weighs it most; NaN for NaN. Sub-tiles of a unit alike.
LAMP_INLINE void energies(const Work &work, int64_t places, float *square) {
  const int unit = (int)(work.call->subtile / SUBTILE);
  static_assert(CHUNK / SUBTILE == LANES, "a chunk's sub-tiles fill a vector");
  for (int64_t c = 0; c * LANES < places; c++) {
    Vf most = splat(0.0f);
    for (int r = 0; r < work.rows.count; r++) {
      if (work.lse[r] == -__builtin_inff()) continue;
      const float factor = exp2_of(work.most[c * work.stride + r] - work.lse[r]);
      Vf w = load(work.weight + r * (work.span / SUBTILE) + c * LANES) * splat(factor);
      w *= w;
      if (unit > 1) {
        float each[LANES];
        store(each, w);
        for (int t = 0; t < LANES; t += unit)
          for (int s = 1; s < unit; s++) each[t] += c * LANES + t + s < places ? each[t + s] : 0.0f;
        w = load(each);
      }
      most = select((w > most) | (w != w), w, most);
    }
    store(square + c * LANES, most);
  }
}

// What importance a tile turned out to have; DEAD where no key is live. `at` is the place behind those looked at.
LAMP_INLINE float known_importance(const Work &work, int64_t t, int64_t places, int64_t &at, bool &read) {
  const Ahead &ahead = *work.ahead;
  const int64_t unit = work.call->subtile / SUBTILE, from = at, end = (t + 1) * unit;
  bool alive = ahead.use;
  if (ahead.use) {
    while (at < places && ahead.order[at] < end) at++;
  } else {
    for (; at < places && at + work.rows.from / SUBTILE < end; at++) alive |= work.alive[at];
  }
  read = at > from;
  if (!read) return ahead.use ? ahead.importance[t] : DEAD;
  return alive ? __builtin_sqrtf(ahead.square[from]) : DEAD;
}

struct Findings {
  float allowed, left, gone;  // energy that may be cold, that was left cold; mass that was skipped
  int64_t hot, called;        // tiles that are, and that the gate says are
  bool stepped, broken;
};

LAMP_INLINE void note(const Ahead &ahead, float tau, float known, float predicted, bool read, Findings &f) {
  const bool live = known >= 0, bad = !healthy(predicted);
  const float seen = bad ? 0 : predicted, size = live ? known : 0;
  const bool skippable = ahead.skip_below >= 0 && seen <= ahead.skip_below;
  const float often = !read ? 0 : ahead.use && ahead.whole && skippable ? (float)AUDIT_WINDOW : 1;
  f.broken |= bad;
  f.stepped |= live;
  if (size <= tau) f.allowed += often * size * size;
  if (seen <= tau) f.left += often * size * size;
  if (skippable) f.gone += often * size;
  f.hot += live && known > tau;
  f.called += live && seen > tau;
}

LAMP_INLINE void judge(const Work &work, const Findings &f, float tau) {
  const LampAttend &call = *work.call;
  const Ahead &ahead = *work.ahead;
  const LampPredict &gate = *ahead.gate;
  const int64_t bg = work.rows.b * call.planes.kv_heads + work.rows.g;
  float *trust = gate.trust + bg * TRUST_FIELDS;
  if (!f.stepped) return;
  const bool too_long = length_of(call, work.rows.b) > gate.trained, raised = call.state[bg * 4 + 1] > 0;
  const bool believed = ahead.believed;
  float excess = 0, expense = 0;
  bool missed = false, lavish = false;
  if (believed) {
    const float allowed = f.allowed + SLACK * tau * tau, subtile = (float)call.subtile;
    excess = f.left / (allowed > 1.17549435e-38f ? allowed : 1.17549435e-38f);
    if (gate.skip > 0) {
      const float gone = f.gone * __builtin_sqrtf(subtile) / (gate.skip * __builtin_sqrtf(__builtin_sqrtf(subtile)));
      if (gone > excess) excess = gone;
    }
    if (excess > CEILING) excess = CEILING;
    expense = (float)f.called / ((float)f.hot + SLACK);
    excess = trust[EXCESS] + (excess - trust[EXCESS]) / AUDIT_WINDOW;
    expense = trust[EXPENSE] + (expense - trust[EXPENSE]) / AUDIT_WINDOW;
    const float limit = gate.limit[work.rows.g];
    missed = excess > (limit < MOST_EXCESS ? limit : MOST_EXCESS);
    lavish = expense > LAVISH_LIMIT;
  }
  const bool no_number = believed && f.broken, dropped = missed || lavish || no_number;
  int64_t flags = (int64_t)trust[TRUST_FLAGS];
  flags |= (missed ? MISSED : 0) | (lavish ? LAVISH : 0) | (no_number ? NO_NUMBER : 0) | (too_long ? TOO_LONG : 0);
  const bool clear = dropped || !believed;
  trust[EXCESS] = clear ? 0 : excess;
  trust[EXPENSE] = clear ? 0 : expense;
  trust[HELD] = dropped || raised ? (float)HOLD_STEPS : trust[HELD] > 1 ? trust[HELD] - 1 : 0;
  trust[TRUST_FLAGS] = (float)flags;
  trust[TRUST_STEPS] += 1;
  trust[EXACT_STEPS] += ahead.use ? 0 : 1;
  trust[DROPPED] += dropped ? 1 : 0;
}

static void audit(Work &work) {
  const LampAttend &call = *work.call;
  const Ahead &ahead = *work.ahead;
  const float tau = work.tau;
  float *history = ahead.gate->history + (work.rows.b * call.planes.kv_heads + work.rows.g) * ahead.gate->tiles * 2;
  Findings f = {0, 0, 0, 0, 0, false, false};
  const int64_t places = (work.rows.to - work.rows.from + SUBTILE - 1) / SUBTILE;
  energies(work, places, ahead.square);
  int64_t at = ahead.use ? 0 : ahead.first * (call.subtile / SUBTILE) - work.rows.from / SUBTILE;
  for (int64_t t = 0; t < ahead.gate->tiles; t++) {
    float known = DEAD;
    if (t >= ahead.first && t < ahead.last) {
      bool read;
      known = known_importance(work, t, places, at, read);
      note(ahead, tau, known, ahead.believed ? ahead.importance[t] : 0, read, f);
    }
    const float seen = known > 0 ? known : 0;  // also where it is no number
    history[2 * t] = seen;
    history[2 * t + 1] = DECAY * history[2 * t + 1] + (1 - DECAY) * seen;
  }
  judge(work, f, tau);
}
