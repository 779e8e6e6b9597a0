// See plan.h for what is computed. One block: the batch is small, and a second launch costs more than the sort. Each
// warp counts the samples of its own stretch of the batch by group, the counts become places, and the warps walk
// their stretches again to fill them, in shared memory where the batch fits there. Lanes of one group are found by
// votes, which keep their order.
#include <algorithm>

#include "../common/check.h"
#include "plan.h"
#include "ptx.cuh"
#include "runtime.h"

namespace taps_fast::cuda {
namespace {

constexpr int kMaxWarps = 32;
constexpr int kAhead = 4;  // loads on their way together: the kernel waits for little else
constexpr int kMaxSharedBytes = 96 * 1024;
constexpr int kFewestStaged = 512;  // samples: fewer are stored sooner than put together

/// counts[warp][group], with one more group for lanes beyond the batch; a word for each warp; the order, where it is
/// made here first; of a layer, a byte for each task.
constexpr int shared_bytes(int warps, int tasks, int staged, bool layer) {
  return (warps * (tasks + 2) + kMaxWarps + staged) * 4 + (layer ? tasks : 0);
}
static_assert(shared_bytes(1, kMaxTasks, 0, false) <= kMaxSharedBytes);
static_assert(shared_bytes(1, kMaxLayerTasks, 0, true) <= kMaxSharedBytes);

__device__ int* staged_order(const PlanProblem& p) {
  return reinterpret_cast<int*>(dynamic_shared() + shared_bytes(p.warps, p.tasks, 0, false));
}

__device__ uint8_t* own_weight(const PlanProblem& p) {
  return dynamic_shared() + shared_bytes(p.warps, p.tasks, p.staged, false);
}

/// Whether each task's weight differs from the base's; a warp looks at a task.
__device__ void find_own_weights(const PlanProblem& p) {
  const int lane = threadIdx.x % 32;
  for (int task = threadIdx.x / 32; task < p.tasks; task += p.warps) {
    bool own = p.base_coeffs && load(p.base_coeffs + task) != 1.f;
    for (int k = lane; k < p.deltas; k += 32) own |= load(p.coeffs + int64_t{task} * p.deltas + k) != 0.f;
    const unsigned any = __ballot_sync(~0u, own);
    if (lane == 0) own_weight(p)[task] = any != 0;
  }
}

__device__ int group_of(const PlanProblem& p, int sample, int end, bool* bad) {
  if (sample >= end) return p.tasks + 1;
  const int64_t id = load(p.ids + sample);
  const bool in_range = -1 <= id && id < p.tasks;
  *bad |= !in_range;
  if (!in_range || id < 0 || (p.layer && !own_weight(p)[id])) return 0;
  return static_cast<int>(id) + 1;
}

/// The lanes whose group is the same as this one's: one vote for each bit of a group's number, of which there are fewer
/// than different groups in a warp, through which a warp match would go.
__device__ __forceinline__ unsigned lanes_of(int group, int last_group) {
  unsigned same = ~0u;
  for (int bit = 0; last_group >> bit; bit++) {
    const bool set = group >> bit & 1;
    const unsigned voted = __ballot_sync(~0u, set);
    same &= set ? voted : ~voted;
  }
  return same;
}

/// What a lane knows of the samples that are looked at together.
struct Seen {
  int group[kAhead];
  unsigned same[kAhead];  // lanes of the same group
};

/// use(sample, group, lanes of the same group) for the samples in [begin, end), 32 of them at a time; lanes beyond have
/// the last group. A second walk, `again`, finds what was seen in the first, if that took one step.
template <class Use>
__device__ __forceinline__ void walk(const PlanProblem& p, int begin, int end, bool again, Seen& seen, bool* bad,
                                     const Use& use) {
  const bool known = again && end - begin <= 32 * kAhead;
  for (int first = begin; first < end; first += 32 * kAhead) {
    const int sample = first + threadIdx.x % 32;
    if (!known) {
#pragma unroll
      for (int n = 0; n < kAhead; n++) seen.group[n] = group_of(p, sample + 32 * n, end, bad);
    }
#pragma unroll
    for (int n = 0; n < kAhead; n++) {
      if (first + 32 * n >= end) break;
      if (!known) seen.same[n] = lanes_of(seen.group[n], p.tasks + 1);
      use(sample + 32 * n, seen.group[n], seen.same[n]);
    }
  }
}

/// Σ of the values of lower threads of the block, which has no more warps than a warp has lanes.
__device__ int sum_before(int value, int* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int lower = lane < warp ? warp_sums[lane] : 0;
  for (int distance = 16; distance > 0; distance /= 2) lower += __shfl_xor_sync(~0u, lower, distance);
  return sum + lower - value;
}

/// Of order and offsets, which this block has just written, the rows' own.
__device__ void place_rows(const PlanProblem& p, int threads, int groups) {
  __syncthreads();
  const int each = p.samples ? p.rows / p.samples : 0;
  for (int position = threadIdx.x; position < p.rows; position += threads) {
    const int within = position % each;
    const int64_t outer = int64_t{within / p.inner} * p.samples + load_own(p.order + position / each);
    store(p.place + position, outer * p.inner + within % p.inner);
  }
  for (int g = threadIdx.x; g < groups; g += threads)
    store(p.ends + g, static_cast<int32_t>(load_own(p.offsets + g + 1) * each));
}

__global__ void __launch_bounds__(32 * kMaxWarps, 1) plan_kernel(const __grid_constant__ PlanProblem p) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, threads = 32 * p.warps;
  const unsigned below = (1u << lane) - 1;
  const int groups = p.tasks + 1, columns = groups + 1;
  int* const counts = reinterpret_cast<int*>(dynamic_shared());
  int* const mine = counts + warp * columns;
  const int stretch = (p.samples + threads - 1) / threads * 32;
  const int begin = warp * stretch, end = std::min(begin + stretch, p.samples);

  for (int n = thread; n < p.warps * columns; n += threads) counts[n] = 0;
  if (p.layer) find_own_weights(p);
  __syncthreads();
  bool bad = false;
  Seen seen;
  walk(p, begin, end, false, seen, &bad, [&](int, int group, unsigned same) {
    if ((same & below) == 0) mine[group] += __popc(same);
    __syncwarp();
  });
  bad = __syncthreads_or(bad);

  // From counts to places: groups in order, in a group warps in order. A thread has `each` neighbouring groups.
  const int each = (groups + threads - 1) / threads;
  const int first_group = std::min(thread * each, groups), last_group = std::min(first_group + each, groups);
  int count = 0;
  for (int g = first_group; g < last_group; g++)
    for (int w = 0; w < p.warps; w++) count += counts[w * columns + g];
  int place = sum_before(count, counts + p.warps * columns);
  for (int g = first_group; g < last_group; g++) {
    store(p.offsets + g, int64_t{place});
    for (int first = 0; first < p.warps; first += kAhead) {
      int own[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; n++) own[n] = first + n < p.warps ? counts[(first + n) * columns + g] : 0;
#pragma unroll
      for (int n = 0; n < kAhead; n++) {
        if (first + n < p.warps) counts[(first + n) * columns + g] = place;
        place += own[n];
      }
    }
  }
  if (thread == 0) {
    store(p.offsets + groups, int64_t{p.samples});
    if (p.valid) store(p.valid, !bad);
  }
  __syncthreads();

  walk(p, begin, end, true, seen, &bad, [&](int sample, int group, unsigned same) {
    const int at = mine[group] + __popc(same & below);
    __syncwarp();
    if ((same & below) == 0) mine[group] += __popc(same);
    __syncwarp();
    if (sample < end) {
      // Neighbouring lanes' samples are far apart in the order: many are put together first.
      if (p.staged) staged_order(p)[at] = sample;
      else store(p.order + at, int64_t{sample});
      if (p.inverse) store(p.inverse + sample, int64_t{at});
      if (p.slots) store(p.slots + sample, int64_t{group});
    }
  });
  if (p.staged) {
    __syncthreads();
    for (int at = thread; at < p.samples; at += threads) store(p.order + at, int64_t{staged_order(p)[at]});
  }
  if (p.layer) place_rows(p, threads, groups);
}

}  // namespace

void plan(PlanProblem p, void* cuda_stream) {
  const int64_t items = p.layer ? std::max<int64_t>({p.samples, p.rows, 32 * int64_t{p.tasks}}) : p.samples;
  p.warps = static_cast<int>(std::clamp<int64_t>((items + 31) / 32, 1, kMaxWarps));
  while (p.warps > 1 && shared_bytes(p.warps, p.tasks, 0, p.layer) > kMaxSharedBytes) p.warps--;
  p.staged = kFewestStaged <= p.samples && p.samples <= kMaxSharedBytes / 4 ? p.samples : 0;
  if (shared_bytes(p.warps, p.tasks, p.staged, p.layer) > kMaxSharedBytes) p.staged = 0;
  const Grid grid{1, 32 * p.warps, 1, shared_bytes(p.warps, p.tasks, p.staged, p.layer)};
  const char* error = launch<plan_kernel>(grid, p, cuda_stream);
  check(!error, p.layer ? "layer" : "task", "_plan: plan_kernel did not start: ", error ? error : "", " (", p.samples,
        " samples, ", p.tasks, " tasks; ", p.warps, " warps, ", grid.shared_bytes, " bytes of shared memory)");
}

}  // namespace taps_fast::cuda
