// What a CPU kernel computes, as plain data: sizes, strides and raw pointers, no torch.
//
// Two products serve the three operators (vocabulary of CONTRIBUTING.md: M rows, I in, O out features):
//
//   RowProduct      out[r, :] = in[r, :] · W_g(r) + bias     forward (W transposed) and dx (W as stored)
//   WeightGradient  P_j = Σ_{r in j} scale_r · dy_rᵀ x_r     dw, whose epilogue dots and scales P's tiles
//
// A plan (plan.h) builds them; the files kernels_*.cpp run them, one item of the grid at a time.
#pragma once

#include <cstdint>

namespace taps_fast::cpu {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Static, so that each instruction set keeps its own copy of these.
static constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
/// Panels and accumulators are float32; float64 for float64 data.
static constexpr int64_t compute_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

/// Row-major matrix whose last axis is contiguous; `stride` counts elements between rows.
struct Matrix {
  const void* data;
  int64_t stride;
};

struct MutableMatrix {
  void* data;
  int64_t stride;
};

/// What the numbers of a summand are made from: stored as they are, or codes of a bit or a byte each.
enum class Coding { kDense, kSign, kMask, kInt8 };

/// One summand of a weight: coeff · matrix, or coeff · scale[row] · D[row, :] with a D that is decoded in registers:
/// a sign (bit ? 1 : -1), a masked tile (bit ? matrix : 0) or an int8.
struct Term {
  Matrix matrix;
  double coeff;
  Coding coding = Coding::kDense;
  const uint8_t* codes = nullptr;
  int64_t code_stride = 0;      // bytes; a row of bits ends on a 64-bit word
  const void* scale = nullptr;  // of the compute type
  int64_t scale_step = 0;       // 0: one number for all rows
};

/// Rows [row_begin, row_end) of the plan's row order times the sum of terms [term_begin, term_end).
/// A row that belongs to several passes is complete after the last of them.
struct Pass {
  int64_t row_begin, row_end;
  int64_t term_begin, term_end;
  bool first, last;
  int64_t choice_end = 0;  // passes [this one, choice_end) mask one tile, and are run together (choose.h)
};

/// Grid of items and the block sizes inside one item.
struct Blocking {
  int64_t row_block;    // rows of one item
  int64_t col_block;    // output columns of one item
  int64_t depth_block;  // length of the product summed between two touches of the accumulator tile
  int64_t panel_depth;  // of the panel that weights are packed into; 0: no pass packs any
};

struct RowProduct {
  DType dtype;
  bool transposed;  // W[column, depth] (forward) or W[depth, column] (dx)
  int64_t rows, cols, depth;
  Matrix in;
  MutableMatrix out;
  Matrix bias;              // one row, or one for each task; data may be null
  const int64_t* row_index; // place in the plan's order -> row of in and out; null: the identity
  const int64_t* bias_index;  // place in the plan's order -> row of bias; null: row 0
  const Term* terms;
  const Pass* passes;
  int64_t num_passes;
  Blocking blocking;
  int64_t depth_part;  // depth of one item; parts of it only where no pass has a panel
  void* partials;  // [parts, rows, cols] of the compute type: sums of the parts, added up by who finishes the last
  int64_t* parts_done;  // [blocks of rows · blocks of cols], zeros at first
  int64_t few_rows;  // most rows of a pass that pack no weights
  bool rows_come;  // of themselves, when they are read in order: fetching them costs time (dispatch.cpp)
};

/// partials[slot] = <P tile, matrix tile>, summed over tiles by the plan.
struct Dot {
  Matrix matrix;
  int64_t slot;
};

/// matrix = factor · P
struct Target {
  MutableMatrix matrix;
  double factor;
};

/// One weight gradient: which rows enter it and what its tiles are used for. `sums`, of the compute type and zeros at
/// first, are to hold Σ_r dy_r; null: not wanted.
struct Job {
  int64_t row_begin, row_end;
  int64_t dot_begin, dot_end;
  int64_t target_begin, target_end;
  void* sums;
};

struct WeightGradient {
  DType dtype;
  int64_t rows, cols;  // O, I: the shape of P
  Matrix dy, x;
  const int64_t* row_index;  // place in the plan's order -> row of dy and x; null: the identity
  const double* row_scale;  // place in the plan's order -> factor; null: 1
  const Job* jobs;
  int64_t num_jobs;
  const Dot* dots;
  const Target* targets;
  double* partials;  // [slots, tiles]
  Blocking blocking;  // tiles of P; depth_block counts rows of dy and x
};

/// How items that lie one after another in memory reach threads: each has a range of them, the same for every layer
/// of a size, so that what it wrote is in its own cache when it reads it in the next layer. Whoever is done takes what
/// others have left. Which thread runs an item changes no result.
struct Share {
  static constexpr int64_t kStride = 8;  // counters of different threads lie in different cache lines
  int64_t* taken;  // [threads · kStride]: items taken of each range
  int64_t threads, mine, items;
};

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
/// Splits n > 0 into the fewest parts of at most `most`, as even as they come: n = 8, most = 6 gives 4 + 4.
static constexpr int64_t even_part(int64_t n, int64_t most) { return ceil_div(n, ceil_div(n, most)); }

static inline int64_t num_blocks(const RowProduct& p) {
  return ceil_div(p.rows, p.blocking.row_block) * ceil_div(p.cols, p.blocking.col_block);
}
static inline int64_t num_parts(const RowProduct& p) { return p.depth > 0 ? ceil_div(p.depth, p.depth_part) : 1; }
static inline int64_t num_items(const RowProduct& p) { return num_blocks(p) * num_parts(p); }
static inline int64_t num_tiles(const WeightGradient& p) {
  return ceil_div(p.rows, p.blocking.row_block) * ceil_div(p.cols, p.blocking.col_block);
}
static inline int64_t num_items(const WeightGradient& p) { return p.num_jobs * num_tiles(p); }

}  // namespace taps_fast::cpu
