// The loop of the refinement: what correct.py does, a sub-tile to a warp.
#pragma once
#include "shared.h"

constexpr int STEPS = HALF_K / 32, WORDS = HALF_K / 16, PIECES = HALF_V / 16;

DEVICE float finite_scale(u16 half) {
  const float x = half_to_float(half);
  return x + (x - x);
}
DEVICE float real(u32 magic) { return bits_as_float(magic) - MAGIC; }

DEVICE u32 upper_nibbles(u32 x) { return x & 0xF0F0F0F0; }
DEVICE u32 lower_nibbles(u32 x) { return (x & 0x0F0F0F0F) ^ 0x08080808; }  // + 8
DEVICE u32 lower_nibbles16(u32 x) { return (x << 4) & 0xF0F0F0F0; }
DEVICE u32 upper_nibbles8(u32 x) { return lower_nibbles(x >> 4); }

// Hyperbolic tangent by the exponential, as `tanh` in _device.py.
DEVICE float capped(float x, float cap) {
  const float twice = power_of_two(divided(x * (1.f / LOG2E), cap) * (2.f * LOG2E));
  return (1.f - divided(2.f, 1.f + twice)) * (cap * LOG2E);
}

// What a lane holds of the query: of its four channels of each product, for the first 16 keys in columns 0 to 3 and for
// the others in columns 4 to 7; and of its two rows, 2 * (lane % 2) and the next.
struct Query {
  u32 upper[2][STEPS][2], lower[2][STEPS][2];
  float factor[2], cold_offset[2], offset[2];
  u32 origin[2];
};

DEVICE Query query_of(const Finish &call, int head, int lane) {
  Query query;
  const int row = lane / 4 % ROWS, half = lane / 16;
  const char *from = call.q8 + ((i64)head * GP + row) * (2 * HALF_K) + lane % 4 * (HALF_K / 4);
  u32 upper[WORDS] = {}, lower[WORDS] = {};
  if (row < GP) load_global<WORDS>(upper, from), load_global<WORDS>(lower, from + HALF_K);
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int word = 0; word < 2; word++) {
      const u32 of_upper = upper[2 * step + word], of_lower = lower[2 * step + word];
      query.upper[0][step][word] = half ? 0 : of_upper, query.upper[1][step][word] = half ? of_upper : 0;
      query.lower[0][step][word] = half ? 0 : of_lower, query.lower[1][step][word] = half ? of_lower : 0;
    }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int mine = 2 * (lane % 2) + i;
    const float *info = call.rowinfo + (i64)head * (ROW_FIELDS * GP) + mine;
    const bool real_row = mine < GP;  // others score 0
    query.factor[i] = real_row ? read(info) * (call.scale * LOG2E) : 0.f;
    const float sum = real_row ? read(info + GP) : 0.f;
    query.cold_offset[i] = sum * 0.5f * query.factor[i], query.offset[i] = sum * 8.f * query.factor[i];
    query.origin[i] = MAGIC_BITS - (u32)(int)((real_row ? read(info + 3 * GP) : 0.f) * 128.f);
  }
  return query;
}

// Asks for a sub-tile.
DEVICE void ask_for_tile(Tile &to, const Finish &call, i64 plane, int tile, int lane) {
  const i64 first = plane + (i64)tile * KEYS;
  const i64 value = first / TILE * (TILE * HALF_V) + first % TILE;
  constexpr int KEY_BYTES = KEYS * HALF_K, PER_CHANNEL = KEYS / 16;
#pragma unroll
  for (int at = 0; at < KEY_BYTES; at += 512) {
    copy16(to.k_high[0] + at + lane * 16, call.k_high + first * HALF_K + at + lane * 16);
    copy16(to.k_low[0] + at + lane * 16, call.k_low + first * HALF_K + at + lane * 16);
  }
#pragma unroll
  for (int channel = 0; channel < HALF_V; channel += 32 / PER_CHANNEL) {
    const int mine = channel + lane / PER_CHANNEL, at = lane % PER_CHANNEL * 16;
    copy16(to.v_high[mine] + at, call.v_high + value + mine * TILE + at);
    copy16(to.v_low[mine] + at, call.v_low + value + mine * TILE + at);
  }
  if (lane < 4) copy16(to.k_scale + lane * 8, call.k_scale + first + lane * 8);
  if (lane >= 4 && lane < 8) copy16(to.v_scale + (lane - 4) * 8, call.v_scale + first + (lane - 4) * 8);
}

// Words of a key's quarter of channels that a lane multiplies: keys lane / 4 + 8 * n.
DEVICE void key_words(u32 *to, const u8 (*from)[HALF_K], int n, int lane) {
  load_words<WORDS>(to, from[lane / 4 + 8 * n] + lane % 4 * (HALF_K / 4));
}
// And of a value channel's quarter of keys: channels lane / 4 + 8 * n.
DEVICE void value_words(u32 *to, const u8 (*from)[KEYS], int n, int lane) {
  load_words<2>(to, from[lane / 4 + 8 * n] + lane % 4 * 8);
}

// Scores [key, row] of a lane: of its two keys and its two rows.
struct Scores {
  float cold[2][2], fine[2][2];
};

DEVICE Scores scores_of(const Finish &call, const Query &query, const Tile &bytes, const float *k_scale, int lane) {
  u32 up[4] = {query.origin[0], query.origin[1], query.origin[0], query.origin[1]}, low[4] = {}, more[4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 first[WORDS], second[WORDS], first_low[WORDS], second_low[WORDS];
    key_words(first, bytes.k_high, 2 * half, lane), key_words(second, bytes.k_high, 2 * half + 1, lane);
    key_words(first_low, bytes.k_low, 2 * half, lane), key_words(second_low, bytes.k_low, 2 * half + 1, lane);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const u32 *upper = query.upper[half][step], *lower = query.lower[half][step];
      const u32 *a = first + 2 * step, *b = second + 2 * step, *c = first_low + 2 * step, *d = second_low + 2 * step;
      multiply(up, upper_nibbles(a[0]), upper_nibbles(b[0]), upper_nibbles(a[1]), upper_nibbles(b[1]), upper[0],
               upper[1]);
      multiply(low, lower_nibbles(a[0]), lower_nibbles(b[0]), lower_nibbles(a[1]), lower_nibbles(b[1]), lower[0],
               lower[1]);
      multiply(more, upper_nibbles8(c[0]), upper_nibbles8(d[0]), upper_nibbles8(c[1]), upper_nibbles8(d[1]), upper[0],
               upper[1]);
      multiply(more, lower_nibbles(c[0]), lower_nibbles(d[0]), lower_nibbles(c[1]), lower_nibbles(d[1]), lower[0],
               lower[1]);
    }
  }
  Scores scores;
#pragma unroll
  for (int key = 0; key < 2; key++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 product = up[2 * key + i] + (low[2 * key + i] << 4);
      float cold = (real(product) * query.factor[i] - query.cold_offset[i]) * k_scale[key];
      float fine = (real(product + more[2 * key + i]) * query.factor[i] - query.offset[i]) * k_scale[key];
      if (call.softcap != 0.f) cold = capped(cold, call.softcap), fine = capped(fine, call.softcap);
      scores.cold[key][i] = cold, scores.fine[key][i] = fine;
    }
  return scores;
}

// What a warp carries from one sub-tile to the next: of a lane's two rows.
struct Carried {
  float top[2], mass[2], value_mass[2], square[2], value_square[2], shift[2];
  float k_most;
  float out[2][PIECES][4];  // halves of the channels; of 16 channels lane / 4 and 8 more, each of two rows
};

DEVICE void move_to(Carried &carried, const float *above) {
  float keep[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float higher = larger_of(carried.top[i], above[i]);
    keep[i] = power_of_two(carried.top[i] - higher), carried.top[i] = higher;
    carried.mass[i] *= keep[i], carried.value_mass[i] *= keep[i], carried.shift[i] *= keep[i];
    carried.square[i] *= keep[i] * keep[i], carried.value_square[i] *= keep[i] * keep[i];
  }
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
      for (int n = 0; n < 4; n++) carried.out[half][piece][n] *= keep[n % 2];
}

// Weights as whole numbers, into shared memory: what the planes are multiplied by (`differences` in correct.py). Gives
// back each row's unit.
DEVICE void weigh(Shared &shared, Carried &carried, const Scores &scores, const float *local, const float *local_cold,
                  const float *k_scale, const float *v_scale, const float *thresholds, bool back, float *unit, int warp,
                  int lane) {
  // Scales are not negative, so their bits are in their order, with NaN above all.
  const float v_peak = bits_as_float(most_of_warp(max(float_as_bits(v_scale[0]), float_as_bits(v_scale[1]))));
  const float floor_peak = larger_of(v_peak, 1e-30f);
  const float of_peak = divided(127.f, floor_peak), fine_of_peak = divided(16256.f, floor_peak);
  carried.k_most = larger_of(carried.k_most, larger_of(k_scale[0], k_scale[1]));
  sync_warp();  // what is there has been multiplied
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float gain = power_of_two(local[i] - carried.top[i]);
    const float taken = back ? power_of_two(local_cold[i] - carried.top[i]) : 0.f;
    const float larger = larger_of(larger_of(gain, taken), 1e-30f);
    const float step = fine_of_peak * divided(gain, larger), step_back = 128.f * divided(taken, larger);
    unit[i] = larger * (v_peak * (1.f / 16256.f));
    int shift = 0;
#pragma unroll
    for (int key = 0; key < 2; key++) {
      const float p = power_of_two(scores.fine[key][i] - local[i]);
      const float p_cold = power_of_two(scores.cold[key][i] - local_cold[i]);
      const float whole_cold = p_cold * v_scale[key] * of_peak + (thresholds[key] - 0.5f) + MAGIC - MAGIC;
      const int add = (int)float_as_bits(p * (v_scale[key] * step) + MAGIC);
      const int take = (int)float_as_bits(whole_cold * step_back + MAGIC);
      const int change = add - take, coarse = (change + 64) >> 7;
      const int added = (add - (int)(MAGIC_BITS - 64)) >> 7;
      const int row = 2 * (lane % 2) + i, at = lane % 4 / 2 * 16 + lane / 4 + 8 * key;
      shared.weights[warp][row][at] = (u8)coarse, shared.weights[warp][ROWS + row][at] = (u8)(change - (coarse << 7));
      shared.added[warp][row][at] = (u8)added;
      shift += take - (int)MAGIC_BITS - 2048 * added;
      const float weight = p * gain, more = weight - p_cold * taken, vv = v_scale[key] * v_scale[key];
      carried.mass[i] += more, carried.value_mass[i] += more * vv;
      carried.square[i] += weight * weight, carried.value_square[i] += weight * weight * vv;
    }
    carried.shift[i] += (float)shift * (0.5f * unit[i]);
  }
  sync_warp();
}

DEVICE void add_values(const Shared &shared, Carried &carried, const Tile &bytes, const float *unit, int warp,
                       int lane) {
  const u32 *weights = reinterpret_cast<const u32 *>(shared.weights[warp][lane / 4] + lane % 4 * 8);
  const u32 *row_added = reinterpret_cast<const u32 *>(shared.added[warp][lane / 4 % ROWS] + lane % 4 * 8);
  const u32 first = weights[0], second = weights[1];
  const u32 added_first = lane < 16 ? row_added[0] : 0, added_second = lane < 16 ? row_added[1] : 0;
  float factor[2];  // columns 0 to 3 are of coarse weights
#pragma unroll
  for (int i = 0; i < 2; i++) factor[i] = lane % 4 < 2 ? 128.f * unit[i] : unit[i];
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    u32 high[2], high8[2], low[2], low8[2];
    value_words(high, bytes.v_high, 2 * piece, lane), value_words(high8, bytes.v_high, 2 * piece + 1, lane);
    value_words(low, bytes.v_low, 2 * piece, lane), value_words(low8, bytes.v_low, 2 * piece + 1, lane);
    u32 upper[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
    u32 lower[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
    multiply(upper, upper_nibbles(high[0]), upper_nibbles(high8[0]), upper_nibbles(high[1]), upper_nibbles(high8[1]),
             first, second);
    multiply(lower, lower_nibbles16(high[0]), lower_nibbles16(high8[0]), lower_nibbles16(high[1]),
             lower_nibbles16(high8[1]), first, second);
    multiply(upper, upper_nibbles8(low[0]), upper_nibbles8(low8[0]), upper_nibbles8(low[1]), upper_nibbles8(low8[1]),
             added_first, added_second);
    multiply(lower, lower_nibbles(low[0]), lower_nibbles(low8[0]), lower_nibbles(low[1]), lower_nibbles(low8[1]),
             added_first, added_second);
#pragma unroll
    for (int n = 0; n < 4; n++) {
      carried.out[0][piece][n] += real(upper[n]) * factor[n % 2];
      carried.out[1][piece][n] += real(lower[n]) * factor[n % 2];
    }
  }
}

DEVICE void refine_one(const Finish &call, Shared &shared, Carried &carried, const Query &query, const Tile &bytes,
                       const float *thresholds, int tile, Range range, bool back, int warp, int lane) {
  float k_scale[2], v_scale[2], local[2], local_cold[2], above[2], unit[2];
#pragma unroll
  for (int key = 0; key < 2; key++) {
    const int at = lane % 4 / 2 * 16 + lane / 4 + 8 * key;
    k_scale[key] = finite_scale(bytes.k_scale[at]), v_scale[key] = finite_scale(bytes.v_scale[at]);
  }
  Scores scores = scores_of(call, query, bytes, k_scale, lane);
  const int first = tile * KEYS;
  if (first < range.lo || first + KEYS > range.hi)
#pragma unroll
    for (int key = 0; key < 2; key++) {
      const int at = first + lane % 4 / 2 * 16 + lane / 4 + 8 * key;
      if (at >= range.lo && at < range.hi) continue;
      k_scale[key] = v_scale[key] = 0.f;
#pragma unroll
      for (int i = 0; i < 2; i++) scores.cold[key][i] = scores.fine[key][i] = DEAD;
    }
  bool far = false;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    local[i] = most_of_row<true>(larger_of(scores.fine[0][i], scores.fine[1][i]));
    local_cold[i] = most_of_row<true>(larger_of(scores.cold[0][i], scores.cold[1][i]));
    above[i] = larger_of(local[i], back ? local_cold[i] : DEAD);
    far |= above[i] - carried.top[i] > HEADROOM;
  }
  if (ballot(far)) move_to(carried, above);
  weigh(shared, carried, scores, local, local_cold, k_scale, v_scale, thresholds, back, unit, warp, lane);
  add_values(shared, carried, bytes, unit, warp, lane);
}

// This block's share, each warp a sub-tile at a time, the next one on its way.
DEVICE Tile &room_for(Shared &shared, int entry, int warp) {
  return entry / WARPS % 2 ? shared.second[warp] : shared.first[warp];
}
DEVICE void ask_for_entry(const Finish &call, Shared &shared, i64 plane, int entry, int mine, int warp, int lane) {
  if (entry < mine) ask_for_tile(room_for(shared, entry, warp), call, plane, shared.mine[entry], lane);
  end_group();
}
DEVICE void refine(const Finish &call, Shared &shared, Carried &carried, const Query &query, i64 plane, int mine,
                   Range range, bool back, int warp, int lane) {
  float thresholds[2];  // `dither` in look_ahead.py
#pragma unroll
  for (int key = 0; key < 2; key++) {
    const float x = (float)(lane % 4 / 2 * 16 + lane / 4 + 8 * key) * 0.6180339887f + 0.5f;
    thresholds[key] = x - floor_of(x);
  }
#pragma unroll 1
  for (int entry = warp; entry < mine; entry += WARPS) {  // it and the next one have been asked for
    wait_for_groups<1>();
    sync_warp();
    refine_one(call, shared, carried, query, room_for(shared, entry, warp), thresholds, shared.mine[entry], range, back,
               warp, lane);
    sync_warp();
    ask_for_entry(call, shared, plane, entry + 2 * WARPS, mine, warp, lane);
  }
}
