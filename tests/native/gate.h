// A look-ahead network over a random call of one token, and a call that summarises one new key.
#pragma once
#include "case.h"

struct Gate {
  Exact<uint16_t> summary, query16;
  Exact<float> history, trust, query32, query_bias, age, extra, limit, margin;
  LampPredict call;
  int64_t tiles, rows;

  explicit Gate(Case &c) : call() {
    Random &random = c.random;
    const int64_t groups[] = {1, 2, 4, 8, 8, 16, 32}, ranks[] = {1, 5, 8, 16, 16, 24, 32, 48, 63, 64};
    const int64_t heads = c.batch * c.kv_heads;
    call.group = random.pick(groups), call.rank = random.pick(ranks);
    call.tiles = tiles = c.room / c.call.subtile;
    rows = (c.paged ? 1 : c.batch) * c.kv_heads * c.stored * c.tile / call.group;
    summary = Exact<uint16_t>(random, rows * call.rank);
    for (int64_t i = 0; i < summary.size(); i++)
      summary[i] = c.wild && random.chance(0.02) ? (uint16_t)random.next()
                                                 : (uint16_t)((random.next() & 0x83ff) | (10 + random.below(6)) << 10);
    history = Exact<float>(random, heads * tiles * 2);
    for (int64_t i = 0; i < history.size(); i++)
      history[i] = c.wild && random.chance(0.02) ? c.number(1) : (float)(random.uniform() * random.uniform());
    trust = Exact<float>(random, heads * 7);
    for (int64_t i = 0; i < heads; i++) {
      const float held = random.chance(0.8) ? 0.0f : (float)random.below(65), steps = (float)random.below(100);
      const float fields[] = {(float)random.uniform(), (float)random.uniform(), held, (float)random.below(16), steps,
                              (float)random.below(10), (float)random.below(3)};
      for (int k = 0; k < 7; k++) trust[7 * i + k] = fields[k];
    }
    const int64_t weights = c.heads * c.dim * call.rank;
    call.query_dtype = random.chance(0.6) ? LAMP_FLOAT16 : random.below(3);
    if (call.query_dtype == LAMP_FLOAT32) {
      query32 = filled(c, weights, 0.3f);
      call.query = query32.data();
    } else {
      query16 = Exact<uint16_t>(random, weights);
      const int one = call.query_dtype == LAMP_FLOAT16 ? 13 : 125, bits = call.query_dtype == LAMP_FLOAT16 ? 10 : 7;
      for (int64_t i = 0; i < weights; i++)
        query16[i] = (uint16_t)((random.next() & (0x8000 | ((1 << bits) - 1))) | (one - random.below(3)) << bits);
      call.query = query16.data();
    }
    query_bias = filled(c, c.heads * call.rank, 1), age = filled(c, c.heads * 16, 1), extra = filled(c, c.heads * 4, 1);
    limit = Exact<float>(random, c.kv_heads), margin = Exact<float>(random, c.kv_heads);
    for (int64_t g = 0; g < c.kv_heads; g++) limit[g] = 4, margin[g] = (float)(1 + 3 * random.uniform());
    call.summary = summary.data(), call.history = history.data(), call.trust = trust.data();
    call.query_bias = query_bias.data(), call.age = age.data(), call.extra = extra.data();
    call.limit = limit.data(), call.margin = margin.data();
    call.trained = random.chance(0.8) ? 1 << 20 : c.keys / 2;
    call.skip = random.chance(0.4) ? 0.0f : (float)random.uniform();
  }

 private:
  static Exact<float> filled(Case &c, int64_t count, float size) {
    Exact<float> x(c.random, count);
    for (int64_t i = 0; i < count; i++) x[i] = c.random.normal() * size;
    return x;
  }
};

struct Summary {
  Gate gate;
  Exact<int64_t> positions;
  LampSummarize call;

  explicit Summary(Case &c) : gate(c), positions(c.random, c.batch), call() {
    call.planes = c.call.planes, call.batch = c.batch, call.threads = 1;
    call.rank = gate.call.rank, call.group = gate.call.group, call.summary = gate.summary.data();
    // [G, D, R] and [G, R] lie at the beginning of [H, D, R] and [H, R].
    call.key = gate.call.query, call.key_dtype = gate.call.query_dtype, call.key_bias = gate.call.query_bias;
    for (int64_t b = 0; b < c.batch; b++) positions[b] = c.random.below(c.room + 40) - 20;
    call.positions = {positions.data(), 8, 1};
  }
  // Where the summary of that sequence and head goes, or -1.
  int64_t row(const Case &c, int64_t b, int64_t g) const {
    const int64_t j = positions[b];
    if (j < 0 || j >= c.room) return -1;
    const int64_t listed = c.paged ? c.table[b * c.call.planes.table_stride + j / c.tile] : j / c.tile;
    if (listed < 0 || listed >= c.stored) return -1;
    const int64_t at = c.paged ? g * c.stored + listed : (b * c.kv_heads + g) * c.stored + listed;
    return (at * c.tile + j % c.tile) / call.group;
  }
};
