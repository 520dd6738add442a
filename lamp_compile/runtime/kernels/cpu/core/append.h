// New rows: balanced, rotated, rounded to nested8 (runtime/formats/nested8.py) and written where they belong.

constexpr int LARGEST = 119;

struct Row {
  uint8_t high[MOST_DIM / 2], residual[MOST_DIM / 2];
  uint16_t scale;
};

LAMP_INLINE void round_row(const float *x, int dim, Row &row) {
  float peak = 0;
  bool spoilt = false;
  for (int c = 0; c < dim; c++) {
    const float size = __builtin_fabsf(x[c]);
    spoilt |= size != size;
    peak = size > peak ? size : peak;
  }
  // NaN in, NaN out: the scale carries it, a nibble cannot.
  row.scale = float_to_half(spoilt ? __builtin_nanf("") : peak / (float)LARGEST);
  const float scale = half_to_float(row.scale);
  int16_t q[MOST_DIM];
  for (int c = 0; c < dim; c++) {
    const float steps = scale == 0 ? 0.0f : x[c] / scale;
    const float held = steps > LARGEST ? LARGEST : steps < -LARGEST ? -LARGEST : steps == steps ? steps : 0.0f;
    const float magic = 12582912.0f;
    q[c] = (int16_t)((held + magic) - magic);
  }
  const int half = dim / 2;
  for (int c = 0; c < half; c++) {
    const int upper = (q[c] + 8) >> 4, lower = (q[c + half] + 8) >> 4;
    row.high[c] = (uint8_t)((upper & 15) << 4 | (lower & 15));
    row.residual[c] = (uint8_t)(((q[c] - upper * 16) & 15) << 4 | ((q[c + half] - lower * 16) & 15));
  }
}

static void append_row(const LampAppend &call, int64_t b, int64_t g, int64_t i) {
  const LampPlanes &planes = call.planes;
  const int64_t first = integer(call.positions, b);
  Place place;
  if (first < 0 || !find(planes, b, g, first + i, place)) return;
  const int half_k = (int)planes.half_k, half_v = (int)planes.half_v;
  float x[MOST_DIM];
  Row row;
  read_row(call.k, call.dtype, b * call.k_strides[0] + g * call.k_strides[1] + i * call.k_strides[2], 2 * half_k, x);
  if (call.balance) {
    const float *balance = call.balance + b * call.balance_stride + g * 2 * half_k;
    for (int c = 0; c < 2 * half_k; c++) x[c] /= balance[c];
  }
  rotate(call.rotate_k, 2 * half_k, false, x);
  round_row(x, 2 * half_k, row);
  __builtin_memcpy(planes.k_high + key_at(planes, place), row.high, half_k);
  __builtin_memcpy(planes.k_residual + key_at(planes, place), row.residual, half_k);
  planes.k_scale[scale_at(planes, place)] = row.scale;

  read_row(call.v, call.dtype, b * call.v_strides[0] + g * call.v_strides[1] + i * call.v_strides[2], 2 * half_v, x);
  rotate(call.rotate_v, 2 * half_v, false, x);
  round_row(x, 2 * half_v, row);
  uint8_t *high = planes.v_high + value_at(planes, place), *residual = planes.v_residual + value_at(planes, place);
  for (int c = 0; c < half_v; c++) {
    high[c * planes.tile] = row.high[c];
    residual[c * planes.tile] = row.residual[c];
  }
  planes.v_scale[scale_at(planes, place)] = row.scale;
}

struct AppendWork {
  const LampAppend *call;
  int64_t block, blocks;  // rows that one task takes, and tasks per sequence and head
};

static void append_task(void *data, int64_t task, int64_t) {
  const AppendWork &work = *(const AppendWork *)data;
  const LampAppend &call = *work.call;
  const int64_t bg = task / work.blocks, first = task % work.blocks * work.block;
  const int64_t last = first + work.block < call.rows ? first + work.block : call.rows;
  for (int64_t i = first; i < last; i++) append_row(call, bg / call.planes.kv_heads, bg % call.planes.kv_heads, i);
}

static int append(const LampAppend *call) {
  // Rows of one storage tile share cache lines, so a task takes whole runs of them.
  AppendWork work = {call, 64, (call->rows + 63) / 64};
  run(append_task, &work, call->batch * call->planes.kv_heads * work.blocks, call->rows < 16 ? 1 : call->threads);
  return 0;
}
