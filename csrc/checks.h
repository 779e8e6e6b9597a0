// What the files that register CPU operators share: errors, dtypes, and how items reach the threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

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

/// Items go to whichever thread is free; each item's result is its own, so the order changes nothing.
template <class Problem>
void run_items(const Problem& problem, void (*kernel)(const Problem&, int64_t*)) {
  int64_t next_item = 0;
  const auto worker = [&](int64_t, int64_t) { kernel(problem, &next_item); };
  const int64_t threads = std::min<int64_t>(num_items(problem), torch::stable::get_num_threads());
  if (threads <= 1) return worker(0, 1);
  torch::stable::parallel_for(0, threads, 1, worker);
}

}  // namespace taps_fast
