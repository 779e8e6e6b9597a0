// Small kernels, right and wrong ones, that test the emulator itself.
#pragma once

#include "emulated_ptx.h"

namespace taps_fast::cuda {

struct Probe {
  const float* in;
  int size_in;
  float* out;
  int size_out;
};

inline std::vector<emulator::Extent> extents(const Probe& p) {
  return {{p.in, 1, 0, 4 * p.size_in}, {p.out, 1, 0, 4 * p.size_out, true}};
}

inline float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

/// in: for each lane a0 a1 a2 a3 b0 b1 (bits) d0 d1 d2 d3; out: d.
template <class T>
void probe_mma(Probe p) {
  const float* mine = p.in + threadIdx.x * 10;
  uint32_t r[6];
  float d[4];
  for (int k = 0; k < 6; k++) r[k] = emulator::bits<uint32_t>(load(mine + k));
  for (int k = 0; k < 4; k++) d[k] = load(mine + 6 + k);
  mma(d, r[0], r[1], r[2], r[3], r[4], r[5], T{});
  for (int k = 0; k < 4; k++) store(p.out + threadIdx.x * 4 + k, d[k]);
}

/// out: in of lane ^ 5; how many lanes below have a positive value; the lane 3 below; whether any value is 1; whether
/// any is 2.
inline void probe_warp(Probe p) {
  const int n = threadIdx.x;
  const float x = load(p.in + n);
  store(p.out + n, __shfl_xor_sync(~0u, x, 5));
  const unsigned positive = __ballot_sync(~0u, x > 0);
  store(p.out + 32 + n, static_cast<float>(__popc(positive & ((1u << n) - 1))));
  store(p.out + 64 + n, static_cast<float>(__shfl_up_sync(~0u, n, 3)));
  store(p.out + 96 + n, static_cast<float>(__syncthreads_or(x == 1.f)));
  store(p.out + 128 + n, static_cast<float>(__syncthreads_or(x == 2.f)));
}

/// Each thread reads what its right neighbour wrote.
template <bool kBarrier>
void probe_neighbour(Probe p) {
  const int n = threadIdx.x;
  shared_floats()[n] = load(p.in + n);
  if (kBarrier) __syncthreads();
  store(p.out + n, shared_floats()[(n + 1) % p.size_in]);
}

/// Copies 4 floats a thread; kWait: groups it leaves unfinished of the two it started.
template <int kPending>
void probe_copy(Probe p) {
  const int n = threadIdx.x;
  uint4* slots = reinterpret_cast<uint4*>(dynamic_shared()) + 2 * n;
  cp_async<Use::kOnce>(slots, p.in + 4 * n, true);
  cp_async_commit();
  cp_async<Use::kAgain>(slots + 1, p.in + 4 * n, false);
  cp_async_commit();
  cp_async_wait<kPending>();
  for (int k = 0; k < 8; k++) store(p.out + 8 * n + k, reinterpret_cast<float*>(slots)[k]);
}

/// out[block] = Σ over the cluster of in[its blocks].
template <bool kBarrier>
void probe_cluster(Probe p) {
  const int blocks = p.size_in;
  if (threadIdx.x == 0) shared_floats()[0] = load(p.in + blockIdx.x);
  if (kBarrier) cluster_sync();
  float sum = 0;
  for (int rank = 0; rank < blocks; rank++) sum += cluster_load(shared_floats(), rank);
  if (threadIdx.x == 0) store(p.out + blockIdx.x, sum);
  cluster_sync();
}

/// One thread does not come to the barrier.
inline void probe_deadlock(Probe) {
  if (threadIdx.x != 3) __syncthreads();
}
inline void probe_reads_beyond(Probe p) { store(p.out, load(p.in + p.size_in)); }
inline void probe_writes_input(Probe p) { store(const_cast<float*>(p.in), 1.f); }
inline void probe_misaligned_copy(Probe p) {
  cp_async<Use::kOnce>(reinterpret_cast<uint4*>(dynamic_shared()), p.in + 1, true);
}
inline void probe_writes_beyond_shared(Probe) { shared_floats()[512] = 1.f; }

}  // namespace taps_fast::cuda
