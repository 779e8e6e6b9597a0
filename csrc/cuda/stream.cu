// See stream.h for what is computed. A block owns 16 out features and 8·kTiles rows. Its warps, and those of the
// other blocks of its cluster, share out the in features. Each warp walks the sources that its rows use, one or two at
// a time, in one sequence of steps, fed by a ring of asynchronous copies that never drains between sources. Sums over
// warps, then over blocks, are in a fixed order: no atomics, no workspace, one launch.
#include <algorithm>

#include "../common/check.h"
#include "ptx.cuh"
#include "runtime.h"
#include "stream.h"
#include "stream_tile.cuh"

namespace taps_fast::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStepBytes = 64;  // of each row
constexpr int kMaxCluster = 8;  // what every GPU with clusters can hold

constexpr int kStages = 4;  // of the ring: 48 KB of weights under way in each block of two sources a step

/// Shared memory: the ring, c[source][row], the list of used sources, its length.
template <class T, int kTiles>
struct Layout {
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kSources = StreamTile<T, kTiles>::kSources;
  static constexpr int kStepVectors = StreamTile<T, kTiles>::kStepVectors;
  static constexpr int kRingBytes = kWarps * kStages * kStepVectors * 16;

  uint4* ring;
  float* coeffs;
  int* used;
  int* num_used;

  __device__ explicit Layout(int num_sources)
      : ring(reinterpret_cast<uint4*>(dynamic_shared())),
        coeffs(reinterpret_cast<float*>(dynamic_shared() + kRingBytes)),
        used(reinterpret_cast<int*>(coeffs + num_sources * kRows)),
        num_used(used + num_sources + kSources - 1) {}

  static int bytes(int num_sources) { return kRingBytes + (num_sources * (kRows + 1) + kSources) * 4; }
};

__device__ int task_of(const StreamProblem& p, int row) {
  return p.ids ? static_cast<int>(load(p.ids + row / p.inner % p.batch)) : 0;
}

__device__ float coefficient(const StreamProblem& p, int source, int task) {
  if (task < 0) return source == 0 ? 1.f : 0.f;
  if (source == 0) return p.base_coeffs ? load(p.base_coeffs + task) : 1.f;
  return load(p.coeffs + int64_t{task} * (p.num_sources - 1) + source - 1);
}

/// Fills c[source][row], 0 for rows that do not exist, and lists the sources that any row uses; -1 fills the last step.
template <class T, int kTiles>
__device__ void list_sources(const StreamProblem& p, const Layout<T, kTiles>& shared, int row0) {
  constexpr int kRows = 8 * kTiles, kSources = Layout<T, kTiles>::kSources;
  const int r = threadIdx.x % kRows, lane = threadIdx.x % 32;
  const bool exists = row0 + r < p.rows;
  const int task = exists ? task_of(p, row0 + r) : 0;
  for (int s = threadIdx.x / kRows; s < p.num_sources; s += kThreads / kRows)
    shared.coeffs[s * kRows + r] = exists ? coefficient(p, s, task) : 0.f;
  __syncthreads();
  if (threadIdx.x < 32) {
    int count = 0;
    for (int first = 0; first < p.num_sources; first += 32) {
      const int s = first + lane;
      bool used = false;
      // Each lane starts at another row, so that lanes read different banks.
      for (int k = 0; k < kRows && s < p.num_sources; k++) used |= shared.coeffs[s * kRows + (lane + k) % kRows] != 0.f;
      const unsigned mask = __ballot_sync(~0u, used);
      if (used) shared.used[count + __popc(mask & ((1u << lane) - 1))] = s;
      count += __popc(mask);
    }
    for (; count % kSources; count++)
      if (lane == 0) shared.used[count] = -1;
    if (lane == 0) *shared.num_used = count;
  }
  __syncthreads();
}

/// 16 bytes of a row, from element i on: zeros beyond its end, and where the row does not exist.
template <Use kUse, bool kAligned, class T>
__device__ __forceinline__ void fetch(uint4* to, const T* row, int i, int size, bool exists) {
  constexpr int kElements = 16 / sizeof(T);
  if constexpr (kAligned) {
    cp_async<kUse>(to, row + i, exists && i < size);
  } else {
    T values[kElements];
#pragma unroll
    for (int e = 0; e < kElements; e++) values[e] = exists && i + e < size ? load(row + i + e) : T{};
    memcpy(to, values, 16);
  }
}

template <class T, int kTiles, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) stream_kernel(const __grid_constant__ StreamProblem p) {
  using Tile = StreamTile<T, kTiles>;
  constexpr int kRows = 8 * kTiles, kElements = kStepBytes / sizeof(T);
  constexpr int kSources = Tile::kSources, kStepVectors = Tile::kStepVectors;
  const Layout<T, kTiles> shared(p.num_sources);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4;
  const int rank = blockIdx.x % p.cluster, block = blockIdx.x / p.cluster;
  // Row blocks of the same weights run side by side, so that the weights come from memory once.
  const int row0 = block % p.row_blocks * kRows, out0 = block / p.row_blocks * kOutputs;
  const T* x = static_cast<const T*>(p.x);

  // The steps of this warp: of each used source, every splits-th piece of the in features from `split` on.
  const int splits = p.cluster * kWarps, split = rank * kWarps + warp;
  const int pieces = (p.in_features + kElements - 1) / kElements;
  const int mine = split < pieces ? (pieces - split + splits - 1) / splits : 0;

  uint4* const ring = shared.ring + warp * kStages * kStepVectors;
  const int64_t weight_row = (out0 + group) * p.weight_stride;
  // The n-th source of a step, and with the first the step's x.
  const auto fetch_source = [&](int n, int source, int piece, int slot) {
    const int i = (split + piece * splits) * kElements + lane % 4 * (16 / sizeof(T));
    const T* weight = static_cast<const T*>(p.sources[std::max(source, 0)]) + weight_row;
    uint4* to = ring + slot * kStepVectors + lane;
#pragma unroll
    for (int h = 0; h < 2; h++)
      fetch<Use::kOnce, kAligned>(to + 32 * (2 * n + h), weight + 8 * h * p.weight_stride, i, p.in_features,
                                  source >= 0 && out0 + group + 8 * h < p.out_features);
    if (n > 0) return;
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      const int row = row0 + 8 * t + group;
      fetch<Use::kAgain, kAligned>(to + 32 * (2 * kSources + t), x + row * p.x_stride, i, p.in_features, row < p.rows);
    }
  };

  // A base that is not scaled is every row's first source: it is on its way while the list is made.
  const int early = p.base_coeffs ? 0 : std::min(kStages - 1, mine);
  for (int step = 0; step < early; step++) fetch_source(0, 0, step, step);
  list_sources(p, shared, row0);
  const int steps = *shared.num_used / kSources * mine;

  const int* next = shared.used;  // the sources of the step that is fetched next, its piece, its place in the ring
  int piece = 0, slot_in = 0;
  const auto fetch_step = [&](int first) {
#pragma unroll
    for (int n = 0; n < kSources; n++)
      if (n >= first) fetch_source(n, next[n], piece, slot_in);
    if (++piece == mine) piece = 0, next += kSources;
    if (++slot_in == kStages) slot_in = 0;
  };
  for (int step = 0; step < kStages - 1; step++) {
    if (step < steps) fetch_step(step < early);
    cp_async_commit();
  }

  Tile tile;
  const int* source = shared.used;
  int left = mine, slot = 0;
  for (int step = 0; step < steps; step++) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // the copies of all lanes are there, and the slot that is filled next has been read
    if (step + kStages - 1 < steps) fetch_step(0);
    cp_async_commit();
    tile.multiply(ring + slot * kStepVectors, lane);
    if (++slot == kStages) slot = 0;
    if (--left == 0) {
#pragma unroll
      for (int n = 0; n < kSources; n++)
        if (source[n] >= 0) tile.fold(n, shared.coeffs + source[n] * kRows, lane);
      source += kSources;
      left = mine;
    }
  }

  // Each warp leaves its sums where its ring was.
  cp_async_wait<0>();
  __syncwarp();
  constexpr int kSums = kRows * kOutputs, kWarpFloats = kStages * kStepVectors * 4;
  static_assert(kSums <= kThreads && kSums <= kWarpFloats);
  float* sums = reinterpret_cast<float*>(shared.ring);
  tile.write(sums + warp * kWarpFloats, lane);
  __syncthreads();
  const int n = threadIdx.x;
  float sum = 0.f;
  if (n < kSums) {
    for (int w = 0; w < kWarps; w++) sum += sums[w * kWarpFloats + n];
    sums[n] = sum;  // over warp 0's, which nobody but this thread reads
  }
  if (p.cluster > 1) {
    cluster_sync();
    sum = 0.f;
    // Each block finishes its share of the rows.
    if (n < kSums && n * p.cluster / kSums == rank)
      for (int k = 0; k < p.cluster; k++) sum += cluster_load(sums + n, k);
  }
  const int row = row0 + n / kOutputs, o = out0 + n % kOutputs;
  if (n < kSums && n * p.cluster / kSums == rank && row < p.rows && o < p.out_features) {
    if (p.bias) {
      const int task = p.bias_stride ? task_of(p, row) : 0;
      sum += to_wide(load(static_cast<const T*>(p.bias) + (task < 0 ? p.tasks : task) * p.bias_stride + o));
    }
    T y;
    from_wide(sum, y);
    store(static_cast<T*>(p.y) + int64_t{row} * p.out_features + o, y);
  }
  if (p.cluster > 1) cluster_sync();  // nobody leaves while others read its sums
}

/// Blocks that share one tile's in features: more where the tiles alone leave processors idle, as long as each warp
/// keeps two steps of a source.
int choose_cluster(const Device& device, int64_t tiles, int pieces) {
  int cluster = 1;
  while (device.has_clusters && cluster < kMaxCluster && 2 * cluster * tiles <= 2 * device.processors &&
         2 * cluster * kWarps * 2 <= pieces)
    cluster *= 2;
  return cluster;
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// Whether each row of x and of each weight is whole 16-byte vectors.
bool is_aligned(const StreamProblem& p) {
  return (p.in_features | p.x_stride | p.weight_stride) * element_size(p.dtype) % 16 == 0 && is_aligned(p.x) &&
         std::all_of(p.sources, p.sources + p.num_sources, [](const void* s) { return is_aligned(s); });
}

template <class T, int kTiles>
void start(StreamProblem& p, const Device& device, void* cuda_stream) {
  const int64_t tiles = (p.out_features + kOutputs - 1) / kOutputs;
  p.row_blocks = (p.rows + 8 * kTiles - 1) / (8 * kTiles);
  p.cluster = choose_cluster(device, tiles * p.row_blocks, p.in_features * sizeof(T) / kStepBytes);
  const Grid grid{tiles * p.row_blocks * p.cluster, kThreads, p.cluster, Layout<T, kTiles>::bytes(p.num_sources)};
  const char* error = is_aligned(p) ? launch<stream_kernel<T, kTiles, true>>(grid, p, cuda_stream)
                                    : launch<stream_kernel<T, kTiles, false>>(grid, p, cuda_stream);
  check(!error, "linear_stream: stream_kernel did not start: ", error ? error : "", " (", name(p.dtype), ", rows ",
        p.rows, ", base [", p.out_features, ", ", p.in_features, "], ", p.num_sources - 1, " deltas; ", grid.blocks,
        " blocks in clusters of ", grid.cluster, ", ", grid.shared_bytes, " bytes of shared memory each)");
}

template <class T>
void start(StreamProblem& p, void* cuda_stream) {
  const Device device = current_device();
  const bool fits = Layout<T, 2>::bytes(p.num_sources) <= device.shared_bytes;
  p.rows <= 8 || !fits ? start<T, 1>(p, device, cuda_stream) : start<T, 2>(p, device, cuda_stream);
}

}  // namespace

void stream(StreamProblem problem, void* cuda_stream) {
  switch (problem.dtype) {
    case DType::kFloat32: return start<float>(problem, cuda_stream);
    case DType::kBFloat16: return start<BFloat16>(problem, cuda_stream);
    case DType::kFloat16: return start<Half>(problem, cuda_stream);
    case DType::kFloat64: return;  // no row for it: the operator has refused
  }
}

}  // namespace taps_fast::cuda
