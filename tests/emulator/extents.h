// The memory that each kernel may touch, said a second time and independently of the kernels.
#pragma once

#include <vector>

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
  return {
      {p.ids, 1, 0, 8 * p.samples},
      {p.order, 1, 0, 8 * p.samples, true},
      {p.inverse, 1, 0, 8 * p.samples, true},
      {p.offsets, 1, 0, 8 * (p.tasks + 2), true},
      {p.valid, 1, 0, 1, true},
  };
}

}  // namespace taps_fast::cuda
