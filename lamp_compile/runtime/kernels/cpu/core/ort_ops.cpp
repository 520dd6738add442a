// ai.lamp.Append and ai.lamp.FusedAttention as operators of ONNX Runtime's CPU provider: what they compute is
// lamp_append and lamp_attend. ONNX Runtime has checked the types of their inputs; shapes are checked here, before
// anything is read. Outputs whose buffer is that of the input are written in place.
#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "ort_inputs.h"

namespace {

using ort::Api, ort::Attributes, ort::Call, ort::Dims, ort::Refused, ort::Tensor;
using ort::Extras, ort::PLANE_TYPES, ort::Planes, ort::Rotation;
using ort::balance_of, ort::broadcast, ort::expect, ort::per_head, ort::per_sequence, ort::text;

constexpr const char *DOMAIN_NAME = "ai.lamp", *THREADS = "ai.lamp.threads";

struct AppendKernel {
  Api api;
  int64_t threads;
  bool rotated;
  mutable Rotation turn_k, turn_v;
  static constexpr const char *NAME = "Append";
  static constexpr size_t INPUTS = 12, NEEDED = 9, OUTPUTS = 6;

  AppendKernel(ort::Table table, const ort::KernelInfo *info, int64_t count) : api(table), threads(count) {
    rotated = Attributes(api, info).choice("rotation", "hadamard", {"none", "hadamard"}) == 1;
  }
  static ort::Type input(size_t i) {
    return i >= NEEDED ? ort::ANY : i == 8 ? ort::INT64 : i >= 2 ? PLANE_TYPES[i - 2] : ort::FLOAT;
  }
  static ort::Type output(size_t i) { return PLANE_TYPES[i]; }

  void run(const Call &call) const {
    const Tensor k = call.required(0, ort::FLOAT, "k", 4), v = call.required(1, ort::FLOAT, "v", 4);
    Planes p(call, 2);
    const Tensor positions = call.required(8, ort::INT64, "positions", 1);
    const int64_t batch = p.batch(), heads = p.planes.kv_heads, rows = k.dims[2];
    const Dims keys = {batch, heads, rows, 2 * p.planes.half_k}, values = {batch, heads, rows, 2 * p.planes.half_v};
    expect(k.dims == keys, "k is " + text(k.dims) + " for planes of " + text(keys));
    expect(v.dims == values, "v is " + text(v.dims) + " for planes of " + text(values));
    LampAppend given = {};
    given.positions = per_sequence(positions, "positions", batch);
    for (int64_t b = 0; b < batch; b++) {
      const int64_t first = positions.as<int64_t>()[b * given.positions.stride];
      expect(first < 0 || (first <= p.room() && rows <= p.room() - first),
             std::to_string(rows) + " rows from " + std::to_string(first) + " on do not fit into planes for " +
                 std::to_string(p.room()) + " keys");
    }
    const Extras extras(call, NEEDED, rotated);
    expect(!extras.start && !extras.mask && !extras.bias && !extras.sinks, "an input that belongs to FusedAttention");
    given.balance = balance_of(extras.balance, p, given.balance_stride);
    if (rotated) {
      given.rotate_k = turn_k.of(keys[3], extras.rotate_k);
      given.rotate_v = turn_v.of(values[3], extras.rotate_v);
    }
    void *to[6];
    for (size_t i = 0; i < 6; i++) to[i] = call.output_of(i, p.at[i], i % 3 == 2 ? 2 : 1);
    p.point(to);
    given.planes = p.planes;
    given.k = k.data, given.v = v.data, given.dtype = LAMP_FLOAT32, given.batch = batch, given.rows = rows;
    for (size_t i = 0; i < 3; i++) {
      given.k_strides[i] = i == 2 ? keys[3] : i == 1 ? rows * keys[3] : heads * rows * keys[3];
      given.v_strides[i] = i == 2 ? values[3] : i == 1 ? rows * values[3] : heads * rows * values[3];
    }
    given.threads = threads;
    call.lend();
    expect(lamp_append(&given) == 0, "the rows were not stored");
  }
};

struct AttendKernel {
  Api api;
  LampAttend fixed{};
  bool rotated;
  mutable Rotation turn_k, turn_v;
  static constexpr const char *NAME = "FusedAttention";
  static constexpr size_t INPUTS = 20, NEEDED = 13, OUTPUTS = 3;

  AttendKernel(ort::Table table, const ort::KernelInfo *info, int64_t count) : api(table) {
    const Attributes node(api, info);
    rotated = node.choice("rotation", "hadamard", {"none", "hadamard"}) == 1;
    fixed.causal = node.choice("causal", "", {"", "top_left", "bottom_right"});
    fixed.rule = node.choice("rule", "energy", {"energy", "lamp_strict", "lamp_relaxed"});
    fixed.scale = node.number("scale", 1.0f);
    fixed.softcap = node.number("softcap", 0.0f);
    fixed.window = node.integer("window", 0);
    fixed.subtile = node.integer("subtile", 32);
    fixed.guard_window = node.integer("guard_window", 16);
    fixed.guard_hold = node.integer("guard_hold", 64);
    fixed.hysteresis = node.number("hysteresis", 0.5f);
    fixed.threads = count;
    expect(node.integer("query_bits", 8) == 8, "the native kernel multiplies queries of 8 bits");
    expect(fixed.subtile == 32 || fixed.subtile == 64 || fixed.subtile == 128,
           "subtile = " + std::to_string(fixed.subtile));
    expect(fixed.window >= 0 && fixed.guard_window > 0 && fixed.guard_hold >= 0, "a negative window or hold");
    expect(std::isfinite(fixed.scale) && std::isfinite(fixed.softcap) && fixed.softcap >= 0 &&
               std::isfinite(fixed.hysteresis),
           "scale, softcap and hysteresis must be finite");
  }
  static ort::Type input(size_t i) {
    if (i >= NEEDED) return ort::ANY;
    return i >= 1 && i < 7 ? PLANE_TYPES[i - 1] : i == 11 || i == 12 ? ort::INT64 : ort::FLOAT;
  }
  static ort::Type output(size_t i) { return i == 2 ? ort::INT64 : ort::FLOAT; }

  static void see(const Extras &extras, LampAttend &given, const Planes &p, const Dims &scores) {
    const int64_t batch = p.batch();
    given.start = per_sequence(extras.start, "start", batch);
    for (int64_t b = 0; b < batch; b++) {
      const int64_t length = static_cast<const int64_t *>(given.lengths.data)[b * given.lengths.stride];
      if (length > given.keys) given.keys = length;
    }
    if (given.keys > p.room()) given.keys = p.room();
    if (extras.mask) {
      broadcast(extras.mask, "mask", scores, given.mask_strides, given.mask_keys);
      given.mask = extras.mask.as<uint8_t>();
    }
    if (extras.bias) {
      broadcast(extras.bias, "bias", scores, given.bias_strides, given.bias_keys);
      given.bias = extras.bias.as<float>();
    }
    if (extras.sinks) {
      expect(extras.sinks.dims == Dims{given.heads}, "sinks are " + text(extras.sinks.dims));
      given.sinks = extras.sinks.as<float>();
    }
    given.balance = balance_of(extras.balance, p, given.balance_stride);
  }

  void run(const Call &call) const {
    const Tensor q = call.required(0, ort::FLOAT, "q", 4);
    const Planes p(call, 1);
    const int64_t batch = p.batch(), kv_heads = p.planes.kv_heads, dim = 2 * p.planes.half_k;
    const int64_t heads = q.dims[1], queries = q.dims[2];
    expect(q.dims[0] == batch && q.dims[3] == dim && heads > 0 && heads % kv_heads == 0 && queries > 0,
           "q is " + text(q.dims) + " for k_high " + text(p.at[0].dims));
    expect(heads / kv_heads <= LAMP_MOST_GROUP, std::to_string(heads / kv_heads) + " query heads to a kv head");
    expect(p.planes.tile % fixed.subtile == 0, "sub-tiles larger than a storage tile");
    LampAttend given = fixed;
    given.planes = p.planes;
    given.q = q.data, given.dtype = LAMP_FLOAT32, given.batch = batch, given.heads = heads, given.queries = queries;
    given.q_strides[0] = heads * queries * dim, given.q_strides[1] = queries * dim, given.q_strides[2] = dim;
    const Tensor tau = call.input(7, ort::FLOAT, "tau"), floor = call.input(8, ort::FLOAT, "floor");
    const Tensor budget = call.input(9, ort::FLOAT, "budget");
    const Tensor state = call.required(10, ort::FLOAT, "state", 3), stats = call.required(11, ort::INT64, "stats", 3);
    expect(tau && floor && budget, "tau, floor or budget is missing");
    given.tau_stride = per_head(tau, "tau", batch, kv_heads), given.tau = tau.as<float>();
    given.floor_stride = per_head(floor, "floor", batch, kv_heads), given.floor = floor.as<float>();
    given.budget_stride = per_head(budget, "budget", batch, kv_heads), given.budget = budget.as<float>();
    expect(state.dims == Dims{batch, kv_heads, 4}, "state is " + text(state.dims));
    expect(stats.dims == Dims{batch, kv_heads, 7}, "stats are " + text(stats.dims));
    given.lengths = per_sequence(call.required(12, ort::INT64, "lengths", 1), "lengths", batch);
    const Extras extras(call, NEEDED, rotated);
    see(extras, given, p, {batch, heads, queries, p.room()});
    if (rotated) {
      given.rotate_k = turn_k.of(dim, extras.rotate_k);
      given.rotate_v = turn_v.of(2 * p.planes.half_v, extras.rotate_v);
    }
    given.out = call.output(0, {batch, heads, queries, 2 * p.planes.half_v});
    given.state = static_cast<float *>(call.output_of(1, state, sizeof(float)));
    given.stats = static_cast<int64_t *>(call.output_of(2, stats, sizeof(int64_t)));
    call.lend();
    expect(lamp_attend(&given) == 0, "no memory for the scores of " + std::to_string(given.keys) + " keys");
  }
};

// A kernel's class as the table of functions that ONNX Runtime wants, for sessions of `threads` threads.
template <class Kernel>
struct Op : ort::CustomOp {
  int64_t threads;

  explicit Op(int64_t count) : ort::CustomOp(), threads(count) {
    version = ort::API_VERSION;
    name = [](const ort::CustomOp *) { return Kernel::NAME; };
    provider = [](const ort::CustomOp *) -> const char * { return "CPUExecutionProvider"; };
    input_type = [](const ort::CustomOp *, size_t i) { return Kernel::input(i); };
    inputs = [](const ort::CustomOp *) { return Kernel::INPUTS; };
    output_type = [](const ort::CustomOp *, size_t i) { return Kernel::output(i); };
    outputs = [](const ort::CustomOp *) { return Kernel::OUTPUTS; };
    destroy = [](void *kernel) { delete static_cast<Kernel *>(kernel); };
    input_presence = [](const ort::CustomOp *, size_t i) { return i < Kernel::NEEDED ? ort::REQUIRED : ort::OPTIONAL; };
    output_presence = [](const ort::CustomOp *, size_t) { return ort::REQUIRED; };
    input_memory = [](const ort::CustomOp *, size_t) { return 0; };
    variadic_inputs = same_inputs = variadic_outputs = same_outputs = [](const ort::CustomOp *) { return 1; };
    first_version = [](const ort::CustomOp *) { return 1; };
    last_version = [](const ort::CustomOp *) { return 1; };
    create_checked = [](const ort::CustomOp *op, ort::Table table, const ort::KernelInfo *info, void **made) {
      return guarded(Api(table), [&] { *made = new Kernel(table, info, static_cast<const Op *>(op)->threads); });
    };
    compute_checked = [](void *kernel, ort::Context *context) {
      const Kernel &self = *static_cast<const Kernel *>(kernel);
      return guarded(self.api, [&] {
        const Call call(self.api, context);
        self.run(call);
      });
    };
  }

  template <class F>
  static ort::Status *guarded(const Api &api, F what) {
    try {
      what();
      return nullptr;
    } catch (const Refused &refused) {
      return api.status(std::string(DOMAIN_NAME) + "." + Kernel::NAME + ": " + refused.what);
    } catch (...) {
      return api.status(std::string(DOMAIN_NAME) + "." + Kernel::NAME + ": out of memory", ort::FAIL);
    }
  }
};

// Operators live as long as sessions might, which nobody tells: one set for each number of threads.
struct Ops {
  Op<AppendKernel> append;
  Op<AttendKernel> attend;
  explicit Ops(int64_t threads) : append(threads), attend(threads) {}
};

Ops &ops_for(int64_t threads) {
  static std::mutex lock;
  static std::map<int64_t, Ops *> made;
  const std::lock_guard<std::mutex> held(lock);
  Ops *&ops = made[threads];
  if (!ops) ops = new Ops(threads);
  return *ops;
}

int64_t threads_of(const Api &api, const ort::SessionOptions *options) {
  int there = 0;
  api.call<const ort::SessionOptions *, const char *, int *>(ort::HAS_CONFIG, options, THREADS, &there);
  if (!there) return 1;
  char value[24] = {};
  size_t size = sizeof value - 1;
  api.call<const ort::SessionOptions *, const char *, char *, size_t *>(ort::GET_CONFIG, options, THREADS, value, &size);
  const long threads = std::atol(value);
  expect(threads >= 1 && threads <= 1024, std::string(THREADS) + " = " + value);
  return threads;
}

// Whether the places in the table hold what they should, tried on objects of our own.
void check(const Api &api) {
  ort::Status *status = api.status("lamp", ort::INVALID_ARGUMENT);
  const bool told = status && api.message(status) == "lamp" &&
                    api.at<ort::Code (*)(const ort::Status *)>(ort::ERROR_CODE)(status) == ort::INVALID_ARGUMENT;
  if (status) api.release(ort::RELEASE_STATUS, status);
  ort::Shape *shape = nullptr;
  api.call<ort::Shape **>(ort::CREATE_SHAPE, &shape);
  const Dims given = {3, 1, 4};
  ort::Type type = ort::ANY;
  api.call<ort::Shape *, ort::Type>(ort::SET_TYPE, shape, ort::UINT8);
  api.call<ort::Shape *, const int64_t *, size_t>(ort::SET_DIMENSIONS, shape, given.data(), given.size());
  api.call<const ort::Shape *, ort::Type *>(ort::ELEMENT_TYPE, shape, &type);
  const bool kept = type == ort::UINT8 && dims_of(api, shape) == given;
  api.release(ort::RELEASE_SHAPE, shape);
  expect(told && kept, "this ONNX Runtime's C interface is not the one that the operators were built for");
}

}  // namespace

extern "C" LAMP_API ort::Status *RegisterCustomOps(ort::SessionOptions *options, const ort::ApiBase *base) {
  const ort::Table table = base->get(ort::API_VERSION);
  if (!table) {
    const ort::Table old = base->get(1);
    return old ? Api(old).status("ai.lamp needs ONNX Runtime 1.17 or newer", ort::FAIL) : nullptr;
  }
  const Api api(table);
  try {
    check(api);
    Ops &ops = ops_for(threads_of(api, options));
    // Never released: the session keeps the address, and nobody says when the last one has gone.
    ort::Domain *domain = nullptr;
    api.call<const char *, ort::Domain **>(ort::CREATE_DOMAIN, DOMAIN_NAME, &domain);
    for (const ort::CustomOp *op : {static_cast<const ort::CustomOp *>(&ops.append),
                                    static_cast<const ort::CustomOp *>(&ops.attend)})
      api.call<ort::Domain *, const ort::CustomOp *>(ort::DOMAIN_ADD, domain, op);
    api.call<ort::SessionOptions *, ort::Domain *>(ort::ADD_DOMAIN, options, domain);
    return nullptr;
  } catch (const Refused &refused) {
    return api.status("ai.lamp: " + refused.what, ort::FAIL);
  } catch (...) {
    return api.status("ai.lamp: out of memory", ort::FAIL);
  }
}
