// out = act(scale·x + shift), or its gradient out = scale·du + slope·x + offset: one pass, 16 bytes a thread.
#include <algorithm>

#include "../common/check.h"
#include "activation.cuh"
#include "lines.cuh"
#include "norm.h"
#include "runtime.h"

namespace taps_fast::cuda {
namespace {

constexpr int kThreads = 256;
// Lines and units of one launch are counted in 32 bits, which divide several times faster than 64.
constexpr int64_t kMaxUnits = int64_t{1} << 30;

/// A line is a plane, or a row of channels; a unit is kCount neighbouring elements of one.
template <class T, int kCount, bool kBackward>
__global__ void __launch_bounds__(kThreads) pointwise_kernel(const __grid_constant__ PointwiseProblem p) {
  using C = Compute<T>;
  const uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
  if (unit >= p.units) return;
  const bool plane = p.in.pixels > 1;
  const int64_t line = p.first_line + unit / p.units_per_line;
  const int64_t j = int64_t{unit % p.units_per_line} * kCount;
  const int64_t row = table_row(p.in, plane ? line / p.in.channels : line);
  const int64_t channel = plane ? line % p.in.channels : j;
  const int64_t at = line * (plane ? p.in.pixels : p.in.channels) + j;
  const auto table = [&](const Table& t, C absent) { return entries<C, kCount>(t, row, channel, plane, absent); };

  const auto x = Vector<T, kCount>::from(static_cast<const T*>(p.x) + at);
  const auto scale = table(p.scale, C(1)), shift = table(p.shift, C(0));
  Vector<T, kCount> out;
  if constexpr (kBackward) {
    const auto dy = Vector<T, kCount>::from(static_cast<const T*>(p.dy) + at);
    const auto slope = table(p.slope, C(0)), offset = table(p.offset, C(0));
#pragma unroll
    for (int e = 0; e < kCount; e++) {
      const C value = to_wide(x.values[e]), u = scale.values[e] * value + shift.values[e];
      C dx = activate_backward(p.activation, C(to_wide(dy.values[e])), u) * scale.values[e] + offset.values[e];
      if (p.slope.data) dx += slope.values[e] * value;
      from_wide(dx, out.values[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCount; e++) {
      const C u = scale.values[e] * C(to_wide(x.values[e])) + shift.values[e];
      from_wide(activate(p.activation, u), out.values[e]);
    }
  }
  out.to(static_cast<T*>(p.out) + at);
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T, int kCount>
void start(PointwiseProblem p, void* cuda_stream) {
  const int64_t length = p.in.pixels > 1 ? p.in.pixels : p.in.channels;
  const int64_t lines = p.in.pixels > 1 ? p.in.rows * p.in.channels : p.in.rows;
  check(length / kCount <= kMaxUnits, "scale_shift: a line must have at most 2^30 elements, got ", length);
  p.units_per_line = static_cast<uint32_t>(length / kCount);
  const int64_t most = kMaxUnits / p.units_per_line;
  for (p.first_line = 0; p.first_line < lines; p.first_line += most) {
    p.units = static_cast<uint32_t>(std::min(most, lines - p.first_line)) * p.units_per_line;
    const Grid grid{(p.units + kThreads - 1) / kThreads, kThreads, 1, 0};
    const char* error = p.dy ? launch<pointwise_kernel<T, kCount, true>>(grid, p, cuda_stream)
                             : launch<pointwise_kernel<T, kCount, false>>(grid, p, cuda_stream);
    check(!error, "scale_shift: pointwise_kernel did not start: ", error ? error : "", " (", name(p.in.dtype), ", ",
          p.in.rows, " rows of ", p.in.channels, " channels, ", p.in.pixels, " pixels; ", grid.blocks, " blocks)");
  }
}

template <class T>
void start(const PointwiseProblem& p, void* cuda_stream) {
  constexpr int kCount = 16 / sizeof(T);
  const int64_t length = p.in.pixels > 1 ? p.in.pixels : p.in.channels;
  bool aligned = length % kCount == 0;
  for (const void* data :
       {p.x, p.dy, static_cast<const void*>(p.out), p.scale.data, p.shift.data, p.slope.data, p.offset.data})
    aligned &= is_aligned(data);
  aligned ? start<T, kCount>(p, cuda_stream) : start<T, 1>(p, cuda_stream);
}

}  // namespace

void pointwise(PointwiseProblem p, void* cuda_stream) {
  switch (p.in.dtype) {
    case DType::kFloat32: return start<float>(p, cuda_stream);
    case DType::kBFloat16: return start<BFloat16>(p, cuda_stream);
    case DType::kFloat16: return start<Half>(p, cuda_stream);
    case DType::kFloat64: return start<double>(p, cuda_stream);
  }
}

}  // namespace taps_fast::cuda
