// One warp's product: 16 out features times 8·kTiles rows, summed over the in features of one step.
//
// A step is 64 bytes of each weight row of kSources sources, and of each row of x, which is thus read from L2 once for
// all of them. Lane 4g + q holds the q-th 16 bytes of weight rows g and g + 8 of each source, and of row g of each tile
// of x, in `step[vector][lane]`. Whatever order a tensor core gives to the in features is the same for both operands,
// so these 16 bytes are its operands as they are: no shuffle, no ldmatrix.
//
// Two kinds of accumulators: `product` sums each source, and `fold` adds one to `total` with each row's coefficient,
// which thus stays in float32, as the weights stay as they were stored.
#pragma once

#include <cstring>

#include "ptx.cuh"

namespace taps_fast::cuda {

constexpr int kOutputs = 16;

template <class T, int kTiles>
struct StreamTile {
  static constexpr int kSources = 2;
  static constexpr int kStepVectors = 32 * (2 * kSources + kTiles);
  float total[kTiles][4] = {}, product[kSources][kTiles][4] = {};

  __device__ void multiply(const uint4* step, int lane) {
    uint4 low[kSources], high[kSources];
#pragma unroll
    for (int s = 0; s < kSources; s++) low[s] = step[2 * s * 32 + lane], high[s] = step[(2 * s + 1) * 32 + lane];
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      const uint4 x = step[(2 * kSources + t) * 32 + lane];
#pragma unroll
      for (int s = 0; s < kSources; s++) {
        mma(product[s][t], low[s].x, high[s].x, low[s].y, high[s].y, x.x, x.y, T{});
        mma(product[s][t], low[s].z, high[s].z, low[s].w, high[s].w, x.z, x.w, T{});
      }
    }
  }

  /// coeffs: of each of the 8·kTiles rows. A row that does not use a source takes nothing of it, not even a NaN.
  __device__ void fold(int s, const float* coeffs, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float c = coeffs[8 * t + 2 * (lane % 4) + j % 2];
        total[t][j] = c == 0.f ? total[t][j] : fmaf(c, product[s][t][j], total[t][j]);
        product[s][t][j] = 0.f;
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
/// other lanes fetched; the four lanes of a weight row are added at the end. Sixteen rows of a second source would not
/// fit in its registers.
template <int kTiles>
struct StreamTile<float, kTiles> {
  static constexpr int kSources = kTiles == 1 ? 2 : 1;
  static constexpr int kStepVectors = 32 * (2 * kSources + kTiles);
  static constexpr int kRows = 8 * kTiles;
  float total[kRows][2] = {}, product[kSources][kRows][2] = {};

  __device__ static float dot(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }

  __device__ void multiply(const uint4* step, int lane) {
    const float4* vectors = reinterpret_cast<const float4*>(step);
    float4 weight[kSources][2];
#pragma unroll
    for (int s = 0; s < kSources; s++)
#pragma unroll
      for (int j = 0; j < 2; j++) weight[s][j] = vectors[(2 * s + j) * 32 + lane];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float4 x = vectors[(2 * kSources + r / 8) * 32 + r % 8 * 4 + lane % 4];
#pragma unroll
      for (int s = 0; s < kSources; s++)
#pragma unroll
        for (int j = 0; j < 2; j++) product[s][r][j] = dot(weight[s][j], x, product[s][r][j]);
    }
  }

  __device__ void fold(int s, const float* coeffs, int) {
#pragma unroll
    for (int r = 0; r < kRows; r++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        total[r][j] = coeffs[r] == 0.f ? total[r][j] : fmaf(coeffs[r], product[s][r][j], total[r][j]);
        product[s][r][j] = 0.f;
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
