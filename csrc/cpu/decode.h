// What a term's codes stand for, a vector at a time: a sign, a masked tile or an int8 (problem.h).
#pragma once

#include "simd.h"

namespace taps_fast::cpu {
namespace {

/// The bits of one vector's lanes; a row of codes ends on a 64-bit word.
template <int lanes>
TAPS_INLINE uint32_t lane_bits(const uint8_t* row, int64_t p) {
  if constexpr (lanes < 8) {
    return row[p >> 3] >> (p & 7) & ((1 << lanes) - 1);
  } else {
    uint32_t bits = 0;
    __builtin_memcpy(&bits, row + (p >> 3), lanes / 8);
    return bits;
  }
}

/// bit ? a : b, lane by lane.
template <class C>
TAPS_INLINE Vec<C> select_lanes(uint32_t bits, Vec<C> a, Vec<C> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return (Vec<C>)_mm512_mask_blend_ps(static_cast<__mmask16>(bits), (__m512)b, (__m512)a);
  else return (Vec<C>)_mm512_mask_blend_pd(static_cast<__mmask8>(bits), (__m512d)b, (__m512d)a);
#else
  using Words = typename VecOf<C>::Words;
  Words lane{};
  for (int i = 0; i < kLanes<C>; i++) lane[i] = 1u << i;
  const Words mask = (Words)((lane & bits) != 0);
  return (Vec<C>)((mask & (Words)a) | (~mask & (Words)b));
#endif
}

/// The elements whose bits are set, 0 for the others; the bits of the first number are at place p of a row of codes.
template <class S>
TAPS_INLINE Vec<Compute<S>> masked_elements(const uint8_t* row, int64_t p, Vec<Compute<S>> v) {
#if defined(__AVX512BF16__)
  if constexpr (kDepths<Element<S>> == 2)
    return (FloatVec)_mm512_maskz_mov_epi16(lane_bits<2 * kLanes<float>>(row, p), (__m512i)v);
#endif
  return select_lanes<Compute<S>>(lane_bits<kLanes<Compute<S>>>(row, p), v, Vec<Compute<S>>{});
}

/// sum + x · v of the elements whose bits are set. A test of a word of bits in every lane costs less than a load of
/// lanes' bits, which takes turns with the multiplications.
template <class S>
TAPS_INLINE Vec<Compute<S>> masked_multiply_add(Vec<Compute<S>> sum, Vec<Compute<S>> x, const uint8_t* row, int64_t p,
                                                Vec<Compute<S>> v) {
#if defined(__AVX512F__)
  if constexpr (kDepths<Element<S>> == 1 && sizeof(Compute<S>) == 4) {
    const auto lane = _mm512_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768);
    const __m512i own = _mm512_sll_epi32(lane, _mm_cvtsi32_si128(p & 16));  // whole vectors: p is 0 or 16 in its word
    const __mmask16 set = _mm512_test_epi32_mask(_mm512_set1_epi32(lane_bits<32>(row, p & ~31)), own);
    return (FloatVec)_mm512_mask3_fmadd_ps((__m512)x, (__m512)v, (__m512)sum, set);
  }
#endif
  return multiply_add<Element<S>>(sum, x, masked_elements<S>(row, p, v));
}

/// kLanes<C> int8 as numbers. GCC converts the generic vector one element at a time.
template <class C>
TAPS_INLINE Vec<C> widen(const int8_t* bytes) {
#if defined(__AVX2__)
  __m128i raw = _mm_setzero_si128();
  __builtin_memcpy(&raw, bytes, kLanes<C>);
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return (Vec<C>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
  else return (Vec<C>)_mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(raw));
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) return (Vec<C>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
  else return (Vec<C>)_mm256_cvtepi32_pd(_mm_cvtepi8_epi32(raw));
#else
  Vec<C> v;
  for (int i = 0; i < kLanes<C>; i++) v[i] = bytes[i];
  return v;
#endif
}

/// Weights that one byte of codes stands for.
template <Coding kCoding>
constexpr int64_t kPerByte = kCoding == Coding::kInt8 ? 1 : 8;

/// D[row, column ...] of a coded term, before its scale: a whole vector, or the first n numbers and anything finite.
template <class S, Coding kCoding, bool kWhole>
TAPS_INLINE Vec<Compute<S>> decode(const Term& term, int64_t row, int64_t column, int64_t n) {
  using C = Compute<S>;
  constexpr int lanes = kLanes<C>;
  const uint8_t* codes = term.codes + row * term.code_stride;
  if constexpr (kCoding == Coding::kInt8) {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(codes) + column;
    int8_t part[lanes] = {};
    if constexpr (!kWhole) __builtin_memcpy(part, bytes, n);
    return widen<C>(kWhole ? bytes : part);
  } else {
    const uint32_t bits = lane_bits<lanes>(codes, column);
    if constexpr (kCoding == Coding::kSign) {
      return select_lanes<C>(bits, splat(C(1)), splat(C(-1)));
    } else {
      const S* tile = static_cast<const S*>(term.matrix.data) + row * term.matrix.stride + column;
      return select_lanes<C>(bits, kWhole ? load(tile) : load_partial(tile, n), Vec<C>{});
    }
  }
}

TAPS_INLINE bool has_codes(const Term* terms, int64_t num_terms) {
  for (int64_t t = 0; t < num_terms; t++)
    if (terms[t].coding != Coding::kDense) return true;
  return false;
}

/// Whether dot.h can read all terms: stored numbers, or masks of such.
TAPS_INLINE bool all_dense_or_masked(const Term* terms, int64_t num_terms) {
  for (int64_t t = 0; t < num_terms; t++)
    if (terms[t].coding != Coding::kDense && terms[t].coding != Coding::kMask) return false;
  return true;
}

/// What multiplies row `row` of D.
template <class C>
TAPS_INLINE C row_factor(const Term& term, int64_t row) {
  return static_cast<C>(term.coeff) * static_cast<const C*>(term.scale)[row * term.scale_step];
}

template <Coding kCoding>
struct CodingOf {
  static constexpr Coding value = kCoding;
};

/// f(CodingOf<coding>{}) for the coding of codes, known at run time.
template <class F>
TAPS_INLINE void with_code(Coding coding, const F& f) {
  switch (coding) {
    case Coding::kSign: return f(CodingOf<Coding::kSign>{});
    case Coding::kMask: return f(CodingOf<Coding::kMask>{});
    case Coding::kInt8: return f(CodingOf<Coding::kInt8>{});
    case Coding::kDense: return;
  }
}

}  // namespace
}  // namespace taps_fast::cpu
