// The final weights of a run's keys, and what the certificate sums of them.

// Which sub-tiles of a run matter to a block of rows, and how. Rows that see nothing of one have no part in it.
struct Block {
  int cold_count, hot_count;
  int cold[RUN], hot[RUN];  // sub-tiles of the run; one may be in both lists, where rows differ
  bool refined[RUN][4];     // by row of the block
  bool mixed;               // some sub-tile is in both lists
};

// Weights of cold sub-tiles, one after the other, relative to what the rows' factors say.
struct Cold {
  float weight[4][RUN_KEYS];  // times the scale of the value
  float most[4];
};

// Refined sub-tiles, gathered from any runs of a segment until there are enough to weigh and multiply at once.
struct Hot {
  int count;
  const uint8_t *high[RUN], *residual[RUN];
  int64_t key[RUN];
  Scales scales[RUN];
  uint32_t v_spoilt[RUN];
  bool refined[RUN][4];                // by row of the block
  float factor[RUN][4];                // from the chunk's weights to the row's
  float difference[RUN][4 * SUBTILE];  // what refinement adds to the scores
};

template <int ROWS>
LAMP_INLINE void sort_subtiles(const Work &work, const Run &run, int r0, Block &block) {
  block.cold_count = block.hot_count = 0;
  block.mixed = false;
  for (int t = 0; t < run.count; t++) {
    bool cold = false, hot = false;
    if (work.rows.tokens == 1) {
      hot = run.hot_for[t][0];
      cold = run.alive[t][0] && !hot;
      for (int i = 0; i < ROWS; i++) block.refined[t][i] = hot;
    } else {
      for (int i = 0; i < ROWS; i++) {
        const int r = r0 + i, token = work.rows.token[r];
        block.refined[t][i] = r < work.rows.count && run.hot_for[t][token];
        hot |= block.refined[t][i];
        cold |= r < work.rows.count && run.alive[t][token] && !run.hot_for[t][token];
      }
    }
    if (cold) block.cold[block.cold_count++] = t;
    if (hot) block.hot[block.hot_count++] = t;
    block.mixed |= cold && hot;
  }
}

// What refinement adds to the scores of 32 keys, in base 2.
template <int ROWS>
LAMP_APART void score_differences(const Work &work, const Run &run, int t, int r0, Feed &feed, float *difference) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  const int half = (int)call.planes.half_k;
  int32_t fine[ROWS * SUBTILE], coarse[ROWS * SUBTILE];
  dots<ROWS>(run.k_residual[t], half, rows.q[r0], rows.sum8 + r0, feed, fine);
  if (call.softcap != 0) dots<ROWS>(run.k_high[t], half, rows.q[r0], rows.sum8 + r0, feed, coarse);
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

// Whether a row gives weight to a value that has no finite scale; NaN is a weight.
LAMP_INLINE bool spoilt(uint32_t bad, int h, Vf p) {
  for (int k = 0; k < LANES; k++)
    if (bad >> (h * LANES + k) & 1 && !(p[k] <= 0)) return true;
  return false;
}

// What the certificate sums, and the weights themselves; in two parts, so that additions need not wait for each other.
struct Sums {
  Vf weight[2], value_weight[2], hard[2], soft[2], value[2], both[2], both_soft[2], most[2];
};

LAMP_INLINE void clear(Sums &sums) {
  for (int h = 0; h < 2; h++)
    sums.weight[h] = sums.value_weight[h] = sums.hard[h] = sums.soft[h] = sums.value[h] = sums.both[h] =
        sums.both_soft[h] = sums.most[h] = splat(0.0f);
}

// Sixteen keys of weight p; gives back the weight of their values.
LAMP_INLINE Vf add_weights(const Scales &scales, int h, Vf p, Sums &sums) {
  const Vf w = p * scales.v[h], soft = p * scales.k_square[h], hard = p * soft;
  sums.weight[h] += p;
  sums.value_weight[h] += w;
  sums.hard[h] += hard;
  sums.soft[h] += soft;
  sums.value[h] += w * w;
  sums.both[h] += hard * scales.v_square[h];
  sums.both_soft[h] += soft * scales.v_square[h];
  sums.most[h] = larger(w, sums.most[h]);
  return w;
}

// Of weights times `factor`, with `noise` times the rounding of the high plane alone.
LAMP_INLINE void add_sums(const Sums &sums, Vf factor, Vf noise, Vf *to) {
  const Vf squared = factor * factor * noise;
  to[WEIGHT] += (sums.weight[0] + sums.weight[1]) * factor;
  to[SCORES_HARD] += (sums.hard[0] + sums.hard[1]) * squared;
  to[SCORES_SOFT] += (sums.soft[0] + sums.soft[1]) * factor;
  to[VALUE_HARD] += (sums.value[0] + sums.value[1]) * squared;
  to[BOTH_HARD] += (sums.both[0] + sums.both[1]) * squared;
  to[BOTH_SOFT] += (sums.both_soft[0] + sums.both_soft[1]) * factor;
}

// Weights of row r, the i-th of its block, in the sub-tiles that are not refined for it. PLAIN: nothing is spoilt, and
// the block's rows agree on what is refined.
template <bool PLAIN>
LAMP_APART void weigh_cold(const Work &work, const Run &run, const Block &block, int i, int r, Cold &cold, Feed &feed,
                           Vf *to, float &poison) {
  const float *z = work.z + r * work.span + (run.first - work.rows.from);
  const Vf factor = splat(run.factor[r]);
  constexpr int SOON = 2;
  Sums sums;
  clear(sums);
  for (int n = 0; n < block.cold_count; n++) {
    const int t = block.cold[n];
    float *weight = cold.weight[i] + n * SUBTILE;
    if (!empty(feed)) {
      const uint8_t *soon = take(feed, 64 * SOON);
      for (int k = 0; k < SOON; k++) __builtin_prefetch(soon + 64 * k);
    }
    for (int h = 0; h < 2; h++) {
      const Vf p = load(z + t * SUBTILE + h * LANES);
      const bool mine = PLAIN || !block.refined[t][i];
      store(weight + h * LANES, mine ? add_weights(run.scales[t], h, p, sums) : splat(0.0f));
      if (!PLAIN && mine && run.v_spoilt[t] && spoilt(run.v_spoilt[t], h, p * factor)) poison = 1;
    }
  }
  add_sums(sums, factor, splat(1.0f), to);
  // The high plane reads (16 hi - 1/2) s: half a step off every channel.
  to[CORRECTION] -= splat(0.5f) * (sums.value_weight[0] + sums.value_weight[1]) * factor;
  cold.most[i] = largest(larger(sums.most[0], sums.most[1]));
}

// Weights of row r, the i-th of its block, in refined sub-tiles, times the scale of the value; gives back the largest.
LAMP_APART float weigh_hot(const Work &work, const Hot &hot, int i, int r, float *weight, Vf *to, float &poison) {
  const float *z = work.z + r * work.span - work.rows.from;
  Sums sums;
  clear(sums);
  for (int n = 0; n < hot.count; n++)
    for (int h = 0; h < 2; h++) {
      const int at = n * SUBTILE + h * LANES;
      if (!hot.refined[n][i]) {
        store(weight + at, splat(0.0f));
        continue;
      }
      Vf p = load(z + hot.key[n] + h * LANES) * splat(hot.factor[n][i]);
      if (!settled(work)) p *= exp2(smaller(splat(127.0f), load(hot.difference[n] + i * SUBTILE + h * LANES)));
      store(weight + at, add_weights(hot.scales[n], h, p, sums));
      if (hot.v_spoilt[n] && spoilt(hot.v_spoilt[n], h, p)) poison = 1;
    }
  add_sums(sums, splat(1.0f), splat(1.0f / 256.0f), to);
  return largest(larger(sums.most[0], sums.most[1]));
}

// Keeps a refined sub-tile of a run for later.
template <int ROWS>
LAMP_INLINE void gather(const Work &work, const Run &run, const Block &block, int t, int r0, Feed &feed, Hot &hot) {
  const int n = hot.count++;
  if (!settled(work)) score_differences<ROWS>(work, run, t, r0, feed, hot.difference[n]);
  hot.high[n] = run.v_high[t];
  hot.residual[n] = run.v_residual[t];
  hot.key[n] = run.first + t * SUBTILE;
  hot.scales[n] = run.scales[t];
  hot.v_spoilt[n] = run.v_spoilt[t];
  for (int i = 0; i < ROWS; i++) {
    hot.refined[n][i] = block.refined[t][i];
    hot.factor[n][i] = r0 + i < work.rows.count ? run.factor[r0 + i] : 0.0f;
  }
}
