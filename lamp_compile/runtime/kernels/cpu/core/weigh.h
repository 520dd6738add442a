// The final weights of a run's keys, and what the certificate sums of them.

// Which sub-tiles of a run matter to a block of rows, and how. Rows that see nothing of one have no part in it.
struct Block {
  int cold_count, hot_count;
  int cold[RUN + 1], hot[RUN];  // sub-tiles of the run; one may be in both lists, where rows differ
  uint32_t refined[4];          // sub-tiles, by row of the block
  bool mixed;                   // some sub-tile is in both lists
};

// Refined sub-tiles, gathered from any runs of a segment until there are enough to weigh and multiply at once.
struct Hot {
  int count;
  bool plain;  // none is spoilt, and all rows of the block agree
  const uint8_t *high[MOST_FINE], *residual[MOST_FINE];
  int64_t key[MOST_FINE];
  Scales scales[MOST_FINE];
  uint32_t v_spoilt[MOST_FINE];
  bool refined[MOST_FINE][4];                            // by row of the block
  float factor[MOST_FINE][4];                            // from the chunk's weights to the row's
  alignas(64) float difference[MOST_FINE][4 * SUBTILE];  // what refinement adds to the scores
};

template <int ROWS>
LAMP_INLINE void sort_subtiles(const Work &work, const Run &run, int r0, Block &block) {
  uint32_t cold = 0, hot = 0;
  for (int i = 0; i < ROWS; i++) {
    const bool there = r0 + i < work.rows.count;
    const int token = work.rows.token[r0 + i];
    block.refined[i] = there ? run.hot_for[token] : 0;
    hot |= block.refined[i];
    if (there) cold |= run.alive[token] & ~run.hot_for[token];
  }
  block.mixed = (cold & hot) != 0;
  block.cold_count = block.hot_count = 0;
  // Without branches, which nobody could foresee.
  for (int t = 0; t < run.count; t++) {
    block.cold[block.cold_count] = t;
    block.cold_count += cold >> t & 1;
  }
  while (hot) block.hot[block.hot_count++] = take_lowest(hot);
}

// What refinement adds to the scores of 32 keys, in base 2.
template <int ROWS>
LAMP_APART void score_differences(const Work &work, const Run &run, int t, int r0, Feed &feed, float *difference) {
  const LampAttend &call = *work.call;
  const Rows &rows = work.rows;
  alignas(64) int32_t fine[ROWS * SUBTILE], coarse[ROWS * SUBTILE];
  dots_with<ROWS>(call.planes, run.k_residual[t], rows.q[r0], rows.sum8 + r0, feed, fine);
  if (call.softcap != 0) dots_with<ROWS>(call.planes, run.k_high[t], rows.q[r0], rows.sum8 + r0, feed, coarse);
  const Vf scale[2] = {known_halves(run.k_scale[t]), known_halves(run.k_scale[t] + LANES)};
  for (int i = 0; i < ROWS; i++)
    for (int h = 0; h < 2; h++) {
      const int at = i * SUBTILE + h * LANES;
      const Vf low = floats(load(fine + at)), mean = splat(rows.half_sum[r0 + i]);
      Vf d;
      if (call.softcap == 0) {
        d = (low + mean) * scale[h] * splat(rows.coefficient[r0 + i]);
      } else {
        const Vf high = floats(load(coarse + at)) * splat(16.0f);
        d = scores(call, rows, r0 + i, high + low, scale[h]) - scores(call, rows, r0 + i, high - mean, scale[h]);
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

// What the certificate sums, and the weights themselves.
struct Sums {
  Vf weight, value_weight, hard, soft, value, both, both_soft, most;
};

LAMP_INLINE void clear(Sums &sums) {
  sums.weight = sums.value_weight = sums.hard = sums.soft = sums.value = sums.both = sums.both_soft = sums.most =
      splat(0.0f);
}

// Sixteen keys of weight p; gives back the weight of their values.
LAMP_INLINE Vf add_weights(const Scales &scales, int h, Vf p, Sums &sums) {
  const Vf w = p * scales.v[h], k = p * scales.k_square[h], both = p * scales.both[h];
  sums.weight += p;
  sums.value_weight += w;
  sums.soft += k;
  sums.both_soft += both;
  sums.hard += p * k;
  sums.both += p * both;
  sums.value += w * w;
  sums.most = larger(w, sums.most);
  return w;
}

// Of weights times `factor`, with `noise` times the rounding of the high plane alone.
LAMP_INLINE void add_sums(const Sums &sums, Vf factor, Vf noise, Vf *to) {
  const Vf squared = factor * factor * noise;
  to[WEIGHT] += sums.weight * factor;
  to[SCORES_HARD] += sums.hard * squared;
  to[SCORES_SOFT] += sums.soft * factor;
  to[VALUE_HARD] += sums.value * squared;
  to[BOTH_HARD] += sums.both * squared;
  to[BOTH_SOFT] += sums.both_soft * factor;
}

// Weights of COUNT rows from r on, the i-th of their block, in the sub-tiles that are not refined for them. PLAIN:
// nothing is spoilt, and the block's rows agree on what is refined.
template <int COUNT, bool PLAIN>
LAMP_APART void weigh_cold(const Work &work, const Run &run, const Block &block, int i, int r, Feeds &feeds,
                           float *most, Vf (*to)[KEY_SUMS], float *const *outputs) {
  const float *z = work.z + r * work.pitch + (run.first - work.rows.from);
  Sums sums[COUNT];
  for (int k = 0; k < COUNT; k++) clear(sums[k]);
  for (int n = 0; n < block.cold_count; n++) {
    const int t = block.cold[n];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 2
      for (int k = 0; k < COUNT; k++) {
        if (k == COUNT - 1) ask_for_two(take(h ? feeds.refined : feeds.values, 128));
        const Vf p = load(z + k * work.pitch + t * SUBTILE + h * LANES);
        if (!PLAIN && block.refined[i + k] >> t & 1) continue;
        add_weights(run.scales[t], h, p, sums[k]);
        if (!PLAIN && run.v_spoilt[t] && spoilt(run.v_spoilt[t], h, p * splat(run.factor[r + k])))
          outputs[i + k][2 * work.call->planes.half_v + POISON] = 1;
      }
  }
  for (int k = 0; k < COUNT; k++) {
    const Vf factor = splat(run.factor[r + k]);
    add_sums(sums[k], factor, splat(1.0f), to[r + k]);
    // The high plane reads (16 hi - 1/2) s: half a step off every channel.
    to[r + k][CORRECTION] -= splat(0.5f) * sums[k].value_weight * factor;
    most[i + k] = largest(sums[k].most);
  }
}

// Weights of COUNT rows from r on, the i-th of their block, in refined sub-tiles, times the scales of values. PLAIN: as
// above.
template <int COUNT, bool PLAIN>
LAMP_APART void weigh_hot(const Work &work, const Hot &hot, int i, int r, float (*weight)[MOST_FINE * SUBTILE],
                          float *most, Vf (*to)[KEY_SUMS], float *const *outputs) {
  const float *z = work.z + r * work.pitch - work.rows.from;
  const bool moved = !settled(work);
  Sums sums[COUNT];
  for (int k = 0; k < COUNT; k++) clear(sums[k]);
  for (int n = 0; n < hot.count; n++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
#pragma GCC unroll 2
      for (int k = 0; k < COUNT; k++) {
        const int at = n * SUBTILE + h * LANES;
        if (!PLAIN && !hot.refined[n][i + k]) {
          store(weight[k] + at, splat(0.0f));
          continue;
        }
        Vf p = load(z + k * work.pitch + hot.key[n] + h * LANES) * splat(hot.factor[n][i + k]);
        const float *difference = hot.difference[n] + (i + k) * SUBTILE + h * LANES;
        if (moved) p *= exp2(smaller(splat(127.0f), load(difference)));
        store(weight[k] + at, add_weights(hot.scales[n], h, p, sums[k]));
        if (!PLAIN && hot.v_spoilt[n] && spoilt(hot.v_spoilt[n], h, p))
          outputs[i + k][2 * work.call->planes.half_v + POISON] = 1;
      }
  for (int k = 0; k < COUNT; k++) {
    add_sums(sums[k], splat(1.0f), splat(1.0f / 256.0f), to[r + k]);
    most[i + k] = largest(sums[k].most);
  }
}

// Keeps a refined sub-tile of a run for later.
template <int ROWS>
LAMP_INLINE void gather(const Work &work, const Run &run, const Block &block, int t, int r0, Feed &feed, Hot &hot) {
  const int n = hot.count++;
  hot.plain = (n == 0 || hot.plain) && !run.any_spoilt;
  if (!settled(work)) score_differences<ROWS>(work, run, t, r0, feed, hot.difference[n]);
  hot.high[n] = run.v_high[t];
  hot.residual[n] = run.v_residual[t];
  hot.key[n] = run.first + t * SUBTILE;
  hot.scales[n] = run.scales[t];
  hot.v_spoilt[n] = run.v_spoilt[t];
  for (int i = 0; i < ROWS; i++) {
    hot.refined[n][i] = block.refined[i] >> t & 1;
    hot.plain &= hot.refined[n][i];
    hot.factor[n][i] = r0 + i < work.rows.count ? run.factor[r0 + i] : 0.0f;
  }
}
