// The backward of norms over runs of adjacent elements; included by each norm_<isa>.cpp.
//
// A run's x and dy are read from memory once: its two means are formed first, then its dx, and the sums by channel grow
// meanwhile, in the order of a span's rows.
#pragma once

#include "norm_table.h"

namespace taps_fast::cpu {
namespace {

/// Calls f(j, get, put) for whole vectors of n elements and once more for a partial one.
template <class S, class F>
TAPS_INLINE void for_each_vector(int64_t n, const F& f) {
  using V = Vec<Compute<S>>;
  constexpr int64_t lanes = kLanes<Compute<S>>;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes)
    f(
        j, [](const auto* p) __attribute__((always_inline)) { return load(p); },
        [](auto* p, V v) __attribute__((always_inline)) { store(p, v); });
  const int64_t rest = n - j;
  if (rest > 0)
    f(
        j, [rest](const auto* p) __attribute__((always_inline)) { return load_partial(p, rest); },
        [rest](auto* p, V v) __attribute__((always_inline)) { store_partial(p, v, rest); });
}

/// One run: what is read of it, and where its dx (null: not wanted) and the sums of its channels go.
template <class S>
struct RunGrad {
  using C = Compute<S>;
  using V = Vec<C>;
  const S *x, *dy;
  S* dx;
  C mean, rstd;
  const C* weight;
  C *first, *second;

  /// Channels that are single elements.
  template <bool kWeight>
  TAPS_INLINE void elements(int64_t n, bool center) const {
    const V m = splat(mean), r = splat(rstd);
    const auto u = [&](int64_t j, V value, const auto& get) __attribute__((always_inline)) {
      if constexpr (kWeight) return value * get(weight + j);
      else return value;
    };
    V level{}, tilt{};
    if (dx) {
      for_each_vector<S>(n, [&](int64_t j, const auto& get, const auto&) __attribute__((always_inline)) {
        const V value = u(j, get(dy + j), get);
        level += value;
        tilt += value * (get(x + j) - m);
      });
      level = center ? splat(static_cast<C>(sum_lanes(level) / n)) : V{};
      tilt = splat(static_cast<C>(sum_lanes(tilt) / n)) * r * r;
    }
    for_each_vector<S>(n, [&](int64_t j, const auto& get, const auto& put) __attribute__((always_inline)) {
      const V value = get(dy + j), away = get(x + j) - m;
      if (dx) put(dx + j, r * (u(j, value, get) - level - away * tilt));
      put(first + j, get(first + j) + value * (away * r));
      put(second + j, get(second + j) + value);
    });
  }

  /// Channels that are planes.
  void planes(int64_t channels, int64_t pixels, bool center) const {
    const V m = splat(mean);
    double level = 0, tilt = 0;
    for (int64_t c = 0; c < channels; c++) {
      const S *xs = x + c * pixels, *dys = dy + c * pixels;
      V plain{}, along{};
      // Lanes beyond a partial vector hold dy = 0.
      for_each_vector<S>(pixels, [&](int64_t j, const auto& get, const auto&) __attribute__((always_inline)) {
        const V value = get(dys + j);
        plain += value;
        along += value * (get(xs + j) - m);
      });
      const C b = static_cast<C>(sum_lanes(plain)), a = static_cast<C>(sum_lanes(along));
      level += double(weight ? weight[c] : 1) * b;
      tilt += double(weight ? weight[c] : 1) * a;
      first[c] += a * rstd;
      second[c] += b;
    }
    if (!dx) return;
    const double count = double(channels) * pixels;
    const V less = splat(static_cast<C>(center ? level / count : 0) * rstd);
    const V turn = splat(static_cast<C>(tilt / count) * rstd * rstd * rstd);
    for (int64_t c = 0; c < channels; c++) {
      const S *xs = x + c * pixels, *dys = dy + c * pixels;
      S* out = dx + c * pixels;
      const V scale = splat(weight ? weight[c] * rstd : rstd);
      for_each_vector<S>(pixels, [&](int64_t j, const auto& get, const auto& put) __attribute__((always_inline)) {
        put(out + j, get(dys + j) * scale - less - (get(xs + j) - m) * turn);
      });
    }
  }
};

template <class S>
void run_group_norm_grad(const GroupNormGrad& p, const Share& share) {
  using C = Compute<S>;
  const int64_t channels = p.in.channels / p.groups, pixels = p.in.pixels, length = channels * pixels;
  for (int64_t item = claim(share); item < p.num_spans; item = claim(share)) {
    const Span& span = p.spans[item];
    const int64_t table = task_row(p.in.member, span.group);
    const C* weight = p.weight ? static_cast<const C*>(p.weight[table]) : nullptr;
    C *first = static_cast<C*>(p.first) + item * p.in.channels,
      *second = static_cast<C*>(p.second) + item * p.in.channels;
    for (int64_t place = span.begin; place < span.end; place++) {
      const int64_t row = row_at(p.in, span.group, place);
      for (int64_t g = 0; g < p.groups; g++) {
        const int64_t run = row * p.groups + g, at = run * length, channel = g * channels;
        const S *x = static_cast<const S*>(p.x) + at, *dy = static_cast<const S*>(p.dy) + at;
        S* dx = p.dx ? static_cast<S*>(p.dx) + at : nullptr;
        const C mean = static_cast<const C*>(p.mean)[run], rstd = static_cast<const C*>(p.rstd)[run];
        const C* w = weight ? weight + channel : nullptr;
        const RunGrad<S> one{x, dy, dx, mean, rstd, w, first + channel, second + channel};
        if (pixels > 1) one.planes(channels, pixels, p.center);
        else if (w) one.template elements<true>(channels, p.center);
        else one.template elements<false>(channels, p.center);
      }
    }
  }
}

void group_norm_grad(const GroupNormGrad& p, const Share& share) {
  switch (p.in.dtype) {
    case DType::kFloat32: return run_group_norm_grad<float>(p, share);
    case DType::kBFloat16: return run_group_norm_grad<BFloat16>(p, share);
    case DType::kFloat16: return run_group_norm_grad<Float16>(p, share);
    case DType::kFloat64: return run_group_norm_grad<double>(p, share);
  }
}

}  // namespace
}  // namespace taps_fast::cpu
