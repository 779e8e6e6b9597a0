// A square of as many vectors as a vector has lanes, transposed in registers.
#pragma once

#include "simd.h"

namespace taps_fast::cpu {
namespace {

/// r[i][j] -> r[j][i] for as many vectors as a vector has lanes.
template <class V>
TAPS_INLINE void transpose(V* r) {
  constexpr int n = sizeof(V) / sizeof(r[0][0]);
  V t[n] = {};
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) t[i][j] = r[j][i];
  for (int i = 0; i < n; i++) r[i] = t[i];
}

#if defined(__AVX512F__)
template <>
TAPS_INLINE void transpose(FloatVec* rows) {
  __m512* r = (__m512*)rows;
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = (__m512d)t[4 * i], b = (__m512d)t[4 * i + 2], c = (__m512d)t[4 * i + 1],
                  d = (__m512d)t[4 * i + 3];
    r[4 * i] = (__m512)_mm512_unpacklo_pd(a, b);
    r[4 * i + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    r[4 * i + 2] = (__m512)_mm512_unpacklo_pd(c, d);
    r[4 * i + 3] = (__m512)_mm512_unpackhi_pd(c, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#elif defined(__AVX2__)
template <>
TAPS_INLINE void transpose(FloatVec* rows) {
  __m256* r = (__m256*)rows;
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

}  // namespace
}  // namespace taps_fast::cpu
