// Few rows: dot products straight from the weights, without a panel.
//
//   out[m, n] (+)= Σ_p a_m[p] · (Σ_t coeff_t · W_t[n, p])
//
// A term may be a masked tile, whose bits lie along the depth as the weights do.
// Of a tile that several tasks mask, each input row has its own.
//
// Packing costs as much as about 25 rows of arithmetic, so up to kDotRows rows the weights are summed in registers and
// used at once: each is read once from memory for all rows, which is the byte limit of the problem. The inputs are
// interleaved, [depth in vectors, rows], so that one pointer serves all rows.
#pragma once

#include "decode.h"
#include "simd.h"

namespace taps_fast::cpu {
namespace {

/// Most rows that take this path; pairs are packed in less time.
template <class E>
constexpr int64_t kDotRows = kRegisters != 32  ? 8
                             : kDepths<E> == 2 ? 14
                                               : 16;
/// Most rows that keep their sums in registers; float64, which need not be fast, gets by with fewer kernels.
template <class E>
constexpr int kDotTile = kRegisters == 32 && sizeof(E) == 4 ? 12 : 4;
constexpr int kRowsOneByOne = 4;  // most inputs of a group that gain by it
/// Terms summed in one pass; more take several. Pairs are multiplied unsummed, and so exactly, each term in its pass.
template <class S>
constexpr int kDotTerms = kDepths<Element<S>> == 1 ? 2 : 1;

/// Weight rows that a tile of m input rows can afford.
constexpr int dot_columns(int m) { return (m + 1) * 4 + 1 <= kRegisters ? 4 : (m + 1) * 2 + 1 <= kRegisters ? 2 : 1; }

/// step(p, read) for every vector of elements along the depth; `read` loads one of S, zeros behind the depth's end.
template <class S, class F>
TAPS_INLINE void over_depth(int64_t depth, const F& step) {
  constexpr int64_t span = kLanes<Compute<S>> * kDepths<Element<S>>;
  int64_t p = 0;
  for (; p + span <= depth; p += span) step(p, [](const S* q) __attribute__((always_inline)) { return elements(q); });
  if (p < depth) step(p, [&](const S* q) __attribute__((always_inline)) { return elements(q, depth - p); });
}

/// kRows interleaved rows times kColumns weight rows, of which the first num_columns are stored. kMasked: the last term
/// is a masked tile.
template <class S, int kRows, int kTerms, bool kMasked, int kColumns>
TAPS_INLINE void dot_tile(const Element<S>* a, const Term* terms, int64_t row, int64_t num_columns, int64_t column,
                          int64_t depth, Compute<S>* out, int64_t out_stride, bool accumulate) {
  using C = Compute<S>;
  using E = Element<S>;
  constexpr int lanes = kLanes<C>, columns = kColumns;
  const S* w[kTerms][columns];
  const uint8_t* codes[columns];
  C coeff[kTerms][columns];
  Vec<C> sum[kRows][columns];
#pragma GCC unroll 16
  for (int n = 0; n < columns; n++) {
    const int64_t weight_row = row + min(n, num_columns - 1);
#pragma GCC unroll 16
    for (int t = 0; t < kTerms; t++) {
      const Term& term = terms[t];
      w[t][n] = static_cast<const S*>(term.matrix.data) + weight_row * term.matrix.stride + column;
      const bool masked = kMasked && t == kTerms - 1;
      coeff[t][n] = masked ? row_factor<C>(term, weight_row) : static_cast<C>(term.coeff);
      if (masked) codes[n] = term.codes + weight_row * term.code_stride;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 16
    for (int n = 0; n < columns; n++) sum[m][n] = Vec<C>{};

  const auto step = [&](int64_t p, auto read) __attribute__((always_inline)) {
    Vec<C> weight[columns];
#pragma GCC unroll 16
    for (int n = 0; n < columns; n++) {
#pragma GCC unroll 8
      for (int t = 0; t < kTerms; t++)  // the hardware stops at each page; this reaches the next rows in time
        __builtin_prefetch(w[t][n] + p + columns * terms[t].matrix.stride, 0, 3);
      Vec<C> last = read(w[kTerms - 1][n] + p);
      if constexpr (kMasked) last = masked_elements<S>(codes[n], column + p, last);
      if constexpr (kTerms == 1) weight[n] = last;
      else weight[n] = coeff[0][n] * read(w[0][n] + p) + coeff[1][n] * last;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Vec<C> x = load(a + p / kDepths<E> * kRows + m * lanes);
#pragma GCC unroll 16
      for (int n = 0; n < columns; n++) sum[m][n] = multiply_add<E>(sum[m][n], x, weight[n]);
    }
  };
  over_depth<S>(depth, step);

  for (int m = 0; m < kRows; m++)
    for (int n = 0; n < columns; n++)
      if (n < num_columns) {
        C* y = out + m * out_stride + n;
        const C total = sum_lanes(sum[m][n]);
        *y = (kTerms == 1 ? coeff[0][n] * total : total) + (accumulate ? *y : C(0));
      }
}

/// The same of one masked tile, with a mask for each input row.
template <class S, int kRows>
TAPS_INLINE void masked_dot_tile(const Element<S>* a, const Term* const* masks, int64_t row, int64_t num_columns,
                                 int64_t column, int64_t depth, Compute<S>* out, int64_t out_stride, bool accumulate) {
  using C = Compute<S>;
  using E = Element<S>;
  constexpr int lanes = kLanes<C>, columns = dot_columns(kRows);
  const S* w[columns];
  const uint8_t* codes[kRows];
  int64_t code_row[columns];
  Vec<C> sum[kRows][columns];
  const Matrix& tile = masks[0]->matrix;
  const int64_t code_stride = masks[0]->code_stride;
#pragma GCC unroll 16
  for (int n = 0; n < columns; n++) {
    const int64_t weight_row = row + min(n, num_columns - 1);
    w[n] = static_cast<const S*>(tile.data) + weight_row * tile.stride + column;
    code_row[n] = weight_row * code_stride;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
    codes[m] = masks[m]->codes;
#pragma GCC unroll 16
    for (int n = 0; n < columns; n++) {
      sum[m][n] = Vec<C>{};
      prefetch(codes[m] + code_row[n] + columns * code_stride + column / 8, depth / 8);
    }
  }
  const auto step = [&](int64_t p, auto read) __attribute__((always_inline)) {
    Vec<C> weight[columns];
#pragma GCC unroll 16
    for (int n = 0; n < columns; n++) {
      __builtin_prefetch(w[n] + p + columns * tile.stride, 0, 3);
      weight[n] = read(w[n] + p);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Vec<C> x = load(a + p / kDepths<E> * kRows + m * lanes);
#pragma GCC unroll 16
      for (int n = 0; n < columns; n++)
        sum[m][n] = masked_multiply_add<S>(sum[m][n], x, codes[m] + code_row[n], column + p, weight[n]);
    }
  };
  over_depth<S>(depth, step);
  for (int m = 0; m < kRows; m++)
    for (int n = 0; n < columns; n++)
      if (n < num_columns) {
        C* y = out + m * out_stride + n;
        *y = row_factor<C>(*masks[m], row + n) * sum_lanes(sum[m][n]) + (accumulate ? *y : C(0));
      }
}

/// num_rows <= kDotTile interleaved inputs, each with its own mask of one tile, times weight rows
/// [row, row + num_columns).
template <class S>
void masked_dot_rows(const Element<S>* a, int64_t num_rows, const Term* const* masks, int64_t row, int64_t num_columns,
                     int64_t column, int64_t depth, Compute<S>* out, int64_t out_stride, bool accumulate) {
  with_constant<kDotTile<Element<S>>>(num_rows, [&](auto rows) {
    constexpr int64_t columns = dot_columns(rows.value);
    for (int64_t n = 0; n < num_columns; n += columns)
      masked_dot_tile<S, rows.value>(a, masks, row + n, min(columns, num_columns - n), column, depth, out + n,
                                     out_stride, accumulate);
  });
}

/// Interleaves row m < num_rows of a group as dot_rows reads it; `in` holds depth elements.
template <class S>
void interleave(Element<S>* group, int64_t num_rows, int64_t m, const S* in, int64_t depth) {
  constexpr int64_t lanes = kLanes<Compute<S>>, depths = kDepths<Element<S>>;
  over_depth<S>(depth, [&](int64_t p, auto read) __attribute__((always_inline)) {
    store(group + p / depths * num_rows + m * lanes, read(in + p));
  });
}

/// num_rows inputs, interleaved in groups of `part` <= kDotTile rows, times weight rows [row, row + num_columns), depth
/// columns from `column` on. Groups beyond the first find the weights in L1. one_by_one: very few inputs take a weight
/// row after the other, which memory that fetches rows by itself brings in less time than several side by side.
template <class S>
void dot_rows(const Element<S>* a, int64_t num_rows, int64_t part, const Term* terms, int64_t num_terms, int64_t row,
              int64_t num_columns, int64_t column, int64_t depth, Compute<S>* out, int64_t out_stride, bool accumulate,
              bool one_by_one) {
  const int64_t length = ceil_div(depth, kDepths<Element<S>>), columns = dot_columns(part);
  const int64_t group_size = part * round_up(length, kLanes<Compute<S>>);
  const auto masked = [&](int64_t t) { return terms[t].coding == Coding::kMask; };
  for (int64_t t = 0, count; t < num_terms; t += count) {
    count = masked(t) ? 1 : min(kDotTerms<S>, num_terms - t);
    for (int64_t n = 0; n < num_columns; n += columns) {
      for (int64_t m = 0; m < num_rows; m += part) {
        with_constant<kDotTile<Element<S>>>(min(part, num_rows - m), [&](auto rows) {
          const auto run = [&](auto count, auto masked) {
            const auto tiles = [&](auto step) {
              for (int64_t k = 0; k < min(columns, num_columns - n); k += step.value)
                dot_tile<S, rows.value, count.value, masked.value, step.value>(
                    a + m / part * group_size, terms + t, row + n + k, min(columns, num_columns - n) - k, column, depth,
                    out + m * out_stride + n + k, out_stride, accumulate || t > 0);
            };
            if constexpr (rows.value <= kRowsOneByOne) {
              if (one_by_one) return tiles(Int<1>{});
            }
            tiles(Int<dot_columns(rows.value)>{});  // a smaller last group could take more columns
          };
          with_constant<kDotTerms<S>>(count, [&](auto count) {
            if (masked(t + count.value - 1)) run(count, Int<1>{});
            else run(count, Int<0>{});
          });
        });
      }
    }
  }
}

}  // namespace
}  // namespace taps_fast::cpu
