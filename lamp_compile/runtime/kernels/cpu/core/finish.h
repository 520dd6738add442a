// The end: partial results joined in order, the output rotated back, certificate and guard (runtime/certificate.py,
// runtime/guard.py).

// What the guard hears of a row.
struct Evidence {
  float counted, error, bad;
};

LAMP_INLINE bool healthy(float x) { return __builtin_fabsf(x) <= 3.4028235e38f; }

// False where the scores, not the data, went out of range: refinement moved them too far from the look-ahead's maximum.
LAMP_INLINE bool finish_row(Work &work, int r, int64_t segments, Evidence &evidence) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  const int value_dim = 2 * (int)call.planes.half_v, width = value_dim + SUMS;
  const int64_t head = rows.head[r], token = rows.first_token + rows.token[r];
  const int64_t place = (rows.b * call.heads + head) * call.queries + token;
  static_assert(SUMS <= LANES, "one vector behind the output holds the sums");
  float x[MOST_DIM + LANES];
  for (int c = 0; c < width; c += LANES) {  // what is read behind a row goes to x behind its sums, and is left out
    Vf sum = splat(0.0f);
    for (int64_t s = 0; s < segments; s++) sum += load(work.partial + (s * rows.count + r) * width + c);
    store(x + c, sum);
  }
  const float *sums = x + value_dim;
  const float before = work.lse[r];
  const bool seen = before != -__builtin_inff();
  float weight = sums[WEIGHT];
  if (seen && call.sinks) weight += exp2_of(LOG2E * call.sinks[head] - before);
  float inverse = seen ? 1.0f / weight : 0.0f;
  const bool poisoned = sums[POISON] != 0;
  if (poisoned) inverse = __builtin_nanf("");
  const float one = seen ? 1.0f / weight : 0.0f, two = one * one;

  // Rounding errors are uniform over a step: of 16 scales for the high plane alone, to which refined keys were
  // compared.
  const float scores = 256.0f * call.scale * call.scale / 12.0f, v_square = (float)value_dim * PEAK_SQUARE;
  // The query's rounding is one vector for all keys: its share goes with the weights, not their squares.
  const float soft = call.scale * call.scale * rows.rounding[r] * 2.0f * (float)call.planes.half_k * PEAK_SQUARE;
  const float hard = scores * rows.norm[r];
  float certificate[3] = {
      hard * sums[SCORES_HARD] * two + soft * sums[SCORES_SOFT] * one,
      256.0f * sums[VALUE_HARD] * two * (float)value_dim / 12.0f,
      (hard * sums[BOTH_HARD] * two + soft * sums[BOTH_SOFT] * one) * v_square,
  };
  const float correction = sums[CORRECTION];
  for (int c = 0; c < value_dim; c += LANES)
    store(x + c, seen ? (load(x + c) + splat(correction)) * splat(inverse) : splat(0.0f));
  store(x + value_dim, splat(0.0f));
  rotate(call.rotate_v, value_dim, true, x);
  Vf squares = splat(0.0f);
  for (int c = 0; c < value_dim; c += LANES) squares += load(x + c) * load(x + c);
  const float square = total(squares);  // not finite where an output is not, or its square
  bool sound = healthy(square);
  write_row(call.out, call.dtype, place * value_dim, value_dim, x);
  // What rounding took from `before` is in the weights: added up in float it would be lost after all.
  const double exact = ((double)before + __builtin_log2((double)weight)) * 0.6931471805599453;
  const float lse = seen ? (float)exact : -__builtin_inff();
  if (call.lse) call.lse[place] = lse;
  for (int i = 0; i < 3; i++) {
    if (!seen) certificate[i] = 0;
    if (call.certificate) call.certificate[place * 3 + i] = certificate[i];
    sound &= healthy(certificate[i]);
  }
  sound &= healthy(lse);
  const float estimate = certificate[0] * square + certificate[1] + certificate[2];
  const float size = square > 1.17549435e-38f ? square : 1.17549435e-38f;
  evidence = {seen && sound ? 1.0f : 0.0f, seen && sound ? estimate / size : 0.0f, seen && !sound ? 1.0f : 0.0f};
  return sound || !seen || poisoned || !healthy(before);
}

// runtime/guard.py: step, for one sequence and kv head.
static void guard(const LampAttend &call, int64_t b, int64_t g, const Evidence *evidence, int64_t rows, int64_t alive,
                  int64_t refined) {
  float counted = 0, error = 0, bad_rows = 0;
  for (int64_t r = 0; r < rows; r++) {
    counted += evidence[r].counted;
    error += evidence[r].error;
    bad_rows += evidence[r].bad;
  }
  enum { ERROR, FLOOR, HOLD, FLAGS };
  enum { STEPS, LIVE, REFINED_TILES, EXACT, RAISED, LOWERED, BAD };
  float *state = call.state + (b * call.planes.kv_heads + g) * 4;
  int64_t *stats = call.stats + (b * call.planes.kv_heads + g) * 7;
  const float floor = call.floor[b * call.floor_stride + g], budget = call.budget[b * call.budget_stride + g];
  const bool bad = bad_rows > 0, stepped = counted > 0 || bad;
  const float level = state[FLOOR], limit = budget * budget;
  const float mean = state[ERROR] + (error / (counted > 1 ? counted : 1.0f) - state[ERROR]) / (float)call.guard_window;
  const float held = state[HOLD] > 1 ? state[HOLD] - 1 : 0;
  const bool over = mean > limit && stepped;
  const bool under = mean < call.hysteresis * call.hysteresis * limit && held == 0 && level > 0 && !over && stepped;
  float raised = level;
  if (over)
    raised = level + 1 < 2 ? level + 1 : 2;
  else if (under)
    raised = level - 1;
  if (bad) raised = 2;
  const bool changed = over || bad;
  if (stepped) {
    int64_t flags = (int64_t)state[FLAGS];
    if (bad) flags |= 1;
    if ((raised > floor ? raised : floor) >= 2) flags |= 2;  // there is no exact tier here
    state[ERROR] = changed ? 0 : mean;
    state[FLOOR] = raised;
    state[HOLD] = changed ? (float)call.guard_hold : held;
    state[FLAGS] = (float)flags;
  }
  stats[STEPS] += stepped;
  stats[LIVE] += alive;
  stats[REFINED_TILES] += refined;
  stats[RAISED] += raised > level && !bad;  // a non-finite output is a reason of its own
  stats[LOWERED] += raised < level;
  stats[BAD] += bad;
}
