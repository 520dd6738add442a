// The values of a run, as its keys weigh: those of refined sub-tiles from both planes.

// Adds what a call of `values` found to a block's outputs.
template <int ROWS>
LAMP_APART void add_to(const Work &work, int r0, const float *step, const int32_t *found, float *const *outputs) {
  const int value_dim = 2 * (int)work.call->planes.half_v;
  for (int i = 0; i < ROWS && r0 + i < work.rows.count; i++) {
    float *to = outputs[i];
    const int32_t *from = found + i * value_dim;
    int c = 0;
    for (; c + LANES <= value_dim; c += LANES) store(to + c, load(to + c) + floats(load(from + c)) * splat(step[i]));
    for (; c < value_dim; c++) to[c] += step[i] * (float)from[c];
  }
}

// Weights of 8 bits on the high plane, relative to the largest of each row, `most`. MIXED: rows differ in what is
// refined.
template <int ROWS, bool MIXED>
LAMP_APART void add_cold(const Work &work, const Run &run, const Block &block, const float *most, int r0, Feeds &feeds,
                         float *const *outputs) {
  alignas(64) uint8_t w[RUN * ROWS * WEIGHT_ROOM];
  float step[ROWS];
  const uint8_t *high[RUN];
  const LampPlanes &planes = work.call->planes;
  for (int n = 0; n < block.cold_count; n++) high[n] = run.v_high[block.cold[n]];
  const float *z[ROWS];
  Vf inverse[ROWS];
  for (int i = 0; i < ROWS; i++) {
    const int r = r0 + i < work.rows.count ? r0 + i : r0;  // one that fills up the block weighs nothing
    z[i] = work.z + r * work.pitch + (run.first - work.rows.from);
    inverse[i] = splat(most[i] > 0 ? 255.0f / most[i] : 0.0f);
    step[i] = r0 + i < work.rows.count ? most[i] / 255.0f * run.factor[r0 + i] : 0.0f;
  }
  for (int n = 0; n < block.cold_count; n++) {
    const int t = block.cold[n];
    Vi rounded[ROWS][2];
    for (int h = 0; h < 2; h++) {
      const int at = t * SUBTILE + h * LANES;
      const Vf cut = cuts_of(run.first + at);
      ask_for_two(take(h ? feeds.refined : feeds.values, 128));
      for (int i = 0; i < ROWS; i++) {
        Vf p = load(z[i] + at) * run.scales[t].v[h];
        if (MIXED && block.refined[i] >> t & 1) p = splat(0.0f);
        rounded[i][h] = whole(p * inverse[i] + cut);
      }
    }
    place_weights_for<ROWS>(planes, rounded, n, w);
  }
  alignas(64) int32_t found[ROWS * MOST_DIM];
  values_with<ROWS>(planes, high, block.cold_count, w, feeds.values, found);
  add_to<ROWS>(work, r0, step, found, outputs);
}

// Refined sub-tiles: weights of 16 bits.
template <int ROWS>
static void add_hot(const Work &work, Hot &hot, int r0, Feeds &feeds, float *const *outputs, Vf (*sums)[KEY_SUMS]) {
  if (!hot.count) return;
  const LampPlanes &planes = work.call->planes;
  constexpr int ROOM = MOST_FINE * ROWS * WEIGHT_ROOM;
  alignas(64) uint8_t upper[ROOM], lower[ROOM], eight[WEIGHTS_OF_EIGHT_BITS ? ROOM : 1];
  float step[ROWS], most[ROWS];
  alignas(64) float weight[ROWS][MOST_FINE * SUBTILE];
  Vf inverse[ROWS];
  for (int i = 0; i < ROWS;) {
    const int r = r0 + i, left = work.rows.count - r;
    if (left <= 0) {  // a row that fills up the block
      __builtin_memset(weight[i], 0, sizeof weight[i]);
      most[i++] = 0;
    } else if (hot.plain && left > 1 && i + 1 < ROWS) {
      weigh_hot<2, true>(work, hot, i, r, weight + i, most, sums, outputs);
      i += 2;
    } else {
      weigh_hot<1, false>(work, hot, i, r, weight + i, most, sums, outputs);
      i++;
    }
  }
  for (int i = 0; i < ROWS; i++) {
    step[i] = most[i] / 65280.0f;  // 255 * 256
    inverse[i] = splat(most[i] > 0 ? 65280.0f / most[i] : 0.0f);
  }
  for (int n = 0; n < hot.count; n++) {
    Vi above[ROWS][2], below[ROWS][2], alone[ROWS][2];
    for (int h = 0; h < 2; h++) {
      const Vf cut = cuts_of(hot.key[n] + h * LANES);
      for (int i = 0; i < ROWS; i++) {
        const Vf x = smaller(load(weight[i] + n * SUBTILE + h * LANES) * inverse[i], splat(65280.0f));
        const Vi fine = whole(x + cut);
        above[i][h] = fine >> 8;
        below[i][h] = fine & splat(255);
        if (WEIGHTS_OF_EIGHT_BITS) alone[i][h] = whole(x * splat(1.0f / 256.0f) + cut);
      }
    }
    place_weights_for<ROWS>(planes, above, n, upper);
    place_weights_for<ROWS>(planes, below, n, lower);
    if (WEIGHTS_OF_EIGHT_BITS) place_weights_for<ROWS>(planes, alone, n, eight);
  }
  alignas(64) int32_t found[ROWS * MOST_DIM];
  fine_values_with<ROWS>(planes, hot.high, hot.residual, hot.count, upper, lower, eight, feeds, found);
  add_to<ROWS>(work, r0, step, found, outputs);
  hot.count = 0;
}

template <int ROWS>
LAMP_INLINE void outputs_of(const Work &work, int r0, float *partial, float **outputs) {
  const int width = 2 * (int)work.call->planes.half_v + SUMS;
  for (int i = 0; i < ROWS; i++) outputs[i] = partial + (r0 + i < work.rows.count ? r0 + i : r0) * width;
}

template <int ROWS>
LAMP_INLINE void refine_rows(const Work &work, const Run &run, int r0, Feeds &feeds, float *partial, Hot &hot,
                             Vf (*sums)[KEY_SUMS]) {
  float *outputs[ROWS];
  Block block;
  outputs_of<ROWS>(work, r0, partial, outputs);
  sort_subtiles<ROWS>(work, run, r0, block);
  for (int n = 0; n < block.hot_count; n++) {
    if (hot.count == MOST_FINE) add_hot<ROWS>(work, hot, r0, feeds, outputs, sums);
    gather<ROWS>(work, run, block, block.hot[n], r0, feeds.refined, hot);
  }
  if (!block.cold_count) return;
  float most[ROWS];
  const bool plain = !block.mixed && !run.any_spoilt;
  for (int i = 0; i < ROWS;) {
    const int r = r0 + i, left = work.rows.count - r;
    if (left <= 0) {  // a row that fills up the block
      most[i++] = 0;
    } else if (plain && left > 1 && i + 1 < ROWS) {
      weigh_cold<2, true>(work, run, block, i, r, feeds, most, sums, outputs);
      i += 2;
    } else {
      if (plain)
        weigh_cold<1, true>(work, run, block, i, r, feeds, most, sums, outputs);
      else
        weigh_cold<1, false>(work, run, block, i, r, feeds, most, sums, outputs);
      i++;
    }
  }
  if (block.mixed)
    add_cold<ROWS, true>(work, run, block, most, r0, feeds, outputs);
  else
    add_cold<ROWS, false>(work, run, block, most, r0, feeds, outputs);
}

// What is left of refined sub-tiles at the end of a segment.
template <int ROWS>
LAMP_INLINE void close_rows(const Work &work, int r0, Feeds &feeds, float *partial, Hot &hot, Vf (*sums)[KEY_SUMS]) {
  float *outputs[ROWS];
  outputs_of<ROWS>(work, r0, partial, outputs);
  add_hot<ROWS>(work, hot, r0, feeds, outputs, sums);
}

// What is carried from run to run of a segment.
struct Carried {
  Hot hot[MOST_ROWS / 4];
  Vf sums[MOST_ROWS][KEY_SUMS];
};

LAMP_INLINE void clear(const Rows &rows, Carried &carried) {
  for (int r = 0; r < rows.count; r += 4) carried.hot[r / 4].count = 0;
  for (int r = 0; r < rows.count; r++)
    for (int i = 0; i < KEY_SUMS; i++) carried.sums[r][i] = splat(0.0f);
}

LAMP_INLINE void refine_run(const Work &work, const Run &run, Feeds &feeds, float *partial, Carried &carried) {
  for (int r = 0; r < work.rows.count;) switch (block_rows(work.rows.count - r)) {
      case 4:
        refine_rows<4>(work, run, r, feeds, partial, carried.hot[r / 4], carried.sums);
        r += 4;
        break;
      case 2:
        refine_rows<2>(work, run, r, feeds, partial, carried.hot[r / 4], carried.sums);
        r += 2;
        break;
      default:
        refine_rows<1>(work, run, r, feeds, partial, carried.hot[r / 4], carried.sums);
        r += 1;
    }
}

LAMP_INLINE void close_segment(const Work &work, Feeds &feeds, float *partial, Carried &carried) {
  const Rows &rows = work.rows;
  const int width = 2 * (int)work.call->planes.half_v + SUMS;
  for (int r = 0; r < rows.count;) switch (block_rows(rows.count - r)) {
      case 4:
        close_rows<4>(work, r, feeds, partial, carried.hot[r / 4], carried.sums);
        r += 4;
        break;
      case 2:
        close_rows<2>(work, r, feeds, partial, carried.hot[r / 4], carried.sums);
        r += 2;
        break;
      default:
        close_rows<1>(work, r, feeds, partial, carried.hot[r / 4], carried.sums);
        r += 1;
    }
  for (int r = 0; r < rows.count; r++)
    for (int i = 0; i < KEY_SUMS; i++) partial[r * width + width - SUMS + i] = total(carried.sums[r][i]);
}

// Runs in the order in which they are worked on: those of a segment that was taken, then those of segments behind it
// that nobody else takes from `more`.
struct Course {
  Segments *more;
  int64_t segment;  // -1 behind the last
  int64_t at, end;  // keys of it that are left
};
struct Step {
  Run run;
  int64_t segment;  // -1 where there is no run
  bool closes;      // the last of its segment
};

LAMP_INLINE float *partial_of(const Work &work, int64_t segment) {
  return work.partial + segment * work.rows.count * (2 * work.call->planes.half_v + SUMS);
}

LAMP_INLINE void enter(const Work &work, int64_t segment, Course &course) {
  const Rows &rows = work.rows;
  course.segment = segment;
  if (segment < 0) return;
  course.at = rows.from + segment * SEGMENT;
  course.end = course.at + SEGMENT < rows.to ? course.at + SEGMENT : rows.to;
  float *partial = partial_of(work, segment);
  __builtin_memset(partial, 0, (char *)partial_of(work, segment + 1) - (char *)partial);
}

// Opens the next run of the course and decides on it.
static void take_step(Work &work, Course &course, Step &step, Feed &values) {
  step.segment = course.segment;
  if (step.segment < 0) return;
  open_run(work, course.at, work.rows.to, step.run, values);
  decide(work, step.run, partial_of(work, step.segment));
  course.at += RUN_KEYS;
  step.closes = course.at >= course.end;
  if (step.closes) enter(work, course.more ? take_segment(*course.more, false) : -1, course);
}

// A segment that was taken, and others that nobody takes first. Each has a partial result of its own.
static void refine_segments(Work &work, int64_t first, Segments *more) {
  Step steps[2];  // one is worked on while what the next one reads is on its way
  Course course = {more, -1, 0, 0};
  Carried carried;
  Feeds feeds;
  clear(feeds.refined, &feeds);
  clear(feeds.values, &feeds);
  clear(work.rows, carried);
  enter(work, first, course);
  take_step(work, course, steps[0], feeds.values);
  // Of more than a few all that comes behind them would be asked for a run late, for the rest of the piece.
  if (steps[0].segment >= 0 && few_refined(steps[0].run)) ask_for_refined(work, steps[0].run, feeds.refined);
  for (int now = 0; steps[now].segment >= 0; now ^= 1) {
    const Step &step = steps[now];
    Step &next = steps[now ^ 1];
    clear(feeds.values, &feeds);
    take_step(work, course, next, feeds.values);
    if (next.segment >= 0)
      ask_for_refined(work, next.run, feeds.refined);
    else if (more)
      ask_for_next(work, feeds.values);
    float *partial = partial_of(work, step.segment);
    refine_run(work, step.run, feeds, partial, carried);
    if (!step.closes) continue;
    close_segment(work, feeds, partial, carried);
    clear(work.rows, carried);
    if (more) done_with_one(*more);
  }
}
