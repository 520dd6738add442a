// Segments of one piece taken by several threads: each by one of them, the owner's from the front, the others' from the
// back; and `run`, whose threads help when no task is left, and go on with the tasks that are said to be their own.
// Arguments: rounds, threads.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "table.h"
#define LAMP_INLINE static inline
#include "share.h"

static void fail(const char *what, int64_t a, int64_t b) {
  std::printf("%s: %lld, %lld\n", what, (long long)a, (long long)b);
  std::exit(1);
}

// What is worked on is no atomic: a sanitizer sees a segment that two threads have, or that is read before it is done.
static void share_out(int64_t round, int64_t threads, Segments &segments, int64_t &helped) {
  const int64_t count = round % 23;
  std::vector<int64_t> worked(count, 0);
  std::atomic<bool> over{false};
  std::atomic<int64_t> by_others{0};
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; i++)
    others.emplace_back([&] {
      for (int64_t times = 0; !over.load(); times++) {
        const int64_t at = take_segment(segments, true);
        if (at < 0) {
          rest(times);
          continue;
        }
        worked[at]++;
        by_others++;
        done_with_one(segments);
      }
    });
  for (int pass = 1; pass <= 2; pass++) {
    offer(segments, count);
    int64_t last = -1;
    for (int64_t at; (at = take_segment(segments, false)) >= 0; done_with_one(segments)) {
      if (at != last + 1) fail("not the next one", last, at);
      last = at;
      for (int64_t wait = 0; wait < 8; wait++) rest(1024);  // so that the others find some
      worked[at]++;
    }
    wait_for(segments, count);
    for (int64_t at = 0; at < count; at++)
      if (worked[at] != pass) fail("worked on so many times", worked[at], pass);
  }
  over = true;
  for (std::thread &other : others) other.join();
  helped += by_others;
}

struct Called {
  std::atomic<int64_t> tasks{0}, helps{0};
};
static void task(void *data, int64_t, int64_t) { static_cast<Called *>(data)->tasks++; }
static void help(void *data, int64_t) { static_cast<Called *>(data)->helps++; }

// Every thread waits in its first task until all have one: each begins a share then.
struct Begun {
  int64_t threads;
  std::vector<int64_t> first;  // task, by thread; -1 before it has one
  std::atomic<int64_t> waiting{0};
};
static void begin(void *data, int64_t at, int64_t thread) {
  Begun &begun = *static_cast<Begun *>(data);
  if (begun.first[thread] >= 0) return;
  begun.first[thread] = at;
  begun.waiting++;
  for (int64_t times = 0; begun.waiting < begun.threads; times++) rest(times);
}
static void tell_shares(int64_t threads) {
  for (int64_t count = threads; count < 5 * threads; count++) {
    Begun begun = {threads, std::vector<int64_t>(threads, -1)};
    run(begin, &begun, count, threads);
    for (int64_t at = 1; at < count; at++) {
      bool begins = false;
      for (const int64_t first : begun.first) begins |= first == at;
      if (begins == same_share(at - 1, at, count, threads)) fail("shares", at, count);
    }
  }
}

int main(int, char **arguments) {
  const int64_t rounds = std::atoll(arguments[1]), threads = std::atoll(arguments[2]);
  Segments segments = {};
  if (take_segment(segments, true) != -1) fail("taken where nothing was offered", 0, 0);
  int64_t helped = 0;
  for (int64_t round = 0; round < rounds; round++) share_out(round, threads, segments, helped);
  if (!helped) fail("nobody helped", 0, 0);
  tell_shares(threads);
  Called called;
  for (int64_t count = 0; count < 3; count++) run(task, &called, count, threads, help, threads);
  if (called.tasks != 3) fail("tasks", called.tasks, 3);
  if (called.helps != 3 * threads) fail("threads that helped", called.helps, 3 * threads);
  std::printf("%lld rounds, %lld segments by others\n", (long long)rounds, (long long)helped);
  return 0;
}
