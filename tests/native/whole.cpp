// Chunks that are looked at whole, against the same ones looked at in the common way. Arguments: first seed, seeds.
#include <immintrin.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "table.h"
namespace kernels_under_test {
#define LAMP_PRODUCTS "avx512.h"
#include "kernels.inc"
}  // namespace kernels_under_test

#include "case.h"

using namespace kernels_under_test;

struct Piece {
  std::vector<char> memory;
  Work *work;

  Piece(const Case &c, int64_t piece, int64_t threads = 1) {
    Plan plan = {};
    plan.call = &c.call;
    plan.segments = (c.keys + SEGMENT - 1) / SEGMENT, plan.span = (c.keys + CHUNK - 1) / CHUNK * CHUNK;
    plan.tokens = c.queries, plan.per_head = 1;
    plan.pieces = c.call.batch * c.call.planes.kv_heads, plan.threads = threads;
    plan.bytes = sizes_of(c.call, nullptr, c.group * c.queries, c.queries, plan.segments, plan.span).all;
    memory.resize((size_t)plan.bytes + 64);
    work = &open_work(plan, piece, memory.data() + (64 - (uintptr_t)memory.data() % 64));
  }
};

static void expect(bool right, const char *what, uint64_t seed, double a, double b) {
  if (right) return;
  std::printf("seed %llu: %s, %.9g and %.9g\n", (unsigned long long)seed, what, a, b);
  std::exit(1);
}

// Weights of one chunk and row: each side's are relative to a level of its own.
static void compare(uint64_t seed, const Work &a, const Work &b, int64_t first, int r) {
  const int64_t chunk = (first - a.rows.from) / CHUNK, at = chunk * a.stride + r;
  const double shift = std::exp2((double)a.most[at] - b.most[at]), near = 1e-4 * (1 + std::fabs(b.most[at]) / 16);
  expect(std::fabs(a.sum[at] * shift / b.sum[at] - 1) < near, "sums", seed, a.sum[at] * shift, b.sum[at]);
  for (int64_t s = first - a.rows.from; s < first - a.rows.from + CHUNK; s++) {
    const double x = a.z[r * a.pitch + s] * shift, y = b.z[r * b.pitch + s];
    expect(std::fabs(x - y) <= near * y + 1e-18, "weights", seed, x, y);
    if (s % SUBTILE) continue;
    const double v = a.weight[r * (a.span / SUBTILE) + s / SUBTILE] * shift;
    const double w = b.weight[r * (b.span / SUBTILE) + s / SUBTILE];
    expect(std::fabs(v - w) <= near * w + 1e-9, "sub-tiles", seed, v, w);
  }
}

static int64_t look(uint64_t seed, const Case &c, int64_t piece) {
  Piece whole(c, piece), common(c, piece);
  Work &a = *whole.work, &b = *common.work;
  Feed feed;
  Levels levels;
  clear(feed, &feed);
  int64_t found = 0;
  for (int64_t first = a.rows.from; first < a.rows.to; first += CHUNK) {
    if ((first - a.rows.from) % SEGMENT == 0) levels = Levels();
    if (!look_at_whole(a, first, feed, levels)) continue;
    Vf most[MOST_ROWS];
    for (int r = 0; r < b.rows.count; r++) most[r] = splat(-__builtin_inff());
    look_at_chunk<true>(b, first, first + CHUNK, feed, most);
    for (int r = 0; r < b.rows.count; r++) {
      weigh_chunk<true>(b, (first - b.rows.from) / CHUNK, CHUNK, r, largest(most[r]));
      compare(seed, a, b, first, r);
    }
    found++;
  }
  return found;
}

static void look_at(uint64_t seed, const Case &c, int64_t *found) {
  const int64_t pieces = c.batch * c.kv_heads;
  for (int64_t piece = 0; piece < pieces; piece++) {
    *found += look(seed, c, piece);
    // One thread goes on with the next head of the sequence; of as many as there are heads none does.
    const int64_t g = piece % c.kv_heads, next = g + 1 < c.kv_heads ? g + 1 : -1;
    const int64_t alone = Piece(c, piece).work->next_head, of_many = Piece(c, piece, pieces).work->next_head;
    expect(alone == next, "next head", seed, (double)alone, (double)next);
    expect(of_many == (pieces > 1 ? -1 : next), "next head of another", seed, (double)of_many, -1);
  }
}

int main(int, char **arguments) {
  const uint64_t first = std::strtoull(arguments[1], nullptr, 10), count = std::strtoull(arguments[2], nullptr, 10);
  int64_t found[2][3] = {}, cases = 0;  // by layout and head size
  for (uint64_t seed = first; seed < first + count; seed++) {
    Case c(seed);
    if (!c.whole || c.wild) continue;
    const int64_t size = c.dim / 128;
    cases++;
    look_at(seed, c, found[c.lanes] + size);
    if (!c.fits_lanes()) continue;
    c.turn();
    look_at(seed, c, found[c.lanes] + size);
  }
  std::printf("%lld cases", (long long)cases);
  for (const auto &sizes : found)
    for (const int64_t chunks : sizes) std::printf(", %lld", (long long)chunks);
  std::printf(" chunks by rows and by lanes\n");
  return 0;
}
