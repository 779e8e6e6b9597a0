// The twin of csrc/cuda/runtime.h.
#pragma once

#include "emulator.h"
#include "extents.h"

namespace taps_fast::cuda {

inline Device current_device() {
  const emulator::Settings& now = emulator::settings;
  return {now.processors, static_cast<int>(now.shared_limit), now.has_clusters};
}

template <auto kernel, class Problem>
const char* launch_grid(const Grid& grid, const Problem& problem, void*) {
  emulator::Settings& now = emulator::settings;
  const emulator::Launch launch{static_cast<int>(grid.blocks), grid.threads, grid.cluster, grid.shared_bytes};
  now.launches.push_back(launch);
  if (!now.refuse.empty()) return now.refuse.c_str();
  if (grid.shared_bytes > now.shared_limit) return "too much shared memory";
  if (grid.blocks < 1 || grid.threads < 1 || grid.threads > 1024 || grid.threads % 32) return "invalid configuration";
  if (grid.cluster < 1 || grid.cluster > 8 || grid.blocks % grid.cluster || (grid.cluster > 1 && !now.has_clusters))
    return "invalid cluster";
  emulator::run(launch, extents(problem), [&] { kernel(problem); });
  return nullptr;
}

}  // namespace taps_fast::cuda
