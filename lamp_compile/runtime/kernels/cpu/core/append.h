// New rows: balanced, rotated, rounded to nested8 (runtime/formats/nested8.py) and written where they belong.

constexpr int LARGEST = 119;

struct Row {
  uint8_t high[MOST_DIM / 2 + LANES], residual[MOST_DIM / 2 + LANES];
  uint16_t scale;
};

// Steps of -119 to 119; 0 where there is no number.
LAMP_INLINE Vf steps_of(Vf x, float scale) {
  const Vf magic = splat(12582912.0f);  // adding it rounds to a whole number
  if (scale == 0) return splat(0.0f);
  const Vf known = numbers(x / splat(scale));
  return (smaller(larger(known, splat((float)-LARGEST)), splat((float)LARGEST)) + magic) - magic;
}

// x has zeros behind its last channel, up to whole vectors.
LAMP_INLINE void round_row(const float *x, int dim, Row &row) {
  Vf most = splat(0.0f), spoilt = splat(0.0f);
  for (int c = 0; c < dim; c += LANES) {
    most = larger(magnitude(load(x + c)), most);
    spoilt += load(x + c) * splat(0.0f);  // NaN for NaN and infinity
  }
  // NaN in, NaN out: the scale carries it, a nibble cannot. An infinity makes its row's scale infinite.
  const float peak = largest(most), unknown = total(spoilt);
  row.scale = float_to_half(unknown != unknown && peak <= 3.4e38f ? unknown : peak / (float)LARGEST);
  const float scale = half_to_float(row.scale);
  const int half = dim / 2;
  for (int c = 0; c < half; c += LANES) {
    const Vi upper = __builtin_convertvector(steps_of(load(x + c), scale), Vi);
    const Vi lower = __builtin_convertvector(steps_of(load(x + half + c), scale), Vi);
    const Vi high_upper = (upper + splat(8)) >> 4, high_lower = (lower + splat(8)) >> 4;
    const Vi low_upper = upper - (high_upper << 4), low_lower = lower - (high_lower << 4);
    store_bytes(row.high + c, (high_upper & splat(15)) << 4 | (high_lower & splat(15)));
    store_bytes(row.residual + c, (low_upper & splat(15)) << 4 | (low_lower & splat(15)));
  }
}

static void append_row(const LampAppend &call, int64_t b, int64_t g, int64_t i) {
  const LampPlanes &planes = call.planes;
  const int64_t first = integer(call.positions, b);
  Place place;
  if (first < 0 || first >= planes.pages * planes.tile || !find(planes, b, g, first + i, place)) return;
  const int half_k = (int)planes.half_k, half_v = (int)planes.half_v;
  float x[MOST_DIM + LANES] = {0};
  Row row;
  read_row(call.k, call.dtype, b * call.k_strides[0] + g * call.k_strides[1] + i * call.k_strides[2], 2 * half_k, x);
  if (call.balance) {
    const float *balance = call.balance + b * call.balance_stride + g * 2 * half_k;
    for (int c = 0; c < 2 * half_k; c++) x[c] /= balance[c];
  }
  rotate(call.rotate_k, 2 * half_k, false, x);
  round_row(x, 2 * half_k, row);
  const int together = planes.by_lanes ? 4 : half_k;
  for (int c = 0; c < half_k; c += together) {
    const int64_t at = key_byte(planes, place, c);
    __builtin_memcpy(planes.k_high + at, row.high + c, together);
    __builtin_memcpy(planes.k_residual + at, row.residual + c, together);
  }
  planes.k_scale[scale_at(planes, place)] = row.scale;

  for (int c = 0; c < LANES; c++) x[2 * half_v + c] = 0;
  read_row(call.v, call.dtype, b * call.v_strides[0] + g * call.v_strides[1] + i * call.v_strides[2], 2 * half_v, x);
  rotate(call.rotate_v, 2 * half_v, false, x);
  round_row(x, 2 * half_v, row);
  const int64_t at = value_byte(planes, place, 0), apart = planes.by_lanes ? 4 : planes.tile;
  for (int c = 0; c < half_v; c++) {
    planes.v_high[at + c * apart] = row.high[c];
    planes.v_residual[at + c * apart] = row.residual[c];
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
  // Before anything is written. A table may be shorter than its sequence: rows without a page go nowhere.
  for (int64_t b = 0; !call->planes.table && b < call->batch; b++)
    if (integer(call->positions, b) >= 0 &&
        integer(call->positions, b) > call->planes.pages * call->planes.tile - call->rows)
      return -2;
  // Rows of one storage tile share cache lines, so a task takes whole runs of them.
  AppendWork work = {call, 64, (call->rows + 63) / 64};
  run(append_task, &work, call->batch * call->planes.kv_heads * work.blocks,
      call->batch * call->planes.kv_heads * call->rows < 128 ? 1 : call->threads);
  return 0;
}
