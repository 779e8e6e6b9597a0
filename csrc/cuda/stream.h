// Few rows: the weights stream past once, in memory order, and the rows stay.
//
//   y[r, o] = Σ_s c[t(r), s] · Σ_i x[r, i] · W_s[o, i] + bias[t(r), o]
//
// W_0 is the base, W_k the k-th delta; c[t, 0] is base_coeffs[t], or 1; t(r) = ids[(r / inner) % batch], where -1 is
// the base alone.
#pragma once

#include <cstdint>

#include "types.h"

namespace taps_fast::cuda {

/// Base and deltas of one launch: as many as leave the kernel's arguments well inside 4 KB.
constexpr int kMaxSources = 256;

struct StreamProblem {
  DType dtype;
  int rows, in_features, out_features, num_sources;
  const void* x;          // [rows, in_features]
  void* y;                // [rows, out_features], contiguous
  const float* coeffs;    // [num_sources - 1], or [tasks, num_sources - 1] with ids
  const float* base_coeffs;  // one a task; null: 1
  const void* bias;       // null: none
  const int64_t* ids;     // null: all rows are of task 0
  int64_t x_stride, weight_stride;
  int64_t bias_stride;    // between tasks; 0: one bias for all
  int64_t batch, inner, tasks;
  int row_blocks, cluster;  // set by stream()
  const void* sources[kMaxSources];  // each [out_features, in_features]
};

/// Chooses the grid and starts the kernel on the current device; raises if it cannot start.
void stream(StreamProblem problem, void* cuda_stream);

}  // namespace taps_fast::cuda
