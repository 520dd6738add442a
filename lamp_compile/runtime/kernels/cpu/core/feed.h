// What will be read soon, asked for a line at a time between all that is worked out. Processors follow a stream by
// themselves, but not far enough, and forget requests that come faster than one every six cycles or in bursts (Zen 5).

struct Feed {
  static constexpr uint32_t ROOM = 64;  // pieces: several times as many as a run of sub-tiles has
  const uint8_t *at, *end;              // of the piece under way; asking again for what is there costs next to nothing
  uint32_t next, count;
  const uint8_t *from[ROOM], *to[ROOM];
};

// Asks for a line. On x86 into the second cache, which has room for several times as many requests under way as the
// first one, and from which products hardly wait; but for what table.h says.
LAMP_INLINE void ask(const void *at) {
#if defined(LAMP_ASKED)
  LAMP_ASKED(at);  // of a test
#elif defined(LAMP_X86)
  if (lamp_ask_near)
    __builtin_prefetch(at, 0, 3);
  else
    __builtin_prefetch(at, 0, 2);
#else
  __builtin_prefetch(at);
#endif
}

// Two lines next to each other are best asked for together (Zen 4).
LAMP_INLINE void ask_for_two(const uint8_t *at) { ask(at), ask(at + 64); }

// For what nothing can be put between: bytes that begin at a line.
LAMP_INLINE void ask_for(const uint8_t *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) ask(from + i);
}

// Nothing to ask for; `idle` is any address that may be asked for.
LAMP_INLINE void clear(Feed &feed, const void *idle) {
  feed.at = feed.end = (const uint8_t *)idle;
  feed.next = feed.count = 0;
}
// Pieces for which there is no room are read without having been asked for.
LAMP_INLINE void push(Feed &feed, const uint8_t *from, int64_t bytes) {
  const uint32_t last = (feed.count - 1) % Feed::ROOM;
  if (feed.next != feed.count && feed.to[last] == from) {
    feed.to[last] = from + bytes;
  } else if (feed.count - feed.next < Feed::ROOM) {
    feed.from[feed.count % Feed::ROOM] = from;
    feed.to[feed.count++ % Feed::ROOM] = from + bytes;
  }
}
// Where so many bytes to ask for begin. Some may lie behind the end of a piece; none of them is read.
LAMP_INLINE const uint8_t *take(Feed &feed, int64_t bytes) {
  if (feed.at >= feed.end) {
    if (feed.next == feed.count) return feed.at - bytes;
    feed.at = feed.from[feed.next % Feed::ROOM];
    feed.end = feed.to[feed.next++ % Feed::ROOM];
  }
  const uint8_t *at = feed.at;
  feed.at += bytes;
  return at;
}

// Of the second pass: the high plane of the values of the next run, and refined sub-tiles of any. With AVX-512, D = 128
// and four rows, three quarters of the values' lines are asked for between products (by rows half of them, and a
// quarter as sums are added up), an eighth as cold keys are weighed, a sixteenth as they are rounded and as many as the
// run is opened (tests/native/asked.cpp).
struct Feeds {
  Feed values, refined;
};
