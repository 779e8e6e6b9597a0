// The table of kernels that each instruction set provides, and the choice among them at run time.
#pragma once

#include <cstdint>

#include "problem.h"

namespace taps_fast::cpu {

struct Kernels {
  const char* name;
  int64_t vector_bytes;
  int64_t strip_vectors;  // vectors in one packed strip of columns
  int64_t tile_rows;      // rows of one register tile
  int64_t row_buffers;    // rows of the left operand that are held converted at a time
  int64_t choice_panels;  // depth of the panels that passes of a choice (problem.h) need
  int64_t choice_rows;    // most rows of a task that gain from one, in float32 and float16
  int64_t bfloat16_choice_rows;
  int64_t dot_rows;  // most rows of a pass of forward that go without a panel
  int64_t float32_dot_rows;
  int64_t float32_dot_rows_coming;  // the same where rows come by themselves
  int64_t bfloat16_dot_rows;
  int64_t axpy_rows;  // the same of dx
  int64_t bfloat16_axpy_rows;
  int64_t axpy_rows_coming;  // the same where rows come by themselves and each weight is read once
  int64_t bfloat16_axpy_rows_coming;
  int64_t outer_rows;  // most rows of a job of dw that go without a tile
  int64_t bfloat16_outer_rows;
  // Run items of the grid until none is left; threads that share the counter share the work.
  void (*row_product)(const RowProduct&, int64_t* next_item, void* workspace);
  void (*weight_gradient)(const WeightGradient&, int64_t* next_item, void* workspace);
};

// One definition in each kernels_<isa>.cpp.
const Kernels& kernels_generic();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();
const Kernels& kernels_avx512amx();
/// On a CPU with AMX: why kernels_avx512amx() cannot run all the same, or null once it can. Asks the system for
/// permission and tries a product, because no test of ours has run on such a CPU.
const char* amx_refusal();

/// Whether this CPU fetches rows that are read in order by itself. Intel's cores do, and asking them to costs time
/// (seen on Cascade Lake); AMD's gain by it (Zen 5).
bool rows_come_by_themselves();

/// Whether PyTorch multiplies many rows of float32 faster than these kernels: MKL does on Intel's cores (Cascade Lake),
/// not on AMD's (Zen 5).
bool vendor_multiplies_faster();

/// The best table this CPU runs, or the one TAPS_FAST_CPU_ISA names; picked once.
const Kernels& kernels();

}  // namespace taps_fast::cpu
