// The results of a block: of its warps, and of the look-ahead's splits that it joins.
#pragma once
#include "refine.h"

constexpr int OUTPUTS = (ROWS * VALUE_DIM + THREADS - 1) / THREADS;  // numbers of a result that a thread adds up

// How much each split that this block joins counts, relative to the largest maximum of all. Where no key was seen
// nothing was written.
DEVICE void note_shares(const Finish &call, Shared &shared, const Looked &looked, int rank) {
  if (thread_index() >= MOST_JOINED * ROWS) return;
  const int slot = thread_index() / ROWS, split = rank + slot * call.blocks;
  const float top = split < call.splits ? shared.tops[split][thread_index() % ROWS] : EMPTY;
  shared.shares[slot][thread_index() % ROWS] = top > EMPTY ? power_of_two(top - looked.most) : 0.f;
}
// Their outputs, as a thread's numbers.
DEVICE void join_parts(float *joined, const Finish &call, const Shared &shared, int rank) {
#pragma unroll
  for (int output = 0; output < OUTPUTS; output++) {
    const int at = output * THREADS + thread_index(), row = at / VALUE_DIM, channel = at % VALUE_DIM;
    joined[output] = 0.f;
    if (row >= GP) continue;
#pragma unroll 4
    for (int slot = 0; rank + slot * call.blocks < call.splits; slot++) {
      const float share = shared.shares[slot][row], part = shared.parts[slot][row][channel];
      if (share != 0.f) joined[output] += part * share;
    }
  }
}

// What a warp has carried, into shared memory.
DEVICE void leave(Shared &shared, Carried &carried, int warp, int lane) {
  const u32 k_most = most_of_warp(float_as_bits(carried.k_most));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float mass = sum_of_row<true>(carried.mass[i]), value_mass = sum_of_row<true>(carried.value_mass[i]);
    const float shift = sum_of_row<true>(carried.shift[i]), square = sum_of_row<true>(carried.square[i]);
    const float value_square = sum_of_row<true>(carried.value_square[i]);
    if (lane >= 2) continue;
    Sums &sums = shared.warps[warp][2 * lane + i];
    // Whole numbers know no NaN: those of value scales come in with `shift`.
    sums.top = carried.top[i], sums.of[MASS] = mass, sums.of[VALUE_MASS] = value_mass;
    sums.of[SHIFT] = shift + value_mass * 0.f, sums.of[SQUARE] = square, sums.of[VALUE_SQUARE] = value_square;
    sums.of[K_MOST] = bits_as_float(k_most);
  }
  const bool upper = lane % 4 < 2;  // these keep the first half of the channels, others the second
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const float given = shuffle_xor(upper ? carried.out[1][piece][n] : carried.out[0][piece][n], 2);
      const float kept = upper ? carried.out[0][piece][n] : carried.out[1][piece][n];
      const int channel = (upper ? 0 : HALF_V) + piece * 16 + n / 2 * 8 + lane / 4;
      shared.outputs[warp][2 * (lane % 2) + n % 2][channel] = kept + given;
    }
}

// The look-ahead's sums, as of one more warp of the first block.
DEVICE void leave_looked(Shared &shared, const Looked &looked, bool first_block, int lane) {
  if (lane >= ROWS) return;
  const float some = first_block ? 1.f : 0.f;
  shared.warps[WARPS][lane] = {looked.most,
                               {looked.sum * some, looked.value_sum * some, 0.f, 0.f, 0.f, 0.f, 0.f, looked.k_most}};
}

// A field of a row over all warps, each lane another one, and the maximum it is relative to.
DEVICE void join_sums(const Shared &shared, Sums *sums, int lane) {
  const int row = lane / SUMMED, field = lane % SUMMED;
  float top = EMPTY, sum = 0.f, most = 0.f;
#pragma unroll
  for (int warp = 0; warp <= WARPS; warp++) top = larger_of(top, shared.warps[warp][row].top);
#pragma unroll
  for (int warp = 0; warp <= WARPS; warp++) {
    const float one = shared.warps[warp][row].of[field], relative = shared.warps[warp][row].top - top;
    sum += one * power_of_two(field < SQUARE ? relative : field < COLD ? 2.f * relative : 0.f) + relative * 0.f;
    most = larger_of(most, one);
  }
  sums[row].of[field] = field == K_MOST ? most : sum;
  if (field == 0) sums[row].top = top;
}

// Outputs of all warps and of the splits.
DEVICE void join_outputs(const Shared &shared, float (*out)[VALUE_DIM], const float *joined) {
#pragma unroll
  for (int output = 0; output < OUTPUTS; output++) {
    const int at = output * THREADS + thread_index(), row = min(at / VALUE_DIM, ROWS - 1), channel = at % VALUE_DIM;
    float top = EMPTY;
#pragma unroll
    for (int warp = 0; warp <= WARPS; warp++) top = larger_of(top, shared.warps[warp][row].top);
    float sum = joined[output] * power_of_two(shared.warps[WARPS][row].top - top);
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++)
      sum += shared.outputs[warp][row][channel] * power_of_two(shared.warps[warp][row].top - top);
    if (at < ROWS * VALUE_DIM) out[row][channel] = sum;
  }
}
