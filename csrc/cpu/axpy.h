// Few rows of dx: out[m, :] += Σ_p a_m[p] · (Σ_t coeff_t · W_t[p, :]), along the weights' rows and without a panel.
//
// kAxpyDepth weight rows at a time are summed in registers and spread over all outputs, which stay near; the weights
// stream past once, fetched before unless they come by themselves: whole rows one after another, on some CPUs
// (kernels.h).
#pragma once

#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int kAxpyDepth = kRegisters == 32 ? 8 : 4;
/// Most rows that take this path: more, and pairs sooner, gain from a panel.
template <class E>
constexpr int64_t kAxpyRows = kDepths<E> == 2    ? 8
                              : kRegisters == 32 ? 16
                                                 : 8;
/// The same where rows come by themselves (kernels.h) and each weight is read once. A weight that several groups of
/// rows read, as a mixed batch reads the base, is to be in L2 by then, and gains from a panel sooner.
template <class E>
constexpr int64_t kAxpyRowsComing = kDepths<E> == 1 && kRegisters == 32 ? 48 : kAxpyRows<E>;

/// kDepth weight rows from `row` on times columns [column, column + num_columns), added to num_rows outputs; x[m] is
/// what multiplies them in output m.
template <class S, int kDepth, int kTerms, bool kFetch>
void axpy_step(const Compute<S> (*x)[kAxpyDepth], int64_t num_rows, const Term* terms, int64_t row, int64_t column,
               int64_t num_columns, Compute<S>* out, int64_t out_stride, bool accumulate) {
  using C = Compute<S>;
  constexpr int64_t lanes = kLanes<C>;
  const S* w[kTerms][kDepth];
  int64_t ahead[kTerms];
#pragma GCC unroll 8
  for (int t = 0; t < kTerms; t++) {
    ahead[t] = kDepth * terms[t].matrix.stride;
#pragma GCC unroll 8
    for (int p = 0; p < kDepth; p++)
      w[t][p] = static_cast<const S*>(terms[t].matrix.data) + (row + p) * terms[t].matrix.stride + column;
  }
  const auto columns = [&](int64_t j, auto read) __attribute__((always_inline)) {
    Vec<C> weight[kDepth];
#pragma GCC unroll 8
    for (int p = 0; p < kDepth; p++) {
      weight[p] = Vec<C>{};
#pragma GCC unroll 8
      for (int t = 0; t < kTerms; t++) {
        if constexpr (kFetch) __builtin_prefetch(w[t][p] + ahead[t] + j, 0, 2);
        weight[p] += static_cast<C>(terms[t].coeff) * read(w[t][p] + j);
      }
    }
    for (int64_t m = 0; m < num_rows; m++) {
      C* y = out + m * out_stride + j;
      Vec<C> sum = x[m][0] * weight[0];
#pragma GCC unroll 8
      for (int p = 1; p < kDepth; p++) sum += x[m][p] * weight[p];
      store(y, accumulate ? load(y) + sum : sum);
    }
  };
  int64_t j = 0;
  for (; j + lanes <= num_columns; j += lanes)
    columns(j, [](const S* q) __attribute__((always_inline)) { return load(q); });
  if (j < num_columns)
    columns(j, [&](const S* q) __attribute__((always_inline)) { return load_partial(q, num_columns - j); });
}

/// num_rows <= kAxpyRowsComing rows, whose inputs a[m] hold depth elements, times weight rows [row, row + depth).
template <class S>
void axpy_rows(const S* const* a, int64_t num_rows, const Term* terms, int64_t num_terms, int64_t row, int64_t depth,
               int64_t column, int64_t num_columns, Compute<S>* out, int64_t out_stride, bool accumulate, bool come) {
  Compute<S> x[kAxpyRowsComing<Element<S>>][kAxpyDepth];
  for (int64_t p = 0; p < depth;) {
    const int64_t step = depth - p < kAxpyDepth ? 1 : kAxpyDepth;
    for (int64_t m = 0; m < num_rows; m++)
      for (int64_t i = 0; i < step; i++) x[m][i] = to_compute(a[m][p + i]);
    for (int64_t t = 0; t < num_terms; t += 2) {
      with_constant<2>(num_terms - t, [&](auto count) {
        const auto run = [&](auto depth, auto fetch) {
          axpy_step<S, depth.value, count.value, fetch.value>(x, num_rows, terms + t, row + p, column, num_columns, out,
                                                              out_stride, accumulate || p > 0 || t > 0);
        };
        if (step == 1) run(Int<1>{}, Int<0>{});
        else if (come) run(Int<kAxpyDepth>{}, Int<0>{});
        else run(Int<kAxpyDepth>{}, Int<1>{});
      });
    }
    p += step;
  }
}

}  // namespace
}  // namespace taps_fast::cpu
