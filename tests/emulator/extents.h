// The memory that each kernel may touch, said a second time and independently of the kernels.
#pragma once

#include <vector>

#include "cuda/norm.h"
#include "cuda/plan.h"
#include "cuda/stream.h"
#include "emulator.h"

namespace taps_fast::cuda {

inline std::vector<emulator::Extent> extents(const StreamProblem& p) {
  const int64_t element = element_size(p.dtype), row = p.in_features * element;
  std::vector<emulator::Extent> memory = {
      {p.x, p.rows, p.x_stride * element, row},
      {p.y, 1, 0, int64_t{p.rows} * p.out_features * element, true},
      {p.coeffs, 1, 0, p.tasks * (p.num_sources - 1) * 4},
  };
  for (int s = 0; s < p.num_sources; s++)
    memory.push_back({p.sources[s], p.out_features, p.weight_stride * element, row});
  if (p.base_coeffs) memory.push_back({p.base_coeffs, 1, 0, p.tasks * 4});
  if (p.ids) memory.push_back({p.ids, 1, 0, p.batch * 8});
  if (p.bias)
    memory.push_back({p.bias, p.bias_stride ? p.tasks + 1 : 1, p.bias_stride * element, p.out_features * element});
  return memory;
}

inline std::vector<emulator::Extent> extents(const PlanProblem& p) {
  std::vector<emulator::Extent> memory = {
      {p.ids, 1, 0, 8 * p.samples},
      {p.order, 1, 0, 8 * p.samples, true},
      {p.offsets, 1, 0, 8 * (p.tasks + 2), true},
  };
  if (p.inverse) memory.push_back({p.inverse, 1, 0, 8 * p.samples, true});
  if (p.valid) memory.push_back({p.valid, 1, 0, 1, true});
  if (p.layer) {
    memory.push_back({p.coeffs, 1, 0, 4 * int64_t{p.tasks} * p.deltas});
    memory.push_back({p.slots, 1, 0, 8 * p.samples, true});
    memory.push_back({p.place, 1, 0, 8 * int64_t{p.rows}, true});
    memory.push_back({p.ends, 1, 0, 4 * (p.tasks + 1), true});
  }
  if (p.base_coeffs) memory.push_back({p.base_coeffs, 1, 0, 4 * p.tasks});
  return memory;
}

inline void add_lines(std::vector<emulator::Extent>& memory, const Lines& in) {
  if (!in.mixed) return;
  memory.push_back({in.ids, 1, 0, 8 * in.batch});
  memory.push_back({in.order, 1, 0, 8 * in.batch});
  memory.push_back({in.offsets, 1, 0, 8 * (in.tasks + 2)});
}

inline void add_table(std::vector<emulator::Extent>& memory, const Lines& in, const Table& table) {
  const int64_t bytes = in.dtype == DType::kFloat64 ? 8 : 4, rows = table.row_stride ? in.tasks + 1 : 1;
  if (table.data) memory.push_back({table.data, rows, table.row_stride * bytes, in.channels * bytes});
}

inline std::vector<emulator::Extent> extents(const PointwiseProblem& p) {
  const int64_t bytes = p.in.rows * p.in.channels * p.in.pixels * element_size(p.in.dtype);
  std::vector<emulator::Extent> memory = {{p.x, 1, 0, bytes}, {p.out, 1, 0, bytes, true}};
  if (p.dy) memory.push_back({p.dy, 1, 0, bytes});
  add_lines(memory, p.in);
  for (const Table& table : {p.scale, p.shift, p.slope, p.offset}) add_table(memory, p.in, table);
  return memory;
}

inline std::vector<emulator::Extent> extents(const SumsProblem& p) {
  const int64_t bytes = p.in.rows * p.in.channels * p.in.pixels * element_size(p.in.dtype);
  const int64_t sums = p.in.groups() * p.in.channels * (p.in.dtype == DType::kFloat64 ? 8 : 4);
  std::vector<emulator::Extent> memory = {{p.x, 1, 0, bytes},
                                          {p.first, 1, 0, sums, true},
                                          {p.second, 1, 0, sums, true},
                                          {p.partial, 1, 0, 2 * p.splits * sums, true}};
  if (p.dy) memory.push_back({p.dy, 1, 0, bytes});
  add_lines(memory, p.in);
  for (const Table& table : {p.scale, p.shift, p.center}) add_table(memory, p.in, table);
  return memory;
}

}  // namespace taps_fast::cuda
