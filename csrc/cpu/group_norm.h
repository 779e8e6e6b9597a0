// The tables of evaluated batch norms, and norms over runs of adjacent elements; included by each norm_<isa>.cpp.
//
// A run is read three times and written once: its mean, the mean of its squared distances from it, and the result. All
// but the first time it comes from a cache.
#pragma once

#include "norm_table.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kLongRun = 1 << 13;
constexpr int kRunVectors = 4;  // sums of a run, so that one addition need not wait for the last

template <class C>
TAPS_INLINE const C* vector_of(Vectors vectors, int64_t row) {
  return vectors ? static_cast<const C*>(vectors[row]) : nullptr;
}

TAPS_INLINE FloatVec square_root(FloatVec v) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes<float>; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
TAPS_INLINE DoubleVec square_root(DoubleVec v) {
  for (int i = 0; i < kLanes<double>; i++) v[i] = __builtin_sqrt(v[i]);
  return v;
}

/// One row of both tables: first the scales, then the shifts that are made of them.
template <class C, bool kShift>
struct TableRow {
  using V = Vec<C>;
  const C *weight, *bias, *mean, *variance;
  C eps;
  C *scale, *shift;

  template <class Load>
  TAPS_INLINE V operator()(int64_t j, const Load& get) const {
    if constexpr (kShift) {
      const V product = get(mean + j) * get(scale + j);
      return bias ? get(bias + j) - product : -product;
    } else {
      const V rstd = 1 / square_root(get(variance + j) + eps);
      return weight ? rstd * get(weight + j) : rstd;
    }
  }
  TAPS_INLINE void put(int64_t j, V y) const { store((kShift ? shift : scale) + j, y); }
  TAPS_INLINE void put_partial(V y, int64_t n) const { store_partial(kShift ? shift : scale, y, n); }
};

template <class C>
void run_norm_tables(const NormTables& p, const Share& share) {
  for (int64_t item = claim(share), items = num_items(p); item < items; item = claim(share)) {
    const int64_t end = min(p.tables, (item + 1) * p.tables_per_item);
    for (int64_t t = item * p.tables_per_item; t < end; t++) {
      if (!p.mean[t]) continue;
      const TableRow<C, false> row{vector_of<C>(p.weight, t),
                                   vector_of<C>(p.bias, t),
                                   vector_of<C>(p.mean, t),
                                   vector_of<C>(p.variance, t),
                                   static_cast<C>(p.eps[t]),
                                   static_cast<C*>(p.scale) + t * p.channels,
                                   static_cast<C*>(p.shift) + t * p.channels};
      for_vectors<C>(p.channels, row);
      for_vectors<C>(p.channels,
                     TableRow<C, true>{row.weight, row.bias, row.mean, row.variance, row.eps, row.scale, row.shift});
    }
  }
}

/// Σ f(element) over a run.
template <class S, class F>
TAPS_INLINE Compute<S> sum_run(const S* x, int64_t n, const F& f) {
  using V = Vec<Compute<S>>;
  constexpr int64_t lanes = kLanes<Compute<S>>;
  V sums[kRunVectors] = {};
  int64_t j = 0;
  for (; j + kRunVectors * lanes <= n; j += kRunVectors * lanes)
#pragma GCC unroll 4
    for (int v = 0; v < kRunVectors; v++) sums[v] += f(load(x + j + v * lanes));
  for (; j + lanes <= n; j += lanes) sums[0] += f(load(x + j));
  Compute<S> sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < n; j++) sum += f(splat(to_compute(x[j])))[0];
  return sum;
}

/// What is written of a run: channels are its elements, or planes of it.
template <class S>
struct Normalised {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* x;
  S* out;
  C mean, rstd;
  const C *weight, *bias;
  bool plane;

  template <class Load>
  TAPS_INLINE V operator()(int64_t j, const Load& get) const {
    V y = (get(x + j) - mean) * rstd;
    if (weight) y *= plane ? splat(*weight) : get(weight + j);
    if (bias) y += plane ? splat(*bias) : get(bias + j);
    return y;
  }
  TAPS_INLINE void put(int64_t j, V y) const { store(out + j, y); }
  TAPS_INLINE void put_partial(V y, int64_t n) const { store_partial(out, y, n); }
};

template <class S>
void run_group_norm(const GroupNorm& p, const Share& share) {
  using C = Compute<S>;
  using V = Vec<C>;
  const int64_t channels = p.in.channels / p.groups, pixels = p.in.pixels, length = channels * pixels;
  for (int64_t item = claim(share), items = num_items(p); item < items; item = claim(share)) {
    const int64_t end = min(p.in.rows * p.groups, (item + 1) * p.runs_per_item);
    for (int64_t run = item * p.runs_per_item; run < end; run++) {
      const int64_t table = table_row(p.in.member, run / p.groups), channel = run % p.groups * channels;
      const C *weight = vector_of<C>(p.weight, table), *bias = vector_of<C>(p.bias, table);
      const S* x = static_cast<const S*>(p.x) + run * length;
      const auto same = [](V v) __attribute__((always_inline)) { return v; };
      C mean = p.center ? sum_run(x, length, same) / static_cast<C>(length) : 0;
      if (p.center && length > kLongRun)  // a long sum loses of the mean what the distances from it still show
        mean += sum_run(x, length, [mean](V v) __attribute__((always_inline)) { return v - mean; }) /
                static_cast<C>(length);
      const auto square = [mean](V v) __attribute__((always_inline)) { return (v - mean) * (v - mean); };
      const C variance = sum_run(x, length, square) / static_cast<C>(length);
      const C rstd = 1 / __builtin_sqrt(variance + static_cast<C>(p.eps));
      if (p.mean) {
        static_cast<C*>(p.mean)[run] = mean;
        static_cast<C*>(p.rstd)[run] = rstd;
      }
      Normalised<S> line{x,         static_cast<S*>(p.out) + run * length, mean,
                         rstd,      weight ? weight + channel : nullptr,   bias ? bias + channel : nullptr,
                         pixels > 1};
      if (pixels == 1) {
        for_vectors<S>(length, line);
        continue;
      }
      for (int64_t c = 0; c < channels; c++, line.x += pixels, line.out += pixels) {
        for_vectors<S>(pixels, line);
        if (weight) line.weight++;
        if (bias) line.bias++;
      }
    }
  }
}

void norm_tables(const NormTables& p, const Share& share) {
  p.wide ? run_norm_tables<double>(p, share) : run_norm_tables<float>(p, share);
}

void group_norm(const GroupNorm& p, const Share& share) {
  switch (p.in.dtype) {
    case DType::kFloat32: return run_group_norm<float>(p, share);
    case DType::kBFloat16: return run_group_norm<BFloat16>(p, share);
    case DType::kFloat16: return run_group_norm<Float16>(p, share);
    case DType::kFloat64: return run_group_norm<double>(p, share);
  }
}

}  // namespace
}  // namespace taps_fast::cpu
