// The index of a mixed batch, in one launch: a stable counting sort of the samples by task; and what a layer's grouped
// product wants of it.
#pragma once

#include <cstdint>

namespace taps_fast::cuda {

/// Tasks whose counts fit in the shared memory of every chip.
constexpr int kMaxTasks = 24000;
constexpr int kMaxLayerTasks = 16384;

struct PlanProblem {
  const int64_t* ids;  // [samples], each -1 (the base) or a task
  int64_t* order;      // [samples]: the samples by group; group 0 is the base, group t + 1 is task t
  int64_t* offsets;    // [tasks + 2]: group g is order[offsets[g]] to order[offsets[g + 1] - 1]
  int64_t* inverse;    // [samples]: where in `order` a sample is; null: not wanted
  bool* valid;         // whether every id was in range; one that was not counts as the base; null: not wanted
  int samples, tasks;
  // Of a layer: there tasks whose weight is the base's count as the base. Else 0.
  bool layer;
  const float* coeffs;       // [tasks, deltas]
  const float* base_coeffs;  // [tasks]; null: 1
  int64_t* slots;            // [samples]: the group of each
  int64_t* place;            // [rows]: the row at each position of the grouped order
  int32_t* ends;             // [tasks + 1]: positions before each group's end
  int deltas, rows, inner;   // sample b's rows are those r with (r / inner) % samples = b
  int warps, staged;  // set by plan(); staged: samples whose order is made in shared memory
};

/// Starts the kernel on the current device; raises if it cannot start.
void plan(PlanProblem problem, void* cuda_stream);

}  // namespace taps_fast::cuda
