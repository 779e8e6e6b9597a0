// What a kernel says to the machine beyond C++: memory, tensor cores, clusters. tests/emulator has a twin of each
// function, so that the kernels' own source also runs on a CPU. Keep a new instruction here, never in a kernel.
#pragma once

#ifdef TAPS_FAST_EMULATED
#include "emulated_ptx.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace taps_fast::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

/// The number, in the narrowest of float32 and float64 that holds it.
__device__ __forceinline__ float to_wide(float x) { return x; }
__device__ __forceinline__ double to_wide(double x) { return x; }
__device__ __forceinline__ float to_wide(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_wide(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Round to nearest, ties to even.
__device__ __forceinline__ void from_wide(float x, float& y) { y = x; }
__device__ __forceinline__ void from_wide(double x, double& y) { y = x; }
__device__ __forceinline__ void from_wide(float x, BFloat16& y) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
__device__ __forceinline__ void from_wide(float x, Half& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

/// Memory that no kernel writes while this one runs.
template <class T>
__device__ __forceinline__ T load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    T x;
    asm("ld.global.nc.b16 %0, [%1];" : "=h"(x.bits) : "l"(p));
    return x;
  } else {
    return __ldg(p);
  }
}

/// Memory that nobody but this thread may write meanwhile.
template <class T>
__device__ __forceinline__ T load_own(const T* p) {
  return *p;
}

template <class T>
__device__ __forceinline__ void store(T* p, T x) {
  *p = x;
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

enum class Use { kOnce, kAgain };

/// Starts copying 16 bytes to shared memory; both addresses are multiples of 16. Without `real`, zeros are written
/// and nothing is read. What is used once by a block goes past L1, and its neighbours are fetched to L2.
template <Use kUse>
__device__ __forceinline__ void cp_async(uint4* shared, const void* global, bool real) {
  const int bytes = real ? 16 : 0;
  if constexpr (kUse == Use::kOnce)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

/// Closes the group of copies that this thread has started since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most kPending of this thread's latest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// d[16, 8] += a[16, 16] · b[16, 8] in float32, by a warp. Of lane 4g + q, with pairs (k, k + 1) in one register:
/// a0 = a[g][2q], a1 = a[g + 8][2q], a2 = a[g][2q + 8], a3 = a[g + 8][2q + 8]; b0 = b[2q][g], b1 = b[2q + 8][g];
/// d = {d[g][2q], d[g][2q + 1], d[g + 8][2q], d[g + 8][2q + 1]}.
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// All threads of all blocks of the cluster meet, and see what the others wrote to shared memory.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// *shared, of the block `rank` of the cluster.
__device__ __forceinline__ float cluster_load(const float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
#else
  return *shared;
#endif
}

}  // namespace taps_fast::cuda

#endif
