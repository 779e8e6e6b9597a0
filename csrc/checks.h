// What the files that register CPU operators share: errors, dtypes, and how items reach the threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "cpu/problem.h"
#include "cpu/workspace.h"

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

/// A contiguous tensor on the CPU, by libtorch's function: `torch::stable::new_empty` looks its operator up by name.
inline torch::stable::Tensor new_tensor(torch::headeronly::ScalarType type,
                                        torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis > 1; axis--)
    strides[axis - 2] = strides[axis - 1] * std::max<int64_t>(sizes[axis - 1], 1);
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), int32_t(type),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

/// The same of zeros, of a type that kernels compute in.
inline torch::stable::Tensor new_zeros(torch::headeronly::ScalarType type,
                                       torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  torch::stable::Tensor made = new_tensor(type, sizes);
  if (made.numel()) std::memset(made.mutable_data_ptr(), 0, made.numel() * cpu::element_size(dtype_of("zeros", type)));
  return made;
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

/// How many of PyTorch's threads gain by so much work. Waking one is reckoned as reading kNumbers numbers, a product as
/// a part of that of one number.
inline int64_t threads_for(double numbers, double products) {
  constexpr double kNumbers = 1 << 17, kProductsOfNumber = 4;
  const double threads = (numbers + products / kProductsOfNumber) / kNumbers;
  return std::clamp<int64_t>(std::min(threads, 1e6), 1, torch::stable::get_num_threads());
}

/// f(thread) in so many threads.
template <class F>
void run_threads(int64_t threads, const F& f) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t mine = begin; mine < end; mine++) f(mine);
  };
  if (threads <= 1) return some(0, threads);
  torch::stable::parallel_for(0, threads, 1, some);
}

/// Items go to whichever of so many threads is free; each item's result is its own, so the order changes nothing.
template <class Problem>
void run_queue(const Problem& problem, void (*kernel)(const Problem&, int64_t* next_item, void* workspace),
               int64_t workspace_bytes, int64_t threads) {
  int64_t next_item = 0;
  run_threads(std::clamp<int64_t>(num_items(problem), 1, threads),
              [&](int64_t) { kernel(problem, &next_item, cpu::workspace(workspace_bytes)); });
}

/// Every item of a problem, in at most so many threads; see `Share`.
template <class Problem>
void run_items(const Problem& problem, void (*kernel)(const Problem&, const cpu::Share&),
               int64_t most = torch::stable::get_num_threads()) {
  const int64_t items = num_items(problem), threads = std::min<int64_t>(items, most);
  std::vector<int64_t> taken(std::max<int64_t>(threads, 0) * cpu::Share::kStride, 0);
  run_threads(threads, [&](int64_t mine) { kernel(problem, {taken.data(), threads, mine, items}); });
}

}  // namespace taps_fast
