// A row of the result, and the guard's step: what merge.py does.
#pragma once
#include "shared.h"

constexpr int CHANNELS = VALUE_DIM / 32;  // of a lane: neighbours

// Times the Hadamard matrix of Sylvester's construction, which is its own inverse but for the size.
DEVICE void turn(float *x, int lane) {
#pragma unroll
  for (int bit = 1; bit < CHANNELS; bit *= 2)
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
      if (!(i & bit)) {
        const float a = x[i], b = x[i + bit];
        x[i] = a + b, x[i + bit] = a - b;
      }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2)
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
      const float other = shuffle_xor(x[i], bit);
      x[i] = x[i] * (lane & bit ? -1.f : 1.f) + other;
    }
}

DEVICE u16 float_to_brain(float x) {
  const u32 bits = float_as_bits(x);
  if (!(x == x)) return 0x7FFF;
  return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

DEVICE void store_row(const Finish &call, const float *x, i64 place, int lane) {
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) {
    const i64 at = place * VALUE_DIM + lane * CHANNELS + i;
    if (call.out_kind == 0)
      static_cast<float *>(call.out)[at] = x[i];
    else
      static_cast<u16 *>(call.out)[at] = call.out_kind == 1 ? float_to_half(x[i]) : float_to_brain(x[i]);
  }
}

// What all blocks have left of a row: sums, and channels of a lane, relative to the maximum that it gives back.
DEVICE float join_left(const Finish &call, const Left *left, float *of, float *x, int row, int lane) {
  // All of this is read before any of it is used. Of sums a lane has one field, of every fourth block.
  constexpr int EACH = MOST_BLOCKS * SUMMED / 32;
  const int field_of_lane = lane % SUMMED;
  float tops[EACH], fields[EACH];
  u32 words[MOST_BLOCKS][CHANNELS];
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const int block = n * (32 / SUMMED) + lane / SUMMED;
    const bool there = block < call.blocks;
    tops[n] = there ? read(&left[block].sums[row].top) : EMPTY;
    fields[n] = there ? read(&left[block].sums[row].of[field_of_lane]) : 0.f;
  }
#pragma unroll
  for (int block = 0; block < MOST_BLOCKS; block++)  // what is not there has no share, but must be finite
    load_global<CHANNELS>(words[block], &left[min(block, call.blocks - 1)].out[row][lane * CHANNELS]);
  float most = EMPTY;
#pragma unroll
  for (int n = 0; n < EACH; n++) most = larger_of(most, tops[n]);
#pragma unroll
  for (int mask = SUMMED; mask < 32; mask *= 2) most = larger_of(most, shuffle_xor(most, mask));
  float field = 0.f, largest = 0.f, shares[EACH];
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const float relative = tops[n] - most, share = power_of_two(relative);
    shares[n] = n * (32 / SUMMED) + lane / SUMMED < call.blocks ? share : 0.f;
    field += fields[n] * (field_of_lane < SQUARE ? share : field_of_lane < COLD ? share * share : 1.f) + relative * 0.f;
    largest = larger_of(largest, fields[n]);  // a maximum may hide NaN, a sum does not
  }
#pragma unroll
  for (int block = 0; block < MOST_BLOCKS; block++) {
    const float share = shuffle(shares[block / (32 / SUMMED)], block % (32 / SUMMED) * SUMMED);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) x[i] += bits_as_float(words[block][i]) * share;
  }
#pragma unroll
  for (int mask = SUMMED; mask < 32; mask *= 2)
    field += shuffle_xor(field, mask), largest = larger_of(largest, shuffle_xor(largest, mask));
  field = field_of_lane == K_MOST ? largest : field;
#pragma unroll
  for (int i = 0; i < SUMMED; i++) of[i] = shuffle(field, i);
  return most;
}

// Certificate, log-sum-exp and the guard's evidence of a row: every sum in units of the final weights; the largest key
// scale stands for all keys. `one`: the final weight of what the sums are relative to.
struct Ended {
  float most, total, one, square, spoilt;
  bool seen;
};
DEVICE void certify(const Finish &call, Shared &shared, const Ended &end, const float *of, float step, float norm,
                    float cold, i64 place, int row) {
  const bool seen = end.seen;
  const float lse = end.most + log_of_two(end.total), one = end.one, square = end.square, spoilt = end.spoilt;
  const float old = cold == -INFINITE ? 0.f : power_of_two(2.f * (cold - lse)) * 256.f;
  const float rounding = norm == 0.f ? 0.f : step * step * (2 * HALF_K * PEAK_SQUARE);
  const float scores = call.scale * call.scale * (1.f / 12.f) * (of[K_MOST] * of[K_MOST]);
  const float value_masses = larger_of(of[VALUE_MASS] * one, 0.f), squares = of[SQUARE] * one * one + of[COLD] * old;
  const float hot_values = of[VALUE_SQUARE] * one * one, cold_values = of[COLD_VALUE] * old;
  float first = scores * (norm * squares + rounding * larger_of(of[MASS] * one, 0.f));
  // The int8 softmax row of the look-ahead adds at most 3 % to the value error of its own sub-tile.
  float second = (hot_values + cold_values * 1.03f) * (VALUE_DIM / 12.f);
  float third = scores * (norm * (hot_values + cold_values) + rounding * value_masses) * (VALUE_DIM * PEAK_SQUARE);
  if (!seen) first = second = third = 0.f;
  call.lse[place] = (seen ? lse * (1.f / LOG2E) : -INFINITE) + spoilt;
  call.certificate[place * 3] = first, call.certificate[place * 3 + 1] = second,
                           call.certificate[place * 3 + 2] = third;
  const float estimate = first * square + second + third;
  const bool bad = (estimate + square + spoilt) * 0.f != 0.f || (seen && !(end.total > 0.f));
  float *evidence = shared.evidence[row];
  evidence[0] = seen && !bad, evidence[2] = bad;
  evidence[1] = seen && !bad ? divided(estimate, larger_of(square, 1.1754944e-38f)) : 0.f;
}

// One row by one warp, from what all blocks have left (`merge` in merge.py).
DEVICE void finish_row(const Finish &call, Shared &shared, const Left *left, float cold, int head, int g, int row,
                       int lane) {
  const float *info = call.rowinfo + (i64)head * (ROW_FIELDS * GP) + row;
  const float step = read(info), norm = read(info + 2 * GP);
  const float sink = call.sinks ? number(call.sinks, g * GROUP + row, call.sink_kind) * LOG2E : 0.f;
  float of[SUMMED], x[CHANNELS] = {};
  float most = join_left(call, left, of, x, row, lane);
  const bool seen = most > EMPTY;
  float share = 1.f, total = of[MASS];
  if (call.sinks) {
    const float above = seen ? larger_of(most, sink) : most;
    share = power_of_two(most - above), most = above;
    total = of[MASS] * share + (seen ? power_of_two(sink - most) : 0.f);
  }
  const float spoilt = total * 0.f, inverse = (seen ? divided(1.f, total) : 0.f) + spoilt;
  float square = 0.f;
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) x[i] = seen ? (x[i] + of[SHIFT]) * share * inverse : spoilt, square += x[i] * x[i];
  square = sum_of_warp(square);
  const i64 place = (i64)head * GROUP + row;
  if (call.rotates) {
    turn(x, lane);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) x[i] *= call.root;
  }
  store_row(call, x, place, lane);
  if (lane == 0)
    certify(call, shared, {most, total, share * inverse, square, spoilt, seen}, of, step, norm, cold, place, row);
}

// What the guard's step reads, and no launch of this call writes before it.
DEVICE void note_guard(const Finish &call, Shared &shared, int head, int b, int g, int lane) {
  if (lane < 4) shared.state[lane] = call.state[(i64)head * 4 + lane];
  if (lane < 7) shared.stats[lane] = call.stats[(i64)head * 7 + lane];
  if (lane == 8) shared.budgets[0] = call.floor[b * call.floor_step + g];
  if (lane == 9) shared.budgets[1] = call.budget[b * call.budget_step + g];
}

// `runtime.guard.step` for one sequence and kv head, in place.
DEVICE void guard(const Finish &call, const Shared &shared, int head, int live_tiles, int refined_tiles) {
  float *state = call.state + (i64)head * 4;
  i64 *stats = call.stats + (i64)head * 7;
  float count = 0.f, error = 0.f, bad_rows = 0.f;
#pragma unroll 1
  for (int row = 0; row < GROUP; row++)
    count += shared.evidence[row][0], error += shared.evidence[row][1], bad_rows += shared.evidence[row][2];
  const float old = shared.state[0], level = shared.state[1], hold_left = shared.state[2];
  float flags = shared.state[3];
  const float floor = shared.budgets[0], budget = shared.budgets[1];
  const bool bad = bad_rows > 0.f, stepped = count > 0.f || bad;
  const float mean = old + divided(divided(error, larger_of(count, 1.f)) - old, (float)call.window);
  const float held = larger_of(hold_left - 1.f, 0.f), limit = budget * budget;
  const bool over = mean > limit && stepped;
  const bool under = mean < call.hysteresis * call.hysteresis * limit && held == 0.f && level > 0.f && !over && stepped;
  float raised = over ? smaller_of(level + 1.f, 2.f) : under ? level - 1.f : level;
  if (bad) raised = 2.f;
  const bool changed = over || bad;
  const float effective = larger_of(raised, floor);
  if (bad && (int)flags % 2 == 0) flags += 1.f;
  if (effective >= 2.f && (int)flags / 2 % 2 == 0) flags += 2.f;
  if (stepped)
    state[0] = changed ? 0.f : mean, state[1] = raised, state[2] = changed ? (float)call.hold : held, state[3] = flags;
  stats[0] = shared.stats[0] + stepped;
  stats[1] = shared.stats[1] + live_tiles, stats[2] = shared.stats[2] + refined_tiles;
  stats[4] = shared.stats[4] + (raised > level && !bad), stats[5] = shared.stats[5] + (raised < level);
  stats[6] = shared.stats[6] + bad;
}
