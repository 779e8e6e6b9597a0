// The CPU operators of taps_fast/_ops.py on top of the kernels: reads tensors, checks shapes, allocates results, runs.
// libtorch's stable ABI only, so one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "coded_ops.h"
#include "common/text.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "linear_call.h"
#include "vendor_gradients.h"

namespace taps_fast {
namespace {

using namespace cpu;

constexpr int64_t kLine = 64;  // bytes of a cache line

Algorithm read_algorithm(const char* op, const std::string& name, bool coded = false) {
  if (name == "blend") return Algorithm::kBlend;
  if (name == "auto" && coded) return Algorithm::kAuto;
  check(name == "split", op, ": algorithm must be ", coded ? "auto, " : "", "blend or split on CPU, got '", name, "'");
  return Algorithm::kSplit;
}

/// Runs a plan of which problem's matrices and sizes are filled. `onto`: what lies in `out` is added to.
void run_rows(RowPlan& plan, const Weight& weight, const Groups& groups, Algorithm how, bool bias_by_task, bool onto) {
  RowProduct& p = plan.problem;
  const double weights = double(p.depth) * p.cols;
  const int64_t threads = threads_for(weights * (1 + weight.deltas.size()), weights * p.rows);
  plan.finish(weight, groups, how, bias_by_task, threads, kernels());
  std::vector<int64_t> places;
  if (onto) {  // a bias that each row has its own of
    for (int64_t r = 0; r < p.rows && !p.row_index; r++) places.push_back(r);
    p.bias = {p.out.data, p.out.stride};
    p.bias_index = p.row_index ? p.row_index : places.data();
  }
  // What all threads share lies behind this thread's own workspace, which is then large enough, and stays where it is.
  const int64_t own = round_up(plan.workspace_bytes(kernels()), kLine), shared = plan.partials_bytes();
  if (shared) p.partials = static_cast<char*>(workspace(own + shared)) + own;
  run_queue(p, kernels().row_product, own, threads);
}

Tensor row_product(const char* op, bool transposed, const Tensor& x, const Tensor& base,
                   const std::vector<Tensor>& deltas, const Tensor& coeffs, const OptionalTensor& base_coeffs,
                   const OptionalTensor& bias, const OptionalTensor& ids, const OptionalTensor& order,
                   const OptionalTensor& offsets, int64_t inner, Algorithm how, const Codes* codes = nullptr) {
  const Layout in(x), weights(base);
  Inputs inputs(op, in.dtype);
  RowPlan plan;
  RowProduct& p = plan.problem;
  p.dtype = dtype_of(op, in.dtype);
  check(in.dim == 2 && weights.dim == 2, op, ": x and base must have 2 dimensions, got ", in, " and ", weights);
  const bool turned = !codes && are_turned(weights, deltas);
  p.transposed = transposed != turned;
  p.rows = in.sizes[0];
  p.depth = weights.sizes[transposed ? 1 : 0];
  p.cols = weights.sizes[transposed ? 0 : 1];
  p.in = inputs.matrix(transposed ? "x" : "dy", x, in, p.rows, p.depth);
  const Groups groups = read_groups(op, inputs, p.rows, coeffs, ids, order, offsets, inner);
  const int64_t tasks = ids ? groups.tasks : 1;
  const Weight weight = read_weight(inputs, base, weights, deltas, coeffs, base_coeffs, tasks, codes, turned,
                                    [](int64_t) { return true; });
  const bool bias_by_task = bias && bias->dim() == 2;
  if (bias_by_task) {
    check(ids.has_value(), op, ": bias must have shape [O] without tasks, got ", Layout(*bias));
    p.bias = inputs.matrix("bias", *bias, groups.tasks + 1, p.cols);
  } else if (bias) {
    p.bias = {inputs.vector("bias", *bias, p.cols, in.dtype), 0};
  }
  Tensor out = new_tensor(in.dtype, {p.rows, p.cols});
  p.out = {out.mutable_data_ptr(), p.cols};
  if (p.rows == 0 || p.cols == 0) return out;
  run_rows(plan, weight, groups, how, bias_by_task, false);
  if (p.depth > 0 && !plan.apart().empty()) {
    CodedProduct apart{p.dtype, transposed, false, p.cols, p.depth, p.in, p.out, p.row_index, p.terms, nullptr, 0, 0};
    run_coded(apart, plan.apart());
  }
  return out;
}

Tensor linear_fwd(const Tensor& x, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
                  const OptionalTensor& base_coeffs, const OptionalTensor& bias, const OptionalTensor& ids,
                  const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner, StringHandle algorithm) {
  return row_product("linear_fwd", true, x, base, deltas, coeffs, base_coeffs, bias, ids, order, offsets, inner,
                     read_algorithm("linear_fwd", take(algorithm)));
}

Tensor linear_coded(const Tensor& x, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
                    const OptionalTensor& base_coeffs, const OptionalTensor& bias, const OptionalTensor& ids,
                    const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner, StringHandle algorithm,
                    const std::vector<Tensor>& scales, const std::vector<Tensor>& tiles,
                    const std::vector<int64_t>& tile_of) {
  const Algorithm how = read_algorithm("linear_coded", take(algorithm), true);
  check(scales.size() == deltas.size() && tile_of.size() == deltas.size(),
        "linear_coded: scales and tile_of must have an entry for each of ", deltas.size(), " deltas, got ",
        scales.size(), " and ", tile_of.size());
  const Codes codes{scales, tiles, tile_of};
  return row_product("linear_coded", true, x, base, deltas, coeffs, base_coeffs, bias, ids, order, offsets, inner, how,
                     &codes);
}

/// y += Σ_k coeffs[t, k] · scale[k] · (x aₖᵀ) bₖ, in turns of one delta a task.
void linear_low_rank_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& scale,
                      const Tensor& coeffs, const OptionalTensor& ids, const OptionalTensor& order,
                      const OptionalTensor& offsets, int64_t inner) {
  const char* op = "linear_low_rank_";
  const Layout in(x), out(y), down(a), up(b);
  check(in.dim == 2 && down.dim == 3 && up.dim == 3 && in.sizes[1] == down.sizes[2] && up.sizes[0] == down.sizes[0] &&
            up.sizes[1] == down.sizes[1] && down.dtype == in.dtype && up.dtype == in.dtype,
        op, ": x must be [M, I], a [K, r, I] and b [K, r, O], of one type, got ", in, ", ", down, " and ", up);
  const int64_t rows = in.sizes[0], count = down.sizes[0], rank = down.sizes[1], depth = in.sizes[1],
                cols = up.sizes[2];
  check(out.dim == 2 && out.sizes[0] == rows && out.sizes[1] == cols && out.dtype == in.dtype && y.is_contiguous() &&
            a.is_contiguous() && b.is_contiguous(),
        op, ": y must be [", rows, ", ", cols, "] like x, and y, a and b contiguous, got y ", out);
  Inputs inputs(op, in.dtype);
  const Groups groups = read_groups(op, inputs, rows, coeffs, ids, order, offsets, inner);
  const int64_t tasks = ids ? groups.tasks : 1;
  const bool wide = in.dtype == ScalarType::Double;
  const ScalarType exact = wide ? ScalarType::Double : ScalarType::Float;
  Weight factors{{nullptr, 0}, {}, nullptr, nullptr, true, false}, products = factors;
  const int64_t size = element_size(dtype_of(op, in.dtype));
  for (int64_t k = 0; k < count; k++) {
    factors.deltas.push_back({{static_cast<const char*>(a.const_data_ptr()) + k * rank * depth * size, depth}, 1.0});
    products.deltas.push_back({{static_cast<const char*>(b.const_data_ptr()) + k * cols * rank * size, cols}, 1.0});
  }
  Weight given = factors, scales = factors;
  given.coeffs = inputs.vector("coeffs", coeffs, tasks * count, exact);
  scales.coeffs = inputs.vector("scale", scale, count, exact);
  given.wide = scales.wide = wide;
  if (rows == 0 || cols == 0 || rank == 0 || depth == 0) return;
  const Matrix of_x = inputs.matrix("x", x, in, rows, depth);
  Tensor thin = new_tensor(in.dtype, {rows, rank});
  for (int64_t turn = 0, more = 1; more; turn++) {
    std::vector<double> chosen(tasks * count), by(tasks * count);
    more = 0;
    for (int64_t t = 0; t < tasks; t++) {
      if (groups.offsets && groups.offsets[t + 1] == groups.offsets[t + 2]) continue;
      for (int64_t k = 0, used = 0; k < count; k++) {
        const double c = given.coeff(t, k);
        if (c == 0 || used++ != turn) continue;
        chosen[t * count + k] = more = 1;
        by[t * count + k] = c * scales.coeff(0, k);
      }
    }
    if (!more) return;
    factors.coeffs = chosen.data();
    products.coeffs = by.data();
    const auto multiply = [&](const Weight& weight, const Matrix& from, int64_t length, Tensor& to, int64_t width,
                              bool up) {
      RowPlan plan;
      RowProduct& p = plan.problem;
      p.dtype = dtype_of(op, in.dtype);
      p.transposed = !up;
      p.rows = rows, p.cols = width, p.depth = length;
      p.in = from;
      p.out = {to.mutable_data_ptr(), width};
      run_rows(plan, weight, groups, Algorithm::kBlend, false, up);
    };
    multiply(factors, of_x, depth, thin, rank, false);
    multiply(products, {thin.const_data_ptr(), rank}, rank, y, cols, true);
  }
}

Tensor linear_dx(const Tensor& dy, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
                 const OptionalTensor& base_coeffs, const OptionalTensor& ids, const OptionalTensor& order,
                 const OptionalTensor& offsets, int64_t inner, StringHandle algorithm) {
  return row_product("linear_dx", false, dy, base, deltas, coeffs, base_coeffs, std::nullopt, ids, order, offsets,
                     inner, read_algorithm("linear_dx", take(algorithm)));
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> linear_dw(
    const Tensor& dy, const Tensor& x, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
    const OptionalTensor& base_coeffs, const OptionalTensor& ids, const OptionalTensor& order,
    const OptionalTensor& offsets, int64_t inner, const std::vector<int64_t>& pairs,
    const std::vector<int64_t>& ddeltas_for, bool need_dcoeffs, bool need_dbase, bool need_dbias) {
  const char* op = "linear_dw";
  const Layout in(x), weights(base);
  Inputs inputs(op, in.dtype);
  GradientPlan plan;
  WeightGradient& p = plan.problem;
  p.dtype = dtype_of(op, in.dtype);
  check(in.dim == 2 && weights.dim == 2, op, ": x and base must have 2 dimensions, got ", in, " and ", weights);
  const int64_t rows = in.sizes[0], out_features = weights.sizes[0], in_features = weights.sizes[1];
  // The gradients of weights that lie as [I, O] do so too, and are xᵀ dy.
  const bool turned = are_turned(weights, deltas);
  p.rows = turned ? in_features : out_features;
  p.cols = turned ? out_features : in_features;
  const Matrix of_dy = inputs.matrix("dy", dy, rows, out_features), of_x = inputs.matrix("x", x, in, rows, in_features);
  p.dy = turned ? of_x : of_dy;
  p.x = turned ? of_dy : of_x;
  const Groups groups = read_groups(op, inputs, rows, coeffs, ids, order, offsets, inner);
  const int64_t tasks = ids ? groups.tasks : 1, num_deltas = deltas.size();
  for (int64_t pair : pairs)
    check(0 <= pair && pair < tasks * num_deltas, op, ": pairs must be in [0, ", tasks * num_deltas, "), got ", pair);
  std::vector<bool> dotted(num_deltas, need_dcoeffs && pairs.empty());
  for (int64_t pair : pairs) dotted[pair % num_deltas] = need_dcoeffs;
  const Weight weight = read_weight(inputs, base, weights, deltas, coeffs, base_coeffs, tasks, nullptr, turned,
                                    [&](int64_t k) { return k >= 0 && dotted[k]; });

  Wanted wanted{need_dcoeffs, pairs, ddeltas_for, {}, {nullptr, p.cols}, nullptr};
  std::vector<Tensor> ddeltas;
  for (int64_t k : ddeltas_for) {
    check(0 <= k && k < num_deltas, op, ": ddeltas_for must be in [0, ", num_deltas, "), got ", k);
    ddeltas.push_back(new_tensor(in.dtype, {p.rows, p.cols}));
    wanted.ddeltas.push_back({ddeltas.back().mutable_data_ptr(), p.cols});
  }
  Tensor dbase = need_dbase ? new_tensor(in.dtype, {p.rows, p.cols}) : new_tensor(in.dtype, {0});
  if (need_dbase) wanted.dbase.data = dbase.mutable_data_ptr();
  const ScalarType wide = weight.wide ? ScalarType::Double : ScalarType::Float;
  Tensor dcoeffs = need_dcoeffs ? new_zeros(wide, coeffs.sizes()) : new_tensor(wide, {0});
  Tensor dbias = need_dbias ? new_zeros(wide, {ids ? tasks + 1 : 1, out_features}) : new_tensor(wide, {0});

  const auto compute = [&](GradientPlan& some, const Wanted& of) {
    const double weights_read = double(some.problem.rows) * some.problem.cols, targets = of.ddeltas.size() + 1.0;
    const int64_t threads = threads_for(weights_read * (targets + (of.dcoeffs ? num_deltas : 0)), weights_read * rows);
    some.finish(weight, groups, of, rows, threads, kernels());
    run_queue(some.problem, kernels().weight_gradient, some.workspace_bytes(kernels()), threads);
  };
  if (need_dbias && out_features > 0 && (turned || in_features == 0)) {  // there is nothing but dy to read
    GradientPlan sums;
    sums.problem.dtype = p.dtype;
    sums.problem.rows = out_features;
    sums.problem.cols = 1;
    sums.problem.dy = of_dy;
    sums.problem.x = of_x;
    compute(sums, {false, {}, {}, {}, {nullptr, 0}, dbias.mutable_data_ptr()});
  } else if (need_dbias) {
    wanted.dbias = dbias.mutable_data_ptr();
  }
  if (out_features > 0 && in_features > 0) {
    compute(plan, wanted);
    if (need_dcoeffs) plan.reduce(dcoeffs.mutable_data_ptr(), weight.wide);
  }
  if (turned) {
    for (Tensor& ddelta : ddeltas) ddelta = torch::stable::transpose(ddelta, 0, 1);
    if (need_dbase) dbase = torch::stable::transpose(dbase, 0, 1);
  }
  return {dcoeffs, ddeltas, dbase, dbias};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor> linear_grad(
    const Tensor& dy, const Tensor& x, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
    const OptionalTensor& base_coeffs, const OptionalTensor& ids, const OptionalTensor& order,
    const OptionalTensor& offsets, int64_t inner, StringHandle algorithm, bool need_dx,
    const std::vector<int64_t>& pairs, const std::vector<int64_t>& ddeltas_for, bool need_dcoeffs, bool need_dbase,
    bool need_dbias) {
  const std::string name = take(algorithm);
  const bool asked = name == "merge";
  const Algorithm how = asked ? Algorithm::kBlend : read_algorithm("linear_grad", name);
  const OneWeight weight{base, deltas, coeffs, base_coeffs};
  const bool takes = !ids && (need_dbase || !ddeltas_for.empty()) && vendor_takes(weight, dy, x);
  check(takes || !asked, "linear_grad: merge must be one weight of contiguous float32 whose gradient is wanted");
  const bool by_vendor = takes && how == Algorithm::kBlend && (asked || vendor_pays(x.size(0)));
  // The rest of the results; and what is checked of the arguments.
  const std::vector<int64_t> none;
  auto [dcoeffs, ddeltas, dbase, dbias] =
      by_vendor ? linear_dw(dy, x, base, deltas, coeffs, base_coeffs, ids, order, offsets, inner, none, none, false,
                            false, need_dbias)
                : linear_dw(dy, x, base, deltas, coeffs, base_coeffs, ids, order, offsets, inner, pairs, ddeltas_for,
                            need_dcoeffs, need_dbase, need_dbias);
  Tensor dx = new_tensor(x.scalar_type(), {0});
  if (by_vendor) {
    vendor_gradients(weight, dy, x, pairs, ddeltas_for, need_dx ? &dx : nullptr, need_dcoeffs ? &dcoeffs : nullptr,
                     ddeltas, need_dbase ? &dbase : nullptr);
  } else if (need_dx) {
    dx = row_product("linear_dx", false, dy, base, deltas, coeffs, base_coeffs, std::nullopt, ids, order, offsets,
                     inner, how);
  }
  return {dx, dcoeffs, ddeltas, dbase, dbias};
}

std::string cpu_isa() { return kernels().name; }

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_FRAGMENT(taps_fast, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&taps_fast::linear_fwd));
  m.impl("linear_coded", TORCH_BOX(&taps_fast::linear_coded));
  m.impl("linear_low_rank_", TORCH_BOX(&taps_fast::linear_low_rank_));
  m.impl("linear_dx", TORCH_BOX(&taps_fast::linear_dx));
  m.impl("linear_dw", TORCH_BOX(&taps_fast::linear_dw));
  m.impl("linear_grad", TORCH_BOX(&taps_fast::linear_grad));
}

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&taps_fast::cpu_isa));
}
