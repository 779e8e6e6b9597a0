// Turns an operator's arguments into the passes and jobs that the kernels run: which rows go together, which terms
// make up their weight, which gradient each product serves, and how the work is cut into blocks. No torch.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "problem.h"

namespace taps_fast::cpu {

/// Rows grouped by task, as in `taps_fast._ops`; offsets is null without tasks.
struct Groups {
  const int64_t* order = nullptr;
  const int64_t* offsets = nullptr;  // [tasks + 2]; group 0 is the base, group t + 1 task t
  int64_t batch = 0;
  int64_t tasks = 0;  // 0 without tasks
  int64_t inner = 1;
};

/// f(r) for the rows r < num_rows of group g, sample by sample: sample(r) = (r / inner) % batch.
template <class F>
void for_each_row(const Groups& groups, int64_t g, int64_t num_rows, const F& f) {
  for (int64_t i = groups.offsets[g]; i < groups.offsets[g + 1]; i++)
    for (int64_t start = groups.order[i] * groups.inner; start < num_rows; start += groups.batch * groups.inner)
      for (int64_t r = start; r < start + groups.inner && r < num_rows; r++) f(r);
}

/// W_t = base_coeffs[t] · base + Σ_k coeffs[t, k] · deltas[k]; without tasks there is one row of coefficients.
struct Weight {
  Matrix base;
  std::vector<Term> deltas;  // their own coefficients are not used
  const void* coeffs;       // [T, K]: float, or double for float64 problems
  const void* base_coeffs;  // null: 1
  bool wide;                // coefficients are double
  bool has_base = true;     // without, rows of no delta are left as they are

  double coeff(int64_t t, int64_t k) const { return at(coeffs, t * static_cast<int64_t>(deltas.size()) + k); }
  /// t = -1: of rows that are no task's.
  double base_coeff(int64_t t) const { return !has_base ? 0.0 : base_coeffs && t >= 0 ? at(base_coeffs, t) : 1.0; }

 private:
  double at(const void* p, int64_t i) const {
    return wide ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
  }
};

enum class Algorithm {
  kAuto,   // blend, but for coded terms of few rows
  kBlend,  // terms summed into one panel
  kSplit,  // a product for each term
};

/// Forward and dx. Fill `problem`'s matrices and sizes first; `finish` adds passes, row order and blocking.
class RowPlan {
 public:
  RowProduct problem{};
  void finish(const Weight& weight, const Groups& groups, Algorithm algorithm, bool bias_by_task, int threads,
              const Kernels& table);
  int64_t workspace_bytes(const Kernels& table) const;
  int64_t partials_bytes() const;  // of what all threads share: problem.partials
  /// Passes with coded terms that are left to the kernels of coded_problem.h, and are added to the product.
  const std::vector<Pass>& apart() const { return apart_; }

 private:
  void add_group(int64_t row_begin, int64_t row_end, const std::vector<Term>& terms, bool first, bool last);
  void choose_blocks(int threads, const Kernels& table);
  bool has_codes(const Pass& pass) const;
  bool reads_weights_once() const;

  std::vector<int64_t> rows_, bias_rows_, parts_done_;
  std::vector<Term> terms_;
  std::vector<Pass> passes_, apart_;
  bool keeps_sums_ = false;  // a row's sums outlive a register tile
};

/// What linear_dw is asked for.
struct Wanted {
  bool dcoeffs;
  std::vector<int64_t> pairs;             // flat t · K + k; empty: all
  std::vector<int64_t> ddeltas_for;       // delta indices
  std::vector<MutableMatrix> ddeltas;     // one for each of them
  MutableMatrix dbase;                    // data null: not wanted
  void* dbias;  // [T + 1, O], or [1, O] without tasks, of the compute type and zeros at first; null: not wanted
};

class GradientPlan {
 public:
  WeightGradient problem{};
  void finish(const Weight& weight, const Groups& groups, const Wanted& wanted, int64_t num_rows, int threads,
              const Kernels& table);
  int64_t workspace_bytes(const Kernels& table) const;
  /// dcoeffs[t · K + k], after the items have run; float or double like the coefficients.
  void reduce(void* dcoeffs, bool wide) const;

 private:
  std::vector<int64_t> rows_;
  std::vector<double> scales_, partials_;
  std::vector<Job> jobs_;
  std::vector<Dot> dots_;
  std::vector<Target> targets_;
  std::vector<int64_t> positions_;  // slot -> flat position in dcoeffs
};

}  // namespace taps_fast::cpu
