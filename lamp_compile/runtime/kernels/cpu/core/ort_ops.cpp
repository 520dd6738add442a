// ai.lamp.Append and ai.lamp.FusedAttention as operators of ONNX Runtime's CPU provider: what they compute is
// lamp_append and lamp_attend. ONNX Runtime has checked the types of their inputs; shapes are checked here, before
// anything is read. Outputs whose buffer is that of the input are written in place.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "lamp_core.h"
#include "ort_abi.h"

namespace {

constexpr const char *DOMAIN_NAME = "ai.lamp", *THREADS = "ai.lamp.threads";
constexpr int MOST_HALF = 128, MOST_GROUP = 64;  // MOST_DIM / 2 of rotation.h, MOST_ROWS of rows.h

struct Refused {
  std::string what;
};

[[noreturn]] void refuse(const std::string &what) { throw Refused{what}; }
void expect(bool fine, const std::string &what) {
  if (!fine) refuse(what);
}

// The table, with the types of the functions that are called.
class Api {
 public:
  explicit Api(ort::Table table) : table_(table) {}

  ort::Status *status(const std::string &message, ort::Code code = ort::INVALID_ARGUMENT) const {
    return at<ort::Status *(*)(ort::Code, const char *)>(ort::CREATE_STATUS)(code, message.c_str());
  }
  template <class... Given>
  void call(ort::Place place, Given... given) const {
    done(at<ort::Status *(*)(Given...)>(place)(given...));
  }
  template <class T>
  void release(ort::Place place, T *what) const {
    at<void (*)(T *)>(place)(what);
  }
  template <class F>
  F at(ort::Place place) const {
    return reinterpret_cast<F>(const_cast<void *>(table_[place]));
  }
  std::string message(const ort::Status *status) const {
    return at<const char *(*)(const ort::Status *)>(ort::ERROR_MESSAGE)(status);
  }
  void done(ort::Status *status) const {
    if (!status) return;
    const std::string what = message(status);
    release(ort::RELEASE_STATUS, status);
    refuse(what);
  }

 private:
  ort::Table table_;
};

using Dims = std::vector<int64_t>;

Dims dims_of(const Api &api, const ort::Shape *shape) {
  size_t count = 0;
  api.call<const ort::Shape *, size_t *>(ort::DIMENSION_COUNT, shape, &count);
  Dims dims(count);
  api.call<const ort::Shape *, int64_t *, size_t>(ort::DIMENSIONS, shape, dims.data(), count);
  return dims;
}

std::string text(const Dims &dims) {
  std::string made = "[";
  for (size_t i = 0; i < dims.size(); i++) made += (i ? ", " : "") + std::to_string(dims[i]);
  return made + "]";
}

int64_t count_of(const Dims &dims) {
  int64_t count = 1;
  for (const int64_t n : dims) count *= n;
  return count;
}

struct Tensor {
  const ort::Value *value = nullptr;
  void *data = nullptr;
  ort::Type type = ort::ANY;
  Dims dims;
  explicit operator bool() const { return value != nullptr; }
  template <class T>
  T *as() const {
    return static_cast<T *>(data);
  }
};

// One call: its inputs and outputs.
class Call {
 public:
  Call(const Api &api, ort::Context *context) : api_(api), context_(context) {
    api.call<const ort::Context *, size_t *>(ort::INPUT_COUNT, context, &inputs_);
  }

  size_t inputs() const { return inputs_; }

  // An input of that element type; nothing where it is left out.
  Tensor input(size_t index, ort::Type type, const char *name) const {
    const Tensor found = input(index);
    expect(!found || found.type == type, std::string(name) + " has element type " + std::to_string(found.type));
    return found;
  }

  Tensor input(size_t index) const {
    Tensor found;
    if (index >= inputs_) return found;
    api_.call<const ort::Context *, size_t, const ort::Value **>(ort::INPUT, context_, index, &found.value);
    if (!found.value) return found;
    ort::Shape *shape = nullptr;
    api_.call<const ort::Value *, ort::Shape **>(ort::SHAPE_OF, found.value, &shape);
    api_.call<const ort::Shape *, ort::Type *>(ort::ELEMENT_TYPE, shape, &found.type);
    found.dims = dims_of(api_, shape);
    api_.release(ort::RELEASE_SHAPE, shape);
    api_.call<ort::Value *, void **>(ort::TENSOR_DATA, const_cast<ort::Value *>(found.value), &found.data);
    return found;
  }

  Tensor required(size_t index, ort::Type type, const char *name, size_t axes) const {
    Tensor found = input(index, type, name);
    expect(static_cast<bool>(found), std::string(name) + " is missing");
    expect(found.dims.size() == axes,
           std::string(name) + " is " + text(found.dims) + ", not of " + std::to_string(axes) + " dimensions");
    return found;
  }

  void *output(size_t index, const Dims &dims) const {
    ort::Value *value = nullptr;
    api_.call<ort::Context *, size_t, const int64_t *, size_t, ort::Value **>(ort::OUTPUT, context_, index, dims.data(),
                                                                              dims.size(), &value);
    void *data = nullptr;
    api_.call<ort::Value *, void **>(ort::TENSOR_DATA, value, &data);
    return data;
  }

  // An output that starts as an input: copied unless it is the same memory.
  void *output_of(size_t index, const Tensor &from, size_t bytes) const {
    void *to = output(index, from.dims);
    const size_t all = static_cast<size_t>(count_of(from.dims)) * bytes;
    if (to != from.data && all) std::memcpy(to, from.data, all);
    return to;
  }

  // The core's tasks on ONNX Runtime's own threads, as long as this lives.
  void lend() const { lamp_lend_threads(parallel, const_cast<Call *>(this)); }
  ~Call() { lamp_lend_threads(nullptr, nullptr); }
  Call(const Call &) = delete;

 private:
  static void parallel(void *self, void (*task)(void *, size_t), void *data, size_t count) {
    const Call &call = *static_cast<Call *>(self);
    ort::Status *status =
        call.api_.at<ort::Status *(*)(const ort::Context *, void (*)(void *, size_t), size_t, size_t, void *)>(
            ort::PARALLEL_FOR)(call.context_, task, count, 0, data);
    if (!status) return;
    call.api_.release(ort::RELEASE_STATUS, status);
    task(data, 0);  // takes all that is left
  }

  const Api &api_;
  ort::Context *context_;
  size_t inputs_ = 0;
};

// Attributes of a node; what is not there keeps its default.
class Attributes {
 public:
  Attributes(const Api &api, const ort::KernelInfo *info) : api_(api), info_(info) {}

  float number(const char *name, float otherwise) const {
    return get<float>(ort::ATTRIBUTE_FLOAT, name, otherwise);
  }
  int64_t integer(const char *name, int64_t otherwise) const {
    return get<int64_t>(ort::ATTRIBUTE_INT64, name, otherwise);
  }
  std::string word(const char *name, const std::string &otherwise) const {
    using Get = ort::Status *(*)(const ort::KernelInfo *, const char *, char *, size_t *);
    size_t size = 0;
    const Get read = api_.at<Get>(ort::ATTRIBUTE_STRING);
    if (missing(read(info_, name, nullptr, &size))) return otherwise;
    std::string found(size, '\0');
    api_.done(read(info_, name, &found[0], &size));
    return found.c_str();
  }
  int64_t choice(const char *name, const char *otherwise, const std::vector<std::string> &known) const {
    const std::string found = word(name, otherwise);
    for (size_t i = 0; i < known.size(); i++)
      if (known[i] == found) return static_cast<int64_t>(i);
    refuse(std::string(name) + " = \"" + found + "\": the native kernel does not know it");
  }

 private:
  bool missing(ort::Status *status) const {
    if (status) api_.release(ort::RELEASE_STATUS, status);
    return status != nullptr;
  }
  template <class T>
  T get(ort::Place place, const char *name, T otherwise) const {
    T found = otherwise;
    using Get = ort::Status *(*)(const ort::KernelInfo *, const char *, T *);
    return missing(api_.at<Get>(place)(info_, name, &found)) ? otherwise : found;
  }
  const Api &api_;
  const ort::KernelInfo *info_;
};

// A Hadamard rotation of `dim` channels (runtime/rotation.py): its base matrix, of order 1, 12 or 20.
class Rotation {
 public:
  // Made on the first call, and compared with the matrix that the node has as an input: the core multiplies by the one
  // that it knows.
  LampRotation of(int64_t dim, const Tensor &matrix) {
    const std::lock_guard<std::mutex> held(lock_);
    if (dim != dim_) {
      signs_ = paley(order_of(dim) - 1);
      expect(!matrix || agrees(dim, matrix), "a rotation that is not the Hadamard matrix of " + std::to_string(dim));
      dim_ = dim;
    }
    return {signs_.data(), order_of(dim)};
  }

 private:
  static int64_t order_of(int64_t dim) {
    for (const int64_t base : {1, 12, 20})
      if (dim % base == 0 && !((dim / base) & (dim / base - 1))) return base;
    refuse("no Hadamard rotation for " + std::to_string(dim) + " channels");
  }
  static std::vector<int8_t> paley(int64_t prime) {
    const size_t n = static_cast<size_t>(prime), order = n + 1;
    std::vector<int8_t> made(order * order, 1);
    std::vector<bool> residue(order, false);
    for (size_t i = 1; i < n; i++) residue[i * i % n] = true;
    for (size_t i = 0; i < n; i++) {
      made[(i + 1) * order] = -1;
      for (size_t j = 0; j < n; j++)
        if (i != j && !residue[(j + n - i) % n]) made[(i + 1) * order + j + 1] = -1;
    }
    return made;
  }
  bool agrees(int64_t dim, const Tensor &matrix) const {
    if (matrix.type != ort::FLOAT || matrix.dims != Dims{dim, dim}) return false;
    const int64_t base = order_of(dim);
    const float norm = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t i = 0; i < dim; i++)
      for (int64_t j = 0; j < dim; j++) {
        int sign = signs_[static_cast<size_t>(i % base * base + j % base)];
        for (int64_t both = (i / base) & (j / base); both; both &= both - 1) sign = -sign;
        if (!(std::fabs(matrix.as<float>()[i * dim + j] - norm * static_cast<float>(sign)) < 1e-6f)) return false;
      }
    return true;
  }
  std::mutex lock_;
  int64_t dim_ = 0;
  std::vector<int8_t> signs_;
};

// What may follow the inputs that always are there. Which of them it is can be told from its type and rank, so that
// those that a node does not have may be left out or empty.
struct Extras {
  Tensor rotate_k, rotate_v, balance, start, mask, bias, sinks;

  Extras(const Call &call, size_t first, bool rotated) {
    for (size_t i = first; i < call.inputs(); i++) {
      const Tensor x = call.input(i);
      if (!x) continue;
      const bool matrices = rotated && i < first + 2;
      Tensor *to = nullptr;
      if (x.type == ort::INT64) to = &start;
      if (x.type == ort::BOOL) to = &mask;
      if (x.type == ort::FLOAT) {
        if (matrices) to = i == first ? &rotate_k : &rotate_v;
        else if (x.dims.size() == 1) to = &sinks;
        else if (x.dims.size() < 4) to = &balance;
        else to = &bias;
      }
      expect(to && !*to, "input " + std::to_string(i) + " of type " + std::to_string(x.type) + " and shape " +
                             text(x.dims) + " is none that the kernel knows");
      *to = x;
    }
  }
};

const char *const PLANE_NAMES[] = {"k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale"};
constexpr ort::Type PLANE_TYPES[] = {ort::UINT8, ort::UINT8, ort::FLOAT16, ort::UINT8, ort::UINT8, ort::FLOAT16};

struct Planes {
  Tensor at[6];
  LampPlanes planes;

  Planes(const Call &call, size_t first) : planes() {
    for (size_t i = 0; i < 6; i++) at[i] = call.required(first + i, PLANE_TYPES[i], PLANE_NAMES[i], i % 3 == 2 ? 3 : 5);
    const Dims &k = at[0].dims, &v = at[3].dims;
    const Dims scales = {k[0], k[1], k[2] * k[3]}, values = {k[0], k[1], k[2], v[3], k[3]};
    const Dims *wanted[] = {&k, &k, &scales, &values, &values, &scales};
    for (size_t i = 0; i < 6; i++)
      expect(at[i].dims == *wanted[i],
             std::string(PLANE_NAMES[i]) + " is " + text(at[i].dims) + " beside k_high " + text(k));
    expect(k[0] > 0 && k[1] > 0 && k[2] > 0, "planes without room: k_high " + text(k));
    expect(k[3] == 32 || k[3] == 64 || k[3] == 128, "storage tiles of " + std::to_string(k[3]) + " keys");
    for (const int64_t half : {k[4], v[3]})
      expect(half > 0 && half % 2 == 0 && half <= MOST_HALF, std::to_string(2 * half) + " channels");
    planes.stored_tiles = planes.pages = k[2];
    planes.tile = k[3], planes.half_k = k[4], planes.half_v = v[3], planes.kv_heads = k[1];
    point(nullptr);
  }

  // At the inputs, or at the outputs that take their place.
  void point(void *const *to) {
    uint8_t **bytes[] = {&planes.k_high, &planes.k_residual, &planes.v_high, &planes.v_residual};
    const size_t which[] = {0, 1, 3, 4};
    for (size_t i = 0; i < 4; i++) *bytes[i] = static_cast<uint8_t *>(to ? to[which[i]] : at[which[i]].data);
    planes.k_scale = static_cast<uint16_t *>(to ? to[2] : at[2].data);
    planes.v_scale = static_cast<uint16_t *>(to ? to[5] : at[5].data);
  }
  int64_t batch() const { return at[0].dims[0]; }
  int64_t room() const { return planes.pages * planes.tile; }
};

// `[B, G]` or `[G]`: the step from one sequence to the next.
int64_t per_head(const Tensor &x, const char *name, int64_t batch, int64_t kv_heads) {
  if (x.dims == Dims{kv_heads} || x.dims == Dims{1, kv_heads}) return 0;
  expect(x.dims == Dims{batch, kv_heads}, std::string(name) + " is " + text(x.dims) + " for " +
                                              std::to_string(batch) + " sequences of " + std::to_string(kv_heads) +
                                              " kv heads");
  return kv_heads;
}

LampIntegers per_sequence(const Tensor &x, const char *name, int64_t batch) {
  if (!x) return {nullptr, 0, 0};
  expect(x.dims.size() <= 1 && (count_of(x.dims) == 1 || count_of(x.dims) == batch),
         std::string(name) + " is " + text(x.dims) + " for " + std::to_string(batch) + " sequences");
  return {x.data, 8, count_of(x.dims) == 1 ? 0 : 1};
}

const float *balance_of(const Tensor &x, const Planes &p, int64_t &stride) {
  stride = 0;
  if (!x) return nullptr;
  const int64_t heads = p.planes.kv_heads, dim = 2 * p.planes.half_k;
  if (x.dims == Dims{p.batch(), heads, dim} && p.batch() > 1) stride = heads * dim;
  expect(x.dims == Dims{heads, dim} || x.dims == Dims{1, heads, dim} || stride,
         "balance is " + text(x.dims) + " for " + std::to_string(heads) + " kv heads of " + std::to_string(dim));
  return x.as<float>();
}

// Steps of a mask or bias that broadcasts to [B, H, S, N].
void broadcast(const Tensor &x, const char *name, const Dims &to, int64_t *steps, int64_t &keys) {
  Dims dims(4 - std::min<size_t>(4, x.dims.size()), 1);
  dims.insert(dims.end(), x.dims.begin(), x.dims.end());
  bool fits = dims.size() == 4 && dims[3] > 0;
  for (size_t axis = 0; fits && axis < 3; axis++) fits = dims[axis] == 1 || dims[axis] == to[axis];
  expect(fits, std::string(name) + " is " + text(x.dims) + " for " + text(to));
  int64_t step = 1;
  for (size_t axis = 4; axis-- > 0; step *= dims[axis]) steps[axis] = dims[axis] == 1 ? 0 : step;
  keys = dims[3];
}

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
    expect(heads / kv_heads <= MOST_GROUP, std::to_string(heads / kv_heads) + " query heads to a kv head");
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
