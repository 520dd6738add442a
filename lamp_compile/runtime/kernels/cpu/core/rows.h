// The rows of one piece of work: the query heads that share a kv head, for some of the tokens; and what each may see.

constexpr int MOST_ROWS = LAMP_MOST_GROUP;  // rows of one piece of work: those of a token at least
constexpr int CHUNK = 512;                  // keys that share a maximum
constexpr int SEGMENT = 2048;               // keys that share a partial result, whatever the number of threads
constexpr float LOG2E = 1.4426950408889634f;
constexpr float PEAK_SQUARE = 119.0f * 119.0f / 7.5f;  // mean square of a stored row over its scale (formats/_base.py)

struct Rows {
  int count, group, tokens, first_token;
  int token[MOST_ROWS + 4], head[MOST_ROWS + 4];  // of this work, and of the call
  int64_t b, g;
  int64_t low[MOST_ROWS], high[MOST_ROWS];     // keys that a token of this work may see, by token
  int64_t from, to;                            // and any of them
  float coefficient[MOST_ROWS];                // score in base 2 per unit of (nibble * int8 * key scale)
  float half_sum[MOST_ROWS];                   // half the sum of a row's int8 channels
  float step[MOST_ROWS];                       // what a row's int8 channels are multiples of
  float norm[MOST_ROWS], rounding[MOST_ROWS];  // |q|^2 of the rounded row, and the variance of its rounding
  int32_t sum8[MOST_ROWS];                     // 8 times the sum of a row's int8 channels
  int8_t q[MOST_ROWS + 4][2 * PADDED];         // rounded; rows behind the last are 0, so that blocks can be whole
};

// Rows are taken four, two or one at a time; three count as four.
LAMP_INLINE int block_rows(int left) { return left >= 3 ? 4 : left; }

LAMP_INLINE void prepare_row(const LampAttend &call, Rows &rows, int r) {
  const int half = (int)call.planes.half_k, dim = 2 * half;
  const int64_t token = rows.first_token + rows.token[r], head = rows.head[r];
  float x[MOST_DIM + LANES];
  store(x + dim, splat(0.0f));  // the last channels may not fill a vector
  read_row(call.q, call.dtype, rows.b * call.q_strides[0] + head * call.q_strides[1] + token * call.q_strides[2], dim,
           x);
  if (call.balance) {
    const float *balance = call.balance + rows.b * call.balance_stride + rows.g * dim;
    for (int c = 0; c < dim; c++) x[c] *= balance[c];
  }
  rotate(call.rotate_k, dim, false, x);
  Vf most = splat(0.0f), spoilt = splat(0.0f);
  for (int c = 0; c < dim; c += LANES) {
    most = larger(magnitude(load(x + c)), most);
    spoilt += load(x + c) * splat(0.0f);  // NaN for NaN and infinity
  }
  const float unknown = total(spoilt), step = unknown != unknown ? unknown : largest(most) / 127.0f;
  Vi sums = splat(0), squares = splat(0);
  int8_t rounded[MOST_DIM + LANES];
  for (int c = 0; c < dim; c += LANES) {
    const Vf magic = splat(12582912.0f), steps = step > 0 ? load(x + c) / splat(step) : splat(0.0f);
    // A step below the smallest normal number is not exact, so the largest could come out above 127.
    const Vf held = smaller(larger((steps + magic) - magic, splat(-127.0f)), splat(127.0f));
    const Vi q = __builtin_convertvector(held, Vi);
    store_bytes(rounded + c, q);
    sums += q;
    squares += q * q;
  }
  __builtin_memcpy(rows.q[r], rounded, half);
  __builtin_memcpy(rows.q[r] + PADDED, rounded + half, half);
  const float sum = total(floats(sums)), square = total(floats(squares));  // whole numbers below 2^24
  rows.step[r] = step;
  rows.coefficient[r] = step * call.scale * LOG2E;
  rows.half_sum[r] = 0.5f * sum;
  rows.sum8[r] = 8 * (int32_t)sum;
  rows.norm[r] = step * step * square;
  rows.rounding[r] = step * step / 12.0f;
}

// Keys that a token may see, but for masks.
LAMP_INLINE void see(const LampAttend &call, Rows &rows, int t) {
  int64_t end = call.keys, begin = 0;
  if (call.lengths.data && integer(call.lengths, rows.b) < end) end = integer(call.lengths, rows.b);
  if (end < 0) end = 0;
  if (call.start.data && integer(call.start, rows.b) > 0) begin = integer(call.start, rows.b);
  if (call.causal) {
    int64_t place = rows.first_token + t;
    if (call.causal == LAMP_BOTTOM_RIGHT) place += end - call.queries;
    if (place + 1 < end) end = place + 1;
    if (call.window && call.window <= place && place - call.window + 1 > begin) begin = place - call.window + 1;
  }
  const int64_t room = call.planes.pages * call.planes.tile;
  if (end > room) end = room;
  rows.low[t] = begin;
  rows.high[t] = end > begin ? end : begin;
}

static void prepare_rows(const LampAttend &call, Rows &rows) {
  rows.count = rows.tokens * rows.group;
  __builtin_memset(rows.q, 0, sizeof rows.q[0] * (rows.count + 4));
  for (int r = 0; r < rows.count + 4; r++) {
    rows.token[r] = r / rows.group;
    rows.head[r] = (int)rows.g * rows.group + r % rows.group;
  }
  for (int r = 0; r < rows.count; r++) prepare_row(call, rows, r);
  for (int r = rows.count; r < MOST_ROWS && r < rows.count + 4; r++)
    rows.coefficient[r] = rows.half_sum[r] = 0, rows.sum8[r] = 0;
  rows.from = rows.to = 0;
  for (int t = 0; t < rows.tokens; t++) {
    see(call, rows, t);
    if (rows.high[t] <= rows.low[t]) continue;
    if (rows.from == rows.to || rows.low[t] < rows.from) rows.from = rows.low[t];
    if (rows.high[t] > rows.to) rows.to = rows.high[t];
  }
  rows.from -= rows.from % SEGMENT;
}

// One bit for each of 8 or 32 bytes, set where it is not 0.
LAMP_INLINE uint32_t eight_bits(const uint8_t *bytes) {
  uint32_t found = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  uint64_t x;
  __builtin_memcpy(&x, bytes, 8);
  const uint64_t ones = (((x & 0x7f7f7f7f7f7f7f7full) + 0x7f7f7f7f7f7f7f7full) | x) >> 7 & 0x0101010101010101ull;
  found = (uint32_t)(ones * 0x0102040810204080ull >> 56);
#else
  for (int i = 0; i < 8; i++) found |= (uint32_t)(bytes[i] != 0) << i;
#endif
  return found;
}
LAMP_INLINE uint32_t bits_of(const uint8_t *bytes) {
  uint32_t found = 0;
  for (int i = 0; i < SUBTILE; i += 8) found |= eight_bits(bytes + i) << i;
  return found;
}

// Whether the heads of a token may see different keys.
LAMP_INLINE bool heads_differ(const LampAttend &call) { return call.mask && call.mask_strides[1]; }

// Which of 32 keys from j on a row may see, one bit each.
LAMP_INLINE uint32_t visible(const LampAttend &call, const Rows &rows, int r, int64_t j) {
  const int t = rows.token[r];
  if (j >= rows.high[t] || j + SUBTILE <= rows.low[t]) return 0;
  uint32_t seen = ~0u;
  if (rows.low[t] > j) seen &= ~0u << (rows.low[t] - j);
  if (rows.high[t] < j + SUBTILE) seen &= ~0u >> (j + SUBTILE - rows.high[t]);
  if (!call.mask) return seen;
  const int64_t *steps = call.mask_strides, head = rows.head[r];
  const uint8_t *mask = call.mask + rows.b * steps[0] + head * steps[1] + (rows.first_token + t) * steps[2];
  if (steps[3] == 1 && j + SUBTILE <= call.mask_keys) return seen & bits_of(mask + j);
  for (int i = 0; i < SUBTILE; i++) {
    const int64_t key = call.mask_keys == 1 ? 0 : j + i;
    if (key >= call.mask_keys || !mask[key * steps[3]]) seen &= ~(1u << i);
  }
  return seen;
}

// The bias of key j for a row, in base 2.
LAMP_INLINE float bias_of(const LampAttend &call, const Rows &rows, int r, int64_t j) {
  const int64_t *steps = call.bias_strides, head = rows.head[r];
  if (call.bias_keys == 1) j = 0;
  if (j >= call.bias_keys) return 0;
  const int64_t token = rows.first_token + rows.token[r];
  return LOG2E * call.bias[rows.b * steps[0] + head * steps[1] + token * steps[2] + j * steps[3]];
}

LAMP_INLINE Vi lanes_of(uint32_t seen, int half) {
  const Vi bit = Vi{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (splat((int32_t)(seen >> (16 * half) & 0xffff)) & bit) != splat(0);
}

// tanh by exp2: good to 3e-7, which is less than a score is rounded by.
LAMP_INLINE Vf soft_cap(Vf y, float cap) {
  const Vf x = y * splat(1.0f / (cap * LOG2E));
  const Vf grown = exp2(smaller(larger(x, splat(-20.0f)), splat(20.0f)) * splat(2.0f * LOG2E));
  const Vf capped = splat(cap * LOG2E) * (splat(1.0f) - splat(2.0f) / (grown + splat(1.0f)));
  return select(x == x, capped, x);
}
