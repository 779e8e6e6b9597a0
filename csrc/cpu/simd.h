// One vector register of float or double, and the conversions between it and what tensors store.
//
// Written with GCC vector extensions, so that one text serves every instruction set; only the horizontal sum, the
// conversions of 16 bits and what pairs need name instructions. Included by the kernels_*.cpp alone: everything is in
// an anonymous namespace and nothing comes from the standard library's templates, so no function compiled for one
// instruction set can be merged with another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
// GCC sees uninitialized values in its own intrinsics, and where it takes vectors apart.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "problem.h"

#define TAPS_INLINE inline __attribute__((always_inline))

namespace taps_fast::cpu {
namespace {

#if defined(__AMX_BF16__)
constexpr int kVectorBytes = 64, kRegisters = 32, kStripVectors = 4, kTileRows = 32;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32, kStripVectors = 4, kTileRows = 6;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16, kStripVectors = 2, kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32, kStripVectors = 4, kTileRows = 6;
#else
constexpr int kVectorBytes = 16, kRegisters = 16, kStripVectors = 2, kTileRows = 4;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));
typedef uint64_t LongVec __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));

/// The type sums are formed in, for each stored type.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class C>
struct VecOf {
  using type = FloatVec;
  using Words = WordVec;  // of as many bits a lane
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
  using Words = LongVec;
};
template <class C>
using Vec = typename VecOf<C>::type;

template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);

/// Two bfloat16 of consecutive depths, the earlier one in the low half: what one lane of VDPBF16PS multiplies.
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};

/// What panels and inputs hold, one lane each: the compute type, or pairs where the instruction set multiplies those.
template <class S>
struct ElementOf {
  using type = Compute<S>;
};
#if defined(__AVX512BF16__)
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
};
#endif
template <class S>
using Element = typename ElementOf<S>::type;

/// Depths that one element covers.
template <class E>
constexpr int64_t kDepths = 1;
template <>
constexpr int64_t kDepths<Pair> = 2;

/// Whether panels of them are multiplied in tiles of AMX (tile_amx.h) rather than in vectors (tile.h).
template <class E>
constexpr bool kInAmx = false;
#if defined(__AMX_BF16__)
template <>
constexpr bool kInAmx<Pair> = true;
#endif

template <class V, class T>
TAPS_INLINE V read(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

TAPS_INLINE FloatVec load(const float* p) { return read<FloatVec>(p); }
TAPS_INLINE DoubleVec load(const double* p) { return read<DoubleVec>(p); }
/// 16 bits as 32, and back. GCC makes two halves of what the instruction sets convert at once.
TAPS_INLINE WordVec to_words(HalfVec v) {
#if defined(__AVX512F__)
  return (WordVec)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (WordVec)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, WordVec);
#endif
}
TAPS_INLINE HalfVec to_halves(WordVec v) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, HalfVec);
#endif
}
TAPS_INLINE FloatVec load(const BFloat16* p) { return (FloatVec)(to_words(read<HalfVec>(p)) << 16); }
TAPS_INLINE FloatVec load(const Float16* p) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_cvtph_ps(read<__m256i>(p));
#elif defined(__AVX2__)
  return (FloatVec)_mm256_cvtph_ps(read<__m128i>(p));
#else
  // Scaling by 2^112 rebiases normal and subnormal numbers alike; infinities and NaNs keep a full exponent.
  const WordVec half = to_words(read<HalfVec>(p));
  const WordVec magnitude = (half & 0x7fff) << 13;
  const WordVec finite = (WordVec)((FloatVec)magnitude * 0x1p112f);
  const WordVec special = (WordVec)((half & 0x7c00) == 0x7c00) & 0x7f800000;
  return (FloatVec)(finite | special | (half & 0x8000) << 16);
#endif
}

TAPS_INLINE float to_compute(float x) { return x; }
TAPS_INLINE double to_compute(double x) { return x; }
template <class S>
TAPS_INLINE float to_compute(S x) {
  HalfVec bits{};
  bits[0] = x.bits;
  S lanes[kVectorBytes / 4];
  __builtin_memcpy(lanes, &bits, sizeof bits);
  return load(lanes)[0];
}

TAPS_INLINE void store(float* p, FloatVec v) { __builtin_memcpy(p, &v, sizeof v); }
TAPS_INLINE void store(double* p, DoubleVec v) { __builtin_memcpy(p, &v, sizeof v); }
TAPS_INLINE void store(BFloat16* p, FloatVec v) {
  // To nearest even; a NaN keeps its high bits and is made quiet, since rounding could carry it into infinity.
#if defined(__AVX512BF16__)  // subnormal numbers become 0
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
  const WordVec bits = (WordVec)v;
  const WordVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const WordVec nan = (WordVec)(v != v);
  const HalfVec half = to_halves((nan & (bits >> 16 | 0x40)) | (~nan & rounded));
#endif
  __builtin_memcpy(p, &half, sizeof half);
}
TAPS_INLINE void store(Float16* p, FloatVec v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // To nearest even, by cases on the magnitude: too large (or NaN), normal, and subnormal, where adding 0.5 lets the
  // addition round at the right bit.
  const WordVec bits = (WordVec)v, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const WordVec nan = (WordVec)(magnitude > 0x7f800000), large = (WordVec)(magnitude >= 0x477ff000);
  const WordVec small = (WordVec)(magnitude < 0x38800000);
  const WordVec normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const WordVec subnormal = (WordVec)((FloatVec)magnitude + 0.5f) - 0x3f000000;
  const WordVec infinite = 0x7c00 | (nan & 0x200);
  const WordVec finite = (small & subnormal) | (~small & normal);
  const HalfVec half = to_halves(sign | (large & infinite) | (~large & finite));
#endif
  __builtin_memcpy(p, &half, sizeof half);
}

/// The first n of a vector's numbers, and zeros after them; other memory than theirs is not touched.
template <class S, int kCount>
TAPS_INLINE void read_partial(S (&vector)[kCount], const S* p, int64_t n) {
  static_assert(sizeof(S) > 1);
#if defined(__AVX512F__)
  const auto lanes = (uint64_t(1) << n) - 1;
  const auto take = [&](auto v) __attribute__((always_inline)) { __builtin_memcpy(vector, &v, sizeof vector); };
  if constexpr (sizeof(S) == 8) take(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes), p));
  else if constexpr (sizeof(S) == 4) take(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), p));
  else if constexpr (kCount == 16) take(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p));
  else take(_mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes), p));
#else
  __builtin_memset(vector, 0, sizeof vector);
  __builtin_memcpy(vector, p, n * sizeof(S));
#endif
}
template <class S, int kCount>
TAPS_INLINE void write_partial(S* p, const S (&vector)[kCount], int64_t n) {
#if defined(__AVX512F__)
  const auto lanes = (uint64_t(1) << n) - 1;
  if constexpr (sizeof(S) == 8) _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(lanes), read<__m512i>(vector));
  else if constexpr (sizeof(S) == 4) _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(lanes), read<__m512i>(vector));
  else _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(lanes), read<__m256i>(vector));
#else
  __builtin_memcpy(p, vector, n * sizeof(S));
#endif
}

/// The first n <= lanes elements, zeros after them.
template <class S>
TAPS_INLINE Vec<Compute<S>> load_partial(const S* p, int64_t n) {
  S vector[kLanes<Compute<S>>];
  read_partial(vector, p, n);
  return load(vector);
}
template <class S>
TAPS_INLINE void store_partial(S* p, Vec<Compute<S>> v, int64_t n) {
  S vector[kLanes<Compute<S>>];
  store(vector, v);
  write_partial(p, vector, n);
}

TAPS_INLINE FloatVec load(const Pair* p) { return read<FloatVec>(p); }
TAPS_INLINE void store(Pair* p, FloatVec v) { __builtin_memcpy(p, &v, sizeof v); }

/// Asks for n numbers from p on to be brought into L2, to be read or written there.
template <class S>
TAPS_INLINE void prefetch(const S* p, int64_t n) {
  constexpr int64_t line = 64;
  for (int64_t b = 0; b < n * int64_t(sizeof(S)); b += line)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + b, 0, 2);
}

/// A vector of elements from as many consecutive numbers as it covers, or from the first n and zeros.
template <class S>
TAPS_INLINE Vec<Compute<S>> elements(const S* p) {
  if constexpr (kDepths<Element<S>> == 1) return load(p);
  else return read<FloatVec>(p);
}
template <class S>
TAPS_INLINE Vec<Compute<S>> elements(const S* p, int64_t n) {
  S vector[kLanes<Compute<S>> * kDepths<Element<S>>];
  read_partial(vector, p, n);
  return elements(vector);
}

/// x in every lane. Not 0 + x, which compilers must compute: of -0 it makes 0.
template <class C>
TAPS_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};
}
/// An element of ones.
template <class E>
TAPS_INLINE E ones() {
  return 1;
}
template <class E>
TAPS_INLINE Vec<Compute<E>> broadcast(E x) {
  return splat(x);
}
/// sum + a · b, lane by lane; for pairs both products of a lane.
template <class E>
TAPS_INLINE Vec<Compute<E>> multiply_add(Vec<Compute<E>> sum, Vec<Compute<E>> a, Vec<Compute<E>> b) {
  return sum + a * b;
}
#if defined(__AVX512BF16__)
template <>
TAPS_INLINE Pair ones<Pair>() {
  return {0x3f803f80};
}
template <>
TAPS_INLINE FloatVec broadcast<Pair>(Pair x) {
  return (FloatVec)_mm512_set1_epi32(static_cast<int>(x.bits));
}
template <>
TAPS_INLINE FloatVec multiply_add<Pair>(FloatVec sum, FloatVec a, FloatVec b) {
  return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
/// The element of two depths.
TAPS_INLINE Pair make_pair(BFloat16 first, BFloat16 second) {
  return {uint32_t(first.bits) | uint32_t(second.bits) << 16};
}
/// Pairs of depths that lie side by side (lanes 0 to 15, then 16 to 31), rounded to nearest even.
TAPS_INLINE FloatVec round_to_pairs(FloatVec low, FloatVec high) {
  return (FloatVec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
/// Pairs of two depths that each fill a vector.
TAPS_INLINE FloatVec zip_to_pairs(FloatVec first, FloatVec second) {
  alignas(64) static constexpr uint16_t places[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)round_to_pairs(first, second);
  return (FloatVec)_mm512_permutexvar_epi16(_mm512_load_si512(places), both);
}
/// The numbers of pairs' earlier and later depths.
TAPS_INLINE FloatVec earlier(FloatVec pairs) { return (FloatVec)((WordVec)pairs << 16); }
TAPS_INLINE FloatVec later(FloatVec pairs) { return (FloatVec)((WordVec)pairs & 0xffff0000); }
/// Pairs of two depths, 2 · lanes columns, from each depth's even and odd columns.
TAPS_INLINE void zip_columns(Pair* out, const FloatVec* even, const FloatVec* odd) {
  alignas(64) static constexpr uint16_t places[32] = {0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35, 51,
                                                      4, 20, 36, 52, 5, 21, 37, 53, 6, 22, 38, 54, 7, 23, 39, 55};
  const __m512i low = _mm512_load_si512(places), high = _mm512_add_epi16(low, _mm512_set1_epi16(8));
  const __m512i a = (__m512i)round_to_pairs(even[0], even[1]), b = (__m512i)round_to_pairs(odd[0], odd[1]);
  store(out, (FloatVec)_mm512_permutex2var_epi16(a, low, b));
  store(out + kLanes<float>, (FloatVec)_mm512_permutex2var_epi16(a, high, b));
}
/// Pairs of two depths from where they are stored: 2 · lanes columns of each, unchanged.
TAPS_INLINE void zip_rows(Pair* out, const BFloat16* first, const BFloat16* second) {
  alignas(64) static constexpr uint16_t places[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(places), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = read<__m512i>(first), b = second ? read<__m512i>(second) : _mm512_setzero_si512();
  store(out, (FloatVec)_mm512_permutex2var_epi16(a, low, b));
  store(out + kLanes<float>, (FloatVec)_mm512_permutex2var_epi16(a, high, b));
}
#endif

template <class V>
TAPS_INLINE double horizontal_sum(V v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); i++) sum += v[i];
  return sum;
}

TAPS_INLINE float sum_lanes(FloatVec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
TAPS_INLINE double sum_lanes(DoubleVec v) { return horizontal_sum(v); }

template <int N>
struct Int {
  static constexpr int value = N;
};

/// f(Int<n>{}) for the run-time n in [1, N].
template <int N, class F>
TAPS_INLINE void with_constant(int64_t n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, f);
  }
  f(Int<N>{});
}

/// Takes one item of the grid; threads share the counter. Which thread runs an item changes no result.
TAPS_INLINE int64_t claim(int64_t* next_item) { return __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED); }

/// Takes an item of this thread's own range, in order, and where none is left one of the next thread that has some.
TAPS_INLINE int64_t claim(const Share& share) {
  for (int64_t k = 0; k < share.threads; k++) {
    const int64_t t = (share.mine + k) % share.threads;
    const int64_t begin = share.items * t / share.threads, end = share.items * (t + 1) / share.threads;
    int64_t* const taken = share.taken + t * Share::kStride;
    if (begin + __atomic_load_n(taken, __ATOMIC_RELAXED) >= end) continue;
    const int64_t item = begin + __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
    if (item < end) return item;
  }
  return share.items;
}

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace taps_fast::cpu
