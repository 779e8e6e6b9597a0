// Few rows: dot products straight from the weights, without a panel.
//
//   out[m, n] (+)= Σ_p a_m[p] · (Σ_t coeff_t · W_t[n, p])
//
// A term may be a masked tile, whose bits lie along the depth as the weights do.
// Of a tile that several tasks mask, each input row has its own.
//
// Few rows do not pay for packing, so up to kDotRows rows the weights are summed in registers and used at once: each is
// read once from memory for all rows, which is the byte limit of the problem. The inputs are interleaved, [depth in
// vectors, rows], so that one pointer serves all rows. The hardware's own fetching stops at each page, so the tile
// fetches as well, from long rows kReach further on, else from the rows that follow.
#pragma once

#include "decode.h"
#include "simd.h"

namespace taps_fast::cpu {
namespace {

/// Most rows that keep their sums in registers; float64, which need not be fast, gets by with fewer kernels.
template <class E>
constexpr int kDotTile = kRegisters == 32 && sizeof(E) == 4 ? 12 : 4;
/// Most rows that take this path: of types that packing does not convert, more take less time with a panel (seen on
/// Zen 4, with 16 registers as well).
template <class S>
constexpr int64_t kDotRows = sizeof(S) != 4 && kDepths<Element<S>> == 1 ? (kRegisters == 32 ? 16 : 8)
                             : kRegisters == 32                         ? 9
                                                                        : kDotTile<Element<S>>;
/// The same of float32 where rows come by themselves (kernels.h): with a panel less than a second register tile takes.
constexpr int64_t kDotRowsComing = kRegisters == 32 ? kDotTile<float> : 8;
constexpr int kRowsOneByOne = 4;  // most inputs of a group that gain by it
/// Terms summed in one pass; more take several. Pairs are multiplied unsummed, and so exactly, each term in its pass.
template <class S>
constexpr int kDotTerms = kDepths<Element<S>> == 1 ? 2 : 1;

/// Weight rows that a tile of m input rows can afford; of 16 registers three take too many.
constexpr int dot_columns(int m) {
  const int columns = min((kRegisters - 1) / (m + 1), 4);
  return columns == 3 && kRegisters < 32 ? 2 : columns;
}

/// Depths that one vector of elements covers; a register tile sums whole vectors.
template <class S>
constexpr int64_t kSpan = kLanes<Compute<S>> * kDepths<Element<S>>;
/// Numbers of a row from one that is read to one that is fetched.
template <class S>
constexpr int64_t kReach = 4096 / int64_t(sizeof(S));

// What follows a register tile is not in it: unrolled for every size of tile it would be most of the code.

/// Adds what the last `depth` < kSpan elements make to a tile's sums, one vector an output: from column `column` of the
/// weights on, and the inputs' last vectors `a`.
template <class S>
__attribute__((noinline)) void add_end(Compute<S>* sums, const Element<S>* a, int64_t rows, int64_t columns,
                                       const Term* terms, int64_t num_terms, int64_t row, int64_t num_columns,
                                       int64_t column, int64_t depth) {
  using C = Compute<S>;
  constexpr int64_t lanes = kLanes<C>;
  for (int64_t n = 0; n < num_columns; n++) {
    Vec<C> weight{};
    for (int64_t t = 0; t < num_terms; t++) {
      const Term& term = terms[t];
      const S* numbers = static_cast<const S*>(term.matrix.data) + (row + n) * term.matrix.stride + column;
      const bool masked = term.coding == Coding::kMask;
      Vec<C> w = elements(numbers, depth);
      if (masked) w = masked_elements<S>(term.codes + (row + n) * term.code_stride, column, w);
      if (num_terms == 1) weight = w;  // pairs are not summed
      else weight += (masked ? row_factor<C>(term, row + n) : static_cast<C>(term.coeff)) * w;
    }
    for (int64_t m = 0; m < rows; m++) {
      C* sum = sums + (m * columns + n) * lanes;
      store(sum, multiply_add<Element<S>>(load(sum), load(a + m * lanes), weight));
    }
  }
}

/// Adds up the lanes of a tile's sums; factors[m * factor_step + n] multiplies each.
template <class C>
__attribute__((noinline)) void put_sums(const C* sums, const C* factors, int64_t factor_step, int64_t rows,
                                        int64_t columns, int64_t num_columns, C* out, int64_t out_stride,
                                        bool accumulate) {
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = 0; n < num_columns; n++) {
      C* y = out + m * out_stride + n;
      const C total = sum_lanes(load(sums + (m * columns + n) * kLanes<C>));
      *y = factors[m * factor_step + n] * total + (accumulate ? *y : C(0));
    }
}

/// kRows interleaved rows times kColumns weight rows, of which the first num_columns are stored. kMasked: the last term
/// is a masked tile.
template <class S, int kRows, int kTerms, bool kMasked, int kColumns>
TAPS_INLINE void dot_tile(const Element<S>* a, const Term* terms, int64_t row, int64_t num_columns, int64_t column,
                          int64_t depth, Compute<S>* out, int64_t out_stride, bool accumulate) {
  using C = Compute<S>;
  using E = Element<S>;
  constexpr int lanes = kLanes<C>, columns = kColumns;
  constexpr int chains = max(4 / (kRows * columns), 1);  // of additions that do not wait for each other
  const S* w[kTerms][columns];
  const uint8_t* codes[columns];
  C coeff[kTerms][columns];
  Vec<C> sum[chains][kRows][columns];
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
    for (int n = 0; n < columns; n++)
#pragma GCC unroll 4
      for (int c = 0; c < chains; c++) sum[c][m][n] = Vec<C>{};

  // What is fetched: this row's numbers further on, or those of the rows that follow, one of which it runs on into.
  const bool along = depth > (columns == 1 ? 1 : 2) * kReach<S>;
  int64_t ahead[kTerms];
#pragma GCC unroll 8
  for (int t = 0; t < kTerms; t++) ahead[t] = along ? kReach<S> : columns * terms[t].matrix.stride;
  const auto add = [&](int64_t p, int c) __attribute__((always_inline)) {
    Vec<C> weight[columns];
#pragma GCC unroll 16
    for (int n = 0; n < columns; n++) {
#pragma GCC unroll 8
      for (int t = 0; t < kTerms; t++) __builtin_prefetch(w[t][n] + p + ahead[t], 0, 3);
      Vec<C> last = elements(w[kTerms - 1][n] + p);
      if constexpr (kMasked) last = masked_elements<S>(codes[n], column + p, last);
      if constexpr (kTerms == 1) weight[n] = last;
      else weight[n] = coeff[0][n] * elements(w[0][n] + p) + coeff[1][n] * last;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Vec<C> x = load(a + p / kDepths<E> * kRows + m * lanes);
#pragma GCC unroll 16
      for (int n = 0; n < columns; n++) sum[c][m][n] = multiply_add<E>(sum[c][m][n], x, weight[n]);
    }
  };
  const int64_t whole = depth - depth % kSpan<S>, together = depth - depth % (chains * kSpan<S>);
  for (int64_t p = 0; p < together; p += chains * kSpan<S>) {
#pragma GCC unroll 4
    for (int c = 0; c < chains; c++) add(p + c * kSpan<S>, c);
  }
  for (int64_t p = together; chains > 1 && p < whole; p += kSpan<S>) add(p, 0);

  C sums[kRows * columns * lanes], factors[columns];
#pragma GCC unroll 16
  for (int n = 0; n < columns; n++) {
    factors[n] = kTerms == 1 ? coeff[0][n] : C(1);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 4
      for (int c = 1; c < chains; c++) sum[0][m][n] += sum[c][m][n];
      store(sums + (m * columns + n) * lanes, sum[0][m][n]);
    }
  }
  const auto count = min(columns, num_columns);
  if (whole < depth)
    add_end<S>(sums, a + whole / kDepths<E> * kRows, kRows, columns, terms, kTerms, row, count, column + whole,
               depth - whole);
  put_sums(sums, factors, 0, kRows, columns, count, out, out_stride, accumulate);
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
  const int64_t whole = depth - depth % kSpan<S>;
  for (int64_t p = 0; p < whole; p += kSpan<S>) {
    Vec<C> weight[columns];
#pragma GCC unroll 16
    for (int n = 0; n < columns; n++) {
      __builtin_prefetch(w[n] + p + columns * tile.stride, 0, 3);
      weight[n] = elements(w[n] + p);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Vec<C> x = load(a + p / kDepths<E> * kRows + m * lanes);
#pragma GCC unroll 16
      for (int n = 0; n < columns; n++)
        sum[m][n] = masked_multiply_add<S>(sum[m][n], x, codes[m] + code_row[n], column + p, weight[n]);
    }
  }

  C sums[kRows * columns * lanes], factors[kRows * columns];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 16
    for (int n = 0; n < columns; n++) store(sums + (m * columns + n) * lanes, sum[m][n]);
  const auto count = min(columns, num_columns);
  for (int64_t m = 0; m < kRows; m++) {
    if (whole < depth)
      add_end<S>(sums + m * columns * lanes, a + whole / kDepths<E> * kRows + m * lanes, 1, columns, masks[m], 1, row,
                 count, column + whole, depth - whole);
    for (int64_t n = 0; n < count; n++) factors[m * columns + n] = row_factor<C>(*masks[m], row + n);
  }
  put_sums(sums, factors, columns, kRows, columns, count, out, out_stride, accumulate);
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
  const auto put = [&](int64_t p, Vec<Compute<S>> v) __attribute__((always_inline)) {
    store(group + p / kDepths<Element<S>> * num_rows + m * kLanes<Compute<S>>, v);
  };
  const int64_t whole = depth - depth % kSpan<S>;
  for (int64_t p = 0; p < whole; p += kSpan<S>) put(p, elements(in + p));
  if (whole < depth) put(whole, elements(in + whole, depth - whole));
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
