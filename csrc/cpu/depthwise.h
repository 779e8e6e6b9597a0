// Depthwise convolution on channels last, with a weight chosen image by image; included by each norm_<isa>.cpp.
//
//   out[n, p, c] = Σ_taps x[n, p·stride - pad + tap·dilation, c] · weight[t(n), tap, c]
//
// One item is one row of output pixels. Several pixels by several vectors of channels are summed in registers; at the
// left and right edge, where taps fall outside, pixels go one by one.
#pragma once

#include "norm.h"
#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int kPixelsAtOnce = 4;
constexpr int kChannelVectors = kRegisters == 32 ? 4 : 2;

template <class S>
class DepthwiseRow {
  using C = Compute<S>;
  using V = Vec<C>;
  static constexpr int64_t lanes = kLanes<C>;

 public:
  DepthwiseRow(const Depthwise& p, int64_t item) : p_(p) {
    const int64_t n = item / p.out_h, y = item % p.out_h;
    top_ = y * p.stride_h - p.pad_h;
    // Taps whose row lies in the image: top + ky · dilation in [0, in_h).
    ky_begin_ = top_ < 0 ? ceil_div(-top_, p.dilation_h) : 0;
    ky_end_ = min(p.kernel_h, p.in_h > top_ ? ceil_div(p.in_h - top_, p.dilation_h) : 0);
    x_ = static_cast<const S*>(p.x) + n * p.in_h * p.in_w * p.channels;
    out_ = static_cast<S*>(p.out) + (n * p.out_h + y) * p.out_w * p.channels;
    weight_ = static_cast<const C*>(p.weight) + p.table[n] * p.kernel_h * p.kernel_w * p.channels;
  }

  void run() {
    const auto whole = [](const auto* q) __attribute__((always_inline)) { return load(q); };
    const auto put = [](S* q, V v) __attribute__((always_inline)) { store(q, v); };
    int64_t c = 0;
    for (; c + lanes <= p_.channels;) {
      const int64_t vectors = min(kChannelVectors, (p_.channels - c) / lanes);
      with_constant<kChannelVectors>(vectors, [&](auto v) { channels<v.value>(c, whole, put); });
      c += vectors * lanes;
    }
    const int64_t n = p_.channels - c;
    if (n > 0)
      channels<1>(
          c, [n](const auto* q) __attribute__((always_inline)) { return load_partial(q, n); },
          [n](S* q, V v) __attribute__((always_inline)) { store_partial(q, v, n); });
  }

 private:
  template <int kVectors, class Load, class Store>
  void channels(int64_t c, const Load& get, const Store& put) {
    // Pixels whose every tap lies in the image: x · stride - pad >= 0, and the last tap's column < in_w.
    const int64_t reach = p_.in_w - 1 - (p_.kernel_w - 1) * p_.dilation_w + p_.pad_w;
    const int64_t first = min(p_.out_w, ceil_div(p_.pad_w, p_.stride_w));
    const int64_t last = reach < 0 ? first : max(first, min(p_.out_w, reach / p_.stride_w + 1));
    int64_t x = 0;
    for (; x < first; x++) edge<kVectors>(x, c, get, put);
    for (; x + kPixelsAtOnce <= last; x += kPixelsAtOnce)
      pixels<kPixelsAtOnce, kVectors>(x, c, 0, p_.kernel_w, get, put);
    for (; x < last; x++) pixels<1, kVectors>(x, c, 0, p_.kernel_w, get, put);
    for (; x < p_.out_w; x++) edge<kVectors>(x, c, get, put);
  }

  template <int kVectors, class Load, class Store>
  void edge(int64_t x, int64_t c, const Load& get, const Store& put) {
    const int64_t left = x * p_.stride_w - p_.pad_w;
    const int64_t begin = left < 0 ? ceil_div(-left, p_.dilation_w) : 0;
    pixels<1, kVectors>(x, c, begin, min(p_.kernel_w, p_.in_w > left ? ceil_div(p_.in_w - left, p_.dilation_w) : 0),
                        get, put);
  }

  template <int kPixels, int kVectors, class Load, class Store>
  TAPS_INLINE void pixels(int64_t x, int64_t c, int64_t kx_begin, int64_t kx_end, const Load& get, const Store& put) {
    V sum[kPixels][kVectors] = {};
    const int64_t step = p_.stride_w * p_.channels;
    for (int64_t ky = ky_begin_; ky < ky_end_; ky++)
      for (int64_t kx = kx_begin; kx < kx_end; kx++) {
        const C* w = weight_ + (ky * p_.kernel_w + kx) * p_.channels + c;
        const int64_t row = top_ + ky * p_.dilation_h, column = x * p_.stride_w - p_.pad_w + kx * p_.dilation_w;
        const S* in = x_ + (row * p_.in_w + column) * p_.channels + c;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
          const V by = get(w + v * lanes);
#pragma GCC unroll 4
          for (int i = 0; i < kPixels; i++) sum[i][v] += get(in + i * step + v * lanes) * by;
        }
      }
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; i++)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) put(out_ + (x + i) * p_.channels + c + v * lanes, sum[i][v]);
  }

  const Depthwise& p_;
  int64_t top_, ky_begin_, ky_end_;
  const S* x_;
  S* out_;
  const C* weight_;
};

template <class S>
void run_depthwise(const Depthwise& p, const Share& share) {
  const int64_t items = num_items(p);
  for (int64_t item = claim(share); item < items; item = claim(share)) DepthwiseRow<S>(p, item).run();
}

void depthwise(const Depthwise& p, const Share& share) {
  switch (p.dtype) {
    case DType::kFloat32: return run_depthwise<float>(p, share);
    case DType::kBFloat16: return run_depthwise<BFloat16>(p, share);
    case DType::kFloat16: return run_depthwise<Float16>(p, share);
    case DType::kFloat64: return run_depthwise<double>(p, share);
  }
}

}  // namespace
}  // namespace taps_fast::cpu
