// The CPU operators of taps_fast/_ops.py on top of the kernels: reads tensors, checks shapes, allocates results, runs.
// libtorch's stable ABI only, so one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cpu/workspace.h"

namespace taps_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace cpu;

using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << "[";
  for (int64_t i = 0; i < t.dim(); i++) s << (i ? ", " : "") << t.size(i);
  s << "]";
  return s.str();
}

DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: break;
  }
  check(false, op, ": x must be float32, bfloat16, float16 or float64, got scalar type ", int(x.scalar_type()));
  return {};
}

/// Tensors whose rows the kernels can walk; a copy is made, and kept alive here, only of others.
class Inputs {
 public:
  Inputs(const char* op, const Tensor& like) : op_(op), like_(like) {}

  Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
    check(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, op_, ": ", name, " must have shape [", rows, ", ",
          cols, "], got ", shape_of(t));
    check(t.scalar_type() == like_.scalar_type(), op_, ": ", name, " must have scalar type ", int(like_.scalar_type()),
          ", got ", int(t.scalar_type()));
    if (t.stride(1) == 1 || cols <= 1) return {t.const_data_ptr(), t.stride(0)};
    kept_.push_back(torch::stable::contiguous(t));
    return {kept_.back().const_data_ptr(), cols};
  }

  const void* vector(const char* name, const Tensor& t, int64_t size, ScalarType dtype) {
    check(t.numel() == size, op_, ": ", name, " must have ", size, " elements, got ", shape_of(t));
    check(t.scalar_type() == dtype, op_, ": ", name, " must have scalar type ", int(dtype), ", got ",
          int(t.scalar_type()));
    if (t.is_contiguous()) return t.const_data_ptr();
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().const_data_ptr();
  }

 private:
  const char* op_;
  const Tensor& like_;
  std::vector<Tensor> kept_;
};

Groups read_groups(const char* op, Inputs& inputs, int64_t rows, const Tensor& coeffs, const OptionalTensor& ids,
                   const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner) {
  check(ids.has_value() == order.has_value() && ids.has_value() == offsets.has_value(), op,
        ": ids, order and offsets must come together");
  Groups groups;
  if (!ids) return groups;
  check(coeffs.dim() == 2, op, ": coeffs must have shape [T, K] with tasks, got ", shape_of(coeffs));
  groups.tasks = coeffs.size(0);
  groups.batch = ids->numel();
  groups.inner = inner;
  groups.order = static_cast<const int64_t*>(inputs.vector("order", *order, groups.batch, ScalarType::Long));
  groups.offsets = static_cast<const int64_t*>(inputs.vector("offsets", *offsets, groups.tasks + 2, ScalarType::Long));
  check(inner >= 1 && (groups.batch ? rows % (inner * groups.batch) == 0 : rows == 0), op,
        ": rows must be a multiple of inner times the batch, got ", rows, " (inner ", inner, ", batch ", groups.batch,
        ")");
  check(groups.offsets[0] == 0 && groups.offsets[groups.tasks + 1] == groups.batch, op,
        ": offsets must span the batch of ", groups.batch, ", got ", groups.offsets[0], " to ",
        groups.offsets[groups.tasks + 1]);
  return groups;
}

Weight read_weight(const char* op, Inputs& inputs, const Tensor& base, const std::vector<Tensor>& deltas,
                   const Tensor& coeffs, const OptionalTensor& base_coeffs, int64_t tasks) {
  check(base.dim() == 2, op, ": base must have shape [O, I], got ", shape_of(base));
  Weight weight;
  weight.base = inputs.matrix("base", base, base.size(0), base.size(1));
  for (const Tensor& delta : deltas)
    weight.deltas.push_back(inputs.matrix("deltas", delta, base.size(0), base.size(1)));
  weight.wide = base.scalar_type() == ScalarType::Double;
  const ScalarType dtype = weight.wide ? ScalarType::Double : ScalarType::Float;
  weight.coeffs = inputs.vector("coeffs", coeffs, tasks * deltas.size(), dtype);
  weight.base_coeffs = base_coeffs ? inputs.vector("base_coeffs", *base_coeffs, tasks, dtype) : nullptr;
  return weight;
}

Algorithm read_algorithm(const char* op, const std::string& name) {
  if (name == "blend") return Algorithm::kBlend;
  check(name == "split", op, ": algorithm must be blend or split on CPU, got '", name, "'");
  return Algorithm::kSplit;
}

/// Items go to whichever thread is free; each item's result is its own, so the order changes nothing.
template <class Problem>
void run(const Problem& problem, void (*kernel)(const Problem&, int64_t*, void*), int64_t workspace_bytes) {
  int64_t next_item = 0;
  const auto worker = [&](int64_t, int64_t) { kernel(problem, &next_item, workspace(workspace_bytes)); };
  const int64_t threads = std::min<int64_t>(num_items(problem), torch::stable::get_num_threads());
  if (threads <= 1) return worker(0, 1);
  torch::stable::parallel_for(0, threads, 1, worker);
}

Tensor row_product(const char* op, bool transposed, const Tensor& x, const Tensor& base,
                   const std::vector<Tensor>& deltas, const Tensor& coeffs, const OptionalTensor& base_coeffs,
                   const OptionalTensor& bias, const OptionalTensor& ids, const OptionalTensor& order,
                   const OptionalTensor& offsets, int64_t inner, const std::string& algorithm) {
  Inputs inputs(op, x);
  const Algorithm how = read_algorithm(op, algorithm);
  check(x.dim() == 2 && base.dim() == 2, op, ": x and base must have 2 dimensions, got ", shape_of(x), " and ",
        shape_of(base));
  RowPlan plan;
  RowProduct& p = plan.problem;
  p.dtype = dtype_of(op, x);
  p.transposed = transposed;
  p.rows = x.size(0);
  p.depth = base.size(transposed ? 1 : 0);
  p.cols = base.size(transposed ? 0 : 1);
  p.in = inputs.matrix(transposed ? "x" : "dy", x, p.rows, p.depth);
  const Groups groups = read_groups(op, inputs, p.rows, coeffs, ids, order, offsets, inner);
  const int64_t tasks = ids ? groups.tasks : 1;
  const Weight weight = read_weight(op, inputs, base, deltas, coeffs, base_coeffs, tasks);
  const bool bias_by_task = bias && bias->dim() == 2;
  if (bias_by_task) {
    check(ids.has_value(), op, ": bias must have shape [O] without tasks, got ", shape_of(*bias));
    p.bias = inputs.matrix("bias", *bias, groups.tasks + 1, p.cols);
  } else if (bias) {
    p.bias = {inputs.vector("bias", *bias, p.cols, x.scalar_type()), 0};
  }
  Tensor out = torch::stable::new_empty(x, {p.rows, p.cols});
  p.out = {out.mutable_data_ptr(), p.cols};
  if (p.rows == 0 || p.cols == 0) return out;
  plan.finish(weight, groups, how, bias_by_task, torch::stable::get_num_threads(), kernels());
  run(p, kernels().row_product, plan.workspace_bytes(kernels()));
  return out;
}

Tensor linear_fwd(const Tensor& x, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
                  const OptionalTensor& base_coeffs, const OptionalTensor& bias, const OptionalTensor& ids,
                  const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner,
                  const std::string& algorithm) {
  return row_product("linear_fwd", true, x, base, deltas, coeffs, base_coeffs, bias, ids, order, offsets, inner,
                     algorithm);
}

Tensor linear_dx(const Tensor& dy, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
                 const OptionalTensor& base_coeffs, const OptionalTensor& ids, const OptionalTensor& order,
                 const OptionalTensor& offsets, int64_t inner, const std::string& algorithm) {
  return row_product("linear_dx", false, dy, base, deltas, coeffs, base_coeffs, std::nullopt, ids, order, offsets,
                     inner, algorithm);
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> linear_dw(const Tensor& dy, const Tensor& x, const Tensor& base,
                                                          const std::vector<Tensor>& deltas, const Tensor& coeffs,
                                                          const OptionalTensor& base_coeffs, const OptionalTensor& ids,
                                                          const OptionalTensor& order, const OptionalTensor& offsets,
                                                          int64_t inner, const std::vector<int64_t>& pairs,
                                                          const std::vector<int64_t>& ddeltas_for, bool need_dcoeffs,
                                                          bool need_dbase) {
  const char* op = "linear_dw";
  Inputs inputs(op, x);
  check(x.dim() == 2 && base.dim() == 2, op, ": x and base must have 2 dimensions, got ", shape_of(x), " and ",
        shape_of(base));
  const int64_t rows = x.size(0), out_features = base.size(0), in_features = base.size(1);
  GradientPlan plan;
  WeightGradient& p = plan.problem;
  p.dtype = dtype_of(op, x);
  p.rows = out_features;
  p.cols = in_features;
  p.dy = inputs.matrix("dy", dy, rows, out_features);
  p.x = inputs.matrix("x", x, rows, in_features);
  const Groups groups = read_groups(op, inputs, rows, coeffs, ids, order, offsets, inner);
  const int64_t tasks = ids ? groups.tasks : 1, num_deltas = deltas.size();
  const Weight weight = read_weight(op, inputs, base, deltas, coeffs, base_coeffs, tasks);

  Wanted wanted{need_dcoeffs, pairs, ddeltas_for, {}, {nullptr, in_features}};
  for (int64_t pair : pairs)
    check(0 <= pair && pair < tasks * num_deltas, op, ": pairs must be in [0, ", tasks * num_deltas, "), got ", pair);
  std::vector<Tensor> ddeltas;
  for (int64_t k : ddeltas_for) {
    check(0 <= k && k < num_deltas, op, ": ddeltas_for must be in [0, ", num_deltas, "), got ", k);
    ddeltas.push_back(torch::stable::new_empty(x, {out_features, in_features}));
    wanted.ddeltas.push_back({ddeltas.back().mutable_data_ptr(), in_features});
  }
  Tensor dbase =
      need_dbase ? torch::stable::new_empty(x, {out_features, in_features}) : torch::stable::new_empty(x, {0});
  if (need_dbase) wanted.dbase.data = dbase.mutable_data_ptr();
  Tensor dcoeffs =
      need_dcoeffs ? torch::stable::new_zeros(coeffs, coeffs.sizes()) : torch::stable::new_empty(coeffs, {0});
  if (out_features > 0 && in_features > 0) {
    plan.finish(weight, groups, wanted, rows, torch::stable::get_num_threads(), kernels());
    run(p, kernels().weight_gradient, plan.workspace_bytes(kernels()));
    if (need_dcoeffs) plan.reduce(dcoeffs.mutable_data_ptr(), weight.wide);
  }
  return {dcoeffs, ddeltas, dbase};
}

std::string cpu_isa() { return kernels().name; }

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_FRAGMENT(taps_fast, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&taps_fast::linear_fwd));
  m.impl("linear_dx", TORCH_BOX(&taps_fast::linear_dx));
  m.impl("linear_dw", TORCH_BOX(&taps_fast::linear_dw));
}

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&taps_fast::cpu_isa));
}
