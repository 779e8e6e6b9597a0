// Packing: the sum of a pass's terms, formed on the way from the weights to a panel that the tile kernel streams.
//
//   panel = strips of `width` columns, one after another; strip[p · width + j] = Σ_t coeff_t · W_t(p, j)
//
// The sum and the transpose share one trip through the registers, so a weight is read once and never stored whole.
// This pass runs at the speed of memory; a separate transpose or a library GEMM that packs again would not.
#pragma once

#include "blend.h"

namespace taps_fast::cpu {
namespace {

/// Rows [row, row + lanes) of the sum, columns [column, column + n), transposed in registers.
template <class S, bool kWhole>
TAPS_INLINE void pack_block(Compute<S>* strip, int64_t width, const Term* terms, int64_t num_terms, int64_t row,
                            int64_t num_rows, int64_t column, int64_t n) {
  using C = Compute<S>;
  constexpr int lanes = kLanes<C>;
  Vec<C> r[lanes];
#pragma GCC unroll 16
  for (int j = 0; j < lanes; j++) r[j] = Vec<C>{};
  for (int64_t t = 0; t < num_terms; t++) {
    const S* p = static_cast<const S*>(terms[t].matrix.data) + row * terms[t].matrix.stride + column;
    const C coeff = static_cast<C>(terms[t].coeff);
#pragma GCC unroll 16
    for (int j = 0; j < lanes; j++) {
      if constexpr (kWhole) {
        r[j] += coeff * load(p + j * terms[t].matrix.stride);
      } else if (j < num_rows) {
        r[j] += coeff * load_partial(p + j * terms[t].matrix.stride, n);
      }
    }
  }
  transpose(r);
#pragma GCC unroll 16
  for (int j = 0; j < lanes; j++)
    if (kWhole || j < n) store(strip + j * width, r[j]);
}

/// Columns of the panel are rows [row, row + num_rows) of the weights; its depth is columns [column, column + depth).
template <class S>
void pack_transposed(Compute<S>* panel, const Term* terms, int64_t num_terms, int64_t row, int64_t num_rows,
                     int64_t column, int64_t depth) {
  using C = Compute<S>;
  constexpr int64_t lanes = kLanes<C>, width = lanes * kStripVectors;
  for (int64_t j = 0; j < num_rows; j += width) {
    const int64_t strip_width = min(width, round_up(num_rows - j, lanes));
    for (int64_t v = 0; v < strip_width; v += lanes) {
      C* strip = panel + j * depth + v;
      const int64_t have = min(lanes, num_rows - j - v);
      int64_t p = 0;
      if (have == lanes) {
        for (; p + lanes <= depth; p += lanes)
          pack_block<S, true>(strip + p * strip_width, strip_width, terms, num_terms, row + j + v, have, column + p,
                              lanes);
      }
      for (; p < depth; p += lanes)
        pack_block<S, false>(strip + p * strip_width, strip_width, terms, num_terms, row + j + v, have, column + p,
                             min(lanes, depth - p));
    }
  }
}

/// Where the rows of a straight panel come from: row `index[p]`, times `scale[p]`.
struct Gather {
  const int64_t* index;  // null: row p itself
  const double* scale;   // null: 1
};

/// Columns of the panel are columns [column, column + num_columns) of the matrices; its depth is rows
/// [row, row + depth), or the rows those places gather. Strips are `width` wide.
template <class S>
void pack_straight(Compute<S>* panel, int64_t width, const Term* terms, int64_t num_terms, int64_t row, int64_t depth,
                   int64_t column, int64_t num_columns, Gather gather = {}) {
  using C = Compute<S>;
  constexpr int64_t lanes = kLanes<C>;
  for (int64_t p = 0; p < depth; p++) {
    const int64_t source = gather.index ? gather.index[row + p] : row + p;
    const C scale = gather.scale ? static_cast<C>(gather.scale[row + p]) : C(1);
    for (int64_t j = 0; j < num_columns; j += width) {
      const int64_t strip_width = min(width, round_up(num_columns - j, lanes));
      C* out = panel + j * depth + p * strip_width;
      for (int64_t v = 0; v < strip_width; v += lanes) {
        const int64_t n = num_columns - j - v;
        store(out + v, scale * blend<S>(terms, num_terms, source, column + j + v, n < lanes ? n : -1));
      }
    }
  }
}

}  // namespace
}  // namespace taps_fast::cpu
