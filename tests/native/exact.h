// Memory of exactly the size asked for, at any alignment its elements allow, so that a sanitizer sees a single byte
// read or written before or behind it; and numbers from a seed.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(void const volatile *, size_t);
extern "C" void __asan_unpoison_memory_region(void const volatile *, size_t);
#else
static void __asan_poison_memory_region(void const volatile *, size_t) {}
static void __asan_unpoison_memory_region(void const volatile *, size_t) {}
#endif

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return (double)(next() >> 11) / 9007199254740992.0; }
  float normal() {
    double sum = 0;
    for (int i = 0; i < 12; i++) sum += uniform();
    return (float)(sum - 6);
  }
  template <class T, size_t N>
  T pick(const T (&values)[N]) {
    return values[below(N)];
  }
};

template <class T>
class Exact {
 public:
  Exact() = default;
  Exact(Random &random, int64_t count) : count_(count), before_((size_t)random.below(64 / sizeof(T)) * sizeof(T)) {
    base_ = (char *)std::malloc(before_ + bytes());
    __asan_poison_memory_region(base_, before_ / 8 * 8);
    std::memset(data(), 0xa5, bytes());
  }
  Exact(Exact &&other) noexcept { *this = static_cast<Exact &&>(other); }
  Exact &operator=(Exact &&other) noexcept {
    std::swap(base_, other.base_), std::swap(count_, other.count_), std::swap(before_, other.before_);
    return *this;
  }
  ~Exact() {
    if (!base_) return;
    __asan_unpoison_memory_region(base_, before_);
    std::free(base_);
  }
  T *data() { return base_ ? (T *)(base_ + before_) : nullptr; }
  const T *data() const { return base_ ? (const T *)(base_ + before_) : nullptr; }
  T &operator[](int64_t i) { return data()[i]; }
  const T &operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }
  size_t bytes() const { return (size_t)count_ * sizeof(T); }
  std::vector<T> copy() const { return {data(), data() + count_}; }
  bool same(const std::vector<T> &other) const { return !std::memcmp(data(), other.data(), bytes()); }
  void assign(const std::vector<T> &other) { std::memcpy(data(), other.data(), bytes()); }

 private:
  char *base_ = nullptr;
  int64_t count_ = 0;
  size_t before_ = 0;
};
