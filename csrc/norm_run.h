// How the operators on rows with channels run their kernels.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "cpu/workspace.h"
#include "norm_call.h"

namespace taps_fast {

constexpr int64_t kItemElements = 1 << 14;  // of an item that is read once: 64 KiB of float32

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

/// Where N tables of `bytes` each lie until the call ends, on whole cache lines: a load that crosses one takes twice as
/// long.
template <size_t N>
std::array<char*, N> tables_of(int64_t bytes) {
  constexpr int64_t line = 64;
  const int64_t lines = (bytes + line - 1) / line * line;
  std::array<char*, N> tables;
  tables[0] = static_cast<char*>(cpu::workspace(N * lines));
  for (size_t i = 1; i < N; i++) tables[i] = tables[i - 1] + lines;
  return tables;
}

/// f of a zero of the compute type.
template <class F>
void with_compute_type(cpu::DType dtype, const F& f) {
  dtype == cpu::DType::kFloat64 ? f(double{}) : f(float{});
}

/// How many rows a table has.
inline int64_t num_tables(const NormCall& call) { return call.rows.member.offsets ? call.rows.member.tasks + 1 : 1; }

/// Cuts p into items, and runs them.
void run_pointwise(cpu::Pointwise& p);

/// Runs p over spans of all groups and returns, in `first` and `second`, each group's rows and its spans' results.
std::tuple<Tensor, Tensor> run_sums(cpu::GroupSums& p, bool moments);

}  // namespace taps_fast
