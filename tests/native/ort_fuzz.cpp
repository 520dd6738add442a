// The operators of ort_ops.cpp on random calls, most of them wrong in one place: a table of functions of our own stands
// in for ONNX Runtime's, and every tensor has memory of exactly its size. A call may be refused; it may not read or
// write outside, and a call that is right may not be refused.
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "exact.h"
#include "lamp_core.h"
#include "ort_abi.h"

namespace ort {
struct Status {
  Code code;
  std::string message;
};
struct Shape {
  Type type = ANY;
  std::vector<int64_t> dims;
};
struct Value {
  Shape shape;
  std::shared_ptr<char> data;
};
struct KernelInfo {
  std::map<std::string, std::string> words;
  std::map<std::string, int64_t> integers;
  std::map<std::string, float> numbers;
};
struct Context {
  std::vector<Value *> inputs;
  std::vector<Value> outputs;
  std::vector<int> in_place;  // input whose memory an output takes, or -1
};
struct Domain {};
struct SessionOptions {
  std::map<std::string, std::string> config;
};
}  // namespace ort

using namespace ort;
using Dims = std::vector<int64_t>;
static std::vector<const CustomOp *> registered;

static size_t size_of(Type type) {
  return type == UINT8 || type == BOOL ? 1 : type == FLOAT16 ? 2 : type == INT64 ? 8 : 4;
}
static int64_t count_of(const Dims &dims) {
  int64_t count = 1;
  for (int64_t n : dims) count *= n;
  return count;
}
static Value made(Type type, const Dims &dims) {
  const size_t bytes = (size_t)count_of(dims) * size_of(type);
  return {{type, dims}, std::shared_ptr<char>((char *)std::malloc(bytes), std::free)};
}
static Status *fail(const char *what) { return new Status{FAIL, what}; }

// The functions of the table, by place.
static Status *create_status(Code code, const char *message) { return new Status{code, message}; }
static Code error_code(const Status *status) { return status->code; }
static const char *error_message(const Status *status) { return status->message.c_str(); }
static void release_status(Status *status) { delete status; }
static Status *create_domain(const char *, Domain **out) { return *out = new Domain, nullptr; }
static Status *domain_add(Domain *, const CustomOp *op) { return registered.push_back(op), nullptr; }
static Status *add_domain(SessionOptions *, Domain *domain) { return delete domain, nullptr; }
static Status *create_shape(Shape **out) { return *out = new Shape, nullptr; }
static Status *set_type(Shape *shape, Type type) { return shape->type = type, nullptr; }
static Status *set_dimensions(Shape *shape, const int64_t *dims, size_t count) {
  return shape->dims.assign(dims, dims + count), nullptr;
}
static Status *element_type(const Shape *shape, Type *out) { return *out = shape->type, nullptr; }
static Status *dimension_count(const Shape *shape, size_t *out) { return *out = shape->dims.size(), nullptr; }
static Status *dimensions(const Shape *shape, int64_t *out, size_t count) {
  if (count != shape->dims.size()) return fail("another rank");
  return std::copy(shape->dims.begin(), shape->dims.end(), out), nullptr;
}
static void release_shape(Shape *shape) { delete shape; }
static Status *shape_of(const Value *value, Shape **out) { return *out = new Shape(value->shape), nullptr; }
static Status *tensor_data(Value *value, void **out) { return *out = value->data.get(), nullptr; }
static Status *input_count(const Context *context, size_t *out) { return *out = context->inputs.size(), nullptr; }
static Status *input_at(const Context *context, size_t i, const Value **out) {
  if (i >= context->inputs.size()) return fail("no such input");
  return *out = context->inputs[i], nullptr;
}
static Status *output_at(Context *context, size_t i, const int64_t *dims, size_t count, Value **out) {
  if (i >= context->outputs.size()) return fail("no such output");
  const int from = context->in_place[i];
  const Dims wanted(dims, dims + count);
  if (from >= 0 && context->inputs[(size_t)from]->shape.dims == wanted)
    context->outputs[i] = *context->inputs[(size_t)from];
  else
    context->outputs[i] = made(registered.size() > 1 && context->outputs.size() == 6 ? (i % 3 == 2 ? FLOAT16 : UINT8)
                                                                                     : (i == 2 ? INT64 : FLOAT),
                               wanted);
  return *out = &context->outputs[i], nullptr;
}
template <class T>
static Status *find(const std::map<std::string, T> &from, const char *name, T *out) {
  const auto found = from.find(name);
  if (found == from.end()) return fail("no such attribute");
  return *out = found->second, nullptr;
}
static Status *number(const KernelInfo *info, const char *name, float *out) { return find(info->numbers, name, out); }
static Status *integer(const KernelInfo *info, const char *name, int64_t *out) {
  return find(info->integers, name, out);
}
static Status *copy_text(const std::string &text, char *out, size_t *size) {
  if (out && *size < text.size() + 1) return fail("too small");
  if (out) std::memcpy(out, text.c_str(), text.size() + 1);
  return *size = text.size() + 1, nullptr;
}
static Status *word(const KernelInfo *info, const char *name, char *out, size_t *size) {
  const auto found = info->words.find(name);
  return found == info->words.end() ? fail("no such attribute") : copy_text(found->second, out, size);
}
static Status *has_config(const SessionOptions *options, const char *key, int *out) {
  return *out = (int)options->config.count(key), nullptr;
}
static Status *get_config(const SessionOptions *options, const char *key, char *out, size_t *size) {
  return copy_text(options->config.at(key), out, size);
}
static Status *parallel_for(const Context *, void (*task)(void *, size_t), size_t total, size_t, void *data) {
  for (size_t i = 0; i < total; i++) task(data, i);
  return nullptr;
}

static const void *table[PARALLEL_FOR + 1];
template <class F>
static void place(Place at, F *function) {
  table[at] = reinterpret_cast<const void *>(function);
}
static void fill_table() {
  place(CREATE_STATUS, create_status), place(ERROR_CODE, error_code), place(ERROR_MESSAGE, error_message);
  place(RELEASE_STATUS, release_status), place(CREATE_DOMAIN, create_domain), place(DOMAIN_ADD, domain_add);
  place(ADD_DOMAIN, add_domain), place(CREATE_SHAPE, create_shape), place(SET_TYPE, set_type);
  place(SET_DIMENSIONS, set_dimensions), place(ELEMENT_TYPE, element_type), place(DIMENSION_COUNT, dimension_count);
  place(DIMENSIONS, dimensions), place(RELEASE_SHAPE, release_shape), place(SHAPE_OF, shape_of);
  place(TENSOR_DATA, tensor_data), place(INPUT_COUNT, input_count), place(INPUT, input_at), place(OUTPUT, output_at);
  place(ATTRIBUTE_FLOAT, number), place(ATTRIBUTE_INT64, integer), place(ATTRIBUTE_STRING, word);
  place(HAS_CONFIG, has_config), place(GET_CONFIG, get_config), place(PARALLEL_FOR, parallel_for);
}
static Table get_api(uint32_t version) { return version <= API_VERSION ? table : nullptr; }
static const char *version_string() { return "fuzz"; }

extern "C" Status *RegisterCustomOps(SessionOptions *, const ApiBase *);

struct Call {
  Random random;
  int64_t batch, heads, group, rows, half, value_half, tile, pages;
  bool rotated;
  std::vector<Value> given;
  std::vector<bool> left_out;
  KernelInfo info;

  explicit Call(uint64_t seed) : random{seed * 0x2545f4914f6cdd1dull + 1} {
    const int64_t halves[] = {8, 16, 32, 40, 64}, tiles[] = {32, 64, 128};
    batch = 1 + random.below(3), heads = 1 + random.below(2), group = 1 + random.below(3), rows = 1 + random.below(4);
    half = random.pick(halves), value_half = random.chance(0.7) ? half : random.pick(halves);
    tile = random.pick(tiles), pages = 1 + random.below(3), rotated = random.chance(0.6);
    info.words["rotation"] = rotated ? "hadamard" : "none";
    given.reserve(64);  // references into it stay
  }
  Value &add(Type type, const Dims &dims) {
    given.push_back(made(type, dims));
    char *bytes = given.back().data.get();
    const int64_t count = count_of(dims);
    for (int64_t i = 0; i < count; i++) {
      if (type == FLOAT) ((float *)bytes)[i] = random.normal();
      if (type == FLOAT16) ((uint16_t *)bytes)[i] = (uint16_t)random.next();
      if (type == UINT8) bytes[i] = (char)random.next();
      if (type == BOOL) bytes[i] = random.chance(0.7);
      if (type == INT64) ((int64_t *)bytes)[i] = random.below(rows + 3);
    }
    return given.back();
  }
  void planes() {
    add(UINT8, {batch, heads, pages, tile, half}), add(UINT8, {batch, heads, pages, tile, half});
    add(FLOAT16, {batch, heads, pages * tile});
    add(UINT8, {batch, heads, pages, value_half, tile}), add(UINT8, {batch, heads, pages, value_half, tile});
    add(FLOAT16, {batch, heads, pages * tile});
  }
  void append() {
    add(FLOAT, {batch, heads, rows, 2 * half}), add(FLOAT, {batch, heads, rows, 2 * value_half});
    planes();
    Value &positions = add(INT64, {batch});
    for (int64_t b = 0; b < batch; b++)
      ((int64_t *)positions.data.get())[b] = random.below(pages * tile - rows + 2) - 1;  // -1: takes nothing
    if (random.chance(0.3)) add_balance();
  }
  void attend() {
    add(FLOAT, {batch, heads * group, rows, 2 * half});
    planes();
    const Dims each = random.chance(0.5) ? Dims{heads} : Dims{batch, heads};
    for (int i = 0; i < 3; i++) add(FLOAT, each);
    add(FLOAT, {batch, heads, 4}), add(INT64, {batch, heads, 7});
    Value &lengths = add(INT64, {random.chance(0.3) ? 1 : batch});
    for (int64_t i = 0; i < lengths.shape.dims[0]; i++)
      ((int64_t *)lengths.data.get())[i] = random.below(pages * tile + 8) - 3;
    if (random.chance(0.3)) add_balance();
    if (random.chance(0.3)) add(INT64, {batch});
    const int64_t room = pages * tile;
    if (random.chance(0.3)) add(BOOL, {random.chance(0.5) ? 1 : batch, 1, rows, random.chance(0.3) ? 1 : room});
    if (random.chance(0.3)) add(FLOAT, {1, random.chance(0.5) ? 1 : heads * group, rows, room - random.below(9)});
    if (random.chance(0.3)) add(FLOAT, {heads * group});
    const char *causal[] = {"", "top_left", "bottom_right"}, *rules[] = {"energy", "lamp_strict", "lamp_relaxed"};
    info.words["causal"] = random.pick(causal), info.words["rule"] = random.pick(rules);
    if (random.chance(0.3) && !info.words["causal"].empty()) info.integers["window"] = 1 + random.below(40);
    info.integers["subtile"] = 32, info.numbers["scale"] = 0.1f;
  }
  void add_balance() {
    if (!rotated || random.chance(0.5)) {
      if (rotated) add_nothing(), add_nothing();
      add(FLOAT, {heads, 2 * half});
    }
  }
  void add_nothing() {  // an input that is left out: its place stays
    add(FLOAT, {1});
    left_out.resize(given.size());
    left_out.back() = true;
  }
  // One thing wrong, or nothing that matters.
  void spoil() {
    Value &value = given[(size_t)random.below((int64_t)given.size())];
    Dims dims = value.shape.dims;
    const int64_t kind = random.below(8);
    if (kind == 0) dims.push_back(1 + random.below(2));
    if (kind == 1) dims.pop_back();
    if (kind >= 2 && kind <= 4) {
      int64_t &n = dims[(size_t)random.below((int64_t)dims.size())];
      const int64_t other[] = {0, 1, n + 1, n > 1 ? n - 1 : 2, 2 * n, 200};
      n = random.pick(other);
    }
    if (kind <= 4) {
      const Type type = value.shape.type;
      const size_t at = (size_t)(&value - given.data());
      if (count_of(dims) > 1 << 20) return;
      Value fresh = add(type, dims);
      given.pop_back();
      given[at] = fresh;
    }
    const Type types[] = {FLOAT, UINT8, INT64, BOOL, FLOAT16};
    if (kind == 5) {
      Value fresh = add(random.pick(types), dims);
      given.pop_back();
      value = fresh;
    }
    if (kind == 6) left_out.resize(given.size()), left_out[(size_t)(&value - given.data())] = true;
    if (kind == 7 && value.shape.type == INT64)
      for (int64_t i = 0; i < count_of(dims); i++)
        ((int64_t *)value.data.get())[i] = (int64_t)random.next() >> random.below(64);
  }
};

static void explain(uint64_t seed, const Status *status) {
  std::printf("seed %llu: a right call is refused: %s\n", (unsigned long long)seed, status->message.c_str());
  std::exit(1);
}

int main(int count, char **arguments) {
  const uint64_t first = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const uint64_t cases = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1000;
  fill_table();
  SessionOptions options;
  options.config["ai.lamp.threads"] = "2";
  const ApiBase base = {get_api, version_string};
  if (RegisterCustomOps(&options, &base) || registered.size() != 2) return std::puts("not registered"), 1;
  uint64_t accepted = 0, refused = 0;
  for (uint64_t i = 0; i < cases; i++) {
    Call call(first + i);
    const bool append = call.random.chance(0.4), right = call.random.chance(0.4);
    append ? call.append() : call.attend();
    if (!right) call.spoil();
    const CustomOp *op = registered[append ? 0 : 1];
    Context context;
    call.left_out.resize(call.given.size());
    for (size_t k = 0; k < call.given.size(); k++)
      context.inputs.push_back(call.left_out[k] ? nullptr : &call.given[k]);
    context.outputs.resize(append ? 6 : 3);
    for (size_t k = 0; k < context.outputs.size(); k++) {
      const int from = append ? (int)k + 2 : k == 0 ? -1 : (int)k + 9;
      const bool there = from >= 0 && context.inputs[(size_t)from];
      context.in_place.push_back(there && call.random.chance(0.5) ? from : -1);
    }
    void *kernel = nullptr;
    Status *status = op->create_checked(op, table, &call.info, &kernel);
    for (int turn = 0; turn < 2 && !status; turn++) status = op->compute_checked(kernel, &context);
    if (kernel) op->destroy(kernel);
    if (status && right) explain(first + i, status);
    (status ? refused : accepted)++;
    delete status;
  }
  std::printf("%llu cases from seed %llu: %llu accepted, %llu refused\n", (unsigned long long)cases,
              (unsigned long long)first, (unsigned long long)accepted, (unsigned long long)refused);
  return 0;
}
