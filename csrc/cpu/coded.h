// The kernels of coded_problem.h for one instruction set; included by the coded_<isa>.cpp alone.
//
// A decoded vector serves up to kCodedRows rows. The sums stay in registers: forward runs along a few weight rows at a
// time and adds up lanes at their end, dx runs down the weight rows along a few vectors of columns. Signs have a faster
// way forward where a register holds 16 floats (signs.h).
#pragma once

#include "coded_problem.h"
#include "decode.h"
#include "dot.h"
#include "signs.h"
#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int kCodedRows = kRegisters == 32 ? 6 : 2;

/// Weight rows (forward) or vectors of columns (dx) that m rows take at a time.
constexpr int coded_columns(int m) { return kRegisters == 32 && m <= 2 ? 8 : 4; }

template <class S>
class CodedItem {
  using C = Compute<S>;
  using V = Vec<C>;
  static constexpr int64_t lanes = kLanes<C>;

 public:
  CodedItem(const CodedProduct& p, const Pass& pass, int64_t begin, void* workspace)
      : p_(p), pass_(pass), begin_(begin), rows_(pass.row_end - pass.row_begin), inputs_(static_cast<C*>(workspace)) {
    const int64_t depth = p.transposed ? p.in_features : p.out_features;
    size_ = min(p.col_block, (p.transposed ? p.out_features : p.in_features) - begin);
    stride_ = round_up(p.col_block, lanes);
    sums_ = inputs_ + max(kCodedRows * round_up(depth, lanes), kSignTables);
    total_ = sums_ + kCodedRows * stride_;
  }

  void run() {
    for (int64_t t = pass_.term_begin; t < pass_.term_end; t++) {
      const Term& term = p_.terms[t];
      with_constant<kCodedRows>(rows_, [&](auto rows) {
        if (p_.transposed) forward<rows.value>(term);
        else backward<rows.value>(term);
      });
      for (int64_t m = 0; m < rows_; m++) scale(term, m, t == pass_.term_begin);
    }
    for (int64_t m = 0; m < rows_; m++) {
      if (p_.wide_out) add(static_cast<C*>(p_.out.data), m);
      else add(static_cast<S*>(p_.out.data), m);
    }
  }

 private:
  static constexpr bool kHasSignRows = kSignTables > 0 && sizeof(C) == 4;

  template <int kRows>
  void forward(const Term& term) {
    if constexpr (kHasSignRows) {
      if (term.coding == Coding::kSign) {
        const S* in[kRows];
        for (int m = 0; m < kRows; m++) in[m] = input(m);
        return sign_rows<S, kRows>(in, term, p_.in_features, begin_, size_, inputs_, sums_, stride_);
      }
    }
    for (int m = 0; m < kRows; m++) interleave<S>(inputs_, kRows, m, input(m), p_.in_features);
    with_code(term.coding, [&](auto coding) {
      if constexpr (!kHasSignRows || coding.value != Coding::kSign) along<kRows, coding.value>(term);
    });
  }

  template <int kRows, Coding kCoding>
  void along(const Term& term) {
    const int64_t depth = p_.in_features;
    constexpr int kColumns = coded_columns(kRows);
    for (int64_t n = 0; n < size_; n += kColumns) {
      V sum[kRows][kColumns] = {};
      const auto step = [&](int64_t p, auto whole) __attribute__((always_inline)) {
        V weight[kColumns];
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; j++)
          weight[j] = decode<S, kCoding, whole.value>(term, begin_ + min(n + j, size_ - 1), p, depth - p);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; m++) {
          const V x = load(inputs_ + p * kRows + m * lanes);
#pragma GCC unroll 8
          for (int j = 0; j < kColumns; j++) sum[m][j] += x * weight[j];
        }
      };
      int64_t p = 0;
      for (; p + lanes <= depth; p += lanes) step(p, Int<1>{});
      if (p < depth) step(p, Int<0>{});
      C sums[kRows * kColumns * lanes], ones[kColumns];
      for (int j = 0; j < kColumns; j++) ones[j] = 1;
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++)
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; j++) store(sums + (m * kColumns + j) * lanes, sum[m][j]);
      put_sums(sums, ones, 0, kRows, kColumns, min(kColumns, size_ - n), sums_ + n, stride_, false);
    }
  }

  template <int kRows>
  void backward(const Term& term) {
    for (int64_t o = 0; o < p_.out_features; o++) {
      const C factor = row_factor<C>(term, o);
      for (int m = 0; m < kRows; m++) inputs_[o * kRows + m] = factor * to_compute(input(m)[o]);
    }
    constexpr int kVectors = coded_columns(kRows);
    with_code(term.coding, [&](auto coding) {
      int64_t j = 0;
      for (; begin_ + j + kVectors * lanes <= p_.in_features && j + kVectors * lanes <= size_; j += kVectors * lanes)
        down<kRows, kVectors, coding.value, true>(term, j);
      for (; j < size_; j += lanes) {
        if (begin_ + j + lanes <= p_.in_features) down<kRows, 1, coding.value, true>(term, j);
        else down<kRows, 1, coding.value, false>(term, j);
      }
    });
  }

  template <int kRows, int kVectors, Coding kCoding, bool kWhole>
  TAPS_INLINE void down(const Term& term, int64_t j) {
    V sum[kRows][kVectors] = {};
    for (int64_t o = 0; o < p_.out_features; o++) {
      V weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) {
        const int64_t i = begin_ + j + v * lanes;
        weight[v] = decode<S, kCoding, kWhole>(term, o, i, p_.in_features - i);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) sum[m][v] += inputs_[o * kRows + m] * weight[v];
    }
    for (int m = 0; m < kRows; m++)
      for (int v = 0; v < kVectors; v++) store(sums_ + m * stride_ + j + v * lanes, sum[m][v]);
  }

  int64_t row(int64_t m) const {
    const int64_t place = pass_.row_begin + m;
    return p_.row_index ? p_.row_index[place] : place;
  }
  const S* input(int64_t m) const { return static_cast<const S*>(p_.in.data) + row(m) * p_.in.stride; }

  /// Adds a term's sums to those of all; those of forward still lack the factor of each column.
  void scale(const Term& term, int64_t m, bool first) {
    const C *sums = sums_ + m * stride_, *factor = static_cast<const C*>(term.scale);
    const bool each = p_.transposed && term.scale_step;
    const V same = splat(p_.transposed ? static_cast<C>(term.coeff) * (each ? C(1) : *factor) : C(1));
    C* total = total_ + m * stride_;
    for (int64_t j = 0; j < size_; j += lanes) {
      V by = same;
      if (each) by *= j + lanes <= size_ ? load(factor + begin_ + j) : load_partial(factor + begin_ + j, size_ - j);
      const V value = by * load(sums + j);
      store(total + j, first ? value : load(total + j) + value);
    }
  }

  /// Adds the sums of all terms to a row of out, which is rounded once.
  template <class Out>
  void add(Out* base, int64_t m) {
    Out* out = base + row(m) * p_.out.stride + begin_;
    const C* total = total_ + m * stride_;
    int64_t j = 0;
    for (; j + lanes <= size_; j += lanes) store(out + j, load(out + j) + load(total + j));
    if (j < size_) store_partial(out + j, load_partial(out + j, size_ - j) + load(total + j), size_ - j);
  }

  const CodedProduct& p_;
  const Pass& pass_;
  const int64_t begin_, rows_;
  int64_t size_, stride_;
  C *inputs_, *sums_, *total_;  // total_: of all terms, by their factors
};

template <class S>
void run_coded(const CodedProduct& p, int64_t* next_item, void* workspace) {
  // Passes of one block of columns follow each other, so that a tile they share stays in the cache.
  const int64_t items = num_items(p);
  for (int64_t i = claim(next_item); i < items; i = claim(next_item))
    CodedItem<S>(p, p.passes[i % p.num_passes], i / p.num_passes * p.col_block, workspace).run();
}

void coded_product(const CodedProduct& p, int64_t* next_item, void* workspace) {
  switch (p.dtype) {
    case DType::kFloat32: return run_coded<float>(p, next_item, workspace);
    case DType::kBFloat16: return run_coded<BFloat16>(p, next_item, workspace);
    case DType::kFloat16: return run_coded<Float16>(p, next_item, workspace);
    case DType::kFloat64: return run_coded<double>(p, next_item, workspace);
  }
}

int64_t coded_workspace_bytes(const CodedProduct& p) {
  const int64_t size = compute_size(p.dtype), step = kVectorBytes / size;
  const int64_t depth = p.transposed ? p.in_features : p.out_features;
  return size * (max(kCodedRows * round_up(depth, step), kSignTables) + 2 * kCodedRows * round_up(p.col_block, step));
}

constexpr CodedKernels make_coded_table() { return {kCodedRows, coded_product, coded_workspace_bytes}; }

}  // namespace
}  // namespace taps_fast::cpu
