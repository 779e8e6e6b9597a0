// taps_fast::sort_tasks on CPU: the index of a mixed batch, by counting.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "checks.h"

namespace taps_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Samples by group, in order within each; where the groups begin; and how many ids are out of range.
std::tuple<Tensor, Tensor, int64_t> sort_tasks(const Tensor& given, int64_t num_tasks) {
  const char* op = "sort_tasks";
  check(given.dim() == 1, op, ": ids must have 1 dimension, got ", given.dim());
  check(given.scalar_type() == ScalarType::Long, op, ": ids must be int64, got scalar type ", int(given.scalar_type()));
  check(num_tasks >= 0, op, ": num_tasks must not be negative, got ", num_tasks);
  const Tensor ids = torch::stable::contiguous(given);
  const int64_t samples = ids.numel(), groups = num_tasks + 1;
  Tensor order = new_tensor(ScalarType::Long, {samples}), offsets = new_tensor(ScalarType::Long, {groups + 1});
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  auto *place = static_cast<int64_t*>(order.mutable_data_ptr()),
       *offset = static_cast<int64_t*>(offsets.mutable_data_ptr());
  std::vector<int64_t> next(groups + 1);
  int64_t bad = 0;
  for (int64_t b = 0; b < samples; b++) {
    const bool in_range = -1 <= id[b] && id[b] < num_tasks;
    bad += !in_range;
    next[in_range ? id[b] + 2 : 1]++;
  }
  for (int64_t g = 0; g < groups; g++) next[g + 1] += next[g];
  for (int64_t g = 0; g <= groups; g++) offset[g] = next[g];
  if (bad == 0)
    for (int64_t b = 0; b < samples; b++) place[next[id[b] + 1]++] = b;
  return {order, offsets, bad};
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) { m.impl("sort_tasks", TORCH_BOX(&taps_fast::sort_tasks)); }
