// The C interface: which kernels this machine can run, threads, memory.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "table.h"

#if defined(LAMP_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(_WIN32)
#define NOMINMAX
#include <malloc.h>
#include <windows.h>
#endif
#if defined(_MSC_VER) && !defined(LAMP_ASK_CPUID)
#define LAMP_ASK_CPUID  // what __builtin_cpu_supports asks is not linked there
#endif
#if defined(LAMP_X86)
#include <cpuid.h>
#endif

namespace {

#if defined(LAMP_X86) && defined(LAMP_ASK_CPUID)
struct Features {
  bool avx2 = false, avx512 = false;  // with all that those files are compiled for

  Features() {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // OSXSAVE
    const bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const bool ymm = (low & 6) == 6, zmm = (low & 0xe6) == 0xe6;  // registers that the system saves
    avx2 = ymm && fma && f16c && (b >> 5 & 1);
    avx512 = avx2 && zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 11 & 1);
  }
};
#elif defined(LAMP_X86)
struct Features {
  bool avx2, avx512;

  Features() {
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and F16C, which all of these have
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
  }
};
#endif

#if defined(LAMP_X86)
bool is_zen5() {
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != 0x68747541 || d != 0x69746e65 || c != 0x444d4163) return false;
  return __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 15) + (a >> 20 & 255) == 26;  // "AuthenticAMD", family 1Ah
}
#endif

#if defined(_WIN32)
char *allocate(size_t bytes) { return static_cast<char *>(_aligned_malloc(bytes, 64)); }
void release(char *data) { _aligned_free(data); }
#else
char *allocate(size_t bytes) { return static_cast<char *>(std::aligned_alloc(64, bytes)); }
void release(char *data) { std::free(data); }
#endif

std::vector<const Kernels *> find_kernels() {
  std::vector<const Kernels *> found;
#if defined(LAMP_X86)
  const Features features;
  if (features.avx512) found.push_back(&lamp_avx512);
  if (features.avx2) found.push_back(&lamp_avx2);
#endif
#if defined(LAMP_NEON)
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&lamp_neon);
#elif defined(_WIN32)
  constexpr unsigned long DOT_PRODUCT = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
  if (IsProcessorFeaturePresent(DOT_PRODUCT)) found.push_back(&lamp_neon);
#else
  found.push_back(&lamp_neon);  // every Apple arm64 has the dot product
#endif
#endif
  found.push_back(&lamp_portable);
  return found;
}

const std::vector<const Kernels *> &all_kernels() {
  static const std::vector<const Kernels *> found = find_kernels();
  return found;
}

std::atomic<const Kernels *> chosen{nullptr};

const Kernels &kernels() {
  const Kernels *now = chosen.load(std::memory_order_relaxed);
  return now ? *now : *all_kernels().front();
}

using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<GompParallel> gomp{nullptr};

struct Lent {
  LampParallel parallel;
  void *context;
};
thread_local Lent lent{nullptr, nullptr};

constexpr int64_t SEATS = 64;      // threads that have tasks of their own; more of them help
thread_local int64_t my_seat = 1;  // in the call before

// Every thread has a share of the tasks, the same in every call, so that what it reads and writes stays in the caches
// of its core; who is done with its own takes from the others.
struct Job {
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
  };
  Task task;
  Help help;
  void *data;
  int64_t count, shares;
  std::atomic<uint64_t> taken{0};
  std::atomic<int64_t> late{0};
  Share share[SEATS];

  Job(Task given, void *with, int64_t tasks, int64_t threads, Help then)
      : task(given), help(then), data(with), count(tasks), shares(std::min(threads, SEATS)) {}

  int64_t sit() {
    for (int64_t i = 0; i < shares; i++) {
      const int64_t seat = (my_seat + i) % shares;
      const uint64_t bit = uint64_t{1} << seat;
      if (!(taken.fetch_or(bit) & bit)) return my_seat = seat;
    }
    return shares + late.fetch_add(1);
  }
};

void take_tasks(void *data) {
  Job &job = *static_cast<Job *>(data);
  const int64_t seat = job.sit();
  for (int64_t i = 0; i < job.shares; i++) {
    const int64_t share = (seat + i) % job.shares, end = (share + 1) * job.count / job.shares;
    const int64_t begin = share * job.count / job.shares;
    for (int64_t at; (at = begin + job.share[share].next.fetch_add(1)) < end;) job.task(job.data, at, seat);
  }
  if (job.help) job.help(job.data, seat);
}

void take_tasks_of(void *data, size_t) { take_tasks(data); }

struct Memory {
  char *data = nullptr;
  int64_t bytes = 0;
  ~Memory() { release(data); }
};
constexpr int64_t MOST_KEPT = 256 << 20;

}  // namespace

#if defined(LAMP_X86)
const bool lamp_ask_near = is_zen5();
#endif

bool same_share(int64_t one, int64_t other, int64_t count, int64_t threads) {
  const int64_t shares = std::min(threads, SEATS);
  // The last share that begins at a task or before it: take_tasks() has where they begin.
  const auto share_of = [=](int64_t task) { return ((task + 1) * shares - 1) / count; };
  return share_of(one) == share_of(other);
}

void run(Task task, void *data, int64_t count, int64_t threads, Help help, int64_t useful) {
  useful = std::min(threads, help ? useful : count);
  if (useful <= 1) {
    for (int64_t i = 0; i < count; i++) task(data, i, 0);
    return;
  }
  my_seat = 0;
  Job job(task, data, count, threads, help);
  if (lent.parallel) {
    lent.parallel(lent.context, take_tasks_of, &job, static_cast<size_t>(useful));
    return;
  }
  if (const GompParallel parallel = gomp.load(std::memory_order_relaxed)) {
    // All of them, also those that will find no task: libgomp ends threads that a smaller team has no use for.
    parallel(take_tasks, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> started;
  for (int64_t i = 1; i < useful; i++) {
    try {
      started.emplace_back(take_tasks, &job);
    } catch (...) {
      break;  // fewer threads do the same work
    }
  }
  take_tasks(&job);
  for (std::thread &thread : started) thread.join();
}

void rest(int64_t times) {
  if (times >= 1024) return std::this_thread::yield();
#if defined(LAMP_X86)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

char *scratch(int64_t bytes) {
  static thread_local Memory memory;
  if (bytes <= memory.bytes && memory.bytes <= MOST_KEPT) return memory.data;
  release(memory.data);
  bytes = (bytes + 63) / 64 * 64;
  memory.data = allocate(static_cast<size_t>(bytes));
  memory.bytes = memory.data ? bytes : 0;
  return memory.data;
}

extern "C" {

const char *lamp_instruction_sets(void) {
  static const std::string names = [] {
    std::string text;
    for (const Kernels *found : all_kernels()) text += (text.empty() ? "" : ",") + std::string(found->name);
    return text;
  }();
  return names.c_str();
}

const char *lamp_instruction_set(void) { return kernels().name; }

int lamp_use(const char *name) {
  for (const Kernels *found : all_kernels())
    if (!std::strcmp(found->name, name)) {
      chosen.store(found);
      return 0;
    }
  return -1;
}

void lamp_use_threads_of(GompParallel parallel) { gomp.store(parallel); }
void lamp_lend_threads(LampParallel parallel, void *context) { lent = {parallel, context}; }
int lamp_append(const LampAppend *call) { return kernels().append(call); }
int lamp_attend(const LampAttend *call) { return kernels().attend(call, nullptr); }
int lamp_attend_predicted(const LampAttend *call, const LampPredict *gate) { return kernels().attend(call, gate); }
int lamp_summarize(const LampSummarize *call) { return kernels().summarise(call); }
int64_t lamp_size_of_append(void) { return sizeof(LampAppend); }
int64_t lamp_size_of_attend(void) { return sizeof(LampAttend); }
int64_t lamp_size_of_predict(void) { return sizeof(LampPredict); }
int64_t lamp_size_of_summarize(void) { return sizeof(LampSummarize); }

}  // extern "C"
