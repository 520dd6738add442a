// What the parts of finish.cu share: sums of a row, and the shared memory of a block.
#pragma once
#include "device.h"
#include "arguments.h"

constexpr int GP = GROUP == 1 ? 1 : GROUP == 2 ? 2 : 4;  // rows of what other launches leave
constexpr int WARPS = THREADS / 32, KEYS = 32, ROWS = 4, VALUE_DIM = 2 * HALF_V, FIELDS = 7, ROW_FIELDS = 7;
constexpr float DEAD = -1e37f, EMPTY = -1e20f, HEADROOM = 40.f, MAGIC = 12582912.f, LOG2E = 1.4426950408889634f;
constexpr float PEAK_SQUARE = 119.f * 119.f / 7.5f;
constexpr u32 MAGIC_BITS = 0x4B400000;

// What is summed of a row: weights, these times squared value scales, what all channels are moved by; squared weights
// of refined keys, and these times squared value scales; the same of sub-tiles that stay at the high plane, in units of
// the look-ahead. And the largest key scale.
enum Field { MASS, VALUE_MASS, SHIFT, SQUARE, VALUE_SQUARE, COLD, COLD_VALUE, K_MOST, SUMMED };

// Of a part of the keys: the first five relative to `top`.
struct Sums {
  float top, of[SUMMED];
};

// A sub-tile, as it is stored.
struct Tile {
  u8 k_high[KEYS][HALF_K], k_low[KEYS][HALF_K], v_high[HALF_V][KEYS], v_low[HALF_V][KEYS];
  u16 k_scale[KEYS], v_scale[KEYS];
};

// What a block leaves of all keys that it has worked on.
struct Left {
  Sums sums[ROWS];
  float out[ROWS][VALUE_DIM];
};

struct alignas(16) Shared {
  Tile first[WARPS];  // what is refined, in turns; the first ones are asked for while energies are still there
  union {
    Tile second[WARPS];
    float energy[MOST_TILES][GP];
  };
  union {  // outputs of splits, and then of warps
    float parts[MOST_JOINED][GP][VALUE_DIM];
    float outputs[WARPS][ROWS][VALUE_DIM + 8];
  };
  u8 weights[WARPS][8][KEYS];   // of coarse and fine 7 bits, a row of the product's columns each
  u8 added[WARPS][ROWS][KEYS];  // what the residual plane is multiplied by
  float tops[MOST_SPLITS][ROWS], shares[MOST_JOINED][ROWS];
  float joined[WARPS][ROWS][4];  // of some splits: maximum, sum, sum times squared value scales, largest key scale
  Sums warps[WARPS + 1][ROWS];   // and of the look-ahead
  int found[WARPS][32];
  float state[4], budgets[2], evidence[ROWS][3];  // of the guard
  i64 stats[7];
  int last;              // whether this block is the last one of its head
  u16 mine[MOST_TILES];  // sub-tiles that this block refines
};

// Of this lane's row (lane % 4), over all splits: log2 of the sum over all keys (and the sink); maximum, sums relative
// to it, largest key scale.
struct Looked {
  float lse, most, sum, value_sum, k_most;
};

struct Range {
  int lo, hi;
};

DEVICE float number(const void *at, int index, int kind) {
  if (kind == 0) return static_cast<const float *>(at)[index];
  const u16 half = static_cast<const u16 *>(at)[index];
  return kind == 1 ? half_to_float(half) : bits_as_float((u32)half << 16);
}
DEVICE float read(const float *at) { return bits_as_float(load4(at)); }

DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
// Over lanes that hold the same row: lane % 4, or with PAIR lane % 2.
template <bool PAIR>
DEVICE float sum_of_row(float x) {
#pragma unroll
  for (int mask = PAIR ? 2 : 4; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
template <bool PAIR>
DEVICE float most_of_row(float x) {
#pragma unroll
  for (int mask = PAIR ? 2 : 4; mask < 32; mask *= 2) x = larger_of(x, shuffle_xor(x, mask));
  return x;
}
