// Products of few rows with compressed weights of one bit or one byte each, which are decoded in registers. No torch.
//
//   forward   out[r, o] += f_o · Σ_i D[o, i] · in[r, i]
//   dx        out[r, i] += Σ_o D[o, i] · f_o · in[r, o]
//
// D is what a term's codes stand for (problem.h), f its coeff · scale. A pass holds at most `tile_rows` rows, and its
// terms follow one another.
#pragma once

#include <cstdint>

#include "problem.h"

namespace taps_fast::cpu {

struct CodedProduct {
  DType dtype;
  bool transposed;  // forward
  bool wide_out;    // out is of the compute type
  int64_t out_features, in_features;
  Matrix in;
  MutableMatrix out;
  const int64_t* row_index;  // place in the plan's order -> row of in and out; null: the identity
  const Term* terms;
  const Pass* passes;
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
