// The kernels of coded_problem.h for one instruction set; included by the coded_<isa>.cpp alone.
//
// A decoded vector serves up to kCodedRows rows. The sums stay in registers: forward runs along a few weight rows at a
// time and adds up lanes at their end, dx runs down the weight rows along a few vectors of columns.
#pragma once

#include "coded_problem.h"
#include "dot.h"
#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int kCodedRows = kRegisters == 32 ? 6 : 2;

/// Weight rows (forward) or vectors of columns (dx) that m rows take at a time.
constexpr int coded_columns(int m) { return kRegisters == 32 && m <= 2 ? 8 : 4; }

typedef uint64_t LongVec __attribute__((vector_size(kVectorBytes)));

template <class C>
struct WordOf {
  using type = WordVec;
};
template <>
struct WordOf<double> {
  using type = LongVec;
};

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
  using Words = typename WordOf<C>::type;
  Words lane{};
  for (int i = 0; i < kLanes<C>; i++) lane[i] = 1u << i;
  const Words mask = (Words)((lane & bits) != 0);
  return (Vec<C>)((mask & (Words)a) | (~mask & (Words)b));
#endif
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

template <class S, Coding kCoding>
class CodedItem {
  using C = Compute<S>;
  using V = Vec<C>;
  static constexpr int64_t lanes = kLanes<C>;

 public:
  CodedItem(const CodedProduct& p, const CodedPass& pass, int64_t begin, void* workspace)
      : p_(p), pass_(pass), begin_(begin), rows_(pass.row_end - pass.row_begin), inputs_(static_cast<C*>(workspace)) {
    const int64_t depth = p.transposed ? p.in_features : p.out_features;
    size_ = min(p.col_block, (p.transposed ? p.out_features : p.in_features) - begin);
    sums_ = inputs_ + kCodedRows * round_up(depth, lanes);
    stride_ = round_up(p.col_block, lanes);
  }

  void run() {
    with_constant<kCodedRows>(rows_, [&](auto rows) {
      if (p_.transposed) forward<rows.value>();
      else backward<rows.value>();
    });
    for (int64_t m = 0; m < rows_; m++) {
      if (p_.wide_out) finish(static_cast<C*>(p_.out.data), m);
      else finish(static_cast<S*>(p_.out.data), m);
    }
  }

 private:
  template <int kRows>
  void forward() {
    const int64_t depth = p_.in_features;
    for (int m = 0; m < kRows; m++) interleave<S>(inputs_, kRows, m, input(m), depth);
    constexpr int kColumns = coded_columns(kRows);
    for (int64_t n = 0; n < size_; n += kColumns) {
      V sum[kRows][kColumns] = {};
      const auto step = [&](int64_t p, auto decode) __attribute__((always_inline)) {
        V weight[kColumns];
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; j++) weight[j] = decode(begin_ + min(n + j, size_ - 1), p);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; m++) {
          const V x = load(inputs_ + p * kRows + m * lanes);
#pragma GCC unroll 8
          for (int j = 0; j < kColumns; j++) sum[m][j] += x * weight[j];
        }
      };
      int64_t p = 0;
      for (; p + lanes <= depth; p += lanes)
        step(p, [&](int64_t o, int64_t i) __attribute__((always_inline)) { return decode<true>(o, i); });
      if (p < depth) step(p, [&](int64_t o, int64_t i) __attribute__((always_inline)) { return decode<false>(o, i); });
      for (int m = 0; m < kRows; m++)
        for (int j = 0; j < kColumns && n + j < size_; j++) sums_[m * stride_ + n + j] = sum_lanes(sum[m][j]);
    }
  }

  template <int kRows>
  void backward() {
    const C* factors = static_cast<const C*>(pass_.factors);
    for (int m = 0; m < kRows; m++) {
      const S* dy = input(m);
      for (int64_t o = 0; o < p_.out_features; o++) inputs_[o * kRows + m] = factors[o] * to_compute(dy[o]);
    }
    constexpr int kVectors = coded_columns(kRows);
    int64_t j = 0;
    for (; begin_ + j + kVectors * lanes <= p_.in_features && j + kVectors * lanes <= size_; j += kVectors * lanes)
      down<kRows, kVectors, true>(j);
    for (; j < size_; j += lanes) {
      if (begin_ + j + lanes <= p_.in_features) down<kRows, 1, true>(j);
      else down<kRows, 1, false>(j);
    }
  }

  template <int kRows, int kVectors, bool kWhole>
  TAPS_INLINE void down(int64_t j) {
    V sum[kRows][kVectors] = {};
    for (int64_t o = 0; o < p_.out_features; o++) {
      V weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) weight[v] = decode<kWhole>(o, begin_ + j + v * lanes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) sum[m][v] += inputs_[o * kRows + m] * weight[v];
    }
    for (int m = 0; m < kRows; m++)
      for (int v = 0; v < kVectors; v++) store(sums_ + m * stride_ + j + v * lanes, sum[m][v]);
  }

  /// D[o, i ...]: a whole vector, or what is left of the row and anything finite after it.
  template <bool kWhole>
  TAPS_INLINE V decode(int64_t o, int64_t i) const {
    const uint8_t* row = pass_.codes + o * p_.code_stride;
    if constexpr (kCoding == Coding::kInt8) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(row + i);
      int8_t part[16] = {};
      if constexpr (!kWhole) __builtin_memcpy(part, codes, p_.in_features - i);
      return widen<C>(kWhole ? codes : part);
    } else {
      const uint32_t bits = lane_bits<lanes>(row, i);
      if constexpr (kCoding == Coding::kSign) {
        return select_lanes<C>(bits, V{} + C(1), V{} - C(1));
      } else {
        const S* tile = static_cast<const S*>(p_.tile.data) + o * p_.tile.stride + i;
        return select_lanes<C>(bits, kWhole ? load(tile) : load_partial(tile, p_.in_features - i), V{});
      }
    }
  }

  int64_t row(int64_t m) const {
    const int64_t place = pass_.row_begin + m;
    return p_.row_index ? p_.row_index[place] : place;
  }
  const S* input(int64_t m) const { return static_cast<const S*>(p_.in.data) + row(m) * p_.in.stride; }

  template <class Out>
  void finish(Out* base, int64_t m) {
    Out* out = base + row(m) * p_.out.stride + begin_;
    const C* sums = sums_ + m * stride_;
    const C* factors = static_cast<const C*>(pass_.factors) + begin_;
    int64_t j = 0;
    const auto put = [&](int64_t n) __attribute__((always_inline)) {
      const auto get = [&](const auto* q)
                           __attribute__((always_inline)) { return n < lanes ? load_partial(q, n) : load(q); };
      const V value = p_.transposed ? get(out + j) + get(factors + j) * load(sums + j) : load(sums + j);
      if (n < lanes) store_partial(out + j, value, n);
      else store(out + j, value);
    };
    for (; j + lanes <= size_; j += lanes) put(lanes);
    if (j < size_) put(size_ - j);
  }

  const CodedProduct& p_;
  const CodedPass& pass_;
  const int64_t begin_, rows_;
  int64_t size_, stride_;
  C *inputs_, *sums_;
};

template <class S, Coding kCoding>
void run_coded(const CodedProduct& p, int64_t* next_item, void* workspace) {
  // Passes of one block of columns follow each other, so that a tile they share stays in the cache.
  const int64_t items = num_items(p);
  for (int64_t i = claim(next_item); i < items; i = claim(next_item))
    CodedItem<S, kCoding>(p, p.passes[i % p.num_passes], i / p.num_passes * p.col_block, workspace).run();
}

template <class S>
void run_coded_as(const CodedProduct& p, int64_t* next_item, void* workspace) {
  switch (p.coding) {
    case Coding::kSign: return run_coded<S, Coding::kSign>(p, next_item, workspace);
    case Coding::kMask: return run_coded<S, Coding::kMask>(p, next_item, workspace);
    case Coding::kInt8: return run_coded<S, Coding::kInt8>(p, next_item, workspace);
  }
}

void coded_product(const CodedProduct& p, int64_t* next_item, void* workspace) {
  switch (p.dtype) {
    case DType::kFloat32: return run_coded_as<float>(p, next_item, workspace);
    case DType::kBFloat16: return run_coded_as<BFloat16>(p, next_item, workspace);
    case DType::kFloat16: return run_coded_as<Float16>(p, next_item, workspace);
    case DType::kFloat64: return run_coded_as<double>(p, next_item, workspace);
  }
}

int64_t coded_workspace_bytes(const CodedProduct& p) {
  const int64_t size = compute_size(p.dtype), step = kVectorBytes / size;
  const int64_t depth = p.transposed ? p.in_features : p.out_features;
  return size * kCodedRows * (round_up(depth, step) + round_up(p.col_block, step));
}

constexpr CodedKernels make_coded_table() { return {kCodedRows, coded_product, coded_workspace_bytes}; }

}  // namespace
}  // namespace taps_fast::cpu
