// A GPU for tests, as far as finish.cu needs one: every thread of a block is a coroutine, warps and the block meet at
// barriers; blocks run one after the other. A thread that waits for one that has ended, or for others in another order,
// ends the program.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef long long i64;
using std::max;
using std::min;

#define DEVICE inline
#define KERNEL static void
#define INFINITE INFINITY

namespace host {

constexpr size_t STACK = 64 << 10;

struct Barrier {
  int wanted = 0, arrived = 0;
  int64_t passed = 0;
};
// What lanes show each other: two exchanges in turns, since a lane may begin the next one while others end this one.
struct Warp {
  Barrier barrier;
  u32 shown[2][32][6];
  int turn[32] = {};
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int index;
  bool done = false;
};
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  char *shared;
  int index, kv_head, sequence;
  int64_t events = 0;
};

inline Block *block;
inline Thread *self;
inline ucontext_t scheduler;
inline void (*body)();

inline void wait_at(Barrier &barrier) {
  const int64_t before = barrier.passed;
  if (++barrier.arrived == barrier.wanted)
    barrier.arrived = 0, barrier.passed++, block->events++;
  else
    while (barrier.passed == before) swapcontext(&self->context, &scheduler);
}
inline Warp &warp() { return block->warps[self->index / 32]; }

// Shows the warp `count` numbers; gives back what all lanes show.
inline u32 (*exchange(const u32 *mine, int count))[6] {
  Warp &w = warp();
  const int lane = self->index % 32, turn = w.turn[lane];
  w.turn[lane] = 1 - turn;
  std::memcpy(w.shown[turn][lane], mine, count * sizeof(u32));
  wait_at(w.barrier);
  return w.shown[turn];
}
inline u32 exchange_one(u32 mine, int lane) { return exchange(&mine, 1)[lane & 31][0]; }

inline void start_thread() {
  body();
  self->done = true, block->events++;
  swapcontext(&self->context, &scheduler);
}

// All threads of one block, until they have ended.
inline void run_block(int index, int kv_head, int sequence, int threads, size_t shared_bytes, void (*function)()) {
  Block here;
  here.kv_head = kv_head, here.sequence = sequence;
  std::vector<char> memory(shared_bytes + 16, (char)0xA5);
  here.shared = memory.data() + (16 - (uintptr_t)memory.data() % 16), here.index = index;
  here.barrier.wanted = threads, here.warps.resize(threads / 32), here.threads.resize(threads);
  for (Warp &w : here.warps) w.barrier.wanted = 32;
  block = &here, body = function;
  for (int i = 0; i < threads; i++) {
    Thread &thread = here.threads[i];
    thread.index = i, thread.stack.reset(new char[STACK]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, start_thread, 0);
  }
  for (bool left = true; left;) {
    const int64_t before = here.events;
    left = false;
    for (Thread &thread : here.threads) {
      if (thread.done) continue;
      left = true, self = &thread;
      swapcontext(&scheduler, &thread.context);
    }
    if (left && here.events == before) std::fprintf(stderr, "threads wait for each other\n"), std::abort();
  }
}

}  // namespace host

DEVICE int thread_index() { return host::self->index; }
DEVICE int block_index() { return host::block->index; }
DEVICE int kv_head_index() { return host::block->kv_head; }
DEVICE int sequence_index() { return host::block->sequence; }
DEVICE char *shared_memory() { return host::block->shared; }
DEVICE void sync_threads() { host::wait_at(host::block->barrier); }
DEVICE void sync_warp() { host::wait_at(host::warp().barrier); }
DEVICE int arrive(int *counter) { return (*counter)++; }
DEVICE void wait_for_last_launch() {}
DEVICE void let_next_launch() {}

DEVICE float bits_as_float(u32 x) {
  float y;
  return std::memcpy(&y, &x, 4), y;
}
DEVICE u32 float_as_bits(float x) {
  u32 y;
  return std::memcpy(&y, &x, 4), y;
}
DEVICE float larger_of(float a, float b) { return std::fmax(a, b); }
DEVICE float smaller_of(float a, float b) { return std::fmin(a, b); }
DEVICE float floor_of(float x) { return std::floor(x); }
DEVICE float power_of_two(float x) { return std::exp2(x); }
DEVICE float log_of_two(float x) { return std::log2(x); }
DEVICE float divided(float a, float b) { return a / b; }
DEVICE float half_to_float(u16 x) {
  _Float16 y;
  return std::memcpy(&y, &x, 2), (float)y;
}
DEVICE u16 float_to_half(float x) {
  const _Float16 y = (_Float16)x;
  u16 z;
  return std::memcpy(&z, &y, 2), z;
}
DEVICE int count_bits(u32 x) { return __builtin_popcount(x); }
DEVICE int lowest_bit(u32 x) { return __builtin_ctz(x); }

DEVICE float shuffle(float x, int lane) { return bits_as_float(host::exchange_one(float_as_bits(x), lane)); }
DEVICE float shuffle_xor(float x, int mask) { return shuffle(x, host::self->index % 32 ^ mask); }
DEVICE int shuffle_int(int x, int lane) { return (int)host::exchange_one((u32)x, lane); }
DEVICE u32 ballot(bool x) {
  const u32 mine = x;
  const auto all = host::exchange(&mine, 1);
  u32 found = 0;
  for (int lane = 0; lane < 32; lane++) found |= all[lane][0] << lane;
  return found;
}
DEVICE u32 most_of_warp(u32 x) {
  const auto all = host::exchange(&x, 1);
  u32 most = 0;
  for (int lane = 0; lane < 32; lane++) most = std::max(most, all[lane][0]);
  return most;
}

DEVICE u32 load4(const void *at) {
  u32 x;
  return std::memcpy(&x, at, 4), x;
}
// Addresses must be multiples of the size, as on a GPU.
DEVICE void load_aligned(void *to, const void *at, size_t bytes) {
  if ((uintptr_t)at % bytes || (uintptr_t)to % 4) std::fprintf(stderr, "%zu bytes from %p\n", bytes, at), std::abort();
  std::memcpy(to, at, bytes);
}
template <int WORDS>
DEVICE void load_global(u32 *to, const void *at) {
  load_aligned(to, at, 4 * WORDS);
}
template <int WORDS>
DEVICE void load_words(u32 *to, const u8 *from) {
  for (int i = 0; i < WORDS; i += 4) load_aligned(to + i, from + 4 * i, 4 * min(WORDS - i, 4));
}
DEVICE void copy16(void *to, const void *from) {
  if ((uintptr_t)to % 16) std::fprintf(stderr, "16 bytes to %p\n", to), std::abort();
  load_aligned(to, from, 16);
}
DEVICE void end_group() {}
template <int LEFT>
DEVICE void wait_for_groups() {}

// The layout of mma.m16n8k32 as PTX defines it.
DEVICE void multiply(u32 *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  const auto all = host::exchange(mine, 6);
  const int lane = host::self->index % 32;
  for (int n = 0; n < 4; n++) {
    const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
    int sum = (int)c[n];
    for (int k = 0; k < 32; k++) {
      const u32 a = all[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], b = all[column * 4 + k % 16 / 4][4 + k / 16];
      sum += (int)(int8_t)(a >> k % 4 * 8) * (int8_t)(b >> k % 4 * 8);
    }
    c[n] = (u32)sum;
  }
}
