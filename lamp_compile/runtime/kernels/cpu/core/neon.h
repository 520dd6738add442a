// Integer products with NEON and its dot product (Armv8.2, from Cortex-A55/A76 and Apple A13 on). What they compute:
// portable.h.

// Up to 16 bytes, zeros behind them; never reads past the last.
LAMP_INLINE uint8x16_t bytes_of(const uint8_t *at, int count) {
  if (count >= 16) return vld1q_u8(at);
  uint8_t padded[16] = {0};
  __builtin_memcpy(padded, at, count);
  return vld1q_u8(padded);
}
LAMP_INLINE int8x16_t upper16(uint8x16_t b) {
  return vreinterpretq_s8_u8(vandq_u8(b, vdupq_n_u8(0xf0)));
}  // 16 * nibble
LAMP_INLINE int8x16_t lower16(uint8x16_t b) { return vreinterpretq_s8_u8(vshlq_n_u8(b, 4)); }
LAMP_INLINE int32x4_t sums_of_4(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
  return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

template <int ROWS>
LAMP_INLINE void dots(const uint8_t *plane, int half, const int8_t *q, const int32_t *, Feed &feed, int32_t *out) {
  for (int j = 0; j < SUBTILE; j += 4) {
    const uint8_t *soon = take(feed, 4 * half);
    for (int i = 0; i < 4 * half; i += 64) ask(soon + i);
    int32x4_t sum[ROWS][4];
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < 4; i++) sum[r][i] = vdupq_n_s32(0);
    for (int c = 0; c < half; c += 16)
      for (int i = 0; i < 4; i++) {
        const uint8x16_t bytes = bytes_of(plane + (j + i) * half + c, half - c);
        const int8x16_t upper = upper16(bytes), lower = lower16(bytes);
        for (int r = 0; r < ROWS; r++) {
          const int8_t *query = q + 2 * r * PADDED + c;
          sum[r][i] = vdotq_s32(sum[r][i], upper, vld1q_s8(query));
          sum[r][i] = vdotq_s32(sum[r][i], lower, vld1q_s8(query + PADDED));
        }
      }
    for (int r = 0; r < ROWS; r++)
      vst1q_s32(out + r * SUBTILE + j, vshrq_n_s32(sums_of_4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), 4));
  }
}

constexpr int MOST_TILES = 8;
template <int ROWS>
LAMP_INLINE void values(const uint8_t *const *tiles, int count, int64_t stride, int half, const uint8_t *w, Feed &feed,
                        int32_t *out) {
  // Weights go up to 255 and the dot product is signed: w = (w - 128) + 128.
  const uint8x16_t top = vdupq_n_u8(0x80);
  const int8x16_t ones = vdupq_n_s8(1);
  for (int c = 0; c < half; c += 4) {
    const int channels = half - c >= 4 ? 4 : half - c;
    int32x4_t sums[ROWS][2][4], mean[2][4];
    for (int p = 0; p < 4; p++) {
      for (int r = 0; r < ROWS; r++) sums[r][0][p] = sums[r][1][p] = vdupq_n_s32(0);
      mean[0][p] = mean[1][p] = vdupq_n_s32(0);
      if (p >= channels) continue;
      const uint8_t *soon = p % 2 ? nullptr : take(feed, 64 * count);
      for (int t = 0; t < count; t++) {
        if (soon) ask(soon + 64 * t);
        for (int part = 0; part < 2; part++) {
          const uint8x16_t bytes = vld1q_u8(tiles[t] + (c + p) * stride + 16 * part);
          const int8x16_t upper = upper16(bytes), lower = lower16(bytes);
          mean[0][p] = vdotq_s32(mean[0][p], upper, ones);
          mean[1][p] = vdotq_s32(mean[1][p], lower, ones);
          for (int r = 0; r < ROWS; r++) {
            const int8x16_t weight =
                vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + (t * ROWS + r) * SUBTILE + 16 * part), top));
            sums[r][0][p] = vdotq_s32(sums[r][0][p], weight, upper);
            sums[r][1][p] = vdotq_s32(sums[r][1][p], weight, lower);
          }
        }
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int part = 0; part < 2; part++) {
        for (int p = 0; p < 4; p++) sums[r][part][p] = vaddq_s32(sums[r][part][p], vshlq_n_s32(mean[part][p], 7));
        int32_t found[4];
        vst1q_s32(found, sums_of_4(sums[r][part][0], sums[r][part][1], sums[r][part][2], sums[r][part][3]));
        __builtin_memcpy(out + r * 2 * half + part * half + c, found, channels * sizeof(int32_t));
      }
  }
}

LAMP_INLINE Vf halves(const uint16_t *from) {
  float x[LANES];
  for (int i = 0; i < LANES; i += 4) vst1q_f32(x + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
  return load(x);
}

#include "fine_by_parts.h"
