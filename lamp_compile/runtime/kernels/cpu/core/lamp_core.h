// The C interface of the CPU kernels. Plain data, no torch, no exceptions: whoever calls has checked shapes and dtypes.
//
// Shape letters as in runtime/ops.py: B batch, H query heads, G kv heads, S queries, N keys, D head dim, Dv value dim.
// All strides count elements; 0 repeats.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LAMP_API __declspec(dllexport)
#else
#define LAMP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Query heads that share a kv head, at most, and channels of a head.
enum { LAMP_MOST_GROUP = 64, LAMP_MOST_DIM = 256 };
enum LampDtype { LAMP_FLOAT32 = 0, LAMP_BFLOAT16 = 1, LAMP_FLOAT16 = 2 };
enum LampRule { LAMP_ENERGY = 0, LAMP_STRICT = 1, LAMP_RELAXED = 2 };
enum LampCausal { LAMP_NOT_CAUSAL = 0, LAMP_TOP_LEFT = 1, LAMP_BOTTOM_RIGHT = 2 };

// Six planes of nested8. Keys [B, G, P, tile, half_k], values [B, G, P, half_v, tile], scales [B, G, P * tile] as
// float16 bits. By lanes, with tiles of 32 keys: keys [B, G, P, half_k / 4, 32, 4], values [B, G, P, 8, half_v, 4]
// (half_k in fours, half_v in sixteens). With a table [B, pages] the planes are a pool [1, G, P, ...].
typedef struct {
  uint8_t *k_high, *k_residual;
  uint16_t *k_scale;
  uint8_t *v_high, *v_residual;
  uint16_t *v_scale;
  const int32_t *table;
  int64_t table_stride, pages, stored_tiles, tile, half_k, half_v, kv_heads, by_lanes;
} LampPlanes;

// A rotation of D = base * 2^n channels: Sylvester's doubling of a base matrix [base, base] of 1 and -1; 0 = none.
typedef struct {
  const int8_t *signs;
  int64_t base;
} LampRotation;

// One integer per sequence, or one for all (stride 0); null = not given.
typedef struct {
  const void *data;
  int64_t bytes, stride;
} LampIntegers;

typedef struct {
  LampPlanes planes;
  LampRotation rotate_k, rotate_v;
  const void *k, *v;
  int64_t dtype, batch, rows;
  int64_t k_strides[3], v_strides[3];  // B, G, row; channels are contiguous
  const float *balance;                // [G, D] or [B, G, D]
  int64_t balance_stride;
  LampIntegers positions;
  int64_t threads;
} LampAppend;

typedef struct {
  LampPlanes planes;
  LampRotation rotate_k, rotate_v;
  const void *q;
  int64_t dtype, batch, heads, queries;
  int64_t q_strides[3];
  const float *balance;
  int64_t balance_stride;
  const float *tau, *floor, *budget;  // [G] or [B, G]
  int64_t tau_stride, floor_stride, budget_stride;
  float *state;    // [B, G, 4]
  int64_t *stats;  // [B, G, 7]
  const uint8_t *mask;
  int64_t mask_strides[4], mask_keys;
  const float *bias;
  int64_t bias_strides[4], bias_keys;
  const float *sinks;
  LampIntegers start, lengths;
  int64_t keys, causal, window;
  float scale, softcap;
  int64_t rule, subtile, guard_window, guard_hold;
  float hysteresis;
  void *out;           // [B, H, S, Dv], dtype of q
  float *lse;          // [B, H, S] or null
  float *certificate;  // [B, H, S, 3] or null
  int64_t threads;
} LampAttend;

// A look-ahead network (runtime/network) at one site, for calls of one token: what is written in place is history and
// trust. `subtile` of the call is a multiple of `group`, and `group` a divisor of 32.
typedef struct {
  const uint16_t *summary;  // [B, G, N / group, R] as float16 bits; with a table that of the pool
  float *history, *trust;   // [B, G, tiles, 2], [B, G, 7]
  const void *query;        // [H, D, R]
  int64_t query_dtype;
  const float *query_bias, *age, *extra, *limit, *margin;  // [H, R], [H, 16], [H, 4], [G], [G]
  int64_t rank, group, tiles, trained;
  float skip;
} LampPredict;

// The summaries of the groups that one new key of each sequence, at `positions`, fell into.
typedef struct {
  LampPlanes planes;  // of the keys; those of values are not looked at
  uint16_t *summary;
  const void *key;  // [G, D, R]
  int64_t key_dtype;
  const float *key_bias;  // [G, R]
  int64_t batch, rank, group;
  LampIntegers positions;
  int64_t threads;
} LampSummarize;

// Instruction sets this build has, best first, separated by commas; and the one in use.
LAMP_API const char *lamp_instruction_sets(void);
LAMP_API const char *lamp_instruction_set(void);
// Use another of them ("avx2"); 0, or -1 when this machine or build does not have it.
LAMP_API int lamp_use(const char *name);
// The OpenMP runtime that torch has started: its GOMP_parallel. Without it threads are started for every call.
LAMP_API void lamp_use_threads_of(void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned));
// Threads of whoever calls, for the next calls of this thread, ahead of all others; null takes them back.
// `parallel(context, task, data, count)` runs task(data, i) for each i below count, and returns when all are done.
// A task may wait for what another one has begun, never for one to begin.
typedef void (*LampParallel)(void *context, void (*task)(void *, size_t), void *data, size_t count);
LAMP_API void lamp_lend_threads(LampParallel parallel, void *context);
// 0; -1 without memory; -2 for rows beyond the planes. Nothing is written then.
LAMP_API int lamp_append(const LampAppend *call);
LAMP_API int lamp_attend(const LampAttend *call);
LAMP_API int lamp_attend_predicted(const LampAttend *call, const LampPredict *gate);
LAMP_API int lamp_summarize(const LampSummarize *call);
// sizeof of the structures, so that a binding that is out of step is noticed.
LAMP_API int64_t lamp_size_of_append(void);
LAMP_API int64_t lamp_size_of_attend(void);
LAMP_API int64_t lamp_size_of_predict(void);
LAMP_API int64_t lamp_size_of_summarize(void);

#ifdef __cplusplus
}
#endif
