// Sums of signed inputs, Σ_i ±x_i, without a multiplication for each of them.
//
//   four inputs have 16 signed sums: a register. Four bits of a code choose one, for 16 outputs at once (VPERMPS).
//
// So two instructions serve 64 weights, where a decoded vector and a multiply-add serve 16. A table takes four more,
// and lasts for all outputs of an item. Codes come in words of 32 bits, one of each of 16 outputs to a vector: they are
// transposed in registers, and each shift brings the next four inputs' bits to the bottom of the lanes.
#pragma once

#include "decode.h"
#include "simd.h"
#include "transpose.h"

namespace taps_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kSignTables = 6144;  // floats, 24 KiB: they stay in L1

/// Inputs whose tables of m rows fit, in whole words: a row of codes gives at most 16 of them to a block.
constexpr int64_t sign_depth(int64_t m) { return min(kSignTables / m / 4 / 32 * 32, 512); }

/// The signed sums of each four of n inputs, n a multiple of 4; those of group g lie at tables + 16·step·g.
TAPS_INLINE void sign_tables(float* tables, int64_t step, const float* x, int64_t n) {
  FloatVec sign[4];
  for (int b = 0; b < 4; b++)
    for (int i = 0; i < 16; i++) sign[b][i] = i >> b & 1 ? 1.0f : -1.0f;
  for (int64_t i = 0; i < n; i += 4)
    store(tables + i * 4 * step, x[i] * sign[0] + x[i + 1] * sign[1] + (x[i + 2] * sign[2] + x[i + 3] * sign[3]));
}

/// sums[m · stride + j] = Σ_i ±x_m[i] with the signs of weight row begin + j, for size rows of bits.
template <class S, int kRows>
void sign_rows(const S* const* in, const Term& term, int64_t depth, int64_t begin, int64_t size, float* tables,
               float* sums, int64_t stride) {
  constexpr int64_t lanes = 16, word = 32;
  constexpr int kChains = kRows >= 4 ? 1 : 4 / kRows;  // as many independent sums hide the latency of an addition
  const int64_t block = round_up(even_part(depth, sign_depth(kRows)), word);
  for (int64_t first = 0; first < depth; first += block) {
    const int64_t n = min(block, depth - first), words = ceil_div(n, word);
    for (int m = 0; m < kRows; m++) {
      alignas(64) float x[512] = {};
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) store(x + i, load(in[m] + first + i));
      if (i < n) store(x + i, load_partial(in[m] + first + i, n - i));
      sign_tables(tables + 16 * m, kRows, x, words * word);
    }
    const __mmask16 present = static_cast<__mmask16>((1u << words) - 1);
    for (int64_t j = 0; j < size; j += lanes) {
      alignas(64) uint32_t codes[16][16];
      FloatVec r[lanes];
      const uint8_t* row = term.codes + (begin + j) * term.code_stride + first / 8;
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) {
        const uint8_t* bits = row + min(i, size - 1 - j) * term.code_stride;
        __builtin_prefetch(bits + lanes * term.code_stride, 0, 3);
        r[i] = (FloatVec)_mm512_maskz_loadu_epi32(present, bits);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) _mm512_store_si512(codes[i], (__m512i)r[i]);
      FloatVec sum[kRows][kChains] = {};
      for (int64_t w = 0; w < words; w++) {
        const __m512i bits = _mm512_load_si512(codes[w]);
        const float* table = tables + w * 8 * kRows * 16;
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
          const __m512i four = _mm512_srli_epi32(bits, 4 * g);
#pragma GCC unroll 8
          for (int m = 0; m < kRows; m++)
            sum[m][g % kChains] += (FloatVec)_mm512_permutexvar_ps(four, _mm512_load_ps(table + (g * kRows + m) * 16));
        }
      }
      for (int m = 0; m < kRows; m++) {
        FloatVec total = sum[m][0];
        for (int c = 1; c < kChains; c++) total += sum[m][c];
        float* out = sums + m * stride + j;
        store(out, first ? load(out) + total : total);
      }
    }
  }
}
#else
constexpr int64_t kSignTables = 0;
#endif

}  // namespace
}  // namespace taps_fast::cpu
