// Two sums over the rows of each task, by channel: Σ du·(x - center) and Σ du, or mean and variance.
//
// Moments are sums too, of x - center and its square, where the center is the mean of some elements that lie all over
// the group: as near to the mean of all, it keeps the difference of squares at the end from cancelling, also where the
// first element is far off, as a corner of padding is. x is read once.
//
// The host does not know how many rows a task has. So each group is cut into the same number of splits, whose sums
// are added in order by a second kernel: no atomics, and the same bits each time.
#include <algorithm>

#include "../common/check.h"
#include "activation.cuh"
#include "lines.cuh"
#include "norm.h"
#include "runtime.h"

namespace taps_fast::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kPiece = 1024;  // pixels of a plane that a warp takes at a time
constexpr int kSamples = 4;  // rows of a group that a warp looks at for the center

/// The rows of one group: the k-th is row(k).
struct Rows {
  int64_t begin, count;  // places in order; rows

  __device__ Rows(const Lines& in, int64_t group) : begin(0), count(in.rows) {
    if (!in.mixed) return;
    begin = load(in.offsets + group);
    count = in.batch ? (load(in.offsets + group + 1) - begin) * (in.rows / in.batch) : 0;
  }

  __device__ int64_t row(const Lines& in, int64_t k) const {
    if (!in.mixed) return k;
    const int64_t each = in.rows / in.batch, rest = k % each;
    const int64_t sample = load(in.order + begin + k / each);
    return (rest / in.inner * in.batch + sample) * in.inner + rest % in.inner;
  }
};

/// Group 0 is the base, whose table row is the last.
__device__ int64_t row_of_group(const Lines& in, int64_t group) {
  return !in.mixed ? 0 : group == 0 ? in.tasks : group - 1;
}

/// Channels of one block: one for planes, as many as lanes for rows of channels.
__host__ __device__ int64_t channel_blocks(const Lines& in) {
  return in.pixels > 1 ? in.channels : (in.channels + 31) / 32;
}

template <class T, bool kMoments>
__global__ void __launch_bounds__(kThreads, 3) group_sums_kernel(const __grid_constant__ SumsProblem p) {
  using C = Compute<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t blocks = channel_blocks(p.in), groups = p.in.mixed ? p.in.tasks + 1 : 1;
  const int64_t block = blockIdx.x % blocks, group = blockIdx.x / blocks % groups, split = blockIdx.x / blocks / groups;
  const bool plane = p.in.pixels > 1;
  const int64_t channel = plane ? block : block * 32 + lane;
  const bool exists = channel < p.in.channels;
  const Rows rows(p.in, group);
  const int64_t pieces = (p.in.pixels + kPiece - 1) / kPiece;
  const T* x = static_cast<const T*>(p.x);
  const T* dy = static_cast<const T*>(p.dy);
  const auto start_of = [&](int64_t k) { return (rows.row(p.in, k) * p.in.channels + channel) * p.in.pixels; };

  C scale(1), shift(0), center(0), first(0), second(0);
  if (exists && rows.count > 0 && p.in.pixels > 0) {
    const int64_t row = row_of_group(p.in, group);
    scale = entries<C, 1>(p.scale, row, channel, true, C(1)).values[0];
    shift = entries<C, 1>(p.shift, row, channel, true, C(0)).values[0];
    if constexpr (!kMoments) center = entries<C, 1>(p.center, row, channel, true, C(0)).values[0];
  }
  C* sums = reinterpret_cast<C*>(dynamic_shared());  // [warp][lane][2]
  const int64_t out = row_of_group(p.in, group) * p.in.channels + channel;
  if constexpr (kMoments) {
    C sampled(0);
    for (int i = 0; i < kSamples && exists && rows.count > 0 && p.in.pixels > 0; i++) {
      const int64_t row = (kSamples * warp + i) * rows.count / (kSamples * kWarps);
      sampled += to_wide(load(x + start_of(row) + (plane ? lane * p.in.pixels / 32 : 0)));
    }
    for (int other = 16; plane && other > 0; other /= 2) sampled += __shfl_xor_sync(~0u, sampled, other);
    sums[threadIdx.x] = sampled;
    __syncthreads();
    for (int other = lane; other < kThreads; other += 32) center += sums[other];
    center /= C(kSamples * kWarps * (plane ? 32 : 1));
    if (split == 0 && exists && warp == 0) store(static_cast<C*>(p.first) + out, center);
    __syncthreads();
  }
  const auto add = [&](int64_t at) {
    const C value = to_wide(load(x + at));
    if constexpr (kMoments) {
      const C d = value - center;
      first += d;
      second += d * d;
    } else {
      const C du = activate_backward(p.activation, C(to_wide(load(dy + at))), scale * value + shift);
      first += du * (value - center);
      second += du;
    }
  };
  for (int64_t unit = split * kWarps + warp; unit < rows.count * pieces; unit += p.splits * kWarps) {
    const int64_t start = start_of(unit / pieces);
    if (plane) {
      const int64_t begin = unit % pieces * kPiece, end = std::min<int64_t>(begin + kPiece, p.in.pixels);
      for (int64_t j = begin + lane; j < end; j += 32) add(start + j);
    } else if (exists) {
      add(start);
    }
  }

  // Lanes of a plane share a channel.
  for (int other = 16; plane && other > 0; other /= 2) {
    first += __shfl_xor_sync(~0u, first, other);
    second += __shfl_xor_sync(~0u, second, other);
  }
  sums[2 * threadIdx.x] = first;
  sums[2 * threadIdx.x + 1] = second;
  __syncthreads();
  if (threadIdx.x >= (plane ? 1 : 32) || !exists) return;
  for (int n = threadIdx.x + 32; n < kThreads; n += 32) {
    first += sums[2 * n];
    second += sums[2 * n + 1];
  }
  C* partial = static_cast<C*>(p.partial) + ((split * groups + group) * p.in.channels + channel) * 2;
  store(partial, first);
  store(partial + 1, second);
}

/// One thread for each group and channel adds the splits.
template <class T, bool kMoments>
__global__ void __launch_bounds__(kThreads) add_splits_kernel(const __grid_constant__ SumsProblem p) {
  using C = Compute<T>;
  const int64_t groups = p.in.mixed ? p.in.tasks + 1 : 1, all = groups * p.in.channels;
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= all) return;
  const C* partial = static_cast<const C*>(p.partial) + 2 * n;
  C first(0), second(0);
  for (int s = 0; s < p.splits; s++) {
    first += load(partial + 2 * all * s);
    second += load(partial + 2 * all * s + 1);
  }
  const int64_t group = n / p.in.channels, channel = n % p.in.channels;
  const int64_t out = row_of_group(p.in, group) * p.in.channels + channel;
  if constexpr (kMoments) {
    const Rows rows(p.in, group);
    const C count = static_cast<C>(rows.count * p.in.pixels);
    if (count > C(0)) {
      const C one = C(1) / count, shifted = first * one, square = second * one - shifted * shifted;
      first = load(static_cast<const C*>(p.first) + out) + shifted;  // the center was left there
      second = square > C(0) || square != square ? square : C(0);
    }
  }
  store(static_cast<C*>(p.first) + out, first);
  store(static_cast<C*>(p.second) + out, second);
}

template <class T, bool kMoments>
void start(const SumsProblem& p, void* cuda_stream) {
  const int64_t groups = p.in.groups(), blocks = channel_blocks(p.in) * groups * p.splits;
  const Grid sums{blocks, kThreads, 1, 2 * kThreads * int{sizeof(Compute<T>)}};
  const auto started = [&](const char* kernel, const Grid& grid, const char* error) {
    check(!error, p.kind == Sums::kMoments ? "moments: " : "scale_shift_sums: ", kernel,
          " did not start: ", error ? error : "", " (", name(p.in.dtype), ", ", p.in.rows, " rows of ", p.in.channels,
          " channels, ", p.in.pixels, " pixels, ", p.in.tasks, " tasks; ", grid.blocks, " blocks)");
  };
  started("group_sums_kernel", sums, launch<group_sums_kernel<T, kMoments>>(sums, p, cuda_stream));
  const Grid add{(groups * p.in.channels + kThreads - 1) / kThreads, kThreads, 1, 0};
  started("add_splits_kernel", add, launch<add_splits_kernel<T, kMoments>>(add, p, cuda_stream));
}

template <class T>
void start(const SumsProblem& p, void* cuda_stream) {
  p.kind == Sums::kMoments ? start<T, true>(p, cuda_stream) : start<T, false>(p, cuda_stream);
}

}  // namespace

void group_sums(const SumsProblem& p, void* cuda_stream) {
  switch (p.in.dtype) {
    case DType::kFloat32: return start<float>(p, cuda_stream);
    case DType::kBFloat16: return start<BFloat16>(p, cuda_stream);
    case DType::kFloat16: return start<Half>(p, cuda_stream);
    case DType::kFloat64: return start<double>(p, cuda_stream);
  }
}

int choose_splits(const Lines& in) {
  const int64_t units = in.rows * ((in.pixels + kPiece - 1) / kPiece);
  const int64_t wanted = 4 * current_device().processors / std::max<int64_t>(1, channel_blocks(in) * in.groups());
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, units / kWarps), 1, 64));
}

}  // namespace taps_fast::cuda
