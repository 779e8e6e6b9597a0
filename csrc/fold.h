// The sums of `fold` and of its gradient (fold_ops.cpp) for one weight, by its pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/problem.h"

namespace taps_fast {

/// out = scale · in + Σ coeffs[k] · deltas[k], all of `size` elements in one order; in may be null: zeros. The sum is
/// of the compute type and rounded once; out may be in.
void fold_one(cpu::DType dtype, int64_t size, const void* in, double scale, std::vector<const void*> deltas,
              std::vector<double> coeffs, void* out);

/// <in, deltas[k]> for each k, likewise.
std::vector<double> dots_one(cpu::DType dtype, int64_t size, const void* in, const std::vector<const void*>& deltas);

}  // namespace taps_fast
