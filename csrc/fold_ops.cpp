// taps_fast::fold and fold_grad on CPU: checks the lists of tensors, cuts them into items, runs, reduces in order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/fold_problem.h"
#include "cpu/kernels.h"
#include "fold.h"

namespace taps_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using namespace cpu;

constexpr int64_t kItem = 16384;  // elements: eight deltas of an item fit a core's L2

/// Cuts tensor `tensor` of `size` elements into items.
void add_items(std::vector<FoldItem>& items, int64_t tensor, int64_t size, int64_t piece) {
  for (int64_t begin = 0; begin < size; begin += piece) items.push_back({tensor, begin, std::min(piece, size - begin)});
}

const FoldKernels& fold_kernels() {
  static const FoldKernels& chosen = []() -> const FoldKernels& {
#if defined(__x86_64__)
    if (kernels().vector_bytes == 64) return fold_avx512();
    if (kernels().vector_bytes == 32) return fold_avx2();
#endif
    return fold_generic();
  }();
  return chosen;
}

/// The problem of one call, and all that its pointers point to.
class Plan {
 public:
  Plan(const char* op, const Tensors& in, const Tensors& deltas, const Tensor& coeffs, const Tensors& parts,
       const Tensors& masks, Tensors& out)
      : op_(op) {
    const int64_t tensors = in.size();
    check(coeffs.dim() == 3 && coeffs.size(0) == tensors, op, ": coeffs must have shape [", tensors, ", P, K]");
    const int64_t num_parts = coeffs.size(1), num_deltas = coeffs.size(2), table = num_parts * num_deltas;
    check(int64_t(deltas.size()) == tensors * num_deltas, op, ": deltas must be ", tensors * num_deltas,
          " tensors, got ", deltas.size());
    check(parts.empty() ? num_parts == 1 : int64_t(parts.size()) == tensors, op, ": parts must be ", tensors,
          " tensors, or none with one part, got ", parts.size());
    check(masks.empty() || int64_t(masks.size()) == tensors, op, ": masks must be ", tensors, " tensors or none, got ",
          masks.size());
    const ScalarType type = tensors ? in[0].scalar_type() : ScalarType::Float;
    const ScalarType wide = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check(coeffs.scalar_type() == wide && coeffs.is_contiguous(), op, ": coeffs must be contiguous, of scalar type ",
          int(wide), ", got ", int(coeffs.scalar_type()));
    problem_ = {dtype_of(op, type, "tensors"), MaskType::kNone, num_deltas, num_parts, nullptr, nullptr, 0,
                coeffs.const_data_ptr(),       nullptr};
    if (!masks.empty())
      problem_.mask = masks[0].scalar_type() == ScalarType::Bool ? MaskType::kByte : MaskType::kElement;
    const ScalarType mask_type = problem_.mask == MaskType::kByte ? ScalarType::Bool : type;
    const int64_t piece = std::max(kItem, 4 * table);
    for (const Tensor& delta : deltas) pointers_.push_back(delta.const_data_ptr());
    for (int64_t l = 0; l < tensors; l++) {
      const int64_t size = in[l].numel();
      run_of("weights", in[l], size, type);
      for (int64_t k = 0; k < num_deltas; k++) run_of("deltas", deltas[l * num_deltas + k], size, type);
      FoldTensor t{pointers_.data() + l * num_deltas, in[l].const_data_ptr(), nullptr, nullptr, nullptr};
      if (!out.empty()) t.out = out[l].mutable_data_ptr();
      if (!masks.empty()) t.mask = run_of("masks", masks[l], size, mask_type).const_data_ptr();
      if (!parts.empty())
        t.part = static_cast<const uint8_t*>(run_of("parts", parts[l], size, ScalarType::Byte).const_data_ptr());
      tensors_.push_back(t);
      add_items(items_, l, size, piece);
    }
    problem_.tensors = tensors_.data();
    problem_.items = items_.data();
    problem_.num_items = items_.size();
  }

  void run(void (*kernel)(const Fold&, const Share&)) { run_items(problem_, kernel); }

  void keep_partials() {
    partials_.assign(problem_.num_items * problem_.num_parts * problem_.num_deltas, 0);
    problem_.partials = partials_.data();
  }

  /// dcoeffs[l] = the sum of its items' partials, in their order.
  template <class C>
  void reduce(C* dcoeffs) const {
    const int64_t table = problem_.num_parts * problem_.num_deltas;
    std::vector<double> sums(tensors_.size() * table, 0);
    for (int64_t i = 0; i < problem_.num_items; i++)
      for (int64_t j = 0; j < table; j++) sums[items_[i].tensor * table + j] += partials_[i * table + j];
    std::copy(sums.begin(), sums.end(), dcoeffs);
  }

 private:
  const Tensor& run_of(const char* name, const Tensor& t, int64_t size, ScalarType type) {
    check(t.numel() == size && t.scalar_type() == type && t.is_contiguous(), op_, ": ", name,
          " must be contiguous, of ", size, " elements and scalar type ", int(type), ", got ", t.numel(), " of ",
          int(t.scalar_type()));
    return t;
  }

  const char* op_;
  Fold problem_;
  std::vector<const void*> pointers_;
  std::vector<FoldTensor> tensors_;
  std::vector<FoldItem> items_;
  std::vector<double> partials_;
};

Tensors like(const Tensors& tensors) {
  Tensors made;
  for (const Tensor& t : tensors) made.push_back(new_tensor(t.scalar_type(), t.sizes()));
  return made;
}

Tensors fold(const Tensors& bases, const Tensors& deltas, const Tensor& coeffs, const Tensors& parts,
             const Tensors& masks) {
  Tensors out = like(bases);
  Plan("fold", bases, deltas, coeffs, parts, masks, out).run(fold_kernels().fold);
  return out;
}

std::tuple<Tensor, Tensors> fold_grad(const Tensors& dweights, const Tensors& deltas, const Tensor& coeffs,
                                      const Tensors& parts, const Tensors& masks, bool need_dcoeffs, bool need_dmasks) {
  Tensors dmasks = need_dmasks ? like(dweights) : Tensors{};
  Plan plan("fold_grad", dweights, deltas, coeffs, parts, masks, dmasks);
  Tensor dcoeffs =
      need_dcoeffs ? new_tensor(coeffs.scalar_type(), coeffs.sizes()) : new_tensor(coeffs.scalar_type(), {0});
  if (need_dcoeffs) plan.keep_partials();
  plan.run(fold_kernels().fold_gradient);
  if (need_dcoeffs) {
    if (coeffs.scalar_type() == ScalarType::Double) plan.reduce(static_cast<double*>(dcoeffs.mutable_data_ptr()));
    else plan.reduce(static_cast<float*>(dcoeffs.mutable_data_ptr()));
  }
  return {dcoeffs, dmasks};
}

}  // namespace

void fold_one(cpu::DType dtype, int64_t size, const void* in, double scale, std::vector<const void*> deltas,
              std::vector<double> coeffs, void* out) {
  if (in && scale != 1) {
    deltas.push_back(in);
    coeffs.push_back(scale);
    in = nullptr;
  }
  const std::vector<float> narrow(coeffs.begin(), coeffs.end());
  const FoldTensor tensor{deltas.data(), in, out, nullptr, nullptr};
  std::vector<FoldItem> items;
  add_items(items, 0, size, kItem);
  const void* numbers = dtype == DType::kFloat64 ? static_cast<const void*>(coeffs.data()) : narrow.data();
  const Fold problem{dtype,   MaskType::kNone, int64_t(deltas.size()), 1, &tensor, items.data(), int64_t(items.size()),
                     numbers, nullptr};
  run_items(problem, fold_kernels().fold);
}

std::vector<double> dots_one(cpu::DType dtype, int64_t size, const void* in, const std::vector<const void*>& deltas) {
  const FoldTensor tensor{deltas.data(), in, nullptr, nullptr, nullptr};
  std::vector<FoldItem> items;
  add_items(items, 0, size, kItem);
  const int64_t count = deltas.size();
  std::vector<double> partials(items.size() * count, 0), sums(count, 0);
  const Fold problem{dtype,   MaskType::kNone, count, 1, &tensor, items.data(), int64_t(items.size()),
                     nullptr, partials.data()};
  run_items(problem, fold_kernels().fold_gradient);
  for (size_t i = 0; i < partials.size(); i++) sums[i % count] += partials[i];
  return sums;
}

}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("fold", TORCH_BOX(&taps_fast::fold));
  m.impl("fold_grad", TORCH_BOX(&taps_fast::fold_grad));
}
