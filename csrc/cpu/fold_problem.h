// Folding a network's deltas into its weights, all tensors at once, and the gradients of the coefficients. No torch.
//
//   Fold          out_l = base_l + mask_l ∘ Σ_k coeffs[l, part_l, k] · delta_lk
//   FoldGradient  dcoeffs[l, p, k] = Σ_{i: part_l(i) = p} dweight_l[i] · mask_l[i] · delta_lk[i]
//                 dmask_l = dweight_l ∘ Σ_k coeffs[l, part_l, k] · delta_lk
//
// Every tensor is a run of `size` elements in one order; an item is a piece of one tensor, and the threads share them.
#pragma once

#include <cstdint>

#include "problem.h"

namespace taps_fast::cpu {

enum class MaskType { kNone, kByte, kElement };  // element: of the tensors' own dtype

struct FoldTensor {
  const void* const* deltas;  // K pointers
  const void* in;             // base (null: zeros), or dweight
  void* out;                  // the weight, or dmask (null: not wanted)
  const void* mask;
  const uint8_t* part;  // null: all elements are of part 0
};

struct FoldItem {
  int64_t tensor, begin, size;
};

struct Fold {
  DType dtype;
  MaskType mask;
  int64_t num_deltas, num_parts;
  const FoldTensor* tensors;
  const FoldItem* items;
  int64_t num_items;
  const void* coeffs;  // [L, P, K], float (double for float64)
  double* partials;    // [num_items, P, K] zeros that the gradient adds to; null: dcoeffs is not wanted
};

static inline int64_t num_items(const Fold& p) { return p.num_items; }

struct FoldKernels {
  const char* name;
  void (*fold)(const Fold&, const Share& share);
  void (*fold_gradient)(const Fold&, const Share& share);
};

// One definition in each fold_<isa>.cpp.
const FoldKernels& fold_generic();
const FoldKernels& fold_avx2();
const FoldKernels& fold_avx512();

}  // namespace taps_fast::cpu
