// What the host side of a kernel asks of the CUDA runtime, and nothing else of it. The emulator has a twin.
#pragma once

#include <cstdint>

namespace taps_fast::cuda {

/// A grid of blocks of threads; `cluster` neighbouring blocks can read each other's shared memory.
struct Grid {
  int64_t blocks;
  int threads, cluster, shared_bytes;
};

struct Device {
  int processors, shared_bytes;  // shared_bytes: of a block at most
  bool has_clusters;
};

}  // namespace taps_fast::cuda

#ifdef TAPS_FAST_EMULATED
#include "emulated_runtime.h"
#else

#include <cuda_runtime.h>

#include <atomic>

namespace taps_fast::cuda {

inline int current_device_index() {
  int index = 0;
  cudaGetDevice(&index);
  return index;
}

inline Device current_device() {
  const int index = current_device_index();
  static std::atomic<int64_t> known[64];  // 0: not asked yet
  int64_t found = known[index & 63].load(std::memory_order_relaxed);
  if (found == 0) {
    int processors = 1, capability = 8, shared_bytes = 48 * 1024;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    found = int64_t{shared_bytes} << 32 | processors << 8 | capability;
    known[index & 63].store(found, std::memory_order_relaxed);
  }
  return {static_cast<int>(found >> 8 & 0xffffff), static_cast<int>(found >> 32), (found & 255) >= 9};
}

template <auto kernel, class Problem>
const char* launch_grid(const Grid& grid, const Problem& problem, void* stream) {
  const int index = current_device_index();
  // More than 48 KB of shared memory is asked for once, for each kernel on each device.
  static std::atomic<uint64_t> allowed{0};
  const uint64_t bit = uint64_t{1} << (index & 63);
  if (!(allowed.load(std::memory_order_relaxed) & bit)) {
    const int most = current_device().shared_bytes;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return cudaGetErrorString(cudaGetLastError());
    allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  if (cudaLaunchKernelEx(&config, kernel, problem) == cudaSuccess) return nullptr;
  return cudaGetErrorString(cudaGetLastError());
}

}  // namespace taps_fast::cuda

#endif

namespace taps_fast::cuda {

/// Starts `kernel` on the stream; what went wrong, or null. Never waits.
template <auto kernel, class Problem>
const char* launch(const Grid& grid, const Problem& problem, void* stream) {
  if (grid.blocks >= int64_t{1} << 31) return "a grid has fewer than 2^31 blocks";
  return launch_grid<kernel>(grid, problem, stream);
}

}  // namespace taps_fast::cuda
