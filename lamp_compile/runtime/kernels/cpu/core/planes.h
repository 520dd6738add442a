// Where a key lies, and in which order the bytes of its storage tile.

constexpr int SUBTILE = 32;  // keys that kernels take at a time

struct Place {
  int64_t tile;  // among all stored tiles
  int offset;    // key within it
};

// Tiles are powers of two but for odd ones from outside; a division takes ten times as long as a shift, of 64 bits
// several times that.
LAMP_INLINE int64_t page_of(const LampPlanes &planes, int64_t j) {
  if (!(planes.tile & (planes.tile - 1))) return j >> __builtin_ctzll(planes.tile);
  if ((uint64_t)j >> 32 || planes.tile >> 32) return j / planes.tile;
  return (uint32_t)j / (uint32_t)planes.tile;
}

// Place of key j of sequence b and kv head g; false where a table has no page for it, with the offset alone.
LAMP_INLINE bool find(const LampPlanes &planes, int64_t b, int64_t g, int64_t j, Place &place) {
  const int64_t page = page_of(planes, j);
  place.offset = (int)(j - page * planes.tile);
  if (page < 0 || page >= planes.pages) return false;
  if (!planes.table) {
    place.tile = (b * planes.kv_heads + g) * planes.stored_tiles + page;
    return true;
  }
  const int64_t listed = planes.table[b * planes.table_stride + page];
  if (listed < 0 || listed >= planes.stored_tiles) return false;
  place.tile = g * planes.stored_tiles + listed;
  return true;
}
// The same, where a page that is not there is tile 0: nothing of it is live.
LAMP_INLINE Place place_of(const LampPlanes &planes, int64_t b, int64_t g, int64_t j) {
  Place place;
  if (find(planes, b, g, j, place)) return place;
  place.tile = planes.table ? g * planes.stored_tiles : 0;
  return place;
}
// The place of the sub-tile behind one at `place`, where neither a table nor an order says otherwise.
LAMP_INLINE void advance(const LampPlanes &planes, Place &place) {
  place.offset += SUBTILE;
  if (place.offset < planes.tile) return;
  place.offset = 0;
  place.tile++;
}
LAMP_INLINE int64_t key_at(const LampPlanes &planes, const Place &place) {
  return (place.tile * planes.tile + place.offset) * planes.half_k;
}
LAMP_INLINE int64_t value_at(const LampPlanes &planes, const Place &place) {
  return place.tile * planes.tile * planes.half_v + place.offset;
}
LAMP_INLINE int64_t scale_at(const LampPlanes &planes, const Place &place) {
  return place.tile * planes.tile + place.offset;
}

// Bytes of one key or value: byte c of it. By lanes, four channels of a key lie together, and four keys of a channel:
// products add up four bytes each, and make a vector of sums of as many keys or channels.
LAMP_INLINE int64_t key_byte(const LampPlanes &planes, const Place &place, int64_t c) {
  if (!planes.by_lanes) return key_at(planes, place) + c;
  return place.tile * SUBTILE * planes.half_k + c / 4 * (4 * SUBTILE) + place.offset * 4 + c % 4;
}
LAMP_INLINE int64_t value_byte(const LampPlanes &planes, const Place &place, int64_t c) {
  if (!planes.by_lanes) return value_at(planes, place) + c * planes.tile;
  return place.tile * SUBTILE * planes.half_v + place.offset / 4 * (4 * planes.half_v) + 4 * c + place.offset % 4;
}

// A sub-tile by lanes, as rows of keys and as rows of channels.
LAMP_INLINE void keys_of_lanes(const uint8_t *lanes, int half, uint8_t *rows) {
  for (int c = 0; c < half; c += 4)
    for (int key = 0; key < SUBTILE; key++) __builtin_memcpy(rows + key * half + c, lanes + c * SUBTILE + 4 * key, 4);
}
LAMP_INLINE void values_of_lanes(const uint8_t *lanes, int half, uint8_t *rows) {
  for (int key = 0; key < SUBTILE; key += 4)
    for (int c = 0; c < half; c++) __builtin_memcpy(rows + c * SUBTILE + key, lanes + key * half + 4 * c, 4);
}

// Ask for bytes that are read soon. Processors follow one stream by themselves, but not far enough ahead.
LAMP_INLINE void fetch(const void *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}
LAMP_INLINE int64_t integer(const LampIntegers &x, int64_t b) {
  const int64_t i = b * x.stride;
  return x.bytes == 8 ? ((const int64_t *)x.data)[i] : ((const int32_t *)x.data)[i];
}
