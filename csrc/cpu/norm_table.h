// The kernels of norm.h for one instruction set; included by each norm_<isa>.cpp, compiled with that set's flags.
//
// A row or plane is walked in whole vectors. Its last, partial vector is taken at the end of the row instead, over
// elements that the vector before it also covers: both are loaded before either is stored, so that x may be out.
#pragma once

#include "activation.h"
#include "norm.h"
#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 256;  // rows of a chunk, whose squares are taken while its channels are in L2
constexpr int kSumVectors = 4;       // vectors of channels that sums hold in registers

/// The entries of a table that go with one row.
template <class C>
TAPS_INLINE const C* entry(const Matrix& table, int64_t row) {
  return table.data ? static_cast<const C*>(table.data) + row * table.stride : nullptr;
}

/// Whole vectors of n elements, f(j, load, store); n < lanes is one partial vector.
template <class S, class F>
TAPS_INLINE void for_vectors(int64_t n, const F& f) {
  using V = Vec<Compute<S>>;
  constexpr int64_t lanes = kLanes<Compute<S>>;
  const auto whole = [](const auto* p) __attribute__((always_inline)) { return load(p); };
  if (n < lanes) {
    const auto partial = [&](const auto* p) __attribute__((always_inline)) { return load_partial(p, n); };
    const V y = f(int64_t{0}, partial);
    f.put_partial(y, n);
    return;
  }
  // In the order of memory, which is what prefetchers expect, but for the last two vectors.
  int64_t j = 0;
  for (; j + 2 * lanes <= n; j += lanes) f.put(j, f(j, whole));
  const V before = f(j, whole), tail = f(n - lanes, whole);
  f.put(j, before);
  f.put(n - lanes, tail);
}

/// One row with channels innermost, or one plane: there the tables' entries are the same for all elements.
template <class S, Activation kActivation, bool kBackward, bool kPlane>
struct Line {
  using C = Compute<S>;
  using V = Vec<C>;
  const S* x;
  const S* dy;
  S* out;
  const C *scale, *shift, *slope, *offset;

  template <class Load>
  TAPS_INLINE V at(const C* table, int64_t j, const Load& get) const {
    if constexpr (kPlane) return splat(*table);
    else return get(table + j);
  }
  template <class Load>
  TAPS_INLINE V operator()(int64_t j, const Load& get) const {
    if constexpr (!kBackward) {
      return activate<kActivation>(get(x + j) * at(scale, j, get) + at(shift, j, get));
    } else {
      V dx = get(dy + j) * at(scale, j, get);
      if constexpr (kActivation != Activation::kNone)
        dx = activate_backward<kActivation>(dx, get(x + j) * at(scale, j, get) + at(shift, j, get));
      if (slope) dx += get(x + j) * at(slope, j, get);
      if (offset) dx += at(offset, j, get);
      return dx;
    }
  }
  TAPS_INLINE void put(int64_t j, V y) const { store(out + j, y); }
  TAPS_INLINE void put_partial(V y, int64_t n) const { store_partial(out, y, n); }
};

template <class S, Activation kActivation, bool kBackward, bool kPlane>
void run_pointwise(const Pointwise& p, const Share& share) {
  using C = Compute<S>;
  const int64_t items = num_items(p), lines = kPlane ? p.in.rows * p.in.channels : p.in.rows;
  const int64_t length = kPlane ? p.in.pixels : p.in.channels;
  const int64_t rows_of_a_run = p.in.member.offsets ? p.in.member.inner : p.in.rows;
  for (int64_t item = claim(share); item < items; item = claim(share)) {
    const int64_t end = min(lines, (item + 1) * p.rows_per_item);
    for (int64_t i = item * p.rows_per_item; i < end;) {
      // Lines that share their entries: the rows of a sample, or one plane.
      const int64_t row = kPlane ? i / p.in.channels : i, channel = kPlane ? i % p.in.channels : 0;
      const int64_t shared = kPlane ? i + 1 : min(end, (i / rows_of_a_run + 1) * rows_of_a_run);
      const int64_t task = table_row(p.in.member, row);
      const auto at = [&](const Matrix& table) {
        const C* found = entry<C>(table, task);
        return found ? found + channel : nullptr;
      };
      Line<S, kActivation, kBackward, kPlane> line{nullptr,     nullptr,     nullptr,     at(p.scale),
                                                   at(p.shift), at(p.slope), at(p.offset)};
      for (; i < shared; i++) {
        line.x = static_cast<const S*>(p.x) + i * length;
        if constexpr (kBackward) line.dy = static_cast<const S*>(p.dy) + i * length;
        line.out = static_cast<S*>(p.out) + i * length;
        for_vectors<S>(length, line);
      }
    }
  }
}

/// Sums that grow by chunks of rows: Σ du·(x - center) and Σ du, or mean and Σ (x - mean)² joined as by Chan et al.
/// (1979).
template <bool kMoments>
struct Sums {
  double* first;
  double* second;
  double before;  // how many values are in already

  TAPS_INLINE void add(int64_t channel, double a, double b, double count) const {
    if constexpr (kMoments) {
      const double d = a - first[channel], share = count / (before + count);
      first[channel] += d * share;
      second[channel] += b + d * d * before * share;
    } else {
      first[channel] += a;
      second[channel] += b;
    }
  }
};

/// kVectors vectors of channels, of which n <= kVectors · lanes count, over a chunk of rows.
template <class S, Activation kActivation, bool kMoments, int kVectors, class Load>
TAPS_INLINE void sum_channels(const S* const* x, const S* const* dy, int64_t rows, const Compute<S>* scale,
                              const Compute<S>* shift, const Compute<S>* center, int64_t channel, int64_t n,
                              const Sums<kMoments>& sums, const Load& get) {
  using C = Compute<S>;
  using V = Vec<C>;
  constexpr int64_t lanes = kLanes<C>;
  V a[kVectors] = {}, b[kVectors] = {};
  for (int64_t r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const int64_t j = channel + v * lanes;
      if constexpr (kMoments) {
        a[v] += get(x[r] + j);
      } else {
        const V value = get(x[r] + j);
        V du = get(dy[r] + j);
        if constexpr (kActivation != Activation::kNone)
          du = activate_backward<kActivation>(du, value * get(scale + j) + get(shift + j));
        a[v] += du * (value - get(center + j));
        b[v] += du;
      }
    }
  if constexpr (kMoments) {
    for (int v = 0; v < kVectors; v++) a[v] /= static_cast<C>(rows);
    for (int64_t r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        const V d = get(x[r] + channel + v * lanes) - a[v];
        b[v] += d * d;
      }
  }
  for (int64_t i = 0; i < n; i++) sums.add(channel + i, a[i / lanes][i % lanes], b[i / lanes][i % lanes], rows);
}

/// Channels [channel, end) of a chunk of rows: blocks of registers, then single vectors, then a partial one.
template <class S, Activation kActivation, bool kMoments>
void sum_chunk(const S* const* x, const S* const* dy, int64_t rows, const Compute<S>* scale, const Compute<S>* shift,
               const Compute<S>* center, int64_t channel, int64_t end, const Sums<kMoments>& sums) {
  constexpr int64_t lanes = kLanes<Compute<S>>, width = kSumVectors * lanes;
  const auto whole = [](const auto* q) __attribute__((always_inline)) { return load(q); };
  for (; channel + width <= end; channel += width)
    sum_channels<S, kActivation, kMoments, kSumVectors>(x, dy, rows, scale, shift, center, channel, width, sums, whole);
  for (; channel + lanes <= end; channel += lanes)
    sum_channels<S, kActivation, kMoments, 1>(x, dy, rows, scale, shift, center, channel, lanes, sums, whole);
  const int64_t n = end - channel;
  const auto partial = [n](const auto* q) __attribute__((always_inline)) { return load_partial(q, n); };
  if (n > 0) sum_channels<S, kActivation, kMoments, 1>(x, dy, rows, scale, shift, center, channel, n, sums, partial);
}

/// One plane, whose table entries are two numbers.
template <class S, Activation kActivation, bool kMoments>
void sum_plane(const S* x, const S* dy, int64_t pixels, Compute<S> scale, Compute<S> shift, Compute<S> center,
               int64_t channel, const Sums<kMoments>& sums) {
  using C = Compute<S>;
  using V = Vec<C>;
  constexpr int64_t lanes = kLanes<C>;
  const int64_t body = pixels / lanes * lanes, rest = pixels - body;
  const auto sweep = [&](auto take) __attribute__((always_inline)) {
    for (int64_t j = 0; j < body; j += lanes)
      take(j, [](const S* q) __attribute__((always_inline)) { return load(q); });
    if (rest) take(body, [&](const S* q) __attribute__((always_inline)) { return load_partial(q, rest); });
  };
  V a{}, b{};
  if constexpr (kMoments) {
    sweep([&](int64_t j, auto get) __attribute__((always_inline)) { a += get(x + j); });
    const C mean = static_cast<C>(sum_lanes(a)) / static_cast<C>(pixels);
    V left{};  // what a long sum has lost of the mean
    for (int64_t j = 0; j < body; j += lanes) {
      const V d = load(x + j) - mean;
      left += d;
      b += d * d;
    }
    double square = sum_lanes(b), off = sum_lanes(left);
    for (int64_t j = body; j < pixels; j++) {
      const double d = to_compute(x[j]) - mean;
      off += d;
      square += d * d;
    }
    off /= static_cast<double>(pixels);
    sums.add(channel, mean + off, square - off * off * static_cast<double>(pixels), pixels);
  } else {
    sweep([&](int64_t j, auto get) __attribute__((always_inline)) {
      const V value = get(x + j);
      V du = get(dy + j);
      if constexpr (kActivation != Activation::kNone) du = activate_backward<kActivation>(du, value * scale + shift);
      a += du * (value - center);
      b += du;
    });
    sums.add(channel, sum_lanes(a), sum_lanes(b), pixels);
  }
}

template <class S, Activation kActivation, bool kMoments>
void run_group_sums(const GroupSums& p, const Share& share) {
  using C = Compute<S>;
  constexpr bool kPlain = kMoments || kActivation == Activation::kNone;
  const int64_t channels = p.in.channels, length = channels * p.in.pixels;
  const int64_t blocks = ceil_div(channels, p.channels_per_item), items = num_items(p);
  for (int64_t item = claim(share); item < items; item = claim(share)) {
    const Span& span = p.spans[item / blocks];
    const int64_t channel = item % blocks * p.channels_per_item, end = min(channels, channel + p.channels_per_item);
    const int64_t table = task_row(p.in.member, span.group);
    const C *scale = entry<C>(p.scale, table), *shift = entry<C>(p.shift, table), *center = entry<C>(p.center, table);
    Sums<kMoments> sums{p.first + item / blocks * channels, p.second + item / blocks * channels, 0};
    for (int64_t c = channel; c < end; c++) sums.first[c] = sums.second[c] = 0;
    const S *x[kRowsAtOnce], *dy[kRowsAtOnce];
    for (int64_t place = span.begin; place < span.end; place += kRowsAtOnce) {
      const int64_t rows = min(kRowsAtOnce, span.end - place);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t row = row_at(p.in, span.group, place + r) * length;
        x[r] = static_cast<const S*>(p.x) + row;
        dy[r] = kMoments ? nullptr : static_cast<const S*>(p.dy) + row;
      }
      if (p.in.pixels == 1) {
        sum_chunk<S, kActivation, kMoments>(x, dy, rows, scale, shift, center, channel, end, sums);
        sums.before += rows;
        continue;
      }
      for (int64_t r = 0; r < rows; r++, sums.before += p.in.pixels)
        for (int64_t c = channel; c < end; c++)
          sum_plane<S, kActivation, kMoments>(x[r] + c * p.in.pixels, kMoments ? nullptr : dy[r] + c * p.in.pixels,
                                              p.in.pixels, kPlain ? 0 : scale[c], kPlain ? 0 : shift[c],
                                              kMoments ? 0 : center[c], c, sums);
    }
  }
}

template <Activation kActivation>
struct Constant {
  static constexpr Activation value = kActivation;
};

/// f(an S, a Constant) for the types and the activation asked for.
template <class F>
TAPS_INLINE void with_types(DType dtype, Activation activation, const F& f) {
  const auto typed = [&](auto type) {
    switch (activation) {
      case Activation::kNone: return f(type, Constant<Activation::kNone>{});
      case Activation::kRelu: return f(type, Constant<Activation::kRelu>{});
      case Activation::kRelu6: return f(type, Constant<Activation::kRelu6>{});
      case Activation::kSilu: return f(type, Constant<Activation::kSilu>{});
      case Activation::kGelu: return f(type, Constant<Activation::kGelu>{});
    }
  };
  switch (dtype) {
    case DType::kFloat32: return typed(float{});
    case DType::kBFloat16: return typed(BFloat16{});
    case DType::kFloat16: return typed(Float16{});
    case DType::kFloat64: return typed(double{});
  }
}

void pointwise(const Pointwise& p, const Share& share) {
  with_types(p.in.dtype, p.activation, [&](auto type, auto activation) {
    using S = decltype(type);
    constexpr Activation a = decltype(activation)::value;
    if (p.dy) p.in.pixels > 1 ? run_pointwise<S, a, true, true>(p, share) : run_pointwise<S, a, true, false>(p, share);
    else p.in.pixels > 1 ? run_pointwise<S, a, false, true>(p, share) : run_pointwise<S, a, false, false>(p, share);
  });
}

void group_sums(const GroupSums& p, const Share& share) {
  with_types(p.in.dtype, p.activation, [&](auto type, auto activation) {
    using S = decltype(type);
    constexpr Activation a = decltype(activation)::value;
    if (p.dy) run_group_sums<S, a, false>(p, share);
    else if constexpr (a == Activation::kNone) run_group_sums<S, a, true>(p, share);
  });
}

}  // namespace
}  // namespace taps_fast::cpu
