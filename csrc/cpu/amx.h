// The instructions of AMX that tile_amx.h is made of, and nothing more, so that tests can put a twin in their place.
//
// Not the compiler's intrinsics: GCC's are macros, which take no template argument for a tile, and it is not told that
// loading a tile reads memory, so it may store what is loaded only afterwards.
#pragma once

#include <cstdint>

#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kAmxTiles = 8, kAmxRows = 16, kAmxBytes = 64;  // a tile is at most kAmxRows rows of kAmxBytes

/// What LDTILECFG reads: the shape of each tile.
struct AmxShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
};
static_assert(sizeof(AmxShapes) == 64);

}  // namespace
}  // namespace taps_fast::cpu

#if defined(TAPS_FAST_EMULATE_AMX)  // "the twin's file"
#include TAPS_FAST_EMULATE_AMX
#else
namespace taps_fast::cpu {
namespace {
namespace amx {

/// Asks Linux for tiles, which are 8 KiB more for it to save for each thread; it grants them to the whole process.
inline bool permitted() {
#if defined(__linux__)
  // No library's wrapper: kernel files include nothing that other files share.
  constexpr long kArchPrctl = 158, kRequestPermission = 0x1023, kTileData = 18;
  long result;
  asm volatile("syscall"
               : "=a"(result)
               : "0"(kArchPrctl), "D"(kRequestPermission), "S"(kTileData)
               : "rcx", "r11", "memory");
  return result == 0;
#else
  return false;
#endif
}

/// Until `release`, this thread has tiles of these shapes; their content is 0.
TAPS_INLINE void configure(const AmxShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
TAPS_INLINE void release() { asm volatile("tilerelease"); }

template <int kTile>
TAPS_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
/// Rows lie `stride` bytes apart.
template <int kTile>
TAPS_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
TAPS_INLINE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
/// sum[m, n] += Σ_k a[m, k] · b[k, n], both products of a pair.
template <int kSum, int kLeft, int kRight>
TAPS_INLINE void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

}  // namespace amx
}  // namespace
}  // namespace taps_fast::cpu
#endif
