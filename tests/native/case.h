// One random call of the core: shapes, planes, pages, what rows see, settings. Every array in memory of its own.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "exact.h"
#include "lamp_core.h"

constexpr float INF = std::numeric_limits<float>::infinity(), NOT = std::numeric_limits<float>::quiet_NaN();
constexpr uint16_t HALF_NAN = 0x7e00, HALF_INF = 0x7c00;

// Wild cases hold NaN, infinities and numbers of any size anywhere; in others they are only where nobody looks.
struct Case {
  Random random;
  bool single, wild, paged, lanes;  // lanes: planes lie by lanes
  bool whole;                       // long, and mostly seen whole by rows that nothing but products scores
  int64_t batch, kv_heads, group, queries, dim, value_dim, tile, pages, stored, keys, heads, room;
  Exact<uint8_t> k_high, k_residual, v_high, v_residual, mask;
  Exact<uint16_t> k_scale, v_scale;
  Exact<int32_t> table, start32, lengths32;
  Exact<int64_t> start64, lengths64, stats;
  Exact<int8_t> k_signs, v_signs;
  Exact<float> q32, balance, tau, floor, budget, state, bias, sinks, lse, certificate, out32;
  Exact<uint16_t> q16, out16;
  LampAttend call;

  // `one`: a call of one token and the energy rule, as for networks.
  explicit Case(uint64_t seed, bool one = false) : random{seed * 0x2545f4914f6cdd1dull + 1}, single(one), call() {
    shapes();
    planes();
    rotations();
    query();
    visibility();
    settings();
  }
  Case(const Case &) = delete;

  int64_t begin(int64_t b) const {
    if (!call.start.data) return 0;
    return std::max<int64_t>(0, integer(call.start, b));
  }
  int64_t end(int64_t b) const {
    int64_t last = std::min(keys, room);
    if (call.lengths.data) last = std::min(last, integer(call.lengths, b));
    return last;
  }
  // The liveness rule of runtime/ops.py.
  bool sees(int64_t b, int64_t h, int64_t s, int64_t j) const {
    int64_t last = keys;
    if (call.lengths.data) last = std::min(last, integer(call.lengths, b));
    if (j >= std::min(last, room) || j < begin(b)) return false;
    if (call.causal) {
      const int64_t i = s + (call.causal == LAMP_BOTTOM_RIGHT ? last - queries : 0);
      if (j > i || (call.window && j <= i - call.window)) return false;
    }
    if (!mask.size()) return true;
    const int64_t at = call.mask_keys == 1 ? 0 : j, *steps = call.mask_strides;
    return at < call.mask_keys && mask[b * steps[0] + h * steps[1] + s * steps[2] + at * steps[3]];
  }
  static int64_t integer(const LampIntegers &x, int64_t b) {
    return x.bytes == 8 ? ((const int64_t *)x.data)[b * x.stride] : ((const int32_t *)x.data)[b * x.stride];
  }
  // Where byte c of a key lies, and of a value; rows are counted over all storage tiles.
  int64_t key_byte(int64_t row, int64_t c, bool by_lanes) const {
    const int64_t half = dim / 2, first = row / tile * tile * half, key = row % tile;
    return first + (by_lanes ? c / 4 * (tile * 4) + key * 4 + c % 4 : key * half + c);
  }
  int64_t value_byte(int64_t row, int64_t c, bool by_lanes) const {
    const int64_t half = value_dim / 2, first = row / tile * tile * half, key = row % tile;
    return first + (by_lanes ? key / 4 * (half * 4) + c * 4 + key % 4 : c * tile + key);
  }
  bool fits_lanes() const { return tile == 32 && dim % 8 == 0 && value_dim % 32 == 0; }
  // The same keys and values in the other layout.
  void turn() {
    for (Exact<uint8_t> *plane : {&k_high, &k_residual}) turn(*plane, dim / 2, &Case::key_byte);
    for (Exact<uint8_t> *plane : {&v_high, &v_residual}) turn(*plane, value_dim / 2, &Case::value_byte);
    call.planes.by_lanes = lanes = !lanes;
  }
  float number(float size) {
    if (!wild || random.chance(0.8)) return random.normal() * size;
    const float values[] = {0.0f, -0.0f, 1e-44f, 1e-39f, 1e-20f, 1e20f, 3.4e38f, -3.4e38f, NOT, INF, -INF};
    return random.pick(values);
  }

 private:
  void turn(Exact<uint8_t> &plane, int64_t half, int64_t (Case::*byte)(int64_t, int64_t, bool) const) {
    std::vector<uint8_t> turned((size_t)plane.size());
    for (int64_t i = 0; i < plane.size(); i++)
      turned[(size_t)(this->*byte)(i / half, i % half, !lanes)] = plane[(this->*byte)(i / half, i % half, lanes)];
    plane.assign(turned);
  }

  void shapes() {
    wild = random.chance(0.3);
    paged = random.chance(0.4);
    const int64_t dims[] = {4, 8, 16, 20, 48, 64, 64, 80, 96, 128, 128, 160, 192, 256}, tiles[] = {32, 64, 128, 32};
    const int64_t groups[] = {1, 2, 3, 4, 4, 5, 7, 8, 16, 33, 64}, counts[] = {1, 1, 1, 1, 2, 3, 5, 17, 70};
    const bool large = random.chance(0.12);
    whole = random.chance(0.08);
    dim = whole ? 64 << random.below(3) : random.pick(dims), value_dim = random.chance(0.5) ? dim : random.pick(dims);
    tile = random.pick(tiles);
    group = random.pick(groups), queries = single ? 1 : random.pick(counts);
    batch = 1 + random.below(large ? 2 : 3), kv_heads = 1 + random.below(large ? 2 : 3);
    if (large) group = std::min<int64_t>(group, 4), queries = std::min<int64_t>(queries, 5);
    while (group * queries > 256) queries = (queries + 1) / 2;
    if (whole) group = 4, queries = single ? 1 : 1 + random.below(4);
    lanes = fits_lanes() && random.chance(0.5);
    heads = group * kv_heads;
    const int64_t wanted =
        large || whole ? 1500 + random.below(large ? 6000 : 1500) : 1 + random.below(random.chance(0.5) ? 70 : 700);
    pages = (wanted + tile - 1) / tile + (random.chance(0.3) ? random.below(3) : 0);
    room = pages * tile;
    keys = random.chance(0.2) ? room + random.below(40) : wanted;
    stored = paged ? batch * pages + random.below(4) : pages;
  }

  template <class T>
  Exact<T> made(int64_t count) {
    return Exact<T>(random, count);
  }

  void planes() {
    const int64_t tiles = (paged ? 1 : batch) * kv_heads * stored, half_k = dim / 2, half_v = value_dim / 2;
    k_high = made<uint8_t>(tiles * tile * half_k), k_residual = made<uint8_t>(tiles * tile * half_k);
    v_high = made<uint8_t>(tiles * tile * half_v), v_residual = made<uint8_t>(tiles * tile * half_v);
    k_scale = made<uint16_t>(tiles * tile), v_scale = made<uint16_t>(tiles * tile);
    for (Exact<uint8_t> *x : {&k_high, &k_residual, &v_high, &v_residual})
      for (int64_t i = 0; i < x->size(); i++) (*x)[i] = (uint8_t)random.next();
    for (Exact<uint16_t> *x : {&k_scale, &v_scale})
      for (int64_t i = 0; i < x->size(); i++) (*x)[i] = HALF_NAN;  // until a sequence has the row
    if (paged) {
      const int64_t stride = pages + random.below(3);
      table = made<int32_t>((batch - 1) * stride + pages);
      std::vector<int32_t> order(stored);
      for (int64_t i = 0; i < stored; i++) order[i] = (int32_t)i;
      for (int64_t i = stored - 1; i > 0; i--) std::swap(order[i], order[random.below(i + 1)]);
      for (int64_t i = 0; i < table.size(); i++) table[i] = (int32_t)random.next();
      for (int64_t b = 0; b < batch; b++)
        for (int64_t p = 0; p < pages; p++) table[b * stride + p] = order[b * pages + p];
      call.planes.table = table.data(), call.planes.table_stride = stride;
    }
    LampPlanes &p = call.planes;
    p.k_high = k_high.data(), p.k_residual = k_residual.data(), p.k_scale = k_scale.data();
    p.v_high = v_high.data(), p.v_residual = v_residual.data(), p.v_scale = v_scale.data();
    p.pages = pages, p.stored_tiles = stored, p.tile = tile, p.half_k = half_k, p.half_v = half_v,
    p.kv_heads = kv_heads, p.by_lanes = lanes;
  }

  LampRotation rotation(int64_t size, Exact<int8_t> &signs) {
    int64_t base = size;
    while (base % 2 == 0 && base > 20) base /= 2;
    signs = made<int8_t>(base * base);
    for (int64_t i = 0; i < base * base; i++) signs[i] = random.chance(0.5) ? 1 : -1;
    return {signs.data(), base};
  }
  void rotations() {
    if (random.chance(0.3)) return;
    call.rotate_k = rotation(dim, k_signs), call.rotate_v = rotation(value_dim, v_signs);
  }

  void query() {
    // Gaps between rows belong to nobody and are not read.
    const int64_t gap = random.below(3), row = dim + gap;
    call.q_strides[2] = row, call.q_strides[1] = row * queries, call.q_strides[0] = row * queries * heads;
    if (random.chance(0.3)) call.q_strides[2] = row * heads, call.q_strides[1] = row;
    const int64_t rows = batch * heads * queries, count = rows * row - gap;
    call.dtype = random.below(3), call.batch = batch, call.heads = heads, call.queries = queries;
    const float size = random.chance(0.2) ? 1e-3f : random.chance(0.5) ? 1.0f : 4.0f;
    if (call.dtype == LAMP_FLOAT32) {
      q32 = made<float>(count), out32 = made<float>(rows * value_dim);
      for (int64_t i = 0; i < count; i++) q32[i] = number(size);
      call.q = q32.data(), call.out = out32.data();
    } else {
      q16 = made<uint16_t>(count), out16 = made<uint16_t>(rows * value_dim);
      for (int64_t i = 0; i < count; i++) {  // exponents around 1, or anything
        const uint16_t any = (uint16_t)random.next();
        const uint16_t sane = call.dtype == LAMP_FLOAT16 ? (any & 0x83ff) | (12 + random.below(4)) << 10
                                                         : (any & 0x807f) | (124 + random.below(4)) << 7;
        q16[i] = wild && random.chance(0.1) ? any : sane;
      }
      call.q = q16.data(), call.out = out16.data();
    }
    if (random.chance(0.7)) {
      lse = made<float>(rows), certificate = made<float>(3 * rows);
      call.lse = lse.data(), call.certificate = certificate.data();
    }
    if (random.chance(0.3)) {
      const bool each = random.chance(0.5);
      balance = made<float>((each ? batch : 1) * kv_heads * dim);
      for (int64_t i = 0; i < balance.size(); i++) balance[i] = wild ? number(1) : (float)(0.5 + random.uniform());
      call.balance = balance.data(), call.balance_stride = each ? kv_heads * dim : 0;
    }
  }

  LampIntegers integers(Exact<int32_t> &narrow, Exact<int64_t> &wide, int64_t most) {
    const int64_t step = random.chance(0.3) ? 0 : 1 + random.below(2), count = step * (batch - 1) + 1;
    const bool small = random.chance(0.5);
    if (small)
      narrow = made<int32_t>(count);
    else
      wide = made<int64_t>(count);
    for (int64_t i = 0; i < count; i++) {
      const int64_t x = random.chance(0.1) ? -3 : random.chance(0.1) ? 0 : random.below(most + 3);
      if (small)
        narrow[i] = (int32_t)x;
      else
        wide[i] = x;
    }
    return {small ? (const void *)narrow.data() : (const void *)wide.data(), small ? 4 : 8, step};
  }

  // Shape [B, H, S, N], each axis its own or shared.
  int64_t broadcast(int64_t *steps, int64_t columns) {
    const int64_t sizes[] = {batch, heads, queries, columns};
    int64_t count = 1;
    for (int axis = 3; axis >= 0; axis--) {
      const bool own = sizes[axis] > 1 && (axis == 3 || random.chance(0.5));
      steps[axis] = own ? count : 0;
      if (own) count *= sizes[axis];
    }
    return count;
  }

  void visibility() {
    call.keys = keys;
    if (random.chance(0.5)) call.lengths = integers(lengths32, lengths64, keys);
    if (random.chance(0.3)) call.start = integers(start32, start64, keys / 2);
    call.causal = random.chance(0.5) ? LAMP_BOTTOM_RIGHT : random.below(2);
    if (call.causal && random.chance(0.4)) call.window = 1 + random.below(keys);
    const int64_t columns[] = {1, keys, room};
    if (!whole && random.chance(0.25)) {
      call.mask_keys = random.pick(columns);
      mask = made<uint8_t>(broadcast(call.mask_strides, call.mask_keys));
      for (int64_t i = 0; i < mask.size(); i++) mask[i] = random.chance(0.7);
      call.mask = mask.data();
    }
    if (!whole && random.chance(0.25)) {
      call.bias_keys = random.pick(columns);
      bias = made<float>(broadcast(call.bias_strides, call.bias_keys));
      for (int64_t i = 0; i < bias.size(); i++) bias[i] = random.chance(0.1) ? -INF : number(1);
      call.bias = bias.data();
    }
    if (random.chance(0.2)) {
      sinks = made<float>(heads);
      for (int64_t i = 0; i < heads; i++) sinks[i] = number(2);
      call.sinks = sinks.data();
    }
    for (int64_t b = 0; b < batch; b++)
      for (int64_t g = 0; g < kv_heads; g++)
        for (int64_t j = begin(b); j < end(b); j++) give_scale(b, g, j);
    // Pages that no row can see may be anything.
    for (int64_t b = 0; paged && b < batch; b++)
      for (int64_t p = 0; p < pages; p++)
        if ((p + 1) * tile <= begin(b) || p * tile >= end(b))
          table[b * call.planes.table_stride + p] = (int32_t)(random.next() >> 32);
  }

  void give_scale(int64_t b, int64_t g, int64_t j) {
    const int64_t page = j / tile;
    const int64_t at =
        paged ? g * stored + table[b * call.planes.table_stride + page] : (b * kv_heads + g) * stored + page;
    for (Exact<uint16_t> *x : {&k_scale, &v_scale}) {
      uint16_t half = (uint16_t)((5 + random.below(4)) << 10 | random.below(1024));  // up to 2^-6
      if (random.chance(0.02)) half = (uint16_t)random.below(1024);                  // denormal or zero
      if (wild && random.chance(0.02))
        half = random.chance(0.5) ? (uint16_t)random.next() : random.chance(0.5) ? HALF_NAN : HALF_INF;
      (*x)[at * tile + j % tile] = half;
    }
  }

  void settings() {
    const float taus[] = {0.0f, 1e9f, 0.02f, 0.1f, 0.3f}, floors[] = {0, 0, 0, 1, 2};
    const bool each = random.chance(0.3);
    const int64_t count = (each ? batch : 1) * kv_heads;
    tau = made<float>(count), floor = made<float>(count), budget = made<float>(count);
    for (int64_t i = 0; i < count; i++) {
      tau[i] = wild && random.chance(0.05) ? NOT : random.pick(taus);
      floor[i] = whole ? 0.0f : random.pick(floors);
      budget[i] = random.chance(0.3) ? INF : (float)random.uniform();
    }
    call.tau = tau.data(), call.floor = floor.data(), call.budget = budget.data();
    call.tau_stride = call.floor_stride = call.budget_stride = each ? kv_heads : 0;
    state = made<float>(batch * kv_heads * 4), stats = made<int64_t>(batch * kv_heads * 7);
    for (int64_t i = 0; i < batch * kv_heads; i++) {
      state[4 * i] = (float)random.uniform(), state[4 * i + 1] = whole ? 0.0f : (float)random.below(3);
      state[4 * i + 2] = (float)random.below(5), state[4 * i + 3] = (float)random.below(4);
      for (int k = 0; k < 7; k++) stats[7 * i + k] = random.below(100);
    }
    call.state = state.data(), call.stats = stats.data();
    call.scale = 1.0f / std::sqrt((float)dim);
    call.softcap = !whole && random.chance(0.2) ? (float)(1 + 30 * random.uniform()) : 0.0f;
    call.rule = single || whole ? (int64_t)LAMP_ENERGY : random.below(3);
    call.subtile = tile >> random.below(tile == 128 ? 3 : tile == 64 ? 2 : 1);
    call.guard_window = 1 + random.below(20), call.guard_hold = random.below(70), call.hysteresis = 0.5f;
    call.threads = 1;
  }
};

// What the planes of a case hold.
struct Planes {
  std::vector<uint8_t> bytes[4];
  std::vector<uint16_t> scales[2];

  explicit Planes(const Case &c)
      : bytes{c.k_high.copy(), c.k_residual.copy(), c.v_high.copy(), c.v_residual.copy()},
        scales{c.k_scale.copy(), c.v_scale.copy()} {}
  void put(Case &c) const {
    c.k_high.assign(bytes[0]), c.k_residual.assign(bytes[1]), c.v_high.assign(bytes[2]), c.v_residual.assign(bytes[3]);
    c.k_scale.assign(scales[0]), c.v_scale.assign(scales[1]);
  }
  bool operator==(const Planes &o) const {
    return std::equal(bytes, bytes + 4, o.bytes) && std::equal(scales, scales + 2, o.scales);
  }
};
