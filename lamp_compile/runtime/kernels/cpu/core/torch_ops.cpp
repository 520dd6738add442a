// lamp::append and lamp::fused_attention as kernels of torch's dispatcher for CPUs: what they compute is lamp_append
// and lamp_attend. Everything that the core relies on is looked at here, in every call, because between two steps of a
// layer the whole model goes through the caches: Python takes longer to look at eighteen tensors than a short context
// takes.
#include <atomic>
#include <cmath>
#include <vector>

#include "hadamard.h"
#include "torch_call.h"

namespace {

constexpr int TILE = 32;          // storage tiles are whole multiples
constexpr int SIDE_BY_SIDE = 16;  // channels of values by lanes: whole multiples

std::atomic<bool> serving{false};
std::atomic<int64_t> served{0};

int dtype_of(const Tensor &x) {
  if (x.dtype == types.float32) return LAMP_FLOAT32;
  if (x.dtype == types.bfloat16) return LAMP_BFLOAT16;
  return x.dtype == types.float16 ? LAMP_FLOAT16 : -1;
}

// Rows [B, heads, n, D], not empty, whose channels lie together.
bool rows_of(const Tensor &x) {
  return x.dim == 4 && dtype_of(x) >= 0 && x.count() > 0 && (x.strides[3] == 1 || x.sizes[3] == 1);
}

// Six planes from argument `first` on, for `batch` sequences; with a table they are a pool.
bool planes_of(const Arguments &given, int first, const Tensor &table, int64_t batch, LampPlanes &planes) {
  const Tensor k_high = given.tensor(first), k_residual = given.tensor(first + 1), k_scale = given.tensor(first + 2);
  const Tensor v_high = given.tensor(first + 3), v_residual = given.tensor(first + 4),
               v_scale = given.tensor(first + 5);
  const bool lanes = k_high.dim == 6;
  if ((!lanes && k_high.dim != 5) || v_high.dim != k_high.dim) return false;
  for (const Tensor *plane : {&k_high, &k_residual, &v_high, &v_residual})
    if (!plane->holds(types.uint8)) return false;
  const int64_t *k = k_high.sizes, tile = lanes ? k[4] : k[3], half_k = lanes ? 4 * k[3] : k[4],
                half_v = v_high.sizes[lanes ? 4 : 3];
  for (const Tensor *plane : {&k_high, &k_residual})
    if (lanes ? !plane->is({k[0], k[1], k[2], half_k / 4, TILE, 4}) : !plane->is({k[0], k[1], k[2], tile, half_k}))
      return false;
  for (const Tensor *plane : {&v_high, &v_residual})
    if (lanes ? !plane->is({k[0], k[1], k[2], TILE / 4, half_v, 4}) : !plane->is({k[0], k[1], k[2], half_v, tile}))
      return false;
  for (const Tensor *scale : {&k_scale, &v_scale})
    if (!scale->holds(types.float16) || !scale->is({k[0], k[1], k[2] * tile})) return false;
  if (k[0] != (table.there ? 1 : batch) || k[1] <= 0 || k[2] <= 0) return false;
  if (tile <= 0 || tile % TILE || (lanes && half_v % SIDE_BY_SIDE)) return false;
  for (const int64_t half : {half_k, half_v})
    if (half <= 0 || half % 2 || 2 * half > LAMP_MOST_DIM) return false;
  if (table.there && (table.dim != 2 || table.sizes[0] != batch || table.sizes[1] <= 0 || !table.holds(types.int32)))
    return false;
  planes.k_high = (uint8_t *)k_high.data, planes.k_residual = (uint8_t *)k_residual.data;
  planes.v_high = (uint8_t *)v_high.data, planes.v_residual = (uint8_t *)v_residual.data;
  planes.k_scale = (uint16_t *)k_scale.data, planes.v_scale = (uint16_t *)v_scale.data;
  planes.table = (const int32_t *)table.data, planes.table_stride = table.there ? table.strides[0] : 0;
  planes.pages = table.there ? table.sizes[1] : k[2], planes.stored_tiles = k[2];
  planes.tile = tile, planes.half_k = half_k, planes.half_v = half_v, planes.kv_heads = k[1];
  planes.by_lanes = lanes;
  return true;
}

bool rotations_of(const Arguments &given, int i, const LampPlanes &planes, LampRotation &k, LampRotation &v) {
  const int kind = given.word(i, {"none", "hadamard"});
  if (kind != 1) return kind == 0;
  k = lamp::hadamard(2 * planes.half_k), v = lamp::hadamard(2 * planes.half_v);
  return k.base && v.base;
}

// One integer, or one for each sequence.
bool integers_of(const Tensor &x, int64_t batch, LampIntegers &to) {
  if (!x.there) return true;
  const int64_t count = x.count();
  if ((x.dtype != types.int64 && x.dtype != types.int32) || x.dim < 0 || x.dim > 1 || (count != 1 && count != batch))
    return false;
  to = {x.data, x.dtype == types.int64 ? 8 : 4, count == 1 ? 0 : x.strides[0]};
  return true;
}

// [..., G, D], or with `width` 0 [..., G]; a first axis of sequences may be missing or shared.
bool setting_of(const Tensor &x, int64_t batch, int64_t heads, int64_t width, const float *&to, int64_t &stride) {
  stride = 0;
  if (!x.there) return true;
  const int64_t axes = width ? 2 : 1;
  const bool leading = x.dim == axes + 1;
  if (!x.holds(types.float32) || (x.dim != axes && !leading)) return false;
  const int64_t *own = x.sizes + leading;
  if (own[0] != heads || (width && own[1] != width) || (leading && x.sizes[0] != 1 && x.sizes[0] != batch))
    return false;
  to = (const float *)x.data;
  if (leading && x.sizes[0] != 1) stride = x.strides[0];
  return true;
}

// What broadcasts to [B, H, S, N], N being one of two sizes.
bool broadcast_of(const Tensor &x, const int64_t *to, int64_t keys, int64_t room, int64_t *strides, int64_t &last) {
  if (!x.there) return true;
  if (x.dim < 1 || x.dim > 4) return false;
  const int64_t missing = 4 - x.dim;
  for (int64_t axis = 0; axis < 4; axis++) {
    const int64_t size = axis < missing ? 1 : x.sizes[axis - missing];
    const bool fits = axis < 3 ? size == 1 || size == to[axis] : size == 1 || size == keys || size == room;
    if (!fits || size <= 0) return false;
    strides[axis] = size == 1 ? 0 : x.strides[axis - missing];
  }
  last = x.sizes[x.dim - 1];
  return true;
}

int64_t threads() {
  uint32_t count = 1;
  return torch.threads(&count) ? 1 : count;
}

// Arguments of lamp::append (runtime/fused_ops.py).
namespace store {
enum { K, V, PLANES, BALANCE = 8, POSITIONS, TABLE, K_FORMAT, V_FORMAT, ROTATION };
constexpr const char *KINDS = "TTTTTTTTtTtssss";

bool stored(const Arguments &given) {
  const Tensor k = given.tensor(K), v = given.tensor(V), table = given.maybe(TABLE);
  if (!rows_of(k) || !rows_of(v) || k.dtype != v.dtype || std::memcmp(k.sizes, v.sizes, 3 * sizeof(int64_t)))
    return false;
  LampAppend call = {};
  const int64_t batch = k.sizes[0];
  if (given.word(K_FORMAT, {"nested8"}) || given.word(V_FORMAT, {"nested8"})) return false;
  if (!planes_of(given, PLANES, table, batch, call.planes)) return false;
  const int64_t heads = call.planes.kv_heads, dim = 2 * call.planes.half_k;
  if (k.sizes[1] != heads || k.sizes[3] != dim || v.sizes[3] != 2 * call.planes.half_v) return false;
  if (!rotations_of(given, ROTATION, call.planes, call.rotate_k, call.rotate_v)) return false;
  if (!setting_of(given.maybe(BALANCE), batch, heads, dim, call.balance, call.balance_stride)) return false;
  if (!integers_of(given.tensor(POSITIONS), batch, call.positions)) return false;
  call.k = k.data, call.v = v.data, call.dtype = dtype_of(k), call.batch = batch, call.rows = k.sizes[2];
  for (int i = 0; i < 3; i++) call.k_strides[i] = k.strides[i], call.v_strides[i] = v.strides[i];
  call.threads = threads();
  return lamp_append(&call) == 0;
}

void append(LampOnStack *stack, uint64_t, uint64_t results) {
  Arguments given(stack, KINDS);
  if (!serving || !stored(given)) return given.hand_on("lamp::_append_checked", results);
  given.drop();
  served++;
}
}  // namespace store

// Arguments of lamp::fused_attention.
namespace decode {
enum {
  Q,
  PLANES,
  TAU = 7,
  FLOOR,
  BUDGET,
  STATE,
  STATS,
  BALANCE,
  MASK,
  BIAS,
  SINKS,
  START,
  LENGTHS,
  TABLE,
  CAUSAL,
  WINDOW,
  SCALE,
  SOFTCAP,
  KEYS,
  K_FORMAT,
  V_FORMAT,
  ROTATION,
  RULE,
  QUERY_BITS,
  SUBTILE,
  GUARD_WINDOW,
  GUARD_HOLD,
  HYSTERESIS
};
constexpr const char *KINDS = "TTTTTTTTTTTTttttttts.f..ssss.....ss";

bool settings_of(const Arguments &given, LampAttend &call) {
  const int causal = given.word(CAUSAL, {"", "top_left", "bottom_right"});
  const int rule = given.word(RULE, {"energy", "lamp_strict", "lamp_relaxed"});
  if (given.word(K_FORMAT, {"nested8"}) || given.word(V_FORMAT, {"nested8"}) || causal < 0 || rule < 0) return false;
  if (!rotations_of(given, ROTATION, call.planes, call.rotate_k, call.rotate_v)) return false;
  call.causal = causal, call.rule = rule;
  call.window = given.integer(WINDOW), call.keys = given.integer(KEYS), call.subtile = given.integer(SUBTILE);
  call.guard_window = given.integer(GUARD_WINDOW), call.guard_hold = given.integer(GUARD_HOLD);
  call.hysteresis = (float)given.number(HYSTERESIS), call.softcap = (float)given.number(SOFTCAP);
  const int64_t subtile = call.subtile;
  if (call.window < 0 || call.keys < 0 || call.guard_window < 1 || call.guard_hold < 0) return false;
  if (!(call.softcap >= 0) || !(call.hysteresis >= 0)) return false;
  return given.integer(QUERY_BITS) == 8 && (!call.window || causal) &&
         (subtile == 32 || subtile == 64 || subtile == 128) && call.planes.tile % subtile == 0;
}

// What each sequence and kv head is decided by, and what is kept of them.
bool controls_of(const Arguments &given, int64_t batch, int64_t heads, LampAttend &call) {
  const Tensor state = given.tensor(STATE), stats = given.tensor(STATS);
  if (!state.holds(types.float32) || !state.is({batch, heads, 4})) return false;
  if (!stats.holds(types.int64) || !stats.is({batch, heads, 7})) return false;
  call.state = (float *)state.data, call.stats = (int64_t *)stats.data;
  return setting_of(given.tensor(TAU), batch, heads, 0, call.tau, call.tau_stride) &&
         setting_of(given.tensor(FLOOR), batch, heads, 0, call.floor, call.floor_stride) &&
         setting_of(given.tensor(BUDGET), batch, heads, 0, call.budget, call.budget_stride) &&
         setting_of(given.maybe(BALANCE), batch, heads, 2 * call.planes.half_k, call.balance, call.balance_stride);
}

// One float for each head, of 16 or 32 bits: models have them in their own dtype.
bool sinks_of(const Tensor &x, int64_t heads, const float *&to) {
  static thread_local std::vector<float> wide;
  if (!x.there) return true;
  const int dtype = dtype_of(x);
  if (dtype < 0 || !x.is({heads}) || !x.dense()) return false;
  if (dtype == LAMP_FLOAT32) {
    to = (const float *)x.data;
    return true;
  }
  wide.resize((size_t)heads);
  for (int64_t i = 0; i < heads; i++) {
    const uint32_t half = ((const uint16_t *)x.data)[i];
    uint32_t bits = half << 16;  // bfloat16
    float scale = 1.0f;
    if (dtype == LAMP_FLOAT16) {
      // Exponents of float16 as those of float32, 112 less than they should be; the largest one is infinity and NaN.
      bits = (half & 0x8000) << 16 | (half & 0x7fff) << 13;
      if ((half & 0x7c00) == 0x7c00)
        bits |= 0x7f800000;
      else
        scale = 5.192296858534828e33f;  // 2^112
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    wide[(size_t)i] = value * scale;
  }
  to = wide.data();
  return true;
}

bool seen_of(const Arguments &given, const Tensor &q, LampAttend &call) {
  const Tensor mask = given.maybe(MASK), bias = given.maybe(BIAS), sinks = given.maybe(SINKS);
  const int64_t room = call.planes.pages * call.planes.tile;
  if ((mask.there && mask.dtype != types.boolean) || (bias.there && bias.dtype != types.float32)) return false;
  call.mask = (const uint8_t *)mask.data, call.bias = (const float *)bias.data;
  return sinks_of(sinks, q.sizes[1], call.sinks) &&
         broadcast_of(mask, q.sizes, call.keys, room, call.mask_strides, call.mask_keys) &&
         broadcast_of(bias, q.sizes, call.keys, room, call.bias_strides, call.bias_keys) &&
         integers_of(given.maybe(START), q.sizes[0], call.start) &&
         integers_of(given.maybe(LENGTHS), q.sizes[0], call.lengths);
}

// The output, or null where the call is not one that the core takes as it is.
LampTensor attended(const Arguments &given) {
  const Tensor q = given.tensor(Q), table = given.maybe(TABLE);
  LampAttend call = {};
  if (!rows_of(q) || !planes_of(given, PLANES, table, q.sizes[0], call.planes)) return nullptr;
  const int64_t batch = q.sizes[0], heads = q.sizes[1], queries = q.sizes[2], dim = q.sizes[3];
  const int64_t kv_heads = call.planes.kv_heads, width = 2 * call.planes.half_v;
  if (dim != 2 * call.planes.half_k || heads % kv_heads || heads / kv_heads > LAMP_MOST_GROUP) return nullptr;
  if (!settings_of(given, call) || !controls_of(given, batch, kv_heads, call) || !seen_of(given, q, call))
    return nullptr;
  call.q = q.data, call.dtype = dtype_of(q), call.batch = batch, call.heads = heads, call.queries = queries;
  for (int i = 0; i < 3; i++) call.q_strides[i] = q.strides[i];
  call.scale = (float)given.number_or(SCALE, 1.0 / std::sqrt((double)dim));
  call.threads = threads();
  const int64_t sizes[4] = {batch, heads, queries, width};
  const int64_t strides[4] = {heads * queries * width, queries * width, width, 1};
  LampTensor out = nullptr;
  if (torch.empty(4, sizes, strides, q.dtype, 0, 0, &out)) return nullptr;
  if (!torch.data(out, &call.out) && lamp_attend(&call) == 0) return out;
  torch.drop_tensor(out);
  return nullptr;
}

void attend(LampOnStack *stack, uint64_t, uint64_t results) {
  Arguments given(stack, KINDS);
  const LampTensor out = serving ? attended(given) : nullptr;
  if (!out) return given.hand_on("lamp::_fused_attention_checked", results);
  given.drop();
  served++;
  stack[0] = (LampOnStack)out;
}
}  // namespace decode

}  // namespace

extern "C" {

int lamp_join_torch(const LampTorch *functions) {
  torch = *functions;
  types = {torch.float32(), torch.bfloat16(), torch.float16(), torch.uint8(),
           torch.int32(),   torch.int64(),    torch.boolean()};
  void *library = nullptr;  // as long as the process: without it torch would forget the kernels
  if (torch.library("lamp", "CPU", __FILE__, __LINE__, &library)) return -1;
  if (torch.implement(library, "append", store::append, VERSION)) return -1;
  if (torch.implement(library, "fused_attention", decode::attend, VERSION)) return -1;
  serving = true;
  return 0;
}

int lamp_serve_torch(int on) { return serving.exchange(on != 0); }
int64_t lamp_served(void) { return served; }
int lamp_refuse(const char *reason) {
  if (handing_on) refused = reason;
  return handing_on;
}
int64_t lamp_size_of_torch(void) { return sizeof(LampTorch); }

}  // extern "C"
