// The index of a mixed batch, in one launch: a stable counting sort of the samples by task.
#pragma once

#include <cstdint>

namespace taps_fast::cuda {

/// Tasks whose counts fit in the shared memory of every chip.
constexpr int kMaxTasks = 24000;

struct PlanProblem {
  const int64_t* ids;  // [samples], each -1 (the base) or a task
  int64_t* order;      // [samples]: the samples by group; group 0 is the base, group t + 1 is task t
  int64_t* offsets;    // [tasks + 2]: group g is order[offsets[g]] to order[offsets[g + 1] - 1]
  int64_t* inverse;    // [samples]: where in `order` a sample is
  bool* valid;         // whether every id was in range; one that was not counts as the base
  int samples, tasks;
  int warps;  // set by plan()
};

/// Starts the kernel on the current device; raises if it cannot start.
void plan(PlanProblem problem, void* cuda_stream);

}  // namespace taps_fast::cuda
