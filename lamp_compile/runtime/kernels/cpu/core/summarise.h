// One new key: the summary of the group that it fell into, made anew (gate.pool and gate.summarise).

static void summarise_group(const LampSummarize &call, int64_t b, int64_t g) {
  const LampPlanes &planes = call.planes;
  const int64_t position = integer(call.positions, b), rank = call.rank, per_page = planes.tile / call.group;
  Place place;
  if (position < 0 || !find(planes, b, g, position, place)) return;
  const int half = (int)planes.half_k, count = (int)(position % call.group) + 1;
  float mean[MOST_DIM] = {0};
  Place row = place;
  for (int i = 0; i < count; i++) {
    row.offset = place.offset - place.offset % (int)call.group + i;
    const float scale = half_to_float(planes.k_scale[scale_at(planes, row)]);
    for (int c = 0; c < half; c++) {
      const int64_t at = key_byte(planes, row, c);
      const uint8_t high = planes.k_high[at], low = planes.k_residual[at];
      mean[c] += scale * (float)(16 * ((int8_t)high >> 4) + ((int8_t)low >> 4));
      mean[half + c] += scale * (float)(16 * ((int8_t)(high << 4) >> 4) + ((int8_t)(low << 4) >> 4));
    }
  }
  for (int c = 0; c < 2 * half; c++) mean[c] /= (float)count;
  Vf out[RANK_PARTS];
  project(mean, 2 * half, call.key, call.key_dtype, g * 2 * half * rank, rank, out);
  uint16_t *to = call.summary + (place.tile * per_page + place.offset / call.group) * rank;
  for (int64_t r = 0; r < rank; r++) to[r] = float_to_half(out[r / LANES][r % LANES] + call.key_bias[g * rank + r]);
}

static void summarise_task(void *data, int64_t task, int64_t) {
  const LampSummarize &call = *(const LampSummarize *)data;
  summarise_group(call, task / call.planes.kv_heads, task % call.planes.kv_heads);
}

static int summarise(const LampSummarize *call) {
  LampSummarize copy = *call;
  const int64_t tasks = call->batch * call->planes.kv_heads;
  run(summarise_task, &copy, tasks, tasks < 32 ? 1 : call->threads);
  return 0;
}
