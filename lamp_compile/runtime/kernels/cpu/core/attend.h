// One attention: cut into pieces of work (a sequence, a kv head, some tokens), each of whole segments of keys. How it
// is cut depends on shapes alone, and partial results are joined in order: any number of threads gives the same bits.

constexpr int64_t SCRATCH = 1 << 24;  // bytes of scores that one piece of work may hold, unless one token needs more

struct Plan {
  const LampAttend *call;
  const LampPredict *gate;  // of a network that predicts, or null
  int64_t pieces, tokens, per_head, bytes, segments, span;
  int64_t threads, memories;  // memories for pieces that are worked on at one time
  char *scratch;
  Shared *shared;       // of each memory
  Evidence *evidence;   // [B * G][group * S]
  int64_t *counts;      // [pieces][2]
  int64_t *unfinished;  // pieces
};

struct Sizes {
  int64_t z, most, weight, alive, partial, ahead, all;
};

// Rows of scores begin at different places of the caches' sets.
LAMP_INLINE int64_t pitch_of(int64_t span) { return span + LANES; }

LAMP_INLINE Sizes sizes_of(const LampAttend &call, const LampPredict *gate, int64_t rows, int64_t tokens,
                           int64_t segments, int64_t span) {
  const int64_t width = 2 * call.planes.half_v + SUMS, stride = rows + 4;
  Sizes s;
  s.z = aligned(4 * rows * pitch_of(span));
  s.most = aligned(4 * segments * (SEGMENT / CHUNK) * stride + 4 * LANES);
  s.weight = aligned(4 * (span / SUBTILE) * rows + 4 * LANES);
  s.alive = aligned(segments * (SEGMENT / SUBTILE) * tokens);
  s.partial = aligned(4 * segments * rows * width);
  s.ahead = gate ? ahead_sizes(call, *gate).all : 0;
  s.all = aligned(sizeof(Work)) + s.z + 2 * s.most + s.weight + s.alive + s.partial + s.ahead;
  return s;
}

static Work &open_work(const Plan &plan, int64_t piece, char *memory) {
  const LampAttend &call = *plan.call;
  Work &work = *(Work *)memory;
  Rows &rows = work.rows;
  const int64_t bg = piece / plan.per_head;
  work.call = &call;
  rows.b = bg / call.planes.kv_heads;
  rows.g = bg % call.planes.kv_heads;
  rows.group = (int)(call.heads / call.planes.kv_heads);
  rows.first_token = (int)(piece % plan.per_head * plan.tokens);
  rows.tokens = (int)(call.queries - rows.first_token < plan.tokens ? call.queries - rows.first_token : plan.tokens);
  prepare_rows(call, rows);
  const Sizes s = sizes_of(call, plan.gate, plan.tokens * rows.group, plan.tokens, plan.segments, plan.span);
  char *at = memory + aligned(sizeof(Work));
  work.span = plan.span, work.pitch = pitch_of(plan.span);
  work.stride = rows.count + 4;
  work.z = (float *)at, at += s.z;
  work.most = (float *)at, at += s.most;
  work.sum = (float *)at, at += s.most;
  work.weight = (float *)at, at += s.weight;
  work.partial = (float *)at, at += s.partial;
  work.alive = (uint8_t *)at;
  __builtin_memset(work.alive, 0, s.alive);
  work.tau = call.tau[rows.b * call.tau_stride + rows.g];
  const float floor = call.floor[rows.b * call.floor_stride + rows.g];
  const float guarded = call.state[(rows.b * call.planes.kv_heads + rows.g) * 4 + 1];
  work.level = guarded > floor ? guarded : floor;
  // Other tokens of the same head read what is there.
  const bool goes_on = plan.per_head == 1 && rows.g + 1 < call.planes.kv_heads;
  work.next_head = goes_on && same_share(piece, piece + 1, plan.pieces, plan.threads) ? rows.g + 1 : -1;
  work.ahead = nullptr, work.order = nullptr, work.hot = nullptr;
  if (plan.gate) {
    const Ahead &ahead = *look_forward(call, *plan.gate, rows, work.level, at + s.alive);
    work.ahead = &ahead;
    if (ahead.use) work.order = ahead.order, work.hot = ahead.hot;
  }
  return work;
}

LAMP_INLINE int64_t segments_of(const Work &work) {
  return work.rows.to > work.rows.from ? (work.rows.to - work.rows.from + SEGMENT - 1) / SEGMENT : 0;
}

// False where it must be done again with both planes from the start.
static bool finish_piece(const Plan &plan, int64_t piece, Work &work) {
  const Rows &rows = work.rows;
  const int64_t all = rows.group * plan.call->queries, segments = segments_of(work);
  Evidence *evidence = plan.evidence + piece / plan.per_head * all + rows.first_token * rows.group;
  bool done = true;
  for (int r = 0; r < rows.count; r++) done &= finish_row(work, r, segments, evidence[r]);
  const int value_dim = 2 * (int)plan.call->planes.half_v;
  int64_t alive = 0, refined = 0;
  for (int64_t i = 0; i < segments * rows.count; i++) {
    alive += (int64_t)work.partial[i * (value_dim + SUMS) + value_dim + ALIVE];
    refined += (int64_t)work.partial[i * (value_dim + SUMS) + value_dim + REFINED];
  }
  plan.counts[2 * piece] = alive;
  plan.counts[2 * piece + 1] = refined;
  return done || work.level >= 1;
}

// What was read is known, and decided on, from here on: the audit needs nothing else.
static void join_and_audit(Work &work) {
  join_looks(work);
  if (work.ahead) audit(work);
  work.ahead = nullptr;  // once, however often a piece is gone through
}

static void work_through(Work &work, Shared &shared) {
  const int64_t segments = segments_of(work);
  offer(shared.looks, segments);
  for (int64_t at; (at = take_segment(shared.looks, false)) >= 0; done_with_one(shared.looks))
    look_at_segment(work, at);
  wait_for(shared.looks, segments);
  join_and_audit(work);
  offer(shared.refines, segments);
  for (int64_t at; (at = take_segment(shared.refines, false)) >= 0;) refine_segments(work, at, &shared.refines);
  wait_for(shared.refines, segments);
}

// One piece, in the memory of the thread that takes it, or, where there are as many threads or more, in its own.
static void piece_task(void *data, int64_t piece, int64_t thread) {
  const Plan &plan = *(const Plan *)data;
  const int64_t at = plan.memories == plan.pieces ? piece : thread;
  Work &work = open_work(plan, piece, plan.scratch + at * plan.bytes);
  work_through(work, plan.shared[at]);
  if (!finish_piece(plan, piece, work)) {
    // Scores in the thousands: where every score comes from both planes at once, none moves.
    work.level = 1;
    work_through(work, plan.shared[at]);
    finish_piece(plan, piece, work);
  }
  __atomic_sub_fetch(plan.unfinished, 1, __ATOMIC_RELEASE);
}

// A segment of what another thread is at; false where there is none.
static bool help_with(const Plan &plan, int64_t at) {
  Work &work = *(Work *)(plan.scratch + at * plan.bytes);
  Shared &shared = plan.shared[at];
  int64_t segment = take_segment(shared.looks, true);
  if (segment >= 0) {
    look_at_segment(work, segment);
    done_with_one(shared.looks);
    return true;
  }
  segment = take_segment(shared.refines, true);
  if (segment < 0) return false;
  refine_segments(work, segment, nullptr);
  done_with_one(shared.refines);
  return true;
}

static void help_others(void *data, int64_t thread) {
  const Plan &plan = *(const Plan *)data;
  for (int64_t times = 0; __atomic_load_n(plan.unfinished, __ATOMIC_ACQUIRE) > 0; times++) {
    for (int64_t i = 1; i <= plan.memories; i++)
      while (help_with(plan, (thread + i) % plan.memories)) times = 0;
    rest(times);
  }
}

static int attend(const LampAttend *given, const LampPredict *gate) {
  const LampAttend &call = *given;
  const int64_t group = call.heads / call.planes.kv_heads, heads = call.batch * call.planes.kv_heads;
  const int64_t room = call.planes.pages * call.planes.tile;
  int64_t keys = call.keys < room ? call.keys : room;
  // A window may be any number: nothing is added to one that is not known to be small.
  if (call.window && call.window < keys - call.queries - SEGMENT) keys = call.window + call.queries + SEGMENT;
  Plan plan = {};
  plan.call = given, plan.gate = gate;
  plan.segments = keys > 0 ? (keys + SEGMENT - 1) / SEGMENT : 1;
  plan.span = keys > 0 ? (keys + CHUNK - 1) / CHUNK * CHUNK : CHUNK;
  plan.tokens = MOST_ROWS / group;
  while (plan.tokens > 1 && 4 * plan.tokens * group * plan.span > SCRATCH) plan.tokens /= 2;
  if (plan.tokens > call.queries) plan.tokens = call.queries;
  plan.per_head = (call.queries + plan.tokens - 1) / plan.tokens;
  plan.pieces = heads * plan.per_head;
  plan.bytes = sizes_of(call, gate, plan.tokens * group, plan.tokens, plan.segments, plan.span).all;
  // Waking threads costs more than a few thousand keys.
  const int64_t work = plan.pieces * keys * plan.tokens * group;
  const int64_t threads = work < 8192 ? 1 : call.threads;
  plan.threads = threads;
  plan.memories = plan.pieces < threads ? plan.pieces : threads;
  const int64_t evidence = aligned(sizeof(Evidence) * heads * group * call.queries);
  const int64_t shared = sizeof(Shared) * plan.memories, counts = aligned(8 * (2 * plan.pieces + 1));
  char *memory = scratch(plan.memories * plan.bytes + shared + evidence + counts);
  if (!memory) return -1;
  plan.scratch = memory;
  plan.shared = (Shared *)(memory + plan.memories * plan.bytes);
  plan.evidence = (Evidence *)((char *)plan.shared + shared);
  plan.counts = (int64_t *)((char *)plan.evidence + evidence);
  plan.unfinished = plan.counts + 2 * plan.pieces;
  __builtin_memset(plan.shared, 0, shared);  // nothing to take
  *plan.unfinished = plan.pieces;
  run(piece_task, &plan, plan.pieces, threads, plan.segments > 1 ? help_others : nullptr, plan.pieces * plan.segments);
  for (int64_t bg = 0; bg < heads; bg++) {
    int64_t alive = 0, refined = 0;
    for (int64_t i = bg * plan.per_head; i < (bg + 1) * plan.per_head; i++) {
      alive += plan.counts[2 * i];
      refined += plan.counts[2 * i + 1];
    }
    guard(call, bg / call.planes.kv_heads, bg % call.planes.kv_heads, plan.evidence + bg * group * call.queries,
          group * call.queries, alive, refined);
  }
  return 0;
}
