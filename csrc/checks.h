// What the files that register CPU operators share: errors, dtypes, and how items reach the threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "cpu/problem.h"

namespace taps_fast {

inline cpu::DType dtype_of(const char* op, torch::headeronly::ScalarType type, const char* name = "x") {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float: return cpu::DType::kFloat32;
    case ScalarType::BFloat16: return cpu::DType::kBFloat16;
    case ScalarType::Half: return cpu::DType::kFloat16;
    case ScalarType::Double: return cpu::DType::kFloat64;
    default: break;
  }
  check(false, op, ": ", name, " must be float32, bfloat16, float16 or float64, got scalar type ", int(type));
  return {};
}

/// An element of a contiguous tensor of float or double.
inline double number(const torch::stable::Tensor& t, int64_t i) {
  return t.scalar_type() == torch::headeronly::ScalarType::Double ? static_cast<const double*>(t.const_data_ptr())[i]
                                                                  : static_cast<const float*>(t.const_data_ptr())[i];
}

/// What a `TaskBatch` promises of its index, without which rows outside the tensors would be read.
inline void check_groups(const char* op, int64_t rows, int64_t inner, int64_t batch, int64_t tasks,
                         const int64_t* order, const int64_t* offsets) {
  check(inner >= 1 && (batch ? rows % inner == 0 && rows / inner % batch == 0 : rows == 0), op,
        ": rows must be a multiple of inner times the batch, got ", rows, " (inner ", inner, ", batch ", batch, ")");
  check(offsets[0] == 0 && offsets[tasks + 1] == batch, op, ": offsets must span the batch of ", batch, ", got ",
        offsets[0], " to ", offsets[tasks + 1]);
  for (int64_t g = 0; g <= tasks; g++)
    check(offsets[g] <= offsets[g + 1], op, ": offsets must not descend, got ", offsets[g], " before ", offsets[g + 1]);
  for (int64_t i = 0; i < batch; i++)
    check(0 <= order[i] && order[i] < batch, op, ": order must be in [0, ", batch, "), got ", order[i]);
}

/// Every item of a problem, in as many threads as PyTorch has; see `Share`.
template <class Problem>
void run_items(const Problem& problem, void (*kernel)(const Problem&, const cpu::Share&)) {
  const int64_t items = num_items(problem), threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  std::vector<int64_t> taken(std::max<int64_t>(threads, 0) * cpu::Share::kStride, 0);
  const auto worker = [&](int64_t begin, int64_t end) {
    for (int64_t mine = begin; mine < end; mine++) kernel(problem, {taken.data(), threads, mine, items});
  };
  if (threads <= 1) return worker(0, threads);
  torch::stable::parallel_for(0, threads, 1, worker);
}

}  // namespace taps_fast
