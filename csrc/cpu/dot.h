// Few rows: dot products straight from the weights, without a panel.
//
//   out[m, n] (+)= Σ_p a_m[p] · (Σ_t coeff_t · W_t[n, p])
//
// Packing costs as much as about 25 rows of arithmetic, so below kDotRows the weights are summed in registers and used
// at once: each weight is read once from memory for all rows, which is the byte limit of the problem.
#pragma once

#include "blend.h"

namespace taps_fast::cpu {
namespace {

constexpr int kDotRows = kRegisters == 32 ? 12 : 8;     // most rows that take this path
constexpr int kDotTile = kRegisters == 32 ? 12 : 4;     // most rows that keep their sums in registers

/// Weight rows that a tile of m input rows can afford.
constexpr int dot_columns(int m) { return (m + 1) * 4 + 1 <= kRegisters ? 4 : (m + 1) * 2 + 1 <= kRegisters ? 2 : 1; }

/// kRows rows times kColumns weight rows starting at `row`; kTerms = 0: any number of terms.
template <class S, int kRows, int kColumns, int kTerms>
TAPS_INLINE void dot_tile(const Compute<S>* const* a, const Term* terms, int64_t num_terms, int64_t row, int64_t column,
                          int64_t depth, Compute<S>* out, int64_t out_stride, bool accumulate) {
  using C = Compute<S>;
  constexpr int lanes = kLanes<C>;
  const int64_t count = kTerms ? kTerms : num_terms;
  Vec<C> sum[kRows][kColumns];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 16
    for (int n = 0; n < kColumns; n++) sum[m][n] = Vec<C>{};

  const auto step = [&](int64_t p, int64_t have) __attribute__((always_inline)) {
    Vec<C> w[kColumns];
#pragma GCC unroll 16
    for (int n = 0; n < kColumns; n++) w[n] = blend<S>(terms, count, row + n, column + p, have);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Vec<C> x = have < 0 ? load(a[m] + p) : load_partial(a[m] + p, have);
#pragma GCC unroll 16
      for (int n = 0; n < kColumns; n++) sum[m][n] += x * w[n];
    }
  };
  int64_t p = 0;
  for (; p + lanes <= depth; p += lanes) step(p, -1);
  if (p < depth) step(p, depth - p);

  for (int m = 0; m < kRows; m++)
    for (int n = 0; n < kColumns; n++) {
      C* y = out + m * out_stride + n;
      *y = sum_lanes(sum[m][n]) + (accumulate ? *y : C(0));
    }
}

template <class S, int kRows, int kTerms>
void dot_columns_loop(const Compute<S>* const* a, const Term* terms, int64_t num_terms, int64_t row, int64_t num_columns,
                      int64_t column, int64_t depth, Compute<S>* out, int64_t out_stride, bool accumulate) {
  constexpr int columns = dot_columns(kRows);
  int64_t n = 0;
  for (; n + columns <= num_columns; n += columns)
    dot_tile<S, kRows, columns, kTerms>(a, terms, num_terms, row + n, column, depth, out + n, out_stride, accumulate);
  for (; n < num_columns; n++)
    dot_tile<S, kRows, 1, kTerms>(a, terms, num_terms, row + n, column, depth, out + n, out_stride, accumulate);
}

/// num_rows <= kDotRows rows times weight rows [row, row + num_columns), depth columns from `column` on.
template <class S>
void dot_rows(const Compute<S>* const* a, int64_t num_rows, const Term* terms, int64_t num_terms, int64_t row,
              int64_t num_columns, int64_t column, int64_t depth, Compute<S>* out, int64_t out_stride,
              bool accumulate) {
  const int64_t part = even_part(num_rows, kDotTile);
  for (int64_t m = 0; m < num_rows; m += part) {
    with_constant<kDotTile>(min(part, num_rows - m), [&](auto rows) {
      const auto run = [&](auto count) {
        dot_columns_loop<S, rows.value, count.value>(a + m, terms, num_terms, row, num_columns, column, depth,
                                                     out + m * out_stride, out_stride, accumulate);
      };
      if (num_terms == 1) run(Int<1>{});
      else if (num_terms == 2) run(Int<2>{});
      else run(Int<0>{});
    });
  }
}

}  // namespace
}  // namespace taps_fast::cpu
