// Which lines of the planes are asked for, over shapes and shares of refined sub-tiles. What is not asked for is read
// all the same, slowly: no other test notices. Prints a line for each call: the layout of planes, D, group, refined
// share, and what is asked for of the keys, the values, and the residual planes of what is refined of both; and where
// lines are asked for.
#include <immintrin.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "table.h"

static std::set<uintptr_t> asked;
static void note(const void *at) { asked.insert((uintptr_t)at / 64); }
#define LAMP_ASKED(at) note(at)
namespace kernels_under_test {
#define LAMP_PRODUCTS "avx512.h"
#include "kernels.inc"
}  // namespace kernels_under_test

#include "exact.h"

constexpr int64_t KEYS = 8192, TILE = 32;
enum Share { NONE, SOME, ALL_DECIDED, ALL };

template <class T>
struct Lines {
  std::vector<T> room;
  T *data;

  explicit Lines(int64_t count) : room(count + 128 / sizeof(T)), data(room.data()) {
    while ((uintptr_t)data % 64) data++;
  }
  // Of those that begin at `from`, so many bytes.
  static double found(const T *from, int64_t bytes) {
    int64_t hits = 0;
    for (int64_t i = 0; i < bytes / 64; i++) hits += asked.count((uintptr_t)from / 64 + i) ? 1 : 0;
    return (double)hits;
  }
};

static void attend_once(Random &random, bool lanes, int64_t dim, int64_t group, Share share) {
  const int64_t half = dim / 2, bytes = KEYS * half;
  Lines<uint8_t> planes[4] = {Lines<uint8_t>(bytes), Lines<uint8_t>(bytes), Lines<uint8_t>(bytes),
                              Lines<uint8_t>(bytes)};
  Lines<uint16_t> k_scale(KEYS), v_scale(KEYS);
  for (Lines<uint8_t> &plane : planes)
    for (int64_t i = 0; i < bytes; i++) plane.data[i] = (uint8_t)random.next();
  // Sub-tiles in groups: scores of some are spread 32 times as wide, which makes those matter.
  for (int64_t i = 0; i < KEYS; i++) {
    k_scale.data[i] = (uint16_t)((i / TILE * 7 / 11 % 9 == 0 ? 9 : 4) << 10);
    v_scale.data[i] = 6 << 10;
  }
  std::vector<float> q(group * dim), out(group * dim), state(4, 0.0f);
  std::vector<int64_t> stats(7, 0);
  for (float &x : q) x = random.normal() * 4;
  const float tau = share == NONE ? 1e9f : share == SOME ? 0.02f : 0.0f, floor = share == ALL, budget = 1e9f;
  LampAttend call = {};
  LampPlanes &p = call.planes;
  p.k_high = planes[0].data, p.k_residual = planes[1].data, p.k_scale = k_scale.data;
  p.v_high = planes[2].data, p.v_residual = planes[3].data, p.v_scale = v_scale.data;
  p.pages = p.stored_tiles = KEYS / TILE, p.tile = TILE, p.half_k = p.half_v = half, p.kv_heads = 1;
  p.by_lanes = lanes;
  call.q = q.data(), call.out = out.data(), call.batch = 1, call.heads = group, call.queries = 1;
  call.q_strides[0] = group * dim, call.q_strides[1] = call.q_strides[2] = dim;
  call.tau = &tau, call.floor = &floor, call.budget = &budget, call.state = state.data(), call.stats = stats.data();
  call.keys = KEYS, call.causal = LAMP_BOTTOM_RIGHT, call.scale = 1.0f / std::sqrt((float)dim);
  call.subtile = TILE, call.guard_window = 16, call.guard_hold = 64, call.hysteresis = 0.5f, call.threads = 1;
  asked.clear();
  if (kernels_under_test::attend(&call, nullptr)) std::exit(1);
  const double refined = (double)stats[2] / (double)stats[1], lines = (double)bytes / 64, fine = lines * refined;
  double there[4];
  for (int i = 0; i < 4; i++) there[i] = Lines<uint8_t>::found(planes[i].data, bytes);
  std::printf("%s %lld %lld %.2f: %.3f %.3f", lanes ? "lanes" : "rows", (long long)dim, (long long)group, refined,
              there[0] / lines, there[2] / lines);
  if (fine > 0) std::printf(" %.3f %.3f", there[1] / fine, there[3] / fine);
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
