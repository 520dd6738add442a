// Segments of one piece of work, of which the thread that the piece belongs to takes the first, and threads with nothing
// left of their own the last. Each is worked on by one thread, and leaves what it leaves whoever that is.
// Compilers' atomics: what <atomic> brings along would be compiled for this instruction set and linked for all.

struct alignas(64) Segments {
  uint64_t range;  // where those not taken begin, and in the upper half where they end
  int64_t done;
};

// Both passes over one piece.
struct Shared {
  Segments looks, refines;
};

LAMP_INLINE uint64_t range_of(int64_t first, int64_t end) { return (uint64_t)first | (uint64_t)end << 32; }
LAMP_INLINE void offer(Segments &segments, int64_t count) {
  __atomic_store_n(&segments.done, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&segments.range, range_of(0, count), __ATOMIC_RELEASE);
}

// The first segment that nobody has taken, or the last one; -1 where there is none.
LAMP_INLINE int64_t take_segment(Segments &segments, bool last) {
  uint64_t seen = __atomic_load_n(&segments.range, __ATOMIC_ACQUIRE);
  for (;;) {
    const int64_t first = (int64_t)(seen & 0xffffffffu), end = (int64_t)(seen >> 32);
    if (first >= end) return -1;
    const uint64_t left = last ? range_of(first, end - 1) : range_of(first + 1, end);
    if (__atomic_compare_exchange_n(&segments.range, &seen, left, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
      return last ? end - 1 : first;
  }
}
LAMP_INLINE void done_with_one(Segments &segments) { __atomic_add_fetch(&segments.done, 1, __ATOMIC_RELEASE); }

// Until others are done with what they took.
LAMP_INLINE void wait_for(const Segments &segments, int64_t count) {
  for (int64_t times = 0; __atomic_load_n(&segments.done, __ATOMIC_ACQUIRE) < count; times++) rest(times);
}
