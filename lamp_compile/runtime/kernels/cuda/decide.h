// Which sub-tiles are refined: what decide.py does, of which every block of a cluster does all.
#pragma once
#include "shared.h"

DEVICE int whole(const void *at, int index, bool wide) {
  return wide ? (int)static_cast<const i64 *>(at)[index] : static_cast<const int *>(at)[index];
}
DEVICE Range keys_of(const Finish &call, int b) {
  int end = call.keys, first = 0, position = 0;
  if (call.lengths) end = min(end, whole(call.lengths, b * call.length_step, call.length_wide));
  if (call.start) first = min(max(first, whole(call.start, b * call.start_step, call.start_wide)), end);
  if (call.causal == 2) position = end - 1;
  int stop = end;
  if (call.causal != 0) {
    stop = min(stop, position + 1);
    if (call.attention_window > 0) first = max(first, position - call.attention_window + 1);
  }
  first = min(first, end);
  return {first, max(stop, first)};
}

// Asks for all that is decided by.
DEVICE void ask_for_energies(Shared &shared, const float *energy, int first, int behind) {
  energy += (i64)first * GP;
#pragma unroll 4
  for (int at = thread_index(); at < behind - first; at += THREADS) {
    if constexpr (GP == 4)
      copy16(shared.energy[at], energy + at * GP);
    else
#pragma unroll
      for (int row = 0; row < GP; row++) shared.energy[at][row] = read(energy + at * GP + row);
  }
}
// And for the outputs of every so many-th split, which this block joins.
DEVICE void ask_for_parts(const Finish &call, Shared &shared, const float *partial, int rank) {
  constexpr int PIECES_EACH = GP * VALUE_DIM / 4;
#pragma unroll 2
  for (int piece = thread_index(); piece < MOST_JOINED * PIECES_EACH; piece += THREADS) {
    const int slot = piece / PIECES_EACH, at = piece % PIECES_EACH * 4, split = rank + slot * call.blocks;
    if (split < call.splits) copy16(shared.parts[slot][0] + at, partial + split * (GP * VALUE_DIM) + at);
  }
}

// What a thread reads of the splits: of one row, lane % 4.
constexpr int SPLITS_EACH = (MOST_SPLITS * ROWS + THREADS - 1) / THREADS;
struct Splits {
  float top[SPLITS_EACH], sum[SPLITS_EACH], value_sum[SPLITS_EACH], k_most[SPLITS_EACH];
};
DEVICE void ask_for_splits(Splits &splits, const Finish &call, const float *meta) {
  const int row = thread_index() % ROWS;
#pragma unroll
  for (int one = 0; one < SPLITS_EACH; one++) {
    const int split = (one * THREADS + thread_index()) / ROWS;
    const float *from = meta + split * (FIELDS * GP) + row;
    const bool there = split < call.splits && row < GP;
    splits.top[one] = there ? read(from) : EMPTY, splits.sum[one] = there ? read(from + GP) : 0.f;
    splits.value_sum[one] = there ? read(from + 2 * GP) : 0.f, splits.k_most[one] = there ? read(from + 3 * GP) : 0.f;
  }
}
DEVICE void note_splits(Shared &shared, const Splits &splits, int warp, int lane) {
  float most = EMPTY, sum = 0.f, value_sum = 0.f, k_most = 0.f;
#pragma unroll
  for (int one = 0; one < SPLITS_EACH; one++) {
    const int split = (one * THREADS + thread_index()) / ROWS;
    if (split < MOST_SPLITS) shared.tops[split][lane % ROWS] = splits.top[one];
    most = larger_of(most, splits.top[one]), k_most = larger_of(k_most, splits.k_most[one]);
  }
  most = most_of_row<false>(most);
#pragma unroll
  for (int one = 0; one < SPLITS_EACH; one++) {
    const float share = power_of_two(splits.top[one] - most);
    sum += splits.sum[one] * share + splits.top[one] * 0.f, value_sum += splits.value_sum[one] * share;
  }
  sum = sum_of_row<false>(sum), value_sum = sum_of_row<false>(value_sum), k_most = most_of_row<false>(k_most);
  float *to = shared.joined[warp][lane % ROWS];
  if (lane < ROWS) to[0] = most, to[1] = sum, to[2] = value_sum, to[3] = k_most;
}

DEVICE Looked looked_ahead(const Finish &call, const Shared &shared, int g, int lane) {
  const int row = lane % ROWS;
  float most = EMPTY, sum = 0.f, value_sum = 0.f, k_most = 0.f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp += 32 / ROWS)
    if (warp + lane / ROWS < WARPS) most = larger_of(most, shared.joined[warp + lane / ROWS][row][0]);
  most = most_of_row<false>(most);
#pragma unroll
  for (int warp = 0; warp < WARPS; warp += 32 / ROWS) {
    if (warp + lane / ROWS >= WARPS) continue;
    const float *from = shared.joined[warp + lane / ROWS][row];
    const float share = power_of_two(from[0] - most);
    sum += from[1] * share, value_sum += from[2] * share, k_most = larger_of(k_most, from[3]);
  }
  sum = sum_of_row<false>(sum), value_sum = sum_of_row<false>(value_sum), k_most = most_of_row<false>(k_most);
  float above = most, with_sink = sum;
  if (call.sinks && row < GROUP) {
    const float sink = number(call.sinks, g * GROUP + row, call.sink_kind) * LOG2E;
    above = larger_of(most, sink);
    with_sink = sum == 0.f ? 0.f : sum * power_of_two(most - above) + power_of_two(sink - above);
  }
  return {above + log_of_two(with_sink), most, sum, value_sum, k_most};
}

// What decisions go by: of each row log2 of its sum, and what is not above it stays at the high plane.
struct Bars {
  float lse[ROWS], bar[ROWS];
};
DEVICE bool is_hot(const Shared &shared, const Bars &bars, int at) {
  bool hot = false;
#pragma unroll
  for (int row = 0; row < GROUP; row++) hot |= !(shared.energy[at][row] <= bars.bar[row]);  // NaN cannot be judged
  return hot;
}

// Squared weights of a block's share of the sub-tiles that stay at the high plane. `early`: a thread's first value
// scale.
DEVICE void note_cold(Shared &shared, const Bars &bars, const float *peak, float early, int first, int begin, int end,
                      int warp, int lane) {
  float square[ROWS] = {}, value_square[ROWS] = {}, v_peak = early;
#pragma unroll 1
  for (int at = begin + thread_index(); at < end; at += THREADS) {
    const float vv = v_peak * v_peak;
    if (!is_hot(shared, bars, at))
#pragma unroll
      for (int row = 0; row < GROUP; row++) {
        const float z = power_of_two(2.f * (shared.energy[at][row] - bars.lse[row]));
        square[row] += z, value_square[row] += z * vv;
      }
    if (at + THREADS < end) v_peak = read(peak + first + at + THREADS);
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    const float one = sum_of_warp(square[row]), two = sum_of_warp(value_square[row]);
    Sums &sums = shared.warps[warp][row];
    if (lane == 0) sums.of[COLD] = one, sums.of[COLD_VALUE] = two;
  }
}

// Lists what is to be refined, of which this block keeps its share.
struct Counts {
  int listed, mine;
};
DEVICE Counts decide(const Finish &call, Shared &shared, const Bars &bars, int first, int behind, bool all_refined,
                     int rank, int warp, int lane) {
  const int rounds = (behind - first + THREADS - 1) / THREADS;
  u32 found = 0;  // by the threads of this warp in round `lane`
#pragma unroll 4
  for (int round = 0; round < rounds; round++) {
    const int at = round * THREADS + thread_index();
    const u32 hot = ballot(first + at < behind && (all_refined || is_hot(shared, bars, at)));
    if (lane == round) found = hot;
  }
  shared.found[warp][lane] = count_bits(found);
  sync_threads();
  // Where these begin: behind what was found before them in their round, and in all rounds before it.
  int all = 0, before = 0;
#pragma unroll 4
  for (int one = 0; one < WARPS; one++) {
    const int of_one = shared.found[one][lane];
    all += of_one, before += one < warp ? of_one : 0;
  }
  int sum = all;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int lower = shuffle_int(sum, max(lane - distance, 0));
    if (lane >= distance) sum += lower;
  }
  int place = before + sum - all;
  all = shuffle_int(sum, 31);
  const int share = (all + call.blocks - 1) * call.per_block >> 18, begin = min(rank * share, all);
  const int end = min(begin + share, all);
  if (place + count_bits(found) > begin)
    for (; found && place < end; found &= found - 1, place++)
      if (place >= begin) shared.mine[place - begin] = (u16)(first + lane * THREADS + warp * 32 + lowest_bit(found));
  sync_threads();
  return {all, end - begin};
}
