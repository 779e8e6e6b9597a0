// A GPU on one CPU thread, for tests: every thread of a cluster is a fibre, barriers and warp instructions are where
// they meet. It is strict where hardware is lenient: asynchronous copies arrive as late as they may, shared memory
// starts as NaN, every global address is checked against the problem's tensors, a barrier that somebody misses is
// an error, and fibres can be run in any order.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};

// Of the fibre that is running.
inline Index threadIdx, blockIdx;

namespace emulator {

/// Memory that a kernel may touch: `rows` pieces of `bytes`, `stride` bytes apart.
struct Extent {
  const void* start;
  int64_t rows, stride, bytes;
  bool writable = false;
};

struct Barrier {
  const char* name;
  int size;
  int arrived = 0;
  int64_t generation = 0;
};

/// A copy that was started and may not have been waited for.
struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  unsigned thread, block;  // block: rank in the cluster
  bool done;
  const Barrier* waits_for;
  int64_t generation;
  std::vector<Copy> copies;
  int groups;                                   // of copies, closed so far
  int exchanges;                                // warp instructions so far
  std::array<std::array<uint32_t, 8>, 2> lane;  // what other lanes read, of this instruction and the one before
};

struct Block {
  std::vector<unsigned char> shared;
  Barrier all{"__syncthreads", 0};
  std::vector<Barrier> warps;
  bool votes[2] = {};  // of __syncthreads_or, by generation of its barrier
};

struct Launch {
  int blocks, threads, cluster, shared_bytes;
};

/// What the tests set and read.
struct Settings {
  int processors = 4;
  bool has_clusters = false;
  bool served = true;  // whether the kernels were compiled for this chip
  int shared_limit = 99 * 1024;  // the smallest of the GPUs that are served
  std::string order = "forward";
  unsigned seed = 0;
  std::string refuse;  // launches fail with this text
  std::vector<Launch> launches;
};
inline Settings settings;

/// Runs a kernel; throws std::runtime_error with what it did wrong.
void run(const Launch& launch, const std::vector<Extent>& extents, const std::function<void()>& kernel);

// For emulated instructions, inside a fibre.
Fiber& current();
Block& block(unsigned rank);
Barrier& cluster_barrier();
[[noreturn]] void fail(const std::string& what);
void meet(Barrier& barrier);
/// Checks that `bytes` at `p` lie in one piece of an extent and are aligned to their size.
void touch(const void* p, int bytes, bool write);
void finish_copies(Fiber& fiber, int pending);

inline Block& my_block() { return block(current().block); }
inline Barrier& my_warp() { return my_block().warps[current().thread / 32]; }

/// A warp instruction: every lane gives words, and reads those of others when all have come.
template <class Read>
auto exchange(const std::array<uint32_t, 8>& words, Read read) {
  Fiber& me = current();
  const int parity = me.exchanges++ % 2;
  me.lane[parity] = words;
  meet(my_warp());
  const Fiber* warp = &me - me.thread % 32;
  return read([=](int lane) -> const std::array<uint32_t, 8>& { return warp[lane].lane[parity]; });
}

template <class To, class From>
To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::my_block().all); }
inline void __syncwarp() { emulator::meet(emulator::my_warp()); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulator::exchange({vote}, [](auto lanes) {
    unsigned mask = 0;
    for (int k = 0; k < 32; k++) mask |= lanes(k)[0] << k;
    return mask;
  });
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  std::array<uint32_t, 8> words = {};
  std::memcpy(words.data(), &x, sizeof x);
  return emulator::exchange(words, [=](auto lanes) {
    T other;
    std::memcpy(&other, lanes(static_cast<int>(threadIdx.x % 32) ^ mask).data(), sizeof other);
    return other;
  });
}

inline int __shfl_up_sync(unsigned, int x, int distance) {
  return emulator::exchange({static_cast<uint32_t>(x)}, [=](auto lanes) {
    const int lane = threadIdx.x % 32;
    return static_cast<int>(lanes(lane >= distance ? lane - distance : lane)[0]);
  });
}

inline int __syncthreads_or(bool vote) {
  emulator::Block& block = emulator::my_block();
  bool& any = block.votes[block.all.generation % 2];
  if (block.all.arrived == 0) any = false;
  any |= vote;
  emulator::meet(block.all);
  return any;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
