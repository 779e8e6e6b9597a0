// Packing: the sum of a pass's terms, formed on the way from the weights to a panel that the tile kernel streams.
//
//   panel = strips of `width` columns, one after another; strip[p · width + j] = Σ_t coeff_t · W_t(p, j)
//
// p counts elements (simd.h). A sum of terms is rounded to pairs once; one term alone with coefficient 1 is exact.
//
// The sum and the transpose share one trip through the registers, so a weight is read once and never stored whole.
// This pass runs at the speed of memory; a separate transpose or a library GEMM that packs again would not.
#pragma once

#include "blend.h"
#include "decode.h"
#include "transpose.h"

namespace taps_fast::cpu {
namespace {

/// Σ_t of coded and dense terms: kRows vectors, one of each of the rows from `row` on, columns from `column` on.
template <class S, int kRows, bool kWhole>
TAPS_INLINE void sum_terms(Vec<Compute<S>>* r, const Term* terms, int64_t num_terms, int64_t row, int64_t num_rows,
                           int64_t column, int64_t n) {
  using C = Compute<S>;
#pragma GCC unroll 16
  for (int j = 0; j < kRows; j++) r[j] = Vec<C>{};
  for (int64_t t = 0; t < num_terms; t++) {
    const Term& term = terms[t];
    if (term.coding != Coding::kDense) {
      with_code(term.coding, [&](auto coding) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int j = 0; j < kRows; j++) {
          // Codes are not among what the tiles fetch: these are the next strip's.
          __builtin_prefetch(term.codes + (row + j + kLanes<C>)*term.code_stride + column / kPerByte<coding.value>);
          if (kWhole || j < num_rows)
            r[j] += row_factor<C>(term, row + j) * decode<S, coding.value, kWhole>(term, row + j, column, n);
        }
      });
      continue;
    }
    const S* p = static_cast<const S*>(term.matrix.data) + row * term.matrix.stride + column;
    const C coeff = static_cast<C>(term.coeff);
#pragma GCC unroll 16
    for (int j = 0; j < kRows; j++) {
      if constexpr (kWhole) {
        r[j] += coeff * load(p + j * term.matrix.stride);
      } else if (j < num_rows) {
        r[j] += coeff * load_partial(p + j * term.matrix.stride, n);
      }
    }
  }
}

#if defined(__AVX512BF16__)
/// Even and odd columns of row `row` of the sum, from `column` on; the first n columns, or two vectors of them when
/// n < 0. coeffs: of up to two terms; kTerms 3: of any number.
template <int kTerms>
TAPS_INLINE void blend_columns(FloatVec& even, FloatVec& odd, const Term* terms, const float* coeffs, int64_t num_terms,
                               int64_t row, int64_t column, int64_t n) {
  for (int64_t t = 0; t < (kTerms <= 2 ? kTerms : num_terms); t++) {
    const BFloat16* p = at<BFloat16>(terms[t].matrix, row, column);
    const FloatVec pairs = n < 0 ? elements(p) : elements(p, n);
    const float coeff = kTerms <= 2 ? coeffs[t] : static_cast<float>(terms[t].coeff);
    even += coeff * earlier(pairs);
    odd += coeff * later(pairs);
  }
}

/// One vector of pairs that lie along a row of the sum, columns as above. A single term stays as it is.
template <int kTerms>
TAPS_INLINE FloatVec blend_pairs(const Term* terms, const float* coeffs, int64_t num_terms, int64_t row, int64_t column,
                                 int64_t n) {
  if constexpr (kTerms == 1) {
    const BFloat16* p = at<BFloat16>(terms[0].matrix, row, column);
    return n < 0 ? elements(p) : elements(p, n);
  }
  FloatVec even{}, odd{};
  blend_columns<kTerms>(even, odd, terms, coeffs, num_terms, row, column, n);
  return zip_to_pairs(even, odd);
}

/// Two vectors of pairs that two rows of the sum make; second < 0: zeros.
template <int kTerms>
TAPS_INLINE void blend_rows(Pair* out, const Term* terms, const float* coeffs, int64_t num_terms, int64_t first,
                            int64_t second, int64_t column) {
  FloatVec even[2] = {}, odd[2] = {};
  blend_columns<kTerms>(even[0], odd[0], terms, coeffs, num_terms, first, column, -1);
  if (second >= 0) blend_columns<kTerms>(even[1], odd[1], terms, coeffs, num_terms, second, column, -1);
  zip_columns(out, even, odd);
}

/// As pack_block below, in pairs.
template <int kTerms, bool kWhole>
TAPS_INLINE void pack_pairs(Pair* strip, int64_t width, const Term* terms, int64_t num_terms, int64_t row,
                            int64_t num_rows, int64_t column, int64_t n) {
  constexpr int lanes = kLanes<float>;
  const float coeffs[2] = {static_cast<float>(terms[0].coeff), static_cast<float>(terms[kTerms > 1].coeff)};
  FloatVec r[lanes];
#pragma GCC unroll 16
  for (int j = 0; j < lanes; j++)
    r[j] = kWhole || j < num_rows ? blend_pairs<kTerms>(terms, coeffs, num_terms, row + j, column, kWhole ? -1 : n)
                                  : FloatVec{};
  transpose(r);
#pragma GCC unroll 16
  for (int j = 0; j < lanes; j++)
    if (kWhole || 2 * j < n) store(strip + j * width, r[j]);
}

/// The same with codes among the terms, a few rows at a time for want of registers.
template <class S, bool kWhole>
TAPS_INLINE void pack_coded_pairs(Pair* strip, int64_t width, const Term* terms, int64_t num_terms, int64_t row,
                                  int64_t num_rows, int64_t column, int64_t n) {
  constexpr int lanes = kLanes<float>, part = 4;
  FloatVec r[lanes];
#pragma GCC unroll 16
  for (int j = 0; j < lanes; j += part) {
    FloatVec low[part], high[part];
    sum_terms<S, part, kWhole>(low, terms, num_terms, row + j, num_rows - j, column, min(n, lanes));
    sum_terms<S, part, kWhole>(high, terms, num_terms, row + j, num_rows - j, column + lanes, max(n - lanes, 0));
#pragma GCC unroll 16
    for (int i = 0; i < part; i++) r[j + i] = round_to_pairs(low[i], high[i]);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int j = 0; j < lanes; j++)
    if (kWhole || 2 * j < n) store(strip + j * width, r[j]);
}
#endif

/// Rows [row, row + lanes) of the sum, columns [column, column + n), transposed in registers.
template <class S, bool kWhole>
TAPS_INLINE void pack_block(Element<S>* strip, int64_t width, const Term* terms, int64_t num_terms, int64_t row,
                            int64_t num_rows, int64_t column, int64_t n) {
  using C = Compute<S>;
  constexpr int lanes = kLanes<C>;
#if defined(__AVX512BF16__)
  if constexpr (kDepths<Element<S>> == 2) {
    if (has_codes(terms, num_terms))
      return pack_coded_pairs<S, kWhole>(strip, width, terms, num_terms, row, num_rows, column, n);
    return with_constant<3>(num_terms, [&](auto count) __attribute__((always_inline)) {
      pack_pairs<count.value, kWhole>(strip, width, terms, num_terms, row, num_rows, column, n);
    });
  }
#endif
  Vec<C> r[lanes];
  sum_terms<S, lanes, kWhole>(r, terms, num_terms, row, num_rows, column, n);
  transpose(r);
#pragma GCC unroll 16
  for (int j = 0; j < lanes; j++)
    if (kWhole || j < n) store(reinterpret_cast<C*>(strip) + j * width, r[j]);
}

/// Columns of the panel are rows [row, row + num_rows) of the weights; its depth is columns [column, column + depth).
template <class S>
void pack_transposed(Element<S>* panel, const Term* terms, int64_t num_terms, int64_t row, int64_t num_rows,
                     int64_t column, int64_t depth) {
  using E = Element<S>;
  constexpr int64_t lanes = kLanes<Compute<S>>, span = lanes * kDepths<E>, width = lanes * kStripVectors;
  const int64_t length = ceil_div(depth, kDepths<E>);
  for (int64_t j = 0; j < num_rows; j += width) {
    const int64_t strip_width = min(width, round_up(num_rows - j, lanes));
    for (int64_t v = 0; v < strip_width; v += lanes) {
      E* strip = panel + j * length + v;
      const int64_t have = min(lanes, num_rows - j - v);
      int64_t p = 0;
      if (have == lanes) {
        for (; p + span <= depth; p += span)
          pack_block<S, true>(strip + p / kDepths<E> * strip_width, strip_width, terms, num_terms, row + j + v, have,
                              column + p, span);
      }
      for (; p < depth; p += span)
        pack_block<S, false>(strip + p / kDepths<E> * strip_width, strip_width, terms, num_terms, row + j + v, have,
                             column + p, min(span, depth - p));
    }
  }
}

constexpr int64_t kRowsAhead = 8;  // rows often lie a page apart, where the hardware does not look ahead

/// Where the rows of a straight panel come from: row `index[p]`, times `scale[p]`.
struct Gather {
  const int64_t* index;  // null: row p itself
  const double* scale;   // null: 1
};

/// Columns of the panel are columns [column, column + num_columns) of the matrices; its depth is rows
/// [row, row + depth), or the rows those places gather. Strips are `width` wide.
template <class S, class E = Element<S>>
void pack_straight(E* panel, int64_t width, const Term* terms, int64_t num_terms, int64_t row, int64_t depth,
                   int64_t column, int64_t num_columns, Gather gather = {}) {
  using C = Compute<S>;
  constexpr int64_t lanes = kLanes<C>;
  const int64_t length = ceil_div(depth, kDepths<E>);
  [[maybe_unused]] const bool exact = num_terms == 1 && terms[0].coeff == 1 && !gather.scale;
  [[maybe_unused]] const float coeffs[2] = {static_cast<float>(terms[0].coeff),
                                            static_cast<float>(terms[num_terms > 1].coeff)};
  for (int64_t p = 0; p < depth; p += kDepths<E>) {
    const auto source = [&](int64_t q) { return gather.index ? gather.index[row + q] : row + q; };
    for (int64_t q = p + kRowsAhead; q < min(p + kRowsAhead + kDepths<E>, depth); q++)
      for (int64_t t = 0; t < num_terms; t++) prefetch(at<S>(terms[t].matrix, source(q), column), num_columns);
    const C scale = gather.scale ? static_cast<C>(gather.scale[row + p]) : C(1);
    for (int64_t j = 0; j < num_columns; j += width) {
      const int64_t strip_width = min(width, round_up(num_columns - j, lanes));
      E* out = panel + j * length + p / kDepths<E> * strip_width;
      for (int64_t v = 0; v < strip_width; v += lanes) {
        const int64_t n = num_columns - j - v, have = n < lanes ? n : -1;
#if defined(__AVX512BF16__)
        if constexpr (kDepths<E> == 2) {
          if (!gather.scale && n >= 2 * lanes && v + lanes < strip_width) {
            if (exact) {
              const auto place = [&](int64_t q) { return at<S>(terms[0].matrix, source(q), column + j + v); };
              zip_rows(out + v, place(p), p + 1 < depth ? place(p + 1) : nullptr);
            } else {
              with_constant<3>(num_terms, [&](auto count) __attribute__((always_inline)) {
                blend_rows<count.value>(out + v, terms, coeffs, num_terms, source(p),
                                        p + 1 < depth ? source(p + 1) : -1, column + j + v);
              });
            }
            v += lanes;
            continue;
          }
        }
#endif
        const Vec<C> first = scale * blend<S>(terms, num_terms, source(p), column + j + v, have);
        if constexpr (kDepths<E> == 1) {
          store(out + v, first);
        } else {
          const bool two = p + 1 < depth;
          const C other = gather.scale && two ? static_cast<C>(gather.scale[row + p + 1]) : C(1);
          const Vec<C> second =
              two ? other * blend<S>(terms, num_terms, source(p + 1), column + j + v, have) : Vec<C>{};
          store(out + v, zip_to_pairs(first, second));
        }
      }
    }
  }
}

}  // namespace
}  // namespace taps_fast::cpu
