// What finish.cu asks of a GPU. Tests compile that file for a host, with functions of the same names.
#ifdef __CUDACC__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ __launch_bounds__(THREADS, 1) void

DEVICE int thread_index() { return threadIdx.x; }
// Of a grid [batch, kv heads, blocks to one of them].
DEVICE int block_index() { return blockIdx.x; }
DEVICE int kv_head_index() { return blockIdx.y; }
DEVICE int sequence_index() { return blockIdx.z; }
DEVICE char *shared_memory() {
  extern __shared__ __align__(16) char held[];
  return held;
}

DEVICE void sync_threads() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE int shuffle_int(int x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE u32 ballot(bool x) { return __ballot_sync(~0u, x); }
DEVICE u32 most_of_warp(u32 x) { return __reduce_max_sync(~0u, x); }
DEVICE int count_bits(u32 x) { return __popc(x); }
DEVICE int lowest_bit(u32 x) { return __ffs(x) - 1; }

#define INFINITE __int_as_float(0x7F800000)
DEVICE float bits_as_float(u32 x) { return __uint_as_float(x); }
DEVICE u32 float_as_bits(float x) { return __float_as_uint(x); }
DEVICE float larger_of(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller_of(float a, float b) { return fminf(a, b); }
DEVICE float floor_of(float x) { return floorf(x); }
DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log_of_two(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The division of Triton's kernels.
DEVICE float divided(float a, float b) {
  float y;
  asm("div.full.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
DEVICE float half_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE u16 float_to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// Past the first cache: what an earlier launch left at the same addresses must not be found there.
DEVICE u32 load4(const void *at) {
  u32 x;
  asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(x) : "l"(at));
  return x;
}

template <int WORDS>
DEVICE void load_global(u32 *to, const void *at) {
  if constexpr (WORDS == 4)
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(at));
  else
    asm volatile("ld.global.cg.v2.b32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(at));
}

// From shared memory.
template <int WORDS>
DEVICE void load_words(u32 *to, const u8 *from) {
  struct alignas(WORDS < 4 ? 4 * WORDS : 16) Words {
    u32 word[WORDS];
  };
  const Words words = *reinterpret_cast<const Words *>(from);
#pragma unroll
  for (int i = 0; i < WORDS; i++) to[i] = words.word[i];
}

// Copies into shared memory that a thread goes on beside, in groups. Also past the first cache.
DEVICE void copy16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)
               : "memory");
}
DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until no more than so many of this thread's latest groups are under way.
template <int LEFT>
DEVICE void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// c [16, 8] += a [16, 32] b [32, 8], int8. Of a lane: rows lane / 4 and 8 more of a and c; of k four numbers from
// 4 * (lane % 4) and from 16 + that; column lane / 4 of b, columns 2 * (lane % 4) and the next of c.
DEVICE void multiply(u32 *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Counts up, behind all that this block has written; what others wrote ahead of their count can be read.
DEVICE int arrive(int *counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
// Programmatic dependent launch, as in _device.py.
DEVICE void wait_for_last_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
#include "host_device.h"
#endif
