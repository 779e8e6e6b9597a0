// One vector of a pass's weight: the sum of its terms, formed in the compute type.
#pragma once

#include "simd.h"

namespace taps_fast::cpu {
namespace {

template <class S>
TAPS_INLINE const S* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const S*>(m.data) + row * m.stride + column;
}

/// Σ_t coeff_t · W_t[row, column ...]: n elements, or a whole vector when n < 0.
template <class S>
TAPS_INLINE Vec<Compute<S>> blend(const Term* terms, int64_t num_terms, int64_t row, int64_t column, int64_t n = -1) {
  using C = Compute<S>;
  Vec<C> sum{};
  for (int64_t t = 0; t < num_terms; t++) {
    const S* p = static_cast<const S*>(terms[t].matrix.data) + row * terms[t].matrix.stride + column;
    sum += static_cast<C>(terms[t].coeff) * (n < 0 ? load(p) : load_partial(p, n));
  }
  return sum;
}

}  // namespace
}  // namespace taps_fast::cpu
