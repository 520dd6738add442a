// Which lines of the planes are asked for, over shapes and shares of refined sub-tiles. What is not asked for is read
// all the same, slowly: no other test notices. Prints a line for each call: the layout of planes, D, group, refined
// share; what is asked for of the queries, the scales and the keys that the second of two heads begins with, before it
// begins; of all keys and values, of the residual planes of what is refined of both, and their first lines twice. Last
// where lines are asked for.
#include <immintrin.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "table.h"

static std::map<uintptr_t, int> asked;  // how often
static void note(const void *at) { asked[(uintptr_t)at / 64]++; }
#define LAMP_ASKED(at) note(at)
namespace kernels_under_test {
#define LAMP_PRODUCTS "avx512.h"
#include "kernels.inc"
}  // namespace kernels_under_test

#include "exact.h"

constexpr int64_t HEADS = 2, KEYS = 8192, TILE = 32;
enum Share { NONE, SOME, ALL_DECIDED, ALL };

template <class T>
struct Lines {
  std::vector<T> room;
  T *data;

  explicit Lines(int64_t count) : room(count + 128 / sizeof(T)), data(room.data()) {
    while ((uintptr_t)data % 64) data++;
  }
  // Of those from the `first` value on, so many bytes: lines asked for so often at least.
  double found(int64_t first, int64_t bytes, int often = 1) const {
    int64_t hits = 0;
    for (int64_t i = 0; i < bytes / 64; i++) {
      const auto line = asked.find((uintptr_t)(data + first) / 64 + i);
      hits += line != asked.end() && line->second >= often;
    }
    return (double)hits;
  }
};

static void attend_once(Random &random, bool lanes, int64_t dim, int64_t group, Share share) {
  const int64_t half = dim / 2, bytes = HEADS * KEYS * half;
  Lines<uint8_t> planes[4] = {Lines<uint8_t>(bytes), Lines<uint8_t>(bytes), Lines<uint8_t>(bytes),
                              Lines<uint8_t>(bytes)};
  Lines<uint16_t> k_scale(HEADS * KEYS), v_scale(HEADS * KEYS);
  Lines<float> q(HEADS * group * dim);
  for (Lines<uint8_t> &plane : planes)
    for (int64_t i = 0; i < bytes; i++) plane.data[i] = (uint8_t)random.next();
  // Sub-tiles in groups: scores of some are spread 32 times as wide, which makes those matter.
  for (int64_t i = 0; i < HEADS * KEYS; i++) {
    k_scale.data[i] = (uint16_t)((i / TILE * 7 / 11 % 9 == 0 ? 9 : 4) << 10);
    v_scale.data[i] = 6 << 10;
  }
  std::vector<float> out(HEADS * group * dim), state(4 * HEADS, 0.0f);
  std::vector<int64_t> stats(7 * HEADS, 0);
  for (int64_t i = 0; i < HEADS * group * dim; i++) q.data[i] = random.normal() * 4;
  const std::vector<float> tau(HEADS, share == NONE ? 1e9f : share == SOME ? 0.02f : 0.0f);
  const std::vector<float> floor(HEADS, share == ALL), budget(HEADS, 1e9f);
  LampAttend call = {};
  LampPlanes &p = call.planes;
  p.k_high = planes[0].data, p.k_residual = planes[1].data, p.k_scale = k_scale.data;
  p.v_high = planes[2].data, p.v_residual = planes[3].data, p.v_scale = v_scale.data;
  p.pages = p.stored_tiles = KEYS / TILE, p.tile = TILE, p.half_k = p.half_v = half, p.kv_heads = HEADS;
  p.by_lanes = lanes;
  call.q = q.data, call.out = out.data(), call.batch = 1, call.heads = HEADS * group, call.queries = 1;
  call.q_strides[0] = HEADS * group * dim, call.q_strides[1] = call.q_strides[2] = dim;
  call.tau = tau.data(), call.floor = floor.data(), call.budget = budget.data(), call.state = state.data(),
  call.stats = stats.data();
  call.keys = KEYS, call.causal = LAMP_BOTTOM_RIGHT, call.scale = 1.0f / std::sqrt((float)dim);
  call.subtile = TILE, call.guard_window = 16, call.guard_hold = 64, call.hysteresis = 0.5f, call.threads = 1;
  asked.clear();
  if (kernels_under_test::attend(&call, nullptr)) std::exit(1);
  const double refined = (double)(stats[2] + stats[9]) / (double)(stats[1] + stats[8]), lines = (double)bytes / 64,
               fine = lines * refined;
  double there[4];
  for (int i = 0; i < 4; i++) there[i] = planes[i].found(0, bytes);
  // Nothing else asks for queries and scales, and keys are asked for again when the head begins.
  const int64_t rows = 4 * group * dim, first = (lanes ? 8 : 4) * TILE;
  const int64_t run = 2 * kernels_under_test::RUN_KEYS;
  const double scales[2] = {k_scale.found(KEYS, 2 * first) / (double)(2 * first / 64),
                            v_scale.found(KEYS, run) / (double)(run / 64)};
  std::printf("%s %lld %lld %.2f: %.3f %.3f %.3f", lanes ? "lanes" : "rows", (long long)dim, (long long)group, refined,
              q.found(group * dim, rows) / (double)(rows / 64), std::fmin(scales[0], scales[1]),
              planes[0].found(KEYS * half, first * half, 2) / (double)(first * half / 64));
  std::printf(" %.3f %.3f", there[0] / lines, there[2] / lines);
  // The first line of each refined sub-tile once more than the others.
  const double subtiles = (double)(HEADS * KEYS / TILE) * refined;
  double twice = 0;
  for (int64_t at = 0; at < bytes; at += TILE * half) twice += planes[1].found(at, 64, 2) + planes[3].found(at, 64, 2);
  if (fine > 0) std::printf(" %.3f %.3f %.3f", there[1] / fine, there[3] / fine, twice / (2 * subtiles));
  std::printf("\n");
}

int main() {
  Random random{1};
  for (const bool lanes : {false, true})
    for (const int64_t dim : {64, 128, 256})
      for (const int64_t group : {1, 2, 4, 8})
        for (const Share share : {NONE, SOME, ALL_DECIDED, ALL}) attend_once(random, lanes, dim, group, share);
  std::printf("into the %s cache\n", lamp_ask_near ? "first" : "second");
  return 0;
}
