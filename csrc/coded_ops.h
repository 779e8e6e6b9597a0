// Runs the kernels of cpu/coded_problem.h, for the operators that have coded terms.
#pragma once

#include <vector>

#include "cpu/coded_problem.h"

namespace taps_fast {

/// Cuts passes of any number of rows to what the kernels take, chooses blocks, and adds the products to p.out.
void run_coded(cpu::CodedProduct& p, const std::vector<cpu::Pass>& passes);

}  // namespace taps_fast
