// The part of ONNX Runtime's C interface that ort_ops.cpp calls. Its wheels come without headers, and nothing here is
// linked: a library of operators is handed a table of functions. The table only ever grows at its end, so a place in it
// means the same in every version from 1.17 on; RegisterCustomOps tries some before it registers anything.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace ort {

constexpr uint32_t API_VERSION = 17;  // the oldest that has all of the places below

struct Status;
struct SessionOptions;
struct KernelInfo;
struct Context;
struct Value;
struct Shape;
struct Domain;
struct Inference;
typedef const void *const *Table;

struct ApiBase {
  Table (*get)(uint32_t version);
  const char *(*version)(void);
};

enum Type { ANY = 0, FLOAT = 1, UINT8 = 2, INT64 = 7, BOOL = 9, FLOAT16 = 10 };
enum Code { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Presence { REQUIRED = 0, OPTIONAL = 1 };

// Places in the table, and what is there.
enum Place {
  CREATE_STATUS = 0,
  ERROR_CODE = 1,
  ERROR_MESSAGE = 2,
  CREATE_DOMAIN = 26,
  DOMAIN_ADD = 27,
  ADD_DOMAIN = 28,
  TENSOR_DATA = 51,
  CREATE_SHAPE = 57,
  SET_TYPE = 58,
  SET_DIMENSIONS = 59,
  ELEMENT_TYPE = 60,
  DIMENSION_COUNT = 61,
  DIMENSIONS = 62,
  SHAPE_OF = 65,
  ATTRIBUTE_FLOAT = 85,
  ATTRIBUTE_INT64 = 86,
  ATTRIBUTE_STRING = 87,
  INPUT_COUNT = 88,
  INPUT = 90,
  OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_SHAPE = 99,
  HAS_CONFIG = 237,
  GET_CONFIG = 238,
  PARALLEL_FOR = 274,
};

// struct OrtCustomOp, as of API_VERSION.
struct CustomOp {
  uint32_t version;
  void *(*create)(const CustomOp *, Table, const KernelInfo *);
  const char *(*name)(const CustomOp *);
  const char *(*provider)(const CustomOp *);
  Type (*input_type)(const CustomOp *, size_t);
  size_t (*inputs)(const CustomOp *);
  Type (*output_type)(const CustomOp *, size_t);
  size_t (*outputs)(const CustomOp *);
  void (*compute)(void *, Context *);
  void (*destroy)(void *);
  Presence (*input_presence)(const CustomOp *, size_t);
  Presence (*output_presence)(const CustomOp *, size_t);
  int (*input_memory)(const CustomOp *, size_t);
  int (*variadic_inputs)(const CustomOp *);
  int (*same_inputs)(const CustomOp *);
  int (*variadic_outputs)(const CustomOp *);
  int (*same_outputs)(const CustomOp *);
  Status *(*create_checked)(const CustomOp *, Table, const KernelInfo *, void **);
  Status *(*compute_checked)(void *, Context *);
  Status *(*infer)(const CustomOp *, Inference *);
  int (*first_version)(const CustomOp *);
  int (*last_version)(const CustomOp *);
};

}  // namespace ort
