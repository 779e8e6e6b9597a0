#include "vendor_gradients.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "cpu/kernels.h"
#include "fold.h"
#include "linear_call.h"

namespace taps_fast {
namespace {

using Tensors = std::vector<Tensor>;
using cpu::DType;

// Where both gradients are as fast as ours, or faster, from 384 x 384 to 4096 x 4096 weights on two Cascade Lake cores;
// with fewer rows they are slower (`python -m benchmarks.cpu_linear rates` compares the products).
constexpr int64_t kRows = 256;

/// out = a b.
void multiply(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // is out, and freed
}

/// The weight, in `scratch` unless it is the base.
Tensor summed(const OneWeight& w, Tensor& scratch) {
  const double scale = w.base_coeffs ? number(*w.base_coeffs, 0) : 1.0;
  std::vector<const void*> terms;
  std::vector<double> coeffs;
  for (size_t k = 0; k < w.deltas.size(); k++) {
    terms.push_back(w.deltas[k].const_data_ptr());
    coeffs.push_back(number(w.coeffs, k));
  }
  if (scale == 1 && std::all_of(coeffs.begin(), coeffs.end(), [](double c) { return c == 0; })) return w.base;
  fold_one(DType::kFloat32, w.base.numel(), w.base.const_data_ptr(), scale, terms, coeffs, scratch.mutable_data_ptr());
  return scratch;
}

}  // namespace

bool vendor_takes(const OneWeight& w, const Tensor& dy, const Tensor& x) {
  const auto is_matrix = [](const Tensor& t) { return t.dim() == 2 && t.scalar_type() == ScalarType::Float; };
  if (!is_matrix(dy) || !is_matrix(x) || w.base.dim() != 2 || w.base.numel() == 0) return false;
  const auto whole = [](const Tensor& t) { return t.is_contiguous(); };
  return whole(w.base) && whole(w.coeffs) && std::all_of(w.deltas.begin(), w.deltas.end(), whole);
}

bool vendor_pays(int64_t rows) {
  static const bool is_faster = cpu::vendor_multiplies_faster();
  return is_faster && rows >= kRows;
}

void vendor_gradients(const OneWeight& weight, const Tensor& dy, const Tensor& x, const std::vector<int64_t>& pairs,
                      const std::vector<int64_t>& ddeltas_for, Tensor* dx, Tensor* dcoeffs, Tensors& ddeltas,
                      Tensor* dbase) {
  const Layout in(x), w(weight.base);
  const int64_t out_features = w.sizes[0], in_features = w.sizes[1], size = out_features * in_features;
  const int64_t num_deltas = weight.deltas.size();
  struct Result {
    Tensor gradient;
    double by;
  };
  std::vector<Result> results;
  for (const int64_t k : ddeltas_for) {
    check(0 <= k && k < num_deltas, "linear_grad: ddeltas_for must be in [0, ", num_deltas, "), got ", k);
    results.push_back({new_tensor(in.dtype, {out_features, in_features}), number(weight.coeffs, k)});
    ddeltas.push_back(results.back().gradient);
  }
  if (dbase) {
    results.push_back(
        {new_tensor(in.dtype, {out_features, in_features}), weight.base_coeffs ? number(*weight.base_coeffs, 0) : 1});
    *dbase = results.back().gradient;
  }
  Tensor& p = results[0].gradient;
  if (dx) {
    *dx = new_tensor(in.dtype, {in.sizes[0], in_features});
    multiply(*dx, dy, summed(weight, p));
  }
  multiply(p, torch::stable::transpose(dy, 0, 1), x);
  if (dcoeffs) {
    std::vector<int64_t> asked = pairs;
    for (int64_t k = 0; pairs.empty() && k < num_deltas; k++) asked.push_back(k);
    std::vector<const void*> of;
    for (const int64_t k : asked) {
      check(0 <= k && k < num_deltas, "linear_grad: pairs must be in [0, ", num_deltas, "), got ", k);
      of.push_back(weight.deltas[k].const_data_ptr());
    }
    *dcoeffs = new_zeros(weight.coeffs.scalar_type(), weight.coeffs.sizes());
    const std::vector<double> dots = dots_one(DType::kFloat32, size, p.const_data_ptr(), of);
    for (size_t i = 0; i < asked.size(); i++)
      static_cast<float*>(dcoeffs->mutable_data_ptr())[asked[i]] = static_cast<float>(dots[i]);
  }
  for (size_t i = results.size(); i-- > 0;) {  // P last
    if (i == 0 && results[i].by == 1) continue;
    void* out = results[i].gradient.mutable_data_ptr();
    fold_one(DType::kFloat32, size, p.const_data_ptr(), results[i].by, {}, {}, out);
  }
}

}  // namespace taps_fast
