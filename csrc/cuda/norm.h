// What surrounds a product in a network whose norms are one a task: a pass that scales, shifts and activates, its
// gradient, and the sums over each task's rows that a batch norm and its gradient need. Formulas in taps_fast/_ops.py.
#pragma once

#include <cstdint>

#include "types.h"

namespace taps_fast::cuda {

enum class Activation { kNone, kRelu, kRelu6, kSilu, kGelu };

/// How elements lie, and the tasks of rows: `rows` of [channels][pixels], or, channels last, rows of channels with
/// pixels 1. Row r is of sample (r / inner) % batch.
struct Lines {
  DType dtype;
  int64_t rows, channels, pixels;
  bool mixed;  // else one group of all rows; an empty batch is mixed, and its ids are null
  const int64_t *ids, *order, *offsets;
  int64_t batch, inner, tasks;

  int64_t groups() const { return mixed ? tasks + 1 : 1; }
};

/// [channels], or with row_stride [tasks + 1, channels], whose last row is the base's; null: absent.
struct Table {
  const void* data;
  int64_t row_stride;
};

struct PointwiseProblem {
  Lines in;
  const void *x, *dy;  // dy null: out = act(scale·x + shift); else out = scale·du + slope·x + offset
  void* out;           // may be x
  Table scale, shift, slope, offset;
  Activation activation;
  int64_t first_line;  // of this launch, and its units of work; set by pointwise()
  uint32_t units, units_per_line;
};

enum class Sums { kGradients, kMoments };  // Σ du·(x - center) and Σ du; mean and variance

struct SumsProblem {
  Lines in;
  Sums kind;
  const void *x, *dy;
  Table scale, shift, center;
  Activation activation;
  void *first, *second;  // [groups, channels], the base's row last, in the tables' type
  void* partial;         // [splits, groups, channels, 2]
  int splits;
};

/// Start their kernels on the current device; raise if they cannot start.
void pointwise(PointwiseProblem problem, void* cuda_stream);
void group_sums(const SumsProblem& problem, void* cuda_stream);

/// How many parts each group's rows are cut into, so that the blocks fill the device.
int choose_splits(const Lines& in);

}  // namespace taps_fast::cuda
