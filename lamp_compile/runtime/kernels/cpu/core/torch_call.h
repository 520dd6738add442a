// Calling torch: its functions, the tensors and arguments of one call of its dispatcher. Not a word of what is
// computed.
#pragma once
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

#include "torch_abi.h"

namespace {

constexpr uint64_t VERSION = 0x020b000000000000;  // of the interface: torch 2.11
constexpr int MOST_ARGUMENTS = 64;

struct Types {
  int32_t float32, bfloat16, float16, uint8, int32, int64, boolean;
};

LampTorch torch{};
Types types{};
thread_local std::string refused;      // why, by the operator that a call was handed on to
thread_local bool handing_on = false;  // this thread is in such an operator

// One tensor, as the dispatcher hands it over; `there` is false for one that was left out.
struct Tensor {
  void *data = nullptr;
  int64_t dim = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = -1;
  bool there = false;

  explicit Tensor(LampTensor from) {
    int64_t *size = nullptr, *stride = nullptr;
    there = from != nullptr;
    if (!there) return;
    // Without an address (meta, sparse) nothing below is of use; `dim` is then one that fits nothing.
    if (torch.data(from, &data) || torch.dim(from, &dim) || torch.sizes(from, &size) || torch.strides(from, &stride) ||
        torch.dtype(from, &dtype)) {
      dim = -1;
      return;
    }
    sizes = size, strides = stride;
  }
  bool is(std::initializer_list<int64_t> wanted) const {
    if (dim != (int64_t)wanted.size()) return false;
    return !dim || !std::memcmp(sizes, wanted.begin(), wanted.size() * sizeof(int64_t));
  }
  bool dense() const {
    int64_t step = 1;
    for (int64_t axis = dim; axis-- > 0; step *= sizes[axis])
      if (sizes[axis] != 1 && strides[axis] != step) return false;
    return dim >= 0;
  }
  bool holds(int32_t wanted) const { return dtype == wanted && dense(); }
  int64_t count() const {
    int64_t all = 1;
    for (int64_t axis = 0; axis < dim; axis++) all *= sizes[axis];
    return all;
  }
};

// Reads arguments in order, and owns them until they are handed on.
class Arguments {
 public:
  Arguments(LampOnStack *stack, const char *kinds) : stack_(stack), kinds_(kinds) {}
  Arguments(const Arguments &) = delete;

  Tensor tensor(int i) const { return Tensor((LampTensor)stack_[i]); }
  Tensor maybe(int i) const {
    const auto *inner = (const LampOnStack *)stack_[i];
    return Tensor(inner ? (LampTensor)*inner : nullptr);
  }
  int64_t integer(int i) const { return (int64_t)stack_[i]; }
  double number(int i) const { return as_number(stack_[i]); }
  double number_or(int i, double otherwise) const {
    const auto *inner = (const LampOnStack *)stack_[i];
    return inner ? as_number(*inner) : otherwise;
  }
  // Where a word stands among those known; -1 where it does not.
  int word(int i, std::initializer_list<const char *> known) const {
    const char *found = nullptr;
    if (torch.text((void *)stack_[i], &found)) return -1;
    int place = 0;
    for (const char *one : known) {
      if (!std::strcmp(one, found)) return place;
      place++;
    }
    return -1;
  }
  // Of what the dispatcher has handed over nothing is kept.
  void drop() {
    for (int i = 0; kinds_[i]; i++) {
      if (kinds_[i] == 'T') torch.drop_tensor((LampTensor)stack_[i]);
      if (kinds_[i] == 's') torch.drop_text((void *)stack_[i]);
      if (kinds_[i] != 't' && kinds_[i] != 'f') continue;
      auto *inner = (LampOnStack *)stack_[i];
      if (!inner) continue;
      if (kinds_[i] == 't') torch.drop_tensor((LampTensor)*inner);
      if (torch.drop_argument)
        torch.drop_argument(inner);
      else
        ::operator delete(inner);
    }
  }
  // By the operator that looks at everything and says what is wrong; it takes the arguments over. Words go as their
  // addresses: torch (2.13) forgets to free those that are handed to it.
  void hand_on(const char *name, uint64_t results) {
    void *words[MOST_ARGUMENTS];
    int count = 0;
    for (int i = 0; kinds_[i]; i++) {
      if (kinds_[i] != 's') continue;
      const char *found = nullptr;
      words[count] = (void *)stack_[i];
      if (torch.text(words[count++], &found)) found = "";
      stack_[i] = (LampOnStack)found;
    }
    const bool before = handing_on;
    handing_on = true;
    refused.clear();
    const int32_t failed = torch.call(name, "", stack_, VERSION);
    handing_on = before;
    for (int i = 0; i < count; i++) torch.drop_text(words[i]);
    if (refused.empty() && failed) refused = std::string(name) + " failed within torch";
    if (refused.empty()) return;
    if (!failed && results) torch.drop_tensor((LampTensor)stack_[0]);  // made in place of an output
    const std::string why = std::move(refused);
    refused.clear();
    throw std::runtime_error(why);
  }

 private:
  static double as_number(LampOnStack from) {
    double x;
    std::memcpy(&x, &from, sizeof x);
    return x;
  }
  LampOnStack *stack_;
  const char *kinds_;  // by argument: T tensor, t one that may be missing, s word, f number that may be missing
};

}  // namespace
