// Few rows of each of several tasks that mask one tile: W_t = base + f_t · (bit ? tile : 0).
//
// Forming a weight for a task costs more than its few rows. So base and tile are packed once for all tasks, a piece of
// the depth at a time that stays near the multipliers, and the register tile forms each vector of weights as it needs
// it: a bit test gives the lanes' mask, and one instruction more the weights. Pairs choose between base and the rounded
// sum, which is packed again where a task's factor differs from that of the one before.
//
// Bits lie along the depth, and a vector's lanes are outputs: words of 16 outputs are brought into one vector, of which
// each test takes a bit of every lane. A lane of pairs tests two bits, one in each half.
#pragma once

#include "simd.h"
#include "tile.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kPieceSteps = 64;  // elements of depth in a piece: two strips of them take 32 KiB, two thirds of L1
template <class E>
constexpr int64_t kPieceDepth = kPieceSteps * kDepths<E>;

#if defined(__AVX512F__)
constexpr int64_t kChoicePanels = 2 * kPieceSteps;
/// Most rows of a task: more make up for a panel of its own, in pairs, whose sums are rounded on the way, later. Tiles
/// of AMX take no weights from registers.
template <class E>
constexpr int64_t kChoiceRows = kInAmx<E>         ? 0
                                : kDepths<E> == 2 ? 128
                                                  : 32;
#else
constexpr int64_t kChoicePanels = 0;
template <class E>
constexpr int64_t kChoiceRows = 0;
#endif

#if defined(__AVX512F__) && !defined(__AMX_BF16__)
/// The bits of one strip and piece, as its register tile tests them: kTests vectors for each 16 columns.
template <class E>
struct ChoiceBits {
  static constexpr int kDepthsOfTest = kDepths<E> == 2 ? 16 : 32;
  static constexpr int kTests = kPieceDepth<E> / kDepthsOfTest;
  alignas(64) uint32_t words[kTests][kStripVectors][16];

  /// Rows [row, row + num_rows) of the codes, `depth` bits from `column` on, which begins a word of 32. Once a cache
  /// line, the next one is fetched, and the one that lies `ahead` bytes further.
  void read(const Term& mask, int64_t row, int64_t num_rows, int64_t column, int64_t depth, int64_t ahead) {
    const __mmask8 present = static_cast<__mmask8>((1u << ceil_div(depth, 32)) - 1);
    const bool new_line = column / 8 % Ahead::kLine < kPieceDepth<E> / 8;
    const uint8_t* bits = mask.codes + row * mask.code_stride + column / 8;
    for (int64_t v = 0; v * 16 < num_rows; v++) {
      const uint8_t* rows[16];
      for (int i = 0; i < 16; i++) {
        rows[i] = bits;
        if (v * 16 + i < num_rows - 1) bits += mask.code_stride;  // lanes beyond repeat the last row
      }
      for (int i = 0; i < 16 && new_line; i++) {
        __builtin_prefetch(rows[i] + Ahead::kLine, 0, 2);
        __builtin_prefetch(rows[i] + ahead, 0, 2);
      }
      const auto codes = [&](int i) __attribute__((always_inline)) { return _mm_maskz_loadu_epi32(present, rows[i]); };
      __m512i r[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {  // rows i, i + 4, i + 8, i + 12
        r[i] = _mm512_castsi128_si512(codes(i));
        r[i] = _mm512_inserti32x4(r[i], codes(i + 4), 1);
        r[i] = _mm512_inserti32x4(r[i], codes(i + 8), 2);
        r[i] = _mm512_inserti32x4(r[i], codes(i + 12), 3);
      }
      const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
      const __m512i c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
      put(0, v, _mm512_unpacklo_epi64(a, b));
      put(1, v, _mm512_unpackhi_epi64(a, b));
      if constexpr (kPieceDepth<E> > 64) {
        put(2, v, _mm512_unpacklo_epi64(c, d));
        put(3, v, _mm512_unpackhi_epi64(c, d));
      }
    }
  }

 private:
  /// Word w of 16 rows, whose four quarters the lanes hold row by row: lane 4 l + i is row i + 4 l.
  TAPS_INLINE void put(int w, int64_t v, __m512i word) {
    if constexpr (kDepths<E> == 1) {
      _mm512_store_si512(words[w][v], word);
    } else {  // even depths in the low half, odd ones a place further down in the high half
      const __m512i high = _mm512_set1_epi32(int(0xffff0000));
      const auto halves = [&](__m512i even, __m512i odd) __attribute__((always_inline)) {
        return _mm512_ternarylogic_epi32(high, odd, even, 0xca);
      };
      _mm512_store_si512(words[2 * w][v], halves(word, _mm512_slli_epi32(word, 15)));
      _mm512_store_si512(words[2 * w + 1][v], halves(_mm512_srli_epi32(word, 16), _mm512_srli_epi32(word, 1)));
    }
  }
};

/// Rows that share the forming of weights, with fewer vectors at a time where they are more than a register tile's.
constexpr int64_t kChoiceTileRows = 2 * kTileRows;

/// kRows rows times vectors [first, first + kVectors) of a strip of strip_vectors: `base` and `other` as packed, of
/// which the bits choose.
template <class E, int kRows, int kVectors>
void choose_tile(const E* const* rows, const E* base, const E* other, float factor, const ChoiceBits<E>& bits,
                 int64_t first, int64_t strip_vectors, float* out, int64_t out_stride, int64_t length, bool accumulate,
                 Ahead& ahead, int64_t fetch) {
  constexpr int lanes = kLanes<float>, kLength = ChoiceBits<E>::kDepthsOfTest / kDepths<E>;
  FloatVec sum[kRows][kVectors];
  const E* a[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++) {
    a[i] = rows[i];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) sum[i][j] = FloatVec{};
  }
  const __m512 same = _mm512_set1_ps(factor);
  for (int64_t p = 0, test = 0; p < length; test++) {
    const int64_t end = min(p + kLength, length);
    ahead.fetch(fetch);
    __m512i bit = _mm512_set1_epi32(kDepths<E> == 2 ? 0x00010001 : 1);
    for (; p < end; p++) {
      FloatVec w[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++) {
        const int64_t place = (p * strip_vectors + first + j) * lanes;
        const __m512i word = _mm512_load_si512(bits.words[test][first + j]);
        if constexpr (kDepths<E> == 1) {
          const __mmask16 set = _mm512_test_epi32_mask(word, bit);
          w[j] = (FloatVec)_mm512_mask3_fmadd_ps((__m512)load(other + place), same, (__m512)load(base + place), set);
        } else {
          const __mmask32 set = _mm512_test_epi16_mask(word, bit);
          w[j] = (FloatVec)_mm512_mask_blend_epi16(set, (__m512i)load(base + place), (__m512i)load(other + place));
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; i++) {
        const FloatVec x = broadcast(a[i][p]);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; j++) sum[i][j] = multiply_add<E>(sum[i][j], x, w[j]);
      }
      bit = _mm512_slli_epi32(bit, kDepths<E>);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) {
      float* y = out + i * out_stride + (first + j) * lanes;
      store(y, accumulate ? load(y) + sum[i][j] : sum[i][j]);
    }
}

#endif

}  // namespace
}  // namespace taps_fast::cpu
