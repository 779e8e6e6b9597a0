// The twin of csrc/cuda/ptx.cuh.
#pragma once

#include <cmath>

#include "emulator.h"

namespace taps_fast::cuda {

using std::erf;
using std::exp;
using std::fmaf;

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline float to_wide(float x) { return x; }
inline double to_wide(double x) { return x; }
inline float to_wide(BFloat16 x) { return emulator::bits<float>(uint32_t{x.bits} << 16); }
inline float to_wide(Half x) { return static_cast<float>(emulator::bits<_Float16>(x.bits)); }

inline void from_wide(float x, float& y) { y = x; }
inline void from_wide(double x, double& y) { y = x; }
inline void from_wide(float x, BFloat16& y) {
  const uint32_t u = emulator::bits<uint32_t>(x);
  y.bits = std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline void from_wide(float x, Half& y) { y.bits = emulator::bits<uint16_t>(static_cast<_Float16>(x)); }

template <class T>
T load(const T* p) {
  emulator::touch(p, sizeof(T), false);
  return *p;
}

template <class T>
T load_own(const T* p) {
  return load(p);
}

template <class T>
void store(T* p, T x) {
  emulator::touch(p, sizeof(T), true);
  *p = x;
}

inline unsigned char* dynamic_shared() { return emulator::my_block().shared.data(); }

enum class Use { kOnce, kAgain };

template <Use>
void cp_async(uint4* shared, const void* global, bool real) {
  emulator::Fiber& me = emulator::current();
  if (real) emulator::touch(global, 16, false);
  // Offsets in shared memory stand for its addresses.
  if ((reinterpret_cast<unsigned char*>(shared) - dynamic_shared()) % 16)
    emulator::fail("a shared address that is not a multiple of 16");
  me.copies.push_back({shared, real ? global : nullptr, me.groups});
}

inline void cp_async_commit() { emulator::current().groups++; }

template <int kPending>
void cp_async_wait() {
  emulator::finish_copies(emulator::current(), kPending);
}

template <class T>
float element(uint32_t pair, int k) {
  return to_wide(T{static_cast<uint16_t>(k % 2 ? pair >> 16 : pair)});
}

template <class T>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, T) {
  emulator::exchange({a0, a1, a2, a3, b0, b1}, [&](auto lanes) {
    const int lane = threadIdx.x % 32;
    for (int j = 0; j < 4; j++) {
      const int m = lane / 4 + j / 2 * 8, n = lane % 4 * 2 + j % 2;
      for (int k = 0; k < 16; k++) {
        const int q = k % 8 / 2, upper = k / 8;
        d[j] += element<T>(lanes(m % 8 * 4 + q)[2 * upper + m / 8], k) * element<T>(lanes(n * 4 + q)[4 + upper], k);
      }
    }
    return 0;
  });
}

inline void cluster_sync() { emulator::meet(emulator::cluster_barrier()); }

inline float cluster_load(const float* shared, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(shared) - dynamic_shared();
  float x;
  std::memcpy(&x, emulator::block(rank).shared.data() + offset, sizeof x);
  return x;
}

}  // namespace taps_fast::cuda
