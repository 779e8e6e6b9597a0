// Products with compressed weights of one bit or one byte each, which are decoded in registers. No torch.
//
//   forward   out[r, o] += factors[o] · Σ_i D[o, i] · in[r, i]
//   dx        out[r, i]  = Σ_o D[o, i] · factors[o] · in[r, o]
//
// D is what a pass's codes stand for: a sign (bit ? 1 : -1), a masked tile (bit ? tile : 0), or an int8.
#pragma once

#include <cstdint>

#include "problem.h"

namespace taps_fast::cpu {

enum class Coding { kSign, kMask, kInt8 };

/// Few rows that share their codes: places [row_begin, row_end) of the plan's order, at most `tile_rows` of them.
struct CodedPass {
  const uint8_t* codes;
  const void* factors;  // [O], of the compute type
  int64_t row_begin, row_end;
};

struct CodedProduct {
  DType dtype;
  Coding coding;
  bool transposed;  // forward
  bool wide_out;    // out is of the compute type
  int64_t out_features, in_features, code_stride;
  Matrix in, tile;
  MutableMatrix out;
  const int64_t* row_index;  // place in the plan's order -> row of in and out; null: the identity
  const CodedPass* passes;
  int64_t num_passes;
  int64_t col_block;  // columns of out in one item
};

static inline int64_t num_items(const CodedProduct& p) {
  return p.num_passes * ceil_div(p.transposed ? p.out_features : p.in_features, p.col_block);
}

struct CodedKernels {
  int64_t tile_rows;
  void (*run)(const CodedProduct&, int64_t* next_item, void* workspace);
  int64_t (*workspace_bytes)(const CodedProduct&);
};

// One definition in each coded_<isa>.cpp.
const CodedKernels& coded_generic();
const CodedKernels& coded_avx2();
const CodedKernels& coded_avx512();

}  // namespace taps_fast::cpu
