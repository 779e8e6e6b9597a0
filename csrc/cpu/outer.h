// Few rows of dw: P = Σ_m y_mᵀ x_m formed a vector at a time, dotted with a delta and scaled into a gradient at once.
//
// The gradients themselves are what takes time, so each vector of P stays in its register, and a row of a delta is read
// and a row of a gradient written as one piece of memory. x is read where it lies, but pairs of its rows are packed.
#pragma once

#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int kOuterAtOnce = 2;  // rows of P that share what is read of x
constexpr int kOuterLength = 8;  // elements of y that stay in registers for each of them
/// Most rows of a job that take this path.
template <class E>
constexpr int64_t kOuterRows = kDepths<E> * kOuterLength;

/// One row of P: what multiplies each row of x, and where its delta and its gradient lie, if they are wanted.
template <class S, class E>
struct OuterRow {
  E y[kOuterLength];
  const S* delta;
  S* gradient;
};

/// Rows of P of num_columns numbers, with `factor` times P stored; returns the sum of the first num_rows' products with
/// their deltas. x: rows as stored, or of pairs, packed to whole vectors.
template <class S, class E, int kLength, bool kDot, bool kStore, class X>
double outer_step(const OuterRow<S, E>* rows, int64_t num_rows, const X* const* x, int64_t num_columns,
                  Compute<S> factor) {
  using C = Compute<S>;
  constexpr int64_t lanes = kLanes<C>;
  Vec<C> y[kOuterAtOnce][kLength], sum[kOuterAtOnce] = {};
  const X* in[kLength];
#pragma GCC unroll 8
  for (int m = 0; m < kLength; m++) {
    in[m] = x[m];
#pragma GCC unroll 2
    for (int i = 0; i < kOuterAtOnce; i++) y[i][m] = broadcast(rows[i].y[m]);
  }
  const auto columns = [&](int64_t j, auto read, auto write) __attribute__((always_inline)) {
    Vec<C> p[kOuterAtOnce] = {};
#pragma GCC unroll 8
    for (int m = 0; m < kLength; m++) {
      const Vec<C> v = read(in[m] + j);
#pragma GCC unroll 2
      for (int i = 0; i < kOuterAtOnce; i++) p[i] = multiply_add<E>(p[i], y[i][m], v);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kOuterAtOnce; i++) {
      if constexpr (kDot) sum[i] += p[i] * read(rows[i].delta + j);
      if constexpr (kStore) write(rows[i].gradient + j, factor * p[i]);
    }
  };
  int64_t j = 0;
  for (; j + lanes <= num_columns; j += lanes)
    columns(
        j, [](const auto* q) __attribute__((always_inline)) { return load(q); },
        [](S* q, Vec<C> v) __attribute__((always_inline)) { store(q, v); });
  if (const int64_t n = num_columns - j; n > 0)
    columns(
        j, [n](const auto* q) __attribute__((always_inline)) { return load_partial(q, n); },
        [n](S* q, Vec<C> v) __attribute__((always_inline)) { store_partial(q, v, n); });
  return kDot ? double(sum_lanes(num_rows > 1 ? sum[0] + sum[1] : sum[0])) : 0.0;
}

}  // namespace
}  // namespace taps_fast::cpu
