// What each instruction set's file hands over, and what all of them may call.
#pragma once
#include "lamp_core.h"

struct Kernels {
  const char *name;
  int (*append)(const LampAppend *);
  int (*attend)(const LampAttend *, const LampPredict *);
  int (*summarise)(const LampSummarize *);
};

typedef void (*Task)(void *data, int64_t task, int64_t thread);
typedef void (*Help)(void *data, int64_t thread);
// Tasks 0 to count - 1 on at most so many threads, numbered from 0. Whoever finds no task any more helps, where that is
// of use to so many threads at most.
void run(Task task, void *data, int64_t count, int64_t threads, Help help = nullptr, int64_t useful = 0);
// Whether two of those tasks are a thread's own, which it takes one after the other.
bool same_share(int64_t one, int64_t other, int64_t count, int64_t threads);
// Of a thread that waits for another one, for the so many-th time.
void rest(int64_t times);
// Memory of the calling thread, kept for its next call; null without memory. Aligned to 64 bytes, not cleared.
char *scratch(int64_t bytes);

#if defined(LAMP_X86)
#if !defined(_WIN32)
__attribute__((visibility("hidden")))
#endif
// Whether lines are asked for into the first cache (feed.h). So on Zen 5, which has room there for what a run of keys
// reads, and forgets requests for the second cache where it must look up the address of a page.
extern const bool lamp_ask_near;
#endif

extern const Kernels lamp_portable;
extern const Kernels lamp_avx2;
extern const Kernels lamp_avx512;
extern const Kernels lamp_neon;
