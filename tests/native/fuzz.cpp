// Random calls of the core, with every instruction set that this machine has: fuzz SEED COUNT. Case i has seed SEED +
// i, so a failure is repeated by "fuzz ITS-SEED 1". What must hold:
//   - nothing is read or written outside the call's own arrays (with a sanitizer; inputs stay as they are without one);
//   - any number of threads gives the same bits;
//   - instruction sets agree;
//   - planes by lanes give what the same planes by rows give, to the bit where sums have the same order;
//   - rows that see nothing give zeros, rows that see something have a log-sum-exp;
//   - nothing that is not finite comes out, unless it went in where somebody looks;
//   - appending changes the rows it names and no other byte; so does summarising.
// Steps that a look-ahead network predicts hold to the same.
#include <cstdio>
#include <sstream>
#include <string>

#include "gate.h"

static uint64_t seed_now = 0, layouts_compared = 0;

[[noreturn]] static void fail(const char *set, const char *what, double a = 0, double b = 0) {
  std::printf("seed %llu, %s: %s (%g, %g)\n", (unsigned long long)seed_now, set, what, a, b);
  std::fflush(stdout);
  std::exit(1);
}

static std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  std::stringstream names(lamp_instruction_sets());
  for (std::string name; std::getline(names, name, ',');) found.push_back(name);
  return found;
}

struct Result {
  std::vector<float> out, lse, certificate, state;
  std::vector<int64_t> stats;
  std::vector<uint16_t> halves;

  bool operator==(const Result &o) const {
    const auto same = [](const auto &a, const auto &b) {
      return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]));
    };
    return same(out, o.out) && same(lse, o.lse) && same(certificate, o.certificate) && same(state, o.state) &&
           same(stats, o.stats) && same(halves, o.halves);
  }
};

static float float_of(uint16_t half, int64_t dtype) {
  uint32_t u = (uint32_t)half << 16;
  float f;
  if (dtype == LAMP_BFLOAT16) {
    std::memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31)
    f = fraction ? NOT : INF;
  else
    f = exponent ? std::ldexp(1024.0f + (float)fraction, exponent - 25) : std::ldexp((float)fraction, -24);
  return half & 0x8000 ? -f : f;
}

static Result attend(Case &c, const char *set, int64_t threads, const std::vector<float> &state,
                     const std::vector<int64_t> &stats) {
  if (lamp_use(set)) fail(set, "is not there");
  c.state.assign(state), c.stats.assign(stats);
  c.call.threads = threads;
  if (lamp_attend(&c.call)) fail(set, "no memory");
  Result r{c.out32.copy(), c.lse.copy(), c.certificate.copy(), c.state.copy(), c.stats.copy(), c.out16.copy()};
  for (uint16_t half : r.halves) r.out.push_back(float_of(half, c.call.dtype));
  return r;
}

static void check_rows(const Case &c, const char *set, const Result &r, const std::vector<int64_t> &before) {
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t h = 0; h < c.heads; h++)
      for (int64_t s = 0; s < c.queries; s++) {
        const int64_t row = (b * c.heads + h) * c.queries + s;
        bool seen = false;
        for (int64_t j = c.begin(b); j < c.end(b) && !seen; j++) seen = c.sees(b, h, s, j);
        for (int64_t i = 0; i < c.value_dim; i++) {
          const float x = r.out[row * c.value_dim + i];
          if (!seen && x != 0) fail(set, "a row that sees nothing is not 0", (double)row, x);
          if (!c.wild && !std::isfinite(x)) fail(set, "not finite", (double)row, x);
        }
        if (r.lse.empty()) continue;
        if (!seen && r.lse[row] != -INF)
          fail(set, "a row that sees nothing has a log-sum-exp", (double)row, r.lse[row]);
        if (seen && !c.wild && !c.call.bias && !std::isfinite(r.lse[row]))
          fail(set, "no log-sum-exp", (double)row, r.lse[row]);
        for (int64_t i = 0; i < 3; i++) {
          const float x = r.certificate[3 * row + i];
          if (!seen && x != 0) fail(set, "a row that sees nothing has a certificate", (double)row, x);
          if (!c.wild && !(x >= 0 && x < INF)) fail(set, "certificate", (double)row, x);
        }
      }
  for (int64_t i = 0; i < c.batch * c.kv_heads; i++) {
    const int64_t *now = r.stats.data() + 7 * i, *then = before.data() + 7 * i;
    const int64_t alive = now[1] - then[1], refined = now[2] - then[2];
    if (refined < 0 || refined > alive || alive > c.queries * c.room / c.call.subtile)
      fail(set, "counts", (double)alive, (double)refined);
    if (now[3] != then[3]) fail(set, "there is no exact tier");
    if (!c.wild && now[6] != then[6]) fail(set, "a bad step");
    for (int k = 0; k < 4; k++)
      if (!c.wild && !std::isfinite(r.state[4 * i + k])) fail(set, "guard state", (double)i, k);
  }
}

// As near as rounding and a few tipped weights allow, where both decided alike.
static void check_close(const Case &c, const char *set, const Result &a, const Result &b) {
  for (size_t i = 0; i < a.lse.size(); i++) {
    if (std::isnan(a.lse[i]) != std::isnan(b.lse[i])) fail(set, "NaN in one instruction set only", (double)i);
    if (!c.wild && std::fabs(a.lse[i] - b.lse[i]) > 1e-3f * (1 + std::fabs(b.lse[i])))
      fail(set, "log-sum-exp", a.lse[i], b.lse[i]);
  }
  for (size_t i = 0; i < a.stats.size(); i++)
    if (i % 7 == 1 && a.stats[i] != b.stats[i]) fail(set, "live sub-tiles", (double)a.stats[i], (double)b.stats[i]);
  if (c.wild) return;
  for (size_t i = 0; i < a.stats.size(); i++)
    if (i % 7 == 2 && a.stats[i] != b.stats[i]) return;
  const double rounding = c.call.dtype == LAMP_FLOAT32 ? 0 : c.call.dtype == LAMP_BFLOAT16 ? 0.01 : 0.002;
  // Of the largest value there is: 2^-6 * 136 a channel, times what a matrix of any signs makes of it.
  const double spread = c.call.rotate_v.base ? c.call.rotate_v.base / std::sqrt((double)c.call.rotate_v.base) : 1;
  // Weights share a scale over twice as many keys on one instruction set as on the others.
  const double bound = 0.004 * 136.0 / 64 * std::sqrt((double)c.value_dim) * spread;
  for (int64_t row = 0; row < c.batch * c.heads * c.queries; row++) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < c.value_dim; i++) {
      const double x = a.out[row * c.value_dim + i], y = b.out[row * c.value_dim + i];
      difference += (x - y) * (x - y), size += y * y;
    }
    if (std::sqrt(difference) > bound + rounding * std::sqrt(size))
      fail(set, "output", std::sqrt(difference), std::sqrt(size));
  }
}

// Whether chunks may be looked at whole, by rows or by lanes alone or with sums in another order.
static bool may_be_whole(const Case &c, const std::string &set) {
  const LampAttend &call = c.call;
  bool long_enough = false;
  for (int64_t b = 0; b < c.batch; b++) long_enough |= c.end(b) - c.begin(b) >= 512;
  return set == "avx512" && long_enough && !call.mask && !call.bias && call.softcap == 0 && call.rule == LAMP_ENERGY &&
         (c.dim == 64 || c.dim == 128 || c.dim == 256);
}

static void compare_layouts(const Case &c, const std::string &set, const Result &one, const Result &turned) {
  layouts_compared++;
  if (may_be_whole(c, set))
    check_close(c, set.c_str(), one, turned);
  else if (!(one == turned))
    fail(set.c_str(), "other bits by lanes than by rows");
}

static void fuzz_attend(uint64_t seed, const std::vector<std::string> &sets) {
  Case c(seed);
  const auto state = c.state.copy();
  const auto stats = c.stats.copy();
  const Planes planes(c);
  const Result plain = attend(c, "portable", 1, state, stats);
  for (const std::string &set : sets) {
    const Result one = set == "portable" ? plain : attend(c, set.c_str(), 1, state, stats);
    check_rows(c, set.c_str(), one, stats);
    check_close(c, set.c_str(), one, plain);
    const int64_t more[] = {2, 3, 5, 16};
    for (int k = 0; k < 2; k++)
      if (!(attend(c, set.c_str(), c.random.pick(more), state, stats) == one))
        fail(set.c_str(), "other bits with other threads");
    if (!c.fits_lanes()) continue;
    c.turn();
    compare_layouts(c, set, one, attend(c, set.c_str(), 1, state, stats));
    c.turn();
  }
  if (!(Planes(c) == planes)) fail("all", "planes were written");
}

static void check_untouched(const Case &c, const char *set, const Planes &now, const Planes &before,
                            const std::vector<char> &written) {
  for (int64_t row = 0; row < c.k_scale.size(); row++) {
    if (written[(size_t)row]) continue;
    for (int i = 0; i < 2; i++)
      if (now.scales[i][row] != before.scales[i][row]) fail(set, "wrote the scale of another row", (double)row);
    for (int i = 0; i < 4; i++)
      for (int64_t k = 0; k < (i < 2 ? c.dim : c.value_dim) / 2; k++) {
        const int64_t at = i < 2 ? c.key_byte(row, k, c.lanes) : c.value_byte(row, k, c.lanes);
        if (now.bytes[i][at] != before.bytes[i][at]) fail(set, "wrote another key or value", (double)row, i);
      }
  }
}

static void fuzz_append(uint64_t seed, const std::vector<std::string> &sets) {
  Case c(seed);
  Random &random = c.random;
  const int64_t rows = 1 + random.below(random.chance(0.3) ? 150 : 3), gap = random.below(3);
  const int64_t n = c.batch * c.kv_heads * rows;
  Exact<float> k(random, n * (c.dim + gap) - gap), v(random, n * (c.value_dim + gap) - gap);
  for (Exact<float> *x : {&k, &v})
    for (int64_t i = 0; i < x->size(); i++) (*x)[i] = c.number(1);
  Exact<int64_t> positions(random, c.batch);
  for (int64_t b = 0; b < c.batch; b++) positions[b] = random.below(c.room + 40) - 20;
  LampAppend call = {};
  call.planes = c.call.planes, call.rotate_k = c.call.rotate_k, call.rotate_v = c.call.rotate_v;
  call.k = k.data(), call.v = v.data(), call.batch = c.batch, call.rows = rows;
  for (int axis = 0, step = 1; axis < 3; axis++, step *= axis == 1 ? (int)rows : (int)c.kv_heads)
    call.k_strides[2 - axis] = step * (c.dim + gap), call.v_strides[2 - axis] = step * (c.value_dim + gap);
  call.balance = c.call.balance, call.balance_stride = c.call.balance_stride;
  call.positions = {positions.data(), 8, 1};
  const Planes before(c);
  std::vector<char> written((size_t)c.k_scale.size());
  bool beyond = false;
  for (int64_t b = 0; b < c.batch; b++) beyond |= positions[b] >= 0 && positions[b] + rows > c.room;
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t g = 0; g < c.kv_heads; g++)
      for (int64_t i = 0; i < rows; i++) {
        const int64_t j = positions[b] + i;
        if (positions[b] < 0 || j >= c.room || (beyond && !c.paged)) continue;
        const int64_t listed = c.paged ? c.table[b * c.call.planes.table_stride + j / c.tile] : j / c.tile;
        if (listed < 0 || listed >= c.stored) continue;
        const int64_t at = c.paged ? g * c.stored + listed : (b * c.kv_heads + g) * c.stored + listed;
        written[(size_t)(at * c.tile + j % c.tile)] = 1;
      }
  const auto store = [&](const std::string &set, int64_t threads) {
    const int wanted = beyond && !c.paged ? -2 : 0;
    call.planes.by_lanes = c.lanes, call.threads = threads;
    if (lamp_append(&call) != wanted) fail(set.c_str(), "rows beyond the planes are refused, others are not");
    return Planes(c);
  };
  for (const std::string &set : sets) {
    lamp_use(set.c_str());
    std::vector<Planes> found;
    for (int64_t threads : {1, 2, 5}) {
      before.put(c);
      found.push_back(store(set, threads));
      check_untouched(c, set.c_str(), found.back(), before, written);
      // Two sequences whose tables list one page write into the same rows; whoever comes last wins.
      if (!(found.back() == found[0]) && !c.paged) fail(set.c_str(), "appended other bytes with other threads");
    }
    before.put(c);
    if (!c.fits_lanes()) continue;
    c.turn();
    store(set, 1);
    c.turn();
    if (!(Planes(c) == found[0])) fail(set.c_str(), "appended other bytes by lanes than by rows");
    before.put(c);
  }
}

struct Predicted {
  Result result;
  std::vector<float> history, trust;

  bool operator==(const Predicted &o) const {
    return result == o.result && !std::memcmp(history.data(), o.history.data(), 4 * history.size()) &&
           !std::memcmp(trust.data(), o.trust.data(), 4 * trust.size());
  }
};

static Predicted attend_predicted(Case &c, Gate &gate, const char *set, int64_t threads, const Predicted &before) {
  if (lamp_use(set)) fail(set, "is not there");
  c.state.assign(before.result.state), c.stats.assign(before.result.stats);
  gate.history.assign(before.history), gate.trust.assign(before.trust);
  c.call.threads = threads;
  if (lamp_attend_predicted(&c.call, &gate.call)) fail(set, "no memory");
  Predicted p{{c.out32.copy(), c.lse.copy(), c.certificate.copy(), c.state.copy(), c.stats.copy(), c.out16.copy()},
              gate.history.copy(),
              gate.trust.copy()};
  for (uint16_t half : p.result.halves) p.result.out.push_back(float_of(half, c.call.dtype));
  return p;
}

static void check_predicted(const Case &c, const Gate &gate, const char *set, const Predicted &p,
                            const Predicted &before) {
  for (int64_t row = 0; row < c.batch * c.heads; row++) {
    const int64_t b = row / c.heads, h = row % c.heads;
    bool seen = false;
    for (int64_t j = c.begin(b); j < c.end(b) && !seen; j++) seen = c.sees(b, h, 0, j);
    for (int64_t i = 0; i < c.value_dim; i++) {
      const float x = p.result.out[row * c.value_dim + i];
      if (!seen && x != 0) fail(set, "a row that sees nothing is not 0", (double)row, x);
      if (!c.wild && !std::isfinite(x)) fail(set, "not finite", (double)row, x);
    }
  }
  for (int64_t i = 0; i < c.batch * c.kv_heads; i++) {
    const int64_t *now = p.result.stats.data() + 7 * i, *then = before.result.stats.data() + 7 * i;
    const int64_t alive = now[1] - then[1], refined = now[2] - then[2];
    if (refined < 0 || refined > alive || alive > gate.tiles) fail(set, "counts", (double)alive, (double)refined);
    const float *trust = p.trust.data() + 7 * i, *old = before.trust.data() + 7 * i;
    const float steps = trust[4] - old[4], exact = trust[5] - old[5];
    if (!(steps == 0 || steps == 1) || exact > steps || exact < 0) fail(set, "trust's counts", steps, exact);
    for (int k = 0; k < 7; k++)
      if (!c.wild && !std::isfinite(trust[k])) fail(set, "trust", (double)i, k);
  }
  // What is no number leaves no trace, but the mean of what was one before stays.
  for (size_t i = 0; i < p.history.size(); i += 2)
    if (!(p.history[i] >= 0 && p.history[i] < 1.01f)) fail(set, "history", (double)i, p.history[i]);
}

static void fuzz_predicted(uint64_t seed, const std::vector<std::string> &sets) {
  Case c(seed, true);
  Gate gate(c);
  const Predicted before{{{}, {}, {}, c.state.copy(), c.stats.copy(), {}}, gate.history.copy(), gate.trust.copy()};
  const Planes planes(c);
  const auto summary = gate.summary.copy();
  const Predicted plain = attend_predicted(c, gate, "portable", 1, before);
  for (const std::string &set : sets) {
    const Predicted one = set == "portable" ? plain : attend_predicted(c, gate, set.c_str(), 1, before);
    check_predicted(c, gate, set.c_str(), one, before);
    bool alike = true;  // a threshold may fall on either side of an importance
    for (size_t i = 0; i < one.result.stats.size(); i++) alike &= one.result.stats[i] == plain.result.stats[i];
    if (alike && !c.wild) check_close(c, set.c_str(), one.result, plain.result);
    for (size_t i = 0; alike && !c.wild && i < one.history.size(); i++)
      if (std::fabs(one.history[i] - plain.history[i]) > 1e-3f)
        fail(set.c_str(), "history differs", one.history[i], plain.history[i]);
    const int64_t more[] = {2, 3, 5, 16};
    for (int k = 0; k < 2; k++)
      if (!(attend_predicted(c, gate, set.c_str(), c.random.pick(more), before) == one))
        fail(set.c_str(), "other bits with other threads");
    if (!c.fits_lanes()) continue;
    c.turn();
    const Predicted turned = attend_predicted(c, gate, set.c_str(), 1, before);
    c.turn();
    compare_layouts(c, set, one.result, turned.result);
    if (!may_be_whole(c, set) && !(one == turned)) fail(set.c_str(), "other history or trust by lanes than by rows");
  }
  if (!(Planes(c) == planes) || !gate.summary.same(summary)) fail("all", "planes or summaries were written");
}

static void fuzz_summarize(uint64_t seed, const std::vector<std::string> &sets) {
  Case c(seed, true);
  Summary s(c);
  const auto before = s.gate.summary.copy();
  std::vector<char> written(before.size());
  bool twice = false;  // two sequences whose tables list one page
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t g = 0; g < c.kv_heads; g++) {
      const int64_t row = s.row(c, b, g);
      for (int64_t r = 0; row >= 0 && r < s.call.rank; r++) {
        twice |= written[(size_t)(row * s.call.rank + r)] != 0;
        written[(size_t)(row * s.call.rank + r)] = 1;
      }
    }
  std::vector<uint16_t> first;
  for (const std::string &set : sets) {
    lamp_use(set.c_str());
    for (int64_t threads : {1, 3}) {
      s.gate.summary.assign(before);
      s.call.threads = threads;
      if (lamp_summarize(&s.call)) fail(set.c_str(), "not summarised");
      if (first.empty()) first = s.gate.summary.copy();
      for (size_t i = 0; i < written.size(); i++) {
        const float now = float_of(s.gate.summary[(int64_t)i], LAMP_FLOAT16), then = float_of(first[i], LAMP_FLOAT16);
        if (!written[i] && s.gate.summary[(int64_t)i] != before[i]) fail(set.c_str(), "wrote another summary");
        if (written[i] && !twice && std::fabs(now - then) > 2e-3f * (1 + std::fabs(then)))
          fail(set.c_str(), "summary", now, then);
      }
    }
    if (!c.fits_lanes() || twice) continue;
    const auto found = s.gate.summary.copy();
    c.turn(), s.call.planes.by_lanes = c.lanes;
    s.gate.summary.assign(before);
    if (lamp_summarize(&s.call) || !s.gate.summary.same(found))
      fail(set.c_str(), "other summary by lanes than by rows");
    c.turn(), s.call.planes.by_lanes = c.lanes;
  }
}

int main(int count, char **arguments) {
  const uint64_t first = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const uint64_t cases = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1000;
  const std::vector<std::string> sets = instruction_sets();
  for (uint64_t i = 0; i < cases; i++) {
    seed_now = first + i;
    if (seed_now % 5 == 0)
      fuzz_append(seed_now, sets);
    else if (seed_now % 10 == 7)
      fuzz_summarize(seed_now, sets);
    else if (seed_now % 5 == 3 || seed_now % 10 == 2)
      fuzz_predicted(seed_now, sets);
    else
      fuzz_attend(seed_now, sets);
  }
  std::printf("%llu cases from seed %llu: %s\n", (unsigned long long)cases, (unsigned long long)first,
              lamp_instruction_sets());
  std::printf("%llu results by lanes as by rows\n", (unsigned long long)layouts_compared);
  return 0;
}
