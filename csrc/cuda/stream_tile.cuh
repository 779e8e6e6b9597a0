// One warp's product: 16 out features times 8·kTiles rows, summed over the in features of one step.
//
// A step is 64 bytes of each weight row and each row of x. Lane 4g + q holds the q-th 16 bytes of weight rows g and
// g + 8, and of row g of each tile of x, in `step[vector][lane]`. Whatever order a tensor core gives to the in
// features is the same for both operands, so these 16 bytes are its operands as they are: no shuffle, no ldmatrix.
//
// Two accumulators: `product` sums one source, and `fold` adds it to `total` with each row's coefficient, which thus
// stays in float32, as the weights stay as they were stored.
#pragma once

#include <cstring>

#include "ptx.cuh"

namespace taps_fast::cuda {

constexpr int kOutputs = 16;

template <class T, int kTiles>
struct StreamTile {
  float total[kTiles][4] = {}, product[kTiles][4] = {};

  __device__ void multiply(const uint4* step, int lane) {
    const uint4 low = step[lane], high = step[32 + lane];
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      const uint4 x = step[(2 + t) * 32 + lane];
      mma(product[t], low.x, high.x, low.y, high.y, x.x, x.y, T{});
      mma(product[t], low.z, high.z, low.w, high.w, x.z, x.w, T{});
    }
  }

  /// coeffs: of each of the 8·kTiles rows. A row that does not use a source takes nothing of it, not even a NaN.
  __device__ void fold(const float* coeffs, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float c = coeffs[8 * t + 2 * (lane % 4) + j % 2];
        total[t][j] = c == 0.f ? total[t][j] : fmaf(c, product[t][j], total[t][j]);
        product[t][j] = 0.f;
      }
  }

  /// To sums[row][out feature].
  __device__ void write(float* sums, int lane) const {
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        sums[(8 * t + 2 * (lane % 4) + j % 2) * kOutputs + lane / 4 + j / 2 * 8] = total[t][j];
  }
};

/// float32 on the ordinary units: with so few rows they keep up with memory, and every product is exact to the last
/// bit that tf32 would drop. A lane multiplies its two weight vectors with the same vector of every row of x, which
/// other lanes fetched; the four lanes of a weight row are added at the end.
template <int kTiles>
struct StreamTile<float, kTiles> {
  static constexpr int kRows = 8 * kTiles;
  float total[kRows][2] = {}, product[kRows][2] = {};

  __device__ static float dot(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }

  __device__ void multiply(const uint4* step, int lane) {
    const float4* vectors = reinterpret_cast<const float4*>(step);
    const float4 low = vectors[lane], high = vectors[32 + lane];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float4 x = vectors[(2 + r / 8) * 32 + r % 8 * 4 + lane % 4];
      product[r][0] = dot(low, x, product[r][0]);
      product[r][1] = dot(high, x, product[r][1]);
    }
  }

  __device__ void fold(const float* coeffs, int) {
#pragma unroll
    for (int r = 0; r < kRows; r++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        total[r][j] = coeffs[r] == 0.f ? total[r][j] : fmaf(coeffs[r], product[r][j], total[r][j]);
        product[r][j] = 0.f;
      }
  }

  __device__ void write(float* sums, int lane) const {
#pragma unroll
    for (int r = 0; r < kRows; r++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float sum = total[r][j] + __shfl_xor_sync(~0u, total[r][j], 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0) sums[r * kOutputs + lane / 4 + 8 * j] = sum;
      }
  }
};

}  // namespace taps_fast::cuda
