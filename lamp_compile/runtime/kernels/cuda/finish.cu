// Everything of a step that comes behind the look-ahead, in one launch: decide, refine, join, guard.
//
// Some blocks work on one sequence and kv head. Each decides for all sub-tiles, which saves handing lists around, and
// refines its share of what is on the list, a warp one sub-tile at a time. Whichever block is done last joins what all
// have left. What is computed is what decide.py, refine.py and merge.py compute; names are theirs. For one new token,
// up to four query heads to a kv head, sub-tiles of 32 keys, rule `energy`.
//
// Compiled by NVRTC with THREADS, GROUP (query heads to a kv head), HALF_K, HALF_V (half the channels of keys and of
// values), TILE (keys of a storage tile), SHARED (bytes reserved for `Shared`) and the limits MOST_TILES, MOST_SPLITS,
// MOST_JOINED and MOST_BLOCKS of finish.py defined.
#include "decide.h"
#include "join.h"
#include "refine.h"
#include "row.h"

static_assert(sizeof(Shared) <= SHARED, "finish.py reserves less");
static_assert(WARPS >= ROWS, "a warp for each row");

KERNEL finish(const Finish call) {
  Shared &shared = *reinterpret_cast<Shared *>(shared_memory());
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int rank = block_index(), g = kv_head_index(), b = sequence_index(), head = b * call.kv_heads + g;
  const Range range = keys_of(call, b);
  const int first_tile = range.lo / KEYS, behind = range.hi > range.lo ? (range.hi + KEYS - 1) / KEYS : first_tile;
  // What the launches ahead of the look-ahead have left is there: it lets this one begin behind its own wait.
  const float *settings = call.rowinfo + (i64)head * (ROW_FIELDS * GP) + 4 * GP;
  const float tau = read(settings);
  const bool all_refined = read(settings + GP) != 0.f;
  wait_for_last_launch();

  // All of this is asked for before any of it is used.
  const i64 noted_at = (i64)head * call.subtiles, slots_at = (i64)head * call.slots;
  Splits splits;
  ask_for_splits(splits, call, call.meta + slots_at * (FIELDS * GP));
  ask_for_energies(shared, call.energy + noted_at * GP, first_tile, behind);
  end_group();
  ask_for_parts(call, shared, call.partial + slots_at * (GP * VALUE_DIM), rank);
  end_group();
  const int tiles = behind - first_tile, cold = (tiles + call.blocks - 1) / call.blocks;
  const int cold_begin = rank * cold, cold_end = min(cold_begin + cold, tiles);
  const float *peak = call.peak + noted_at;
  const float early =
      cold_begin + thread_index() < cold_end ? read(peak + first_tile + cold_begin + thread_index()) : 0.f;
  const Query query = query_of(call, head, lane);
  note_splits(shared, splits, warp, lane);
  wait_for_groups<1>();
  sync_threads();
  const Looked looked = looked_ahead(call, shared, g, lane);
  Bars bars;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    bars.lse[row] = shuffle(looked.lse, row);
    bars.bar[row] = log_of_two(tau) + bars.lse[row];
  }
  note_shares(call, shared, looked, rank);
  wait_for_groups<0>();
  const Counts counts = decide(call, shared, bars, first_tile, behind, all_refined, rank, warp, lane);
  const i64 plane = head * call.plane_keys;
#pragma unroll 1
  for (int turn = 0; turn < 2; turn++) {
    ask_for_entry(call, shared, plane, warp + turn * WARPS, counts.mine, warp, lane);
    if (turn) continue;
    note_cold(shared, bars, peak, early, first_tile, cold_begin, all_refined ? 0 : cold_end, warp, lane);
    sync_threads();  // the second ones take the place of energies
  }
  let_next_launch();

  float joined[OUTPUTS];
  join_parts(joined, call, shared, rank);
  Carried carried = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {  // rows that are none score 0
    const float top = shuffle(looked.most, 2 * (lane % 2) + i);
    carried.top[i] = 2 * (lane % 2) + i < GROUP ? top : 0.f;
  }
  refine(call, shared, carried, query, plane, counts.mine, range, !all_refined, warp, lane);
  sync_threads();  // outputs of warps take the place of those of splits
  leave(shared, carried, warp, lane);
  if (warp == 0) leave_looked(shared, looked, rank == 0, lane);
  sync_threads();
  Left *left = reinterpret_cast<Left *>(call.left) + head * call.blocks;
  if (warp == WARPS - 1) join_sums(shared, left[rank].sums, lane);
  join_outputs(shared, left[rank].out, joined);
  sync_threads();
  if (thread_index() == 0) {
    int *done = reinterpret_cast<int *>(call.rowinfo + ((i64)head * ROW_FIELDS + 6) * GP);
    shared.last = call.blocks == 1 || arrive(done) == call.blocks - 1;
  }
  sync_threads();
  if (!shared.last) return;
  if (warp == WARPS - 1) note_guard(call, shared, head, b, g, lane);
  if (warp < GROUP) finish_row(call, shared, left, shuffle(looked.lse, warp), head, g, warp, lane);
  sync_threads();
  if (thread_index() == 0) guard(call, shared, head, tiles, all_refined ? tiles : counts.listed);
}
