// The kernels of fold_problem.h for one instruction set; included by the fold_<isa>.cpp alone.
//
// An item is walked in blocks that stay in L1. Up to kFoldTerms deltas are read side by side, so with K <= kFoldTerms
// nothing but the tensors themselves touches memory, and each delta is read once whatever K is.
#pragma once

#include "fold_problem.h"
#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kFoldBlock = 2048;  // elements
constexpr int kFoldTerms = 8;

template <class S>
class FoldItemRun {
  using C = Compute<S>;
  static constexpr int64_t lanes = kLanes<C>;

 public:
  FoldItemRun(const Fold& problem, int64_t item)
      : p_(problem), item_(problem.items[item]), t_(problem.tensors[item_.tensor]) {
    const int64_t table = p_.num_parts * p_.num_deltas;
    coeffs_ = static_cast<const C*>(p_.coeffs) + item_.tensor * table;
    partials_ = p_.partials ? p_.partials + item * table : nullptr;
  }

  void fold() {
    for_blocks([&](int64_t begin, int64_t n) {
      S* out = static_cast<S*>(t_.out) + begin;
      sum_deltas(begin, n);
      each(n, [&](int64_t j, int64_t m) {
        const Vec<C> scaled =
            m < lanes ? mask_at<true>(begin + j, m) * load(sum_ + j) : mask_at<false>(begin + j, m) * load(sum_ + j);
        put(out + j, t_.in ? get(in() + begin + j, m) + scaled : scaled, m);
      });
    });
  }

  void gradient() {
    for_blocks([&](int64_t begin, int64_t n) {
      const S* dweight = in() + begin;
      if (t_.out) {
        S* out = static_cast<S*>(t_.out) + begin;
        sum_deltas(begin, n);
        each(n, [&](int64_t j, int64_t m) { put(out + j, get(dweight + j, m) * load(sum_ + j), m); });
      }
      if (!partials_) return;
      each(n, [&](int64_t j, int64_t m) {
        const Vec<C> mask = m < lanes ? mask_at<true>(begin + j, m) : mask_at<false>(begin + j, m);
        store(sum_ + j, get(dweight + j, m) * mask);
      });
      if (t_.part) return dot_parts(begin, n);
      for (int64_t k = 0; k < p_.num_deltas; k += kFoldTerms)
        with_constant<kFoldTerms>(p_.num_deltas - k, [&](auto terms) { dot<terms.value>(k, begin, n); });
    });
  }

 private:
  const S* in() const { return static_cast<const S*>(t_.in); }
  const S* delta(int64_t k) const { return static_cast<const S*>(t_.deltas[k]); }

  template <class F>
  void for_blocks(const F& f) {
    for (int64_t begin = 0; begin < item_.size; begin += kFoldBlock)
      f(item_.begin + begin, min(kFoldBlock, item_.size - begin));
  }

  /// f(j, m) for every vector of n elements; only the last may hold m < lanes of them.
  template <class F>
  static TAPS_INLINE void each(int64_t n, const F& f) {
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) f(j, lanes);
    if (j < n) f(j, n - j);
  }

  static TAPS_INLINE Vec<C> get(const S* p, int64_t m) { return m < lanes ? load_partial(p, m) : load(p); }
  static TAPS_INLINE void put(S* p, Vec<C> v, int64_t m) { m < lanes ? store_partial(p, v, m) : store(p, v); }

  template <bool kPartial>
  TAPS_INLINE Vec<C> mask_at(int64_t i, int64_t m) const {
    Vec<C> v{};
    if (p_.mask == MaskType::kNone) return v + C(1);
    if (p_.mask == MaskType::kElement) {
      const S* mask = static_cast<const S*>(t_.mask) + i;
      return kPartial ? load_partial(mask, m) : load(mask);
    }
    const uint8_t* mask = static_cast<const uint8_t*>(t_.mask) + i;
    for (int64_t l = 0; l < (kPartial ? m : lanes); l++) v[l] = mask[l] ? C(1) : C(0);
    return v;
  }

  /// sum_ = Σ_k c_k · delta_k of one block; deltas whose coefficient is 0 are not read.
  void sum_deltas(int64_t begin, int64_t n) {
    if (t_.part) return sum_parts(begin, n);
    const S* open[kFoldTerms];
    C c[kFoldTerms];
    int64_t count = 0;
    bool started = false;
    const auto flush = [&] {
      if (!count) return;
      with_constant<kFoldTerms>(count, [&](auto terms) { add<terms.value>(open, c, n, started); });
      started = true;
      count = 0;
    };
    for (int64_t k = 0; k < p_.num_deltas; k++) {
      if (coeffs_[k] == C(0)) continue;
      open[count] = delta(k) + begin;
      c[count++] = coeffs_[k];
      if (count == kFoldTerms) flush();
    }
    flush();
    if (!started) each(n, [&](int64_t j, int64_t) { store(sum_ + j, Vec<C>{}); });
  }

  template <int kTerms>
  void add(const S* const* open, const C* c, int64_t n, bool accumulate) {
    each(n, [&](int64_t j, int64_t m) {
      Vec<C> v = accumulate ? load(sum_ + j) : Vec<C>{};
#pragma GCC unroll 8
      for (int t = 0; t < kTerms; t++) v += c[t] * get(open[t] + j, m);
      store(sum_ + j, v);
    });
  }

  void sum_parts(int64_t begin, int64_t n) {
    const uint8_t* part = t_.part + begin;
    each(n, [&](int64_t j, int64_t) { store(sum_ + j, Vec<C>{}); });
    for (int64_t k = 0; k < p_.num_deltas; k++) {
      each(n, [&](int64_t j, int64_t m) { store(one_ + j, get(delta(k) + begin + j, m)); });
      for (int64_t i = 0; i < n; i++) {
        const C c = coeffs_[part[i] * p_.num_deltas + k];
        sum_[i] += c == C(0) ? C(0) : c * one_[i];
      }
    }
  }

  /// partials[k ...] += <sum_, delta_k> of one block, kTerms deltas at a time.
  template <int kTerms>
  void dot(int64_t k, int64_t begin, int64_t n) {
    Vec<C> total[kTerms];
#pragma GCC unroll 8
    for (int t = 0; t < kTerms; t++) total[t] = Vec<C>{};
    const S* deltas[kTerms];
#pragma GCC unroll 8
    for (int t = 0; t < kTerms; t++) deltas[t] = delta(k + t) + begin;
    each(n, [&](int64_t j, int64_t m) {
      const Vec<C> g = load(sum_ + j);
#pragma GCC unroll 8
      for (int t = 0; t < kTerms; t++) total[t] += g * get(deltas[t] + j, m);
    });
    for (int t = 0; t < kTerms; t++) partials_[k + t] += sum_lanes(total[t]);
  }

  void dot_parts(int64_t begin, int64_t n) {
    const uint8_t* part = t_.part + begin;
    for (int64_t k = 0; k < p_.num_deltas; k++) {
      each(n, [&](int64_t j, int64_t m) { store(one_ + j, get(delta(k) + begin + j, m)); });
      for (int64_t i = 0; i < n; i++) partials_[part[i] * p_.num_deltas + k] += double(sum_[i]) * one_[i];
    }
  }

  const Fold& p_;
  const FoldItem item_;
  const FoldTensor& t_;
  const C* coeffs_;
  double* partials_;
  alignas(64) C sum_[kFoldBlock];
  alignas(64) C one_[kFoldBlock];
};

template <class S>
void run_items(const Fold& problem, const Share& share, bool gradient) {
  for (int64_t i = claim(share); i < num_items(problem); i = claim(share)) {
    FoldItemRun<S> item(problem, i);
    if (gradient) item.gradient();
    else item.fold();
  }
}

void run_fold(const Fold& problem, const Share& share, bool gradient) {
  switch (problem.dtype) {
    case DType::kFloat32: return run_items<float>(problem, share, gradient);
    case DType::kBFloat16: return run_items<BFloat16>(problem, share, gradient);
    case DType::kFloat16: return run_items<Float16>(problem, share, gradient);
    case DType::kFloat64: return run_items<double>(problem, share, gradient);
  }
}

void fold(const Fold& problem, const Share& share) { run_fold(problem, share, false); }
void fold_gradient(const Fold& problem, const Share& share) { run_fold(problem, share, true); }

constexpr FoldKernels make_fold_table(const char* name) { return {name, fold, fold_gradient}; }

}  // namespace
}  // namespace taps_fast::cpu
