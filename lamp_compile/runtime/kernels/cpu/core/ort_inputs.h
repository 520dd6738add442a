// The inputs of the ai.lamp operators, with their shapes checked against each other: what the core is told of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <mutex>

#include "hadamard.h"
#include "ort_call.h"

namespace ort {

// A Hadamard rotation of `dim` channels: made on the first call, and compared with the matrix that the node has as an
// input, since the core multiplies by the one that it knows.
class Rotation {
 public:
  LampRotation of(int64_t dim, const Tensor &matrix) {
    const std::lock_guard<std::mutex> held(lock_);
    if (dim != dim_) {
      made_ = lamp::hadamard(dim);
      expect(made_.base, "no Hadamard rotation for " + std::to_string(dim) + " channels");
      expect(!matrix || agrees(dim, matrix), "a rotation that is not the Hadamard matrix of " + std::to_string(dim));
      dim_ = dim;
    }
    return made_;
  }

 private:
  bool agrees(int64_t dim, const Tensor &matrix) const {
    if (matrix.type != FLOAT || matrix.dims != Dims{dim, dim}) return false;
    const int64_t base = made_.base;
    const float norm = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t i = 0; i < dim; i++)
      for (int64_t j = 0; j < dim; j++) {
        int sign = made_.signs[i % base * base + j % base];
        for (int64_t both = (i / base) & (j / base); both; both &= both - 1) sign = -sign;
        if (!(std::fabs(matrix.as<float>()[i * dim + j] - norm * static_cast<float>(sign)) < 1e-6f)) return false;
      }
    return true;
  }
  std::mutex lock_;
  int64_t dim_ = 0;
  LampRotation made_ = {nullptr, 0};
};

// What may follow the inputs that always are there. Which of them it is can be told from its type and rank, so that
// those that a node does not have may be left out or empty.
struct Extras {
  Tensor rotate_k, rotate_v, balance, start, mask, bias, sinks;

  Extras(const Call &call, size_t first, bool rotated) {
    for (size_t i = first; i < call.inputs(); i++) {
      const Tensor x = call.input(i);
      if (!x) continue;
      const bool matrices = rotated && i < first + 2 && x.dims.size() == 2;
      Tensor *to = nullptr;
      if (x.type == INT64) to = &start;
      if (x.type == BOOL) to = &mask;
      if (x.type == FLOAT) {
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
constexpr Type PLANE_TYPES[] = {UINT8, UINT8, FLOAT16, UINT8, UINT8, FLOAT16};

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
      expect(half > 0 && half % 2 == 0 && 2 * half <= LAMP_MOST_DIM, std::to_string(2 * half) + " channels");
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
inline int64_t per_head(const Tensor &x, const char *name, int64_t batch, int64_t kv_heads) {
  if (x.dims == Dims{kv_heads} || x.dims == Dims{1, kv_heads}) return 0;
  expect(x.dims == Dims{batch, kv_heads}, std::string(name) + " is " + text(x.dims) + " for " +
                                              std::to_string(batch) + " sequences of " + std::to_string(kv_heads) +
                                              " kv heads");
  return kv_heads;
}

inline LampIntegers per_sequence(const Tensor &x, const char *name, int64_t batch) {
  if (!x) return {nullptr, 0, 0};
  expect(x.dims.size() <= 1 && (count_of(x.dims) == 1 || count_of(x.dims) == batch),
         std::string(name) + " is " + text(x.dims) + " for " + std::to_string(batch) + " sequences");
  return {x.data, 8, count_of(x.dims) == 1 ? 0 : 1};
}

inline const float *balance_of(const Tensor &x, const Planes &p, int64_t &stride) {
  stride = 0;
  if (!x) return nullptr;
  const int64_t heads = p.planes.kv_heads, dim = 2 * p.planes.half_k;
  if (x.dims == Dims{p.batch(), heads, dim} && p.batch() > 1) stride = heads * dim;
  expect(x.dims == Dims{heads, dim} || x.dims == Dims{1, heads, dim} || stride,
         "balance is " + text(x.dims) + " for " + std::to_string(heads) + " kv heads of " + std::to_string(dim));
  return x.as<float>();
}

// Steps of a mask or bias that broadcasts to [B, H, S, N].
inline void broadcast(const Tensor &x, const char *name, const Dims &to, int64_t *steps, int64_t &keys) {
  Dims dims(4 - std::min<size_t>(4, x.dims.size()), 1);
  dims.insert(dims.end(), x.dims.begin(), x.dims.end());
  bool fits = dims.size() == 4 && dims[3] > 0;
  for (size_t axis = 0; fits && axis < 3; axis++) fits = dims[axis] == 1 || dims[axis] == to[axis];
  expect(fits, std::string(name) + " is " + text(x.dims) + " for " + text(to));
  int64_t step = 1;
  for (size_t axis = 4; axis-- > 0; step *= dims[axis]) steps[axis] = dims[axis] == 1 ? 0 : step;
  keys = dims[3];
}

}  // namespace ort
