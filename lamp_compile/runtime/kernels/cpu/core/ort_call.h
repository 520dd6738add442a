// Calling ONNX Runtime: its functions with their types, and the inputs, outputs and attributes of a node. Not a word of
// what is computed.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "lamp_core.h"
#include "ort_abi.h"

namespace ort {

struct Refused {
  std::string what;
};

[[noreturn]] inline void refuse(const std::string &what) { throw Refused{what}; }
inline void expect(bool fine, const std::string &what) {
  if (!fine) refuse(what);
}

// The table, with the types of the functions that are called.
class Api {
 public:
  explicit Api(Table table) : table_(table) {}

  Status *status(const std::string &message, Code code = INVALID_ARGUMENT) const {
    return at<Status *(*)(Code, const char *)>(CREATE_STATUS)(code, message.c_str());
  }
  template <class... Given>
  void call(Place place, Given... given) const {
    done(at<Status *(*)(Given...)>(place)(given...));
  }
  template <class T>
  void release(Place place, T *what) const {
    at<void (*)(T *)>(place)(what);
  }
  template <class F>
  F at(Place place) const {
    return reinterpret_cast<F>(const_cast<void *>(table_[place]));
  }
  std::string message(const Status *status) const {
    return at<const char *(*)(const Status *)>(ERROR_MESSAGE)(status);
  }
  void done(Status *status) const {
    if (!status) return;
    const std::string what = message(status);
    release(RELEASE_STATUS, status);
    refuse(what);
  }

 private:
  Table table_;
};

using Dims = std::vector<int64_t>;

inline Dims dims_of(const Api &api, const Shape *shape) {
  size_t count = 0;
  api.call<const Shape *, size_t *>(DIMENSION_COUNT, shape, &count);
  Dims dims(count);
  api.call<const Shape *, int64_t *, size_t>(DIMENSIONS, shape, dims.data(), count);
  return dims;
}

inline std::string text(const Dims &dims) {
  std::string made = "[";
  for (size_t i = 0; i < dims.size(); i++) made += (i ? ", " : "") + std::to_string(dims[i]);
  return made + "]";
}

inline int64_t count_of(const Dims &dims) {
  int64_t count = 1;
  for (const int64_t n : dims) count *= n;
  return count;
}

struct Tensor {
  const Value *value = nullptr;
  void *data = nullptr;
  Type type = ANY;
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
  Call(const Api &api, Context *context) : api_(api), context_(context) {
    api.call<const Context *, size_t *>(INPUT_COUNT, context, &inputs_);
  }

  size_t inputs() const { return inputs_; }

  // An input of that element type; nothing where it is left out.
  Tensor input(size_t index, Type type, const char *name) const {
    const Tensor found = input(index);
    expect(!found || found.type == type, std::string(name) + " has element type " + std::to_string(found.type));
    return found;
  }

  Tensor input(size_t index) const {
    Tensor found;
    if (index >= inputs_) return found;
    api_.call<const Context *, size_t, const Value **>(INPUT, context_, index, &found.value);
    if (!found.value) return found;
    Shape *shape = nullptr;
    api_.call<const Value *, Shape **>(SHAPE_OF, found.value, &shape);
    api_.call<const Shape *, Type *>(ELEMENT_TYPE, shape, &found.type);
    found.dims = dims_of(api_, shape);
    api_.release(RELEASE_SHAPE, shape);
    api_.call<Value *, void **>(TENSOR_DATA, const_cast<Value *>(found.value), &found.data);
    return found;
  }

  Tensor required(size_t index, Type type, const char *name, size_t axes) const {
    Tensor found = input(index, type, name);
    expect(static_cast<bool>(found), std::string(name) + " is missing");
    expect(found.dims.size() == axes,
           std::string(name) + " is " + text(found.dims) + ", not of " + std::to_string(axes) + " dimensions");
    return found;
  }

  void *output(size_t index, const Dims &dims) const {
    Value *value = nullptr;
    api_.call<Context *, size_t, const int64_t *, size_t, Value **>(OUTPUT, context_, index, dims.data(),
                                                                              dims.size(), &value);
    void *data = nullptr;
    api_.call<Value *, void **>(TENSOR_DATA, value, &data);
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
    Status *status =
        call.api_.at<Status *(*)(const Context *, void (*)(void *, size_t), size_t, size_t, void *)>(
            PARALLEL_FOR)(call.context_, task, count, 0, data);
    if (!status) return;
    call.api_.release(RELEASE_STATUS, status);
    task(data, 0);  // takes all that is left
  }

  const Api &api_;
  Context *context_;
  size_t inputs_ = 0;
};

// Attributes of a node; what is not there keeps its default.
class Attributes {
 public:
  Attributes(const Api &api, const KernelInfo *info) : api_(api), info_(info) {}

  float number(const char *name, float otherwise) const {
    return get<float>(ATTRIBUTE_FLOAT, name, otherwise);
  }
  int64_t integer(const char *name, int64_t otherwise) const {
    return get<int64_t>(ATTRIBUTE_INT64, name, otherwise);
  }
  std::string word(const char *name, const std::string &otherwise) const {
    using Get = Status *(*)(const KernelInfo *, const char *, char *, size_t *);
    size_t size = 0;
    const Get read = api_.at<Get>(ATTRIBUTE_STRING);
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
  bool missing(Status *status) const {
    if (status) api_.release(RELEASE_STATUS, status);
    return status != nullptr;
  }
  template <class T>
  T get(Place place, const char *name, T otherwise) const {
    T found = otherwise;
    using Get = Status *(*)(const KernelInfo *, const char *, T *);
    return missing(api_.at<Get>(place)(info_, name, &found)) ? otherwise : found;
  }
  const Api &api_;
  const KernelInfo *info_;
};

}  // namespace ort
