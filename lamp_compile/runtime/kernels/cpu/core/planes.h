// Where a key lies.

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

// Ask for bytes that are read soon. Processors follow one stream by themselves, but not far enough ahead.
LAMP_INLINE void fetch(const void *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}
LAMP_INLINE int64_t integer(const LampIntegers &x, int64_t b) {
  const int64_t i = b * x.stride;
  return x.bytes == 8 ? ((const int64_t *)x.data)[i] : ((const int32_t *)x.data)[i];
}
