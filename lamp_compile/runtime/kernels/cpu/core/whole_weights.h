// Weights of whole chunks' keys, in parts that find room between products. Part of whole.h.

// 2^x = factor[i] * ((f + NEAREST)^2 + REST), to 3e-7, where x + 1/64 is a whole number, i thirty-seconds and f < 1/32.
constexpr float HALF_STEP = 1.0f / 64;
constexpr float NEAREST = 1.4375f, REST = 2.08117975f;
alignas(64) static const float FACTORS[32] = {
    0.238506868f, 0.243729487f, 0.249066472f, 0.254520327f, 0.26009357f,  0.265788883f, 0.271608919f, 0.27755636f,
    0.283634067f, 0.289844841f, 0.296191603f, 0.302677363f, 0.309305131f, 0.316078037f, 0.322999239f, 0.330072016f,
    0.337299645f, 0.344685555f, 0.352233171f, 0.359946072f, 0.367827863f, 0.375882238f, 0.384113014f, 0.392523974f,
    0.401119143f, 0.409902513f, 0.418878198f, 0.428050429f, 0.437423527f, 0.447001845f, 0.456789911f, 0.466792315f,
};

// What turns products into weights, by row.
struct Weigher {
  float coefficient[ABREAST], mean[ABREAST], level[ABREAST];
  int32_t begin[ABREAST];  // less what the products with nibbles are too large by
};

// Of the sixteen keys before, or as many vectors of them: 16 times their products, and where their scales are and their
// weights go.
template <int VECTORS>
struct Before {
  __m512i product[ABREAST][VECTORS];
  const uint16_t *scale;
  float *weight;
  int64_t pitch;
};

// A row's weights under way. They are worked out in parts, far apart: while one waits for the part before, all that
// comes behind it must find room in the processor's queues.
struct Weighing {
  Vf x, part, factor;
};

// Worked out here, and not where it is used.
LAMP_INLINE void settle(Vf &v) { __asm__ volatile("" : "+v"(v)); }

LAMP_INLINE void weigh_scores(const Weigher &weigher, __m512i product, Vf scale, int r, Weighing &w) {
  const Vf y = (Vf)_mm512_cvtepi32_ps(product) * splat(weigher.coefficient[r]) - splat(weigher.mean[r]);
  w.x = y * scale - splat(weigher.level[r]);
  settle(w.x);
}
LAMP_INLINE void weigh_split(Weighing &w) {
  // 1.5 * 2^18 leaves whole thirty-seconds, and counts them in its last bits.
  constexpr float COUNT = 393216.0f;
  const Vf counted =
      (Vf)_mm512_add_round_ps((__m512)w.x, (__m512)splat(COUNT), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  w.part = w.x - (counted - splat(COUNT + NEAREST));
  w.factor = (Vf)_mm512_permutex2var_ps((__m512)load(FACTORS), (__m512i)counted, (__m512)load(FACTORS + LANES));
  settle(w.part);
  settle(w.factor);
}
// Of what is too far from 0 to be split a part may be anything: the power of two makes it 0, infinite or NaN.
LAMP_INLINE void weigh_join(Weighing &w) {
  w.x = (Vf)_mm512_scalef_ps((__m512)((w.part * w.part + splat(REST)) * w.factor), (__m512)w.x);
  settle(w.x);
}
// With a sub-tile's last keys, the weights of its first ones are read again: sums kept for them would have to be
// stored, which products wait for.
template <bool LAST>
LAMP_INLINE void weigh_end(const Before<1> &before, int r, const Weighing &w, Vf *sum, Vf *mass) {
  float *weight = before.weight + r * before.pitch;
  store(weight, w.x);
  if (!LAST) return;
  const Vf first = load(weight - LANES);
  sum[r] += first + w.x;
  mass[r] = first * first + w.x * w.x;
}

// Part `part` of sixteen: four of each row.
template <bool LAST>
LAMP_INLINE void weigh_part(const Weigher &weigher, const Before<1> &before, Vf scale, int part, Weighing &w, Vf *sum,
                            Vf *mass) {
  const int r = part / 4;
  if (part % 4 == 0) weigh_scores(weigher, before.product[r][0], scale, r, w);
  if (part % 4 == 1) weigh_split(w);
  if (part % 4 == 2) weigh_join(w);
  if (part % 4 == 3) weigh_end<LAST>(before, r, w, sum, mass);
}

// NaN for infinities.
LAMP_INLINE Vf scale_of(const uint16_t *at) {
  const Vf scale = halves(at);
  return scale + (scale - scale);
}

// Four rows' squares, added up within each 128 bits: one of each row.
LAMP_INLINE Vf join_rows(const Vf *mass) {
  const __m512 *m = (const __m512 *)mass;
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(m[0], m[1]), _mm512_unpackhi_ps(m[0], m[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(m[2], m[3]), _mm512_unpackhi_ps(m[2], m[3]));
  return (Vf)_mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
LAMP_INLINE __m512 pairs_of_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
// The sums of sixteen such, in order, by row.
LAMP_INLINE void totals_by_row(const Vf *joined, __m512i *to) {
  for (int i = 0; i < 4; i++) {
    const __m512 a = pairs_of_lanes((__m512)joined[i], (__m512)joined[i + 4]);
    const __m512 b = pairs_of_lanes((__m512)joined[i + 8], (__m512)joined[i + 12]);
    to[i] = (__m512i)pairs_of_lanes(a, b);
  }
  transpose(to);
}

static void begin_weigher(const Rows &rows, int r0, const float *level, Weigher &weigher) {
  for (int r = 0; r < ABREAST; r++) {
    weigher.coefficient[r] = rows.coefficient[r0 + r];
    weigher.mean[r] = rows.half_sum[r0 + r] * rows.coefficient[r0 + r];
    weigher.level[r] = level[r0 + r] - HALF_STEP;
    weigher.begin[r] = -16 * rows.sum8[r0 + r];
  }
}
