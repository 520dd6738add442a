// Second pass, with the log-sum-exp of the first at hand: decide, refine what is worth it, weigh the values.

constexpr int RUN = 8;  // sub-tiles whose cold weights share a step: 256 keys
constexpr int RUN_KEYS = RUN * SUBTILE;

// Of one run of sub-tiles and up to four rows.
struct Run {
  int64_t first;  // key
  int count;      // sub-tiles
  const uint8_t *k_high[RUN], *k_residual[RUN], *v_high[RUN], *v_residual[RUN];
  const uint8_t *next[RUN];  // v_high of the run after this
  Vf k_scale[RUN][2], v_scale[RUN][2], v_square[RUN][2];
  uint32_t v_spoilt[RUN];  // keys whose value has no finite scale
  float cold[4][RUN_KEYS],
      hot[4][RUN_KEYS];     // weight * value scale; a row's sub-tile is in one of them, 0 in the other
  float factor[MOST_ROWS];  // from the chunk's weights to the row's
  bool alive[RUN][MOST_ROWS], hot_for[RUN][MOST_ROWS];  // by token
  bool refined[RUN][4], any_hot[RUN], any, any_cold;    // by row of the block; any: some sub-tile is refined
  float cold_most[4], hot_most[4];
};

// Ask for 32 keys of a plane of values.
LAMP_INLINE void fetch_values(const LampPlanes &planes, const uint8_t *plane) {
  if (planes.tile == SUBTILE) return fetch(plane, SUBTILE * planes.half_v);
  for (int64_t c = 0; c < planes.half_v; c++) __builtin_prefetch(plane + c * planes.tile);
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

// Which sub-tiles of a run are alive and which are refined, for every token: for all of its heads when one asks for it.
// Counts both in the partial result of the token's first row.
LAMP_INLINE void decide(const Work &work, Run &run, float *partial) {
  const Rows &rows = work.rows;
  const int unit = (int)(work.call->subtile / SUBTILE), width = 2 * (int)work.call->planes.half_v + SUMS;
  const int64_t base = (run.first - rows.from) / SUBTILE;
  for (int r = 0; r < rows.count; r++) {
    const float most = work.most[base * SUBTILE / CHUNK * work.stride + r];
    run.factor[r] = work.lse[r] == -__builtin_inff() ? 0.0f : exp2_of(most - work.lse[r]);
  }
  for (int token = 0; token < rows.tokens; token++) {
    Vi hot = splat(work.level >= 1 ? -1 : 0);
    for (int r = token * rows.group; !settled(work) && r < (token + 1) * rows.group; r++)
      hot |= wanted(work, run, base, r);
    int32_t flags[LANES];
    __builtin_memcpy(flags, &hot, sizeof flags);
    for (int t = 0; work.level < 1 && work.hot && t < run.count; t++) flags[t] = work.hot[base + t];
    float *sums = partial + token * rows.group * width + width - SUMS;
    for (int t = 0; t < run.count; t += unit) {
      const int end = t + unit < run.count ? t + unit : run.count;
      bool alive = false;
      for (int s = t; s < end; s++) alive |= work.alive[(base + s) * rows.tokens + token];
      for (int s = t; s < end; s++) {
        run.alive[s][token] = alive;
        run.hot_for[s][token] = alive && flags[t];
        if (!run.hot_for[s][token]) continue;
        if (!settled(work)) fetch(run.k_residual[s], SUBTILE * work.call->planes.half_k);
        fetch_values(work.call->planes, run.v_residual[s]);
      }
      sums[ALIVE] += alive;
      sums[REFINED] += alive && flags[t];
    }
  }
}

LAMP_INLINE void open_run(const Work &work, int64_t first, int64_t end, Run &run) {
  const LampPlanes &planes = work.call->planes;
  run.first = first;
  run.count = 0;
  for (int64_t j = first; j < first + RUN_KEYS && j < end; j += SUBTILE) {
    const Place place = place_of(planes, work.rows.b, work.rows.g, key_of(work, j));
    const int64_t later = key_of(work, j + RUN_KEYS < end ? j + RUN_KEYS : j);
    fetch(planes.v_scale + scale_at(planes, place_of(planes, work.rows.b, work.rows.g, later)), 2 * SUBTILE);
    const int t = run.count++;
    run.k_high[t] = planes.k_high + key_at(planes, place);
    run.k_residual[t] = planes.k_residual + key_at(planes, place);
    run.v_high[t] = planes.v_high + value_at(planes, place);
    run.v_residual[t] = planes.v_residual + value_at(planes, place);
    run.v_spoilt[t] = 0;
    for (int h = 0; h < 2; h++) {
      const Vf k = halves(planes.k_scale + scale_at(planes, place) + h * LANES);
      const Vf v = halves(planes.v_scale + scale_at(planes, place) + h * LANES);
      // What is not finite has spoilt its scores already; as a value it spoils the rows that weigh it.
      run.k_scale[t][h] = select(finite(k), k, splat(0.0f));
      run.v_scale[t][h] = select(finite(v), v, splat(0.0f));
      run.v_square[t][h] = run.v_scale[t][h] * run.v_scale[t][h];
      if (any(~finite(v)))
        for (int i = 0; i < LANES; i++)
          if (!finite(v)[i]) run.v_spoilt[t] |= 1u << (h * LANES + i);
    }
  }
}

// What refinement adds to the scores of 32 keys, in base 2.
template <int ROWS>
LAMP_INLINE void score_differences(const Work &work, const Run &run, int t, int r0, float *difference) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  const int half = (int)call.planes.half_k;
  int32_t fine[ROWS * SUBTILE], coarse[ROWS * SUBTILE];
  dots<ROWS>(run.k_residual[t], run.k_residual[t], half, rows.q[r0], rows.sum8 + r0, fine);
  if (call.softcap != 0) dots<ROWS>(run.k_high[t], run.k_high[t], half, rows.q[r0], rows.sum8 + r0, coarse);
  for (int i = 0; i < ROWS; i++)
    for (int h = 0; h < 2; h++) {
      const int at = i * SUBTILE + h * LANES;
      const Vf low = floats(load(fine + at)), mean = splat(rows.half_sum[r0 + i]);
      Vf d;
      if (call.softcap == 0) {
        d = (low + mean) * run.k_scale[t][h] * splat(rows.coefficient[r0 + i]);
      } else {
        const Vf high = floats(load(coarse + at)) * splat(16.0f);
        d = scores(call, rows, r0 + i, high + low, run.k_scale[t][h]) -
            scores(call, rows, r0 + i, high - mean, run.k_scale[t][h]);
      }
      store(difference + at, d);
    }
}

// Final weights of a run for a row, and what the certificate sums of them: `sums` of KEY_SUMS vectors.
LAMP_INLINE void weigh(const Work &work, Run &run, int i, int r, const float *differences, int rows, Vf *sums,
                       float &poison) {
  const float *z = work.z + r * work.span + (run.first - work.rows.from);
  const Vf factor = splat(run.factor[r]), zero = splat(0.0f);
  Vf weight = zero, hard = zero, soft = zero, value = zero, both = zero, both_soft = zero, cold = zero, most = zero,
     hottest = zero;
  for (int t = 0; t < run.count; t++) {
    const bool hot = run.refined[t][i];
    const Vf noise = splat(1.0f / 256.0f);  // of both planes, over that of the high plane alone
    float *to = hot ? run.hot[i] : run.cold[i], *other = hot ? run.cold[i] : run.hot[i];
    for (int h = 0; h < 2; h++) {
      const int at = t * SUBTILE + h * LANES;
      Vf p = load(z + at) * factor;
      if (hot && !settled(work))
        p = p * exp2(smaller(splat(127.0f), load(differences + (t * rows + i) * SUBTILE + h * LANES)));
      const Vf ps = p * run.k_scale[t][h], w = p * run.v_scale[t][h], pss = ps * run.k_scale[t][h];
      const Vf v2 = run.v_square[t][h];
      const Vf p2 = hot ? noise * ps * ps : ps * ps, w2 = hot ? noise * w * w : w * w;
      store(to + at, w);
      if (run.any_hot[t]) store(other + at, zero);
      weight += p;
      hard += p2;
      soft += pss;
      value += w2;
      both += p2 * v2;
      both_soft += pss * v2;
      if (hot) {
        hottest = larger(w, hottest);
      } else {
        most = larger(w, most);
        cold += w;
      }
      if (run.v_spoilt[t])
        for (int k = 0; k < LANES; k++)
          if (run.v_spoilt[t] >> (h * LANES + k) & 1 && !(p[k] <= 0)) poison = 1;
    }
  }
  sums[WEIGHT] += weight;
  sums[CORRECTION] -= splat(0.5f) * cold;  // the high plane reads (16 hi - 1/2) s: half a step off every channel
  sums[SCORES_HARD] += hard;
  sums[SCORES_SOFT] += soft;
  sums[VALUE_HARD] += value;
  sums[BOTH_HARD] += both;
  sums[BOTH_SOFT] += both_soft;
  run.cold_most[i] = largest(most);
  run.hot_most[i] = largest(hottest);
}

// Where between two steps a weight is cut, by key: evenly spread over any stretch of keys, so that what is lost here is
// gained there, however small the weights are.
LAMP_INLINE Vf dither(int64_t key) {
  const Vf lane = Vf{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float first = (float)((uint32_t)(key * 2654435769u) >> 8) * 5.9604645e-8f;  // key / golden ratio, its fraction
  Vf x = splat(first) + lane * splat(0.61803399f);
  return x - floats(__builtin_convertvector(x, Vi));
}

LAMP_INLINE void as_bytes(Vi x, uint8_t *to) {
  const Vb b = __builtin_convertvector(x, Vb);
  __builtin_memcpy(to, &b, sizeof b);
}

template <int ROWS>
LAMP_INLINE void add_cold(Work &work, Run &run, int r0, float *const *outputs) {
  uint8_t w[RUN * ROWS * SUBTILE];
  float step[ROWS];
  for (int i = 0; i < ROWS; i++) {
    step[i] = run.cold_most[i] / 255.0f;
    const Vf inverse = splat(run.cold_most[i] > 0 ? 255.0f / run.cold_most[i] : 0.0f);
    for (int t = 0; t < run.count; t++)
      for (int h = 0; h < 2; h++) {
        const int at = t * SUBTILE + h * LANES;
        const Vf x = smaller(load(run.cold[i] + at) * inverse + dither(run.first + at), splat(255.0f));
        as_bytes(__builtin_convertvector(x, Vi), w + (t * ROWS + i) * SUBTILE + h * LANES);
      }
  }
  const int half = (int)work.call->planes.half_v;
  int32_t out[ROWS * MOST_DIM];
  values<ROWS>(run.v_high, run.next, run.count, work.call->planes.tile, half, w, out);
  for (int i = 0; i < ROWS && r0 + i < work.rows.count; i++)
    for (int c = 0; c < 2 * half; c++) outputs[i][c] += step[i] * (float)out[i * 2 * half + c];
}

// Refined sub-tiles: weights of 16 bits on the high plane, of 8 on the residual, whose values are a sixteenth.
template <int ROWS>
LAMP_INLINE void add_hot(Work &work, Run &run, int r0, float *const *outputs) {
  uint8_t upper[RUN * ROWS * SUBTILE], lower[RUN * ROWS * SUBTILE], eight[RUN * ROWS * SUBTILE];
  const uint8_t *high[RUN], *residual[RUN];
  float step[ROWS];
  int count = 0;
  for (int t = 0; t < run.count; t++) {
    if (!run.any_hot[t]) continue;
    high[count] = run.v_high[t];
    residual[count++] = run.v_residual[t];
  }
  for (int i = 0; i < ROWS; i++) {
    step[i] = run.hot_most[i] / 65280.0f;  // 255 * 256
    const Vf inverse = splat(run.hot_most[i] > 0 ? 65280.0f / run.hot_most[i] : 0.0f);
    for (int t = 0, n = 0; t < run.count; t++) {
      if (!run.any_hot[t]) continue;
      for (int h = 0; h < 2; h++) {
        const Vf x = smaller(load(run.hot[i] + t * SUBTILE + h * LANES) * inverse, splat(65280.0f));
        const Vf cut = dither(run.first + t * SUBTILE + h * LANES);
        const Vi fine = __builtin_convertvector(x + cut, Vi);
        const int at = (n * ROWS + i) * SUBTILE + h * LANES;
        as_bytes(fine >> 8, upper + at);
        as_bytes(fine & splat(255), lower + at);
        as_bytes(__builtin_convertvector(smaller(x * splat(1.0f / 256.0f) + cut, splat(255.0f)), Vi), eight + at);
      }
      n++;
    }
  }
  const int half = (int)work.call->planes.half_v;
  int32_t out[ROWS * MOST_DIM];
  fine_values<ROWS>(high, residual, count, work.call->planes.tile, half, upper, lower, eight, out);
  for (int i = 0; i < ROWS && r0 + i < work.rows.count; i++)
    for (int c = 0; c < 2 * half; c++) outputs[i][c] += step[i] * (float)out[i * 2 * half + c];
}

template <int ROWS>
LAMP_INLINE void refine_rows(Work &work, Run &run, int r0, float *partial, Vf (*sums)[KEY_SUMS]) {
  const int value_dim = 2 * (int)work.call->planes.half_v, width = value_dim + SUMS;
  float *outputs[ROWS];
  float differences[RUN * ROWS * SUBTILE];
  run.any_cold = run.any = false;
  for (int i = 0; i < ROWS; i++) outputs[i] = partial + (r0 + i < work.rows.count ? r0 + i : r0) * width;
  for (int t = 0; t < run.count; t++) {
    run.any_hot[t] = false;
    for (int i = 0; i < ROWS; i++) {
      const int r = r0 + i, token = work.rows.token[r];
      run.refined[t][i] = r < work.rows.count && run.hot_for[t][token];
      run.any_hot[t] |= run.refined[t][i];
      run.any_cold |= r < work.rows.count && run.alive[t][token] && !run.hot_for[t][token];
    }
    run.any |= run.any_hot[t];
    if (run.any_hot[t] && !settled(work)) score_differences<ROWS>(work, run, t, r0, differences + t * ROWS * SUBTILE);
  }
  for (int i = 0; i < ROWS; i++) {
    if (r0 + i < work.rows.count) {
      weigh(work, run, i, r0 + i, differences, ROWS, sums[r0 + i], outputs[i][value_dim + POISON]);
      continue;
    }
    // A row that fills up the block.
    __builtin_memset(run.cold[i], 0, sizeof run.cold[i]);
    __builtin_memset(run.hot[i], 0, sizeof run.hot[i]);
    run.cold_most[i] = run.hot_most[i] = 0;
  }
  if (run.any_cold) add_cold<ROWS>(work, run, r0, outputs);
  if (run.any) add_hot<ROWS>(work, run, r0, outputs);
}

static void refine_segment(Work &work, int64_t segment) {
  const Rows &rows = work.rows;
  const int width = 2 * (int)work.call->planes.half_v + SUMS;
  float *partial = work.partial + segment * rows.count * width;
  __builtin_memset(partial, 0, sizeof(float) * rows.count * width);
  const int64_t begin = rows.from + segment * SEGMENT;
  const int64_t end = begin + SEGMENT < rows.to ? begin + SEGMENT : rows.to;
  Run runs[2];  // one is worked on while the residual planes of the next are on their way
  Vf sums[MOST_ROWS][KEY_SUMS];
  for (int r = 0; r < rows.count; r++)
    for (int i = 0; i < KEY_SUMS; i++) sums[r][i] = splat(0.0f);
  int64_t opened = begin;
  for (int64_t first = begin; first < end; first += RUN_KEYS) {
    for (; opened < end && opened <= first + RUN_KEYS; opened += RUN_KEYS) {
      Run &next = runs[(opened - begin) / RUN_KEYS % 2];
      open_run(work, opened, end, next);
      decide(work, next, partial);
    }
    Run &run = runs[(first - begin) / RUN_KEYS % 2];
    const Run &after = first + RUN_KEYS < end ? runs[(first - begin) / RUN_KEYS % 2 ^ 1] : run;
    for (int t = 0; t < run.count; t++) run.next[t] = after.v_high[t < after.count ? t : 0];
    for (int r = 0; r < rows.count;) switch (block_rows(rows.count - r)) {
        case 4:
          refine_rows<4>(work, run, r, partial, sums);
          r += 4;
          break;
        case 2:
          refine_rows<2>(work, run, r, partial, sums);
          r += 2;
          break;
        default:
          refine_rows<1>(work, run, r, partial, sums);
          r += 1;
      }
  }
  for (int r = 0; r < rows.count; r++)
    for (int i = 0; i < KEY_SUMS; i++) partial[r * width + width - SUMS + i] = total(sums[r][i]);
}
