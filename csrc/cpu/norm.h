// The pointwise operators, norms, the sums of norms and depthwise convolutions, as plain data. In the first three
// channels are either innermost, where every row is a pixel, or each row holds channels planes of `pixels` adjacent
// elements:
//
//   Pointwise   out = act(u), or from dy: out = scale·du + slope·x + offset      u = scale·x + shift, du = dy·act'(u)
//   GroupSums   over the rows of each group: Σ du·(x - center) and Σ du, or mean and Σ (x - mean)²
//   GroupNorm   z = (x - mean) / √(mean of (x - mean)² + eps) over each run of a row, out = weight·z + bias
//
// A table has one row for each task and one more for rows of no task, or a single row for all (stride 0).
#pragma once

#include <cstdint>

#include "problem.h"

namespace taps_fast::cpu {

enum class Activation { kNone, kRelu, kRelu6, kSilu, kGelu };

/// Where rows belong: sample(r) = (r / inner) % batch, and its task is ids[sample]; offsets null: one group of all
/// rows.
struct Membership {
  const int64_t* ids;
  const int64_t* order;
  const int64_t* offsets;
  int64_t tasks, batch, inner;
};

struct Rows {
  DType dtype;
  int64_t rows, channels, pixels;  // pixels 1: channels are innermost
  Membership member;
};

struct Pointwise {
  Rows in;
  Activation activation;
  const void* x;
  const void* dy;  // null: forward
  void* out;
  Matrix scale, shift;   // of the compute type
  Matrix slope, offset;  // data null: none
  int64_t rows_per_item;  // of planes where pixels > 1
};

/// What one item of GroupSums reads: places [begin, end) in the order of the group's rows.
struct Span {
  int64_t group, begin, end;
};

struct GroupSums {
  Rows in;
  Activation activation;
  const void* x;
  const void* dy = nullptr;  // null: moments
  Matrix scale{}, shift{}, center{};  // the first two are read behind an activation alone
  const Span* spans = nullptr;
  int64_t num_spans = 0;
  int64_t channels_per_item = 0;
  double* first = nullptr;   // [spans, channels]: Σ du·(x - center), or the mean
  double* second = nullptr;  // [spans, channels]: Σ du, or Σ (x - mean)²
};

static inline int64_t num_items(const Pointwise& p) {
  return ceil_div(p.in.pixels > 1 ? p.in.rows * p.in.channels : p.in.rows, p.rows_per_item);
}
static inline int64_t num_items(const GroupSums& p) {
  return p.num_spans * ceil_div(p.in.channels, p.channels_per_item);
}

/// The row of tables and of results that a group has; group 0 holds the rows of no task.
static inline int64_t task_row(const Membership& m, int64_t group) {
  return !m.offsets ? 0 : group == 0 ? m.tasks : group - 1;
}
static inline int64_t table_row(const Membership& m, int64_t row) {
  if (!m.offsets) return 0;
  const int64_t id = m.ids[row / m.inner % m.batch];
  return id < 0 ? m.tasks : id;
}
/// How many rows a group has. Outer repeats of the batch, order and inner rows give each of them a place.
static inline int64_t rows_of_group(const Rows& in, int64_t group) {
  const Membership& m = in.member;
  if (!m.offsets) return in.rows;
  return m.batch ? (m.offsets[group + 1] - m.offsets[group]) * (in.rows / m.batch) : 0;
}
/// The row at a place of a group: outer repeat, then sample in order, then inner row.
static inline int64_t row_at(const Rows& in, int64_t group, int64_t place) {
  const Membership& m = in.member;
  if (!m.offsets) return place;
  const int64_t samples = m.offsets[group + 1] - m.offsets[group];
  const int64_t run = place / m.inner;
  return (run / samples * m.batch + m.order[m.offsets[group] + run % samples]) * m.inner + place % m.inner;
}

/// What each task's module holds: a vector of the compute type for each row of a table; null: a task without rows.
using Vectors = const void* const*;

/// The tables of an evaluated batch norm: scale = weight / √(variance + eps), shift = bias - mean·scale.
struct NormTables {
  bool wide;  // whether the compute type is double
  int64_t tables, channels;
  Vectors weight, bias;  // null: 1 and 0
  Vectors mean, variance;
  const double* eps;
  void* scale;  // [tables, channels]
  void* shift;
  int64_t tables_per_item;
};

static inline int64_t num_items(const NormTables& p) { return ceil_div(p.tables, p.tables_per_item); }

/// Layer, RMS and group norms whose groups are runs of adjacent elements: channels / groups channels of a row.
struct GroupNorm {
  Rows in;
  int64_t groups;
  bool center;  // false: mean is 0
  double eps;
  const void* x;
  void* out;
  Vectors weight, bias;  // null: 1 and 0
  void *mean, *rstd;     // of each run; null: not kept
  int64_t runs_per_item;
};

/// The backward of GroupNorm: with z = (x - mean)·rstd and u = weight·dy,
///
///   dx = rstd·(u - (mean of u) - z·(mean of u·z))          over a run; the first mean is 0 where that of x is
///
/// and by channel Σ dy·z and Σ dy over each span of rows.
struct GroupNormGrad {
  Rows in;
  int64_t groups;
  bool center;
  const void *x, *dy;
  void* dx;  // null: not wanted
  Vectors weight;
  const void *mean, *rstd;  // [rows, groups]
  const Span* spans;
  int64_t num_spans;
  void *first, *second;  // [spans, channels], zeros
};

static inline int64_t num_items(const GroupNormGrad& p) { return p.num_spans; }

static inline int64_t num_items(const GroupNorm& p) { return ceil_div(p.in.rows * p.groups, p.runs_per_item); }

/// A depthwise convolution of images [N, H, W, C], each with the row of weight [tables, taps, C] that table names.
struct Depthwise {
  DType dtype;
  int64_t images, channels, in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  const void* x;
  const void* weight;  // of the compute type
  const int64_t* table;
  void* out;
};

static inline int64_t num_items(const Depthwise& p) { return p.images * p.out_h; }

struct NormKernels {
  const char* name;
  void (*pointwise)(const Pointwise&, const Share& share);
  void (*group_sums)(const GroupSums&, const Share& share);
  void (*norm_tables)(const NormTables&, const Share& share);
  void (*group_norm)(const GroupNorm&, const Share& share);
  void (*group_norm_grad)(const GroupNormGrad&, const Share& share);
  void (*depthwise)(const Depthwise&, const Share& share);
};

// One definition in each norm_<isa>.cpp.
const NormKernels& norm_kernels_generic();
const NormKernels& norm_kernels_avx2();
const NormKernels& norm_kernels_avx512();

/// The table of the instruction set that runs (kernels.h).
const NormKernels& norm_kernels();

}  // namespace taps_fast::cpu
