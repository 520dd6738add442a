// The part of torch's stable C interface (torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h,
// from 2.10 on) that torch_ops.cpp calls. Nothing of torch is included or linked: Python finds the functions in the
// library that is loaded and hands them over, in the order of LampTorch.
#pragma once
#include "lamp_core.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef void *LampTensor;  // owned by whoever holds it
typedef uint64_t
    LampOnStack;  // an argument: a number, a tensor, a string, or a pointer to an argument that may be missing
typedef void (*LampBoxed)(LampOnStack *stack, uint64_t arguments, uint64_t results);

// All that return an integer return 0 where it went well.
typedef struct {
  int32_t (*library)(const char *name, const char *key, const char *file, uint32_t line, void **made);
  int32_t (*implement)(void *library, const char *name, LampBoxed kernel, uint64_t version);
  int32_t (*call)(const char *name, const char *overload, LampOnStack *stack, uint64_t version);
  int32_t (*data)(LampTensor, void **);
  int32_t (*dim)(LampTensor, int64_t *);
  int32_t (*sizes)(LampTensor, int64_t **);
  int32_t (*strides)(LampTensor, int64_t **);
  int32_t (*dtype)(LampTensor, int32_t *);
  int32_t (*empty)(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device,
                   int32_t index, LampTensor *made);
  int32_t (*drop_tensor)(LampTensor);
  int32_t (*text)(void *string, const char **);
  int32_t (*drop_text)(void *string);
  int32_t (*threads)(uint32_t *);
  int32_t (*float32)(void), (*bfloat16)(void), (*float16)(void), (*uint8)(void), (*int32)(void), (*int64)(void),
      (*boolean)(void);
  int32_t (*drop_argument)(LampOnStack *);  // null before torch 2.13
} LampTorch;

// Makes lamp::append and lamp::fused_attention on CPUs go straight to the core. Calls that it does not serve, and wrong
// ones, go on to lamp::_append_checked and lamp::_fused_attention_checked, which take addresses of words for words. 0
// where torch took them.
LAMP_API int lamp_join_torch(const LampTorch *functions);
// Whether calls are served (1) or all go on (0). Gives back what was before.
LAMP_API int lamp_serve_torch(int on);
// Calls served since torch was joined.
LAMP_API int64_t lamp_served(void);
// Said by a checked operator that will not do it: what lamp::append or lamp::fused_attention ends with. 0 where this
// thread is in no call that was handed on.
LAMP_API int lamp_refuse(const char *reason);
LAMP_API int64_t lamp_size_of_torch(void);

#ifdef __cplusplus
}
#endif
