// The register tile: kTileRows rows times one packed strip of columns, summed over the panel's depth.
//
//   tile[i, j] (+)= Σ_p a_i[p · step] · strip[p · width + j]
//
// Rows of `a` are broadcast from where they lie (one pointer each, so gathered rows cost nothing); the strip is read
// once a tile. 6 × 4 vectors (AVX-512) or 6 × 2 (AVX2) use all but a few registers as accumulators, which hides the
// latency of the multiply-adds.
#pragma once

#include "simd.h"

namespace taps_fast::cpu {
namespace {

template <class C, int kRows, int kVectors>
TAPS_INLINE void tile(const C* const* rows, int64_t step, const C* strip, C* out, int64_t out_stride, int64_t depth,
                      bool accumulate) {
  constexpr int lanes = kLanes<C>;
  Vec<C> sum[kRows][kVectors];
  const C* a[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++) {
    a[i] = rows[i];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) sum[i][j] = accumulate ? load(out + i * out_stride + j * lanes) : Vec<C>{};
  }
  for (int64_t p = 0; p < depth; p++) {
    Vec<C> b[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) b[j] = load(strip + (p * kVectors + j) * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      const C x = a[i][p * step];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++) sum[i][j] += x * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) store(out + i * out_stride + j * lanes, sum[i][j]);
}

/// num_rows <= kTileRows rows times a whole panel of num_columns columns.
template <class C>
void tile_row(const C* const* rows, int64_t num_rows, int64_t step, const C* panel, int64_t num_columns, C* out,
              int64_t out_stride, int64_t depth, bool accumulate) {
  constexpr int64_t lanes = kLanes<C>, width = lanes * kStripVectors;
  for (int64_t j = 0; j < num_columns; j += width) {
    const int64_t vectors = min(kStripVectors, ceil_div(num_columns - j, lanes));
    with_constant<kStripVectors>(vectors, [&](auto v) {
      with_constant<kTileRows>(num_rows, [&](auto r) {
        const C* strip = panel + j * depth;
        if (step == 1)
          tile<C, r.value, v.value>(rows, 1, strip, out + j, out_stride, depth, accumulate);
        else
          tile<C, r.value, v.value>(rows, step, strip, out + j, out_stride, depth, accumulate);
      });
    });
  }
}

}  // namespace
}  // namespace taps_fast::cpu
