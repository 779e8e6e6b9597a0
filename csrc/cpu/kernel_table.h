// Builds one instruction set's table; included by each kernels_<isa>.cpp, which is compiled with that set's flags.
#pragma once

#include "kernels.h"
#include "row_product.h"
#include "weight_gradient.h"

namespace taps_fast::cpu {
namespace {

#if defined(__AMX_BF16__)
// What AVX-512 has without it is not compiled again.
void row_product(const RowProduct& problem, int64_t* next_item, void* workspace) {
  if (problem.dtype != DType::kBFloat16) return kernels_avx512().row_product(problem, next_item, workspace);
  const AmxScope scope;
  run_row_product<BFloat16>(problem, next_item, workspace);
}

void weight_gradient(const WeightGradient& problem, int64_t* next_item, void* workspace) {
  if (problem.dtype != DType::kBFloat16 || problem.row_scale)
    return kernels_avx512bf16().weight_gradient(problem, next_item, workspace);
  const AmxScope scope;
  run_weight_gradient<BFloat16>(problem, next_item, workspace);
}
#elif defined(__AVX512BF16__)
// What AVX-512 has without it is not compiled again.
void row_product(const RowProduct& problem, int64_t* next_item, void* workspace) {
  if (problem.dtype == DType::kBFloat16) return run_row_product<BFloat16>(problem, next_item, workspace);
  kernels_avx512().row_product(problem, next_item, workspace);
}

void weight_gradient(const WeightGradient& problem, int64_t* next_item, void* workspace) {
  if (problem.dtype == DType::kBFloat16) return run_weight_gradient<BFloat16>(problem, next_item, workspace);
  kernels_avx512().weight_gradient(problem, next_item, workspace);
}
#else
void row_product(const RowProduct& problem, int64_t* next_item, void* workspace) {
  switch (problem.dtype) {
    case DType::kFloat32: return run_row_product<float>(problem, next_item, workspace);
    case DType::kBFloat16: return run_row_product<BFloat16>(problem, next_item, workspace);
    case DType::kFloat16: return run_row_product<Float16>(problem, next_item, workspace);
    case DType::kFloat64: return run_row_product<double>(problem, next_item, workspace);
  }
}

void weight_gradient(const WeightGradient& problem, int64_t* next_item, void* workspace) {
  switch (problem.dtype) {
    case DType::kFloat32: return run_weight_gradient<float>(problem, next_item, workspace);
    case DType::kBFloat16: return run_weight_gradient<BFloat16>(problem, next_item, workspace);
    case DType::kFloat16: return run_weight_gradient<Float16>(problem, next_item, workspace);
    case DType::kFloat64: return run_weight_gradient<double>(problem, next_item, workspace);
  }
}
#endif

constexpr Kernels make_table(const char* name) {
  return {name,
          kVectorBytes,
          kStripVectors,
          kTileRows,
          kRowBuffers,
          kChoicePanels,
          kChoiceRows<float>,
          kChoiceRows<Element<BFloat16>>,
          kDotRows<Float16>,
          kDotRows<float>,
          kDotRowsComing,
          kDotRows<BFloat16>,
          kAxpyRows<float>,
          kAxpyRows<Element<BFloat16>>,
          kAxpyRowsComing<float>,
          kAxpyRowsComing<Element<BFloat16>>,
          kOuterRows<float>,
          kOuterRows<Element<BFloat16>>,
          row_product,
          weight_gradient};
}

}  // namespace
}  // namespace taps_fast::cpu
