// The CPU operators of taps_fast/_ops.py on top of the kernels: reads tensors, checks shapes, allocates results, runs.
// libtorch's stable ABI only, so one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "coded_ops.h"
#include "common/text.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cpu/workspace.h"

namespace taps_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace cpu;

using OptionalTensor = std::optional<Tensor>;

/// A tensor's layout, read once: every look at a tensor is a call through the C interface.
struct Layout {
  explicit Layout(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
    dtype = t.scalar_type();
  }

  int64_t dim;
  int64_t *sizes, *strides;
  ScalarType dtype;
};

/// Its shape, as error messages print it.
std::ostream& operator<<(std::ostream& s, const Layout& t) {
  s << "[";
  for (int64_t i = 0; i < t.dim; i++) s << (i ? ", " : "") << t.sizes[i];
  return s << "]";
}

/// A matrix of x's type, not initialized.
Tensor empty(const Layout& x, int64_t rows, int64_t cols) {
  const int64_t sizes[] = {rows, cols}, strides[] = {cols, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, int32_t(x.dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

/// Tensors whose rows the kernels can walk; a copy is made, and kept alive here, only of others.
class Inputs {
 public:
  Inputs(const char* op, ScalarType dtype) : op_(op), dtype_(dtype) {}

  Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
    return matrix(name, t, Layout(t), rows, cols);
  }

  Matrix matrix(const char* name, const Tensor& t, const Layout& layout, int64_t rows, int64_t cols) {
    check(layout.dim == 2 && layout.sizes[0] == rows && layout.sizes[1] == cols, op_, ": ", name, " must have shape [",
          rows, ", ", cols, "], got ", layout);
    check(layout.dtype == dtype_, op_, ": ", name, " must have scalar type ", int(dtype_), ", got ", int(layout.dtype));
    if (layout.strides[1] == 1 || cols <= 1) return {t.const_data_ptr(), layout.strides[0]};
    kept_.push_back(torch::stable::contiguous(t));
    return {kept_.back().const_data_ptr(), cols};
  }

  const void* vector(const char* name, const Tensor& t, int64_t size, ScalarType dtype) {
    const Layout layout(t);
    check(t.numel() == size, op_, ": ", name, " must have ", size, " elements, got ", layout);
    check(layout.dtype == dtype, op_, ": ", name, " must have scalar type ", int(dtype), ", got ", int(layout.dtype));
    if (t.is_contiguous()) return t.const_data_ptr();
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().const_data_ptr();
  }

 private:
  const char* op_;
  ScalarType dtype_;
  std::vector<Tensor> kept_;
};

Groups read_groups(const char* op, Inputs& inputs, int64_t rows, const Tensor& coeffs, const OptionalTensor& ids,
                   const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner) {
  check(ids.has_value() == order.has_value() && ids.has_value() == offsets.has_value(), op,
        ": ids, order and offsets must come together");
  Groups groups;
  if (!ids) return groups;
  const Layout table(coeffs);
  check(table.dim == 2, op, ": coeffs must have shape [T, K] with tasks, got ", table);
  groups.tasks = table.sizes[0];
  groups.batch = ids->numel();
  groups.inner = inner;
  groups.order = static_cast<const int64_t*>(inputs.vector("order", *order, groups.batch, ScalarType::Long));
  groups.offsets = static_cast<const int64_t*>(inputs.vector("offsets", *offsets, groups.tasks + 2, ScalarType::Long));
  check_groups(op, rows, inner, groups.batch, groups.tasks, groups.order, groups.offsets);
  return groups;
}

/// What makes deltas of codes numbers, as linear_coded is given it: a scale for each delta, and the tiles of masks.
struct Codes {
  const std::vector<Tensor>&scales, &tiles;
  const std::vector<int64_t>& tile_of;  // -1: no mask

  static bool is_coded(const Tensor& delta, ScalarType dtype) {
    const ScalarType own = delta.scalar_type();
    return own != dtype && (own == ScalarType::Byte || own == ScalarType::Char);
  }

  /// The terms of entry k: one, or as many as a stack holds.
  void add(std::vector<Term>& terms, Inputs& inputs, const Tensor& delta, size_t k, int64_t rows, int64_t cols,
           bool wide) const {
    const char* op = "linear_coded";
    const bool bits = delta.scalar_type() == ScalarType::Byte;
    Term term{{nullptr, 0}, 1.0, bits ? Coding::kSign : Coding::kInt8};
    term.code_stride = bits ? 8 * ceil_div(cols, 64) : cols;
    const Layout codes(delta), scale(scales[k]);
    const int64_t stacked = codes.dim == 3, count = stacked ? codes.sizes[0] : 1, size = rows * term.code_stride;
    check(codes.dim == 2 + stacked && codes.sizes[stacked] == rows && codes.sizes[stacked + 1] == term.code_stride, op,
          ": codes must have shape [", rows, ", ", term.code_stride, "], or one more axis in front, got ", codes);
    check(scale.dim == stacked || scale.dim == stacked + 1, op, ": scales must be one number or ", rows,
          " a delta, got ", scale);
    term.scale_step = scale.dim > stacked;
    const int64_t scale_size = term.scale_step ? rows : 1;
    const auto* code = static_cast<const uint8_t*>(inputs.vector("codes", delta, count * size, codes.dtype));
    const auto* scale_data = static_cast<const char*>(
        inputs.vector("scales", scales[k], count * scale_size, wide ? ScalarType::Double : ScalarType::Float));
    if (tile_of[k] >= 0) {
      check(bits && tile_of[k] < int64_t(tiles.size()), op, ": tile_of must be below ", tiles.size(),
            " and name a tile for bits alone, got ", tile_of[k]);
      term.coding = Coding::kMask;
      term.matrix = inputs.matrix("tiles", tiles[tile_of[k]], rows, cols);
    }
    for (int64_t n = 0; n < count; n++) {
      term.codes = code + n * size;
      term.scale = scale_data + n * scale_size * (wide ? sizeof(double) : sizeof(float));
      terms.push_back(term);
    }
  }
};

Weight read_weight(Inputs& inputs, const Tensor& base, const Layout& layout, const std::vector<Tensor>& deltas,
                   const Tensor& coeffs, const OptionalTensor& base_coeffs, int64_t tasks,
                   const Codes* codes = nullptr) {
  const int64_t rows = layout.sizes[0], cols = layout.sizes[1];
  Weight weight;
  weight.base = inputs.matrix("base", base, layout, rows, cols);
  weight.deltas.reserve(deltas.size());
  weight.wide = layout.dtype == ScalarType::Double;
  for (size_t k = 0; k < deltas.size(); k++) {
    if (codes && codes->is_coded(deltas[k], layout.dtype))
      codes->add(weight.deltas, inputs, deltas[k], k, rows, cols, weight.wide);
    else weight.deltas.push_back({inputs.matrix("deltas", deltas[k], rows, cols), 1.0});
  }
  const ScalarType dtype = weight.wide ? ScalarType::Double : ScalarType::Float;
  weight.coeffs = inputs.vector("coeffs", coeffs, tasks * weight.deltas.size(), dtype);
  weight.base_coeffs = base_coeffs ? inputs.vector("base_coeffs", *base_coeffs, tasks, dtype) : nullptr;
  return weight;
}

Algorithm read_algorithm(const char* op, StringHandle handle, bool coded) {
  const std::string name = take(handle);
  if (name == "blend") return Algorithm::kBlend;
  if (name == "auto" && coded) return Algorithm::kAuto;
  check(name == "split", op, ": algorithm must be ", coded ? "auto, " : "", "blend or split on CPU, got '", name, "'");
  return Algorithm::kSplit;
}

/// Items go to whichever thread is free; each item's result is its own, so the order changes nothing.
template <class Problem>
void run(const Problem& problem, void (*kernel)(const Problem&, int64_t*, void*), int64_t workspace_bytes,
         int64_t threads) {
  int64_t next_item = 0;
  const auto worker = [&](int64_t, int64_t) { kernel(problem, &next_item, workspace(workspace_bytes)); };
  threads = std::min(num_items(problem), threads);
  if (threads <= 1) return worker(0, 1);
  torch::stable::parallel_for(0, threads, 1, worker);
}

/// Runs a plan of which problem's matrices and sizes are filled. `onto`: what lies in `out` is added to.
void run_rows(RowPlan& plan, const Weight& weight, const Groups& groups, Algorithm how, bool bias_by_task, bool onto) {
  RowProduct& p = plan.problem;
  const int threads = torch::stable::get_num_threads();
  plan.finish(weight, groups, how, bias_by_task, threads, kernels());
  std::vector<int64_t> places;
  if (onto) {  // a bias that each row has its own of
    for (int64_t r = 0; r < p.rows && !p.row_index; r++) places.push_back(r);
    p.bias = {p.out.data, p.out.stride};
    p.bias_index = p.row_index ? p.row_index : places.data();
  }
  run(p, kernels().row_product, plan.workspace_bytes(kernels()), threads);
}

Tensor row_product(const char* op, bool transposed, const Tensor& x, const Tensor& base,
                   const std::vector<Tensor>& deltas, const Tensor& coeffs, const OptionalTensor& base_coeffs,
                   const OptionalTensor& bias, const OptionalTensor& ids, const OptionalTensor& order,
                   const OptionalTensor& offsets, int64_t inner, StringHandle algorithm, const Codes* codes = nullptr) {
  const Algorithm how = read_algorithm(op, algorithm, codes);
  const Layout in(x), weights(base);
  Inputs inputs(op, in.dtype);
  RowPlan plan;
  RowProduct& p = plan.problem;
  p.dtype = dtype_of(op, in.dtype);
  check(in.dim == 2 && weights.dim == 2, op, ": x and base must have 2 dimensions, got ", in, " and ", weights);
  p.transposed = transposed;
  p.rows = in.sizes[0];
  p.depth = weights.sizes[transposed ? 1 : 0];
  p.cols = weights.sizes[transposed ? 0 : 1];
  p.in = inputs.matrix(transposed ? "x" : "dy", x, in, p.rows, p.depth);
  const Groups groups = read_groups(op, inputs, p.rows, coeffs, ids, order, offsets, inner);
  const int64_t tasks = ids ? groups.tasks : 1;
  const Weight weight = read_weight(inputs, base, weights, deltas, coeffs, base_coeffs, tasks, codes);
  const bool bias_by_task = bias && bias->dim() == 2;
  if (bias_by_task) {
    check(ids.has_value(), op, ": bias must have shape [O] without tasks, got ", Layout(*bias));
    p.bias = inputs.matrix("bias", *bias, groups.tasks + 1, p.cols);
  } else if (bias) {
    p.bias = {inputs.vector("bias", *bias, p.cols, in.dtype), 0};
  }
  Tensor out = empty(in, p.rows, p.cols);
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
                     algorithm);
}

Tensor linear_coded(const Tensor& x, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
                    const OptionalTensor& base_coeffs, const OptionalTensor& bias, const OptionalTensor& ids,
                    const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner, StringHandle algorithm,
                    const std::vector<Tensor>& scales, const std::vector<Tensor>& tiles,
                    const std::vector<int64_t>& tile_of) {
  check(scales.size() == deltas.size() && tile_of.size() == deltas.size(),
        "linear_coded: scales and tile_of must have an entry for each of ", deltas.size(), " deltas, got ",
        scales.size(), " and ", tile_of.size());
  const Codes codes{scales, tiles, tile_of};
  return row_product("linear_coded", true, x, base, deltas, coeffs, base_coeffs, bias, ids, order, offsets, inner,
                     algorithm, &codes);
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
  Weight factors{{nullptr, 0}, {}, nullptr, nullptr, true}, products = factors;
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
  Tensor thin = empty(in, rows, rank);
  for (int64_t turn = 0, more = 1; more; turn++) {
    std::vector<double> chosen(tasks * count), by(tasks * count);
    more = 0;
    for (int64_t t = 0; t < tasks; t++)
      for (int64_t k = 0, used = 0; k < count; k++) {
        const double c = given.coeff(t, k);
        if (c == 0 || used++ != turn) continue;
        chosen[t * count + k] = more = 1;
        by[t * count + k] = c * scales.coeff(0, k);
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
                     inner, algorithm);
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
  p.rows = out_features;
  p.cols = in_features;
  p.dy = inputs.matrix("dy", dy, rows, out_features);
  p.x = inputs.matrix("x", x, in, rows, in_features);
  const Groups groups = read_groups(op, inputs, rows, coeffs, ids, order, offsets, inner);
  const int64_t tasks = ids ? groups.tasks : 1, num_deltas = deltas.size();
  const Weight weight = read_weight(inputs, base, weights, deltas, coeffs, base_coeffs, tasks);

  Wanted wanted{need_dcoeffs, pairs, ddeltas_for, {}, {nullptr, in_features}, nullptr};
  for (int64_t pair : pairs)
    check(0 <= pair && pair < tasks * num_deltas, op, ": pairs must be in [0, ", tasks * num_deltas, "), got ", pair);
  std::vector<Tensor> ddeltas;
  for (int64_t k : ddeltas_for) {
    check(0 <= k && k < num_deltas, op, ": ddeltas_for must be in [0, ", num_deltas, "), got ", k);
    ddeltas.push_back(empty(in, out_features, in_features));
    wanted.ddeltas.push_back({ddeltas.back().mutable_data_ptr(), in_features});
  }
  Tensor dbase = need_dbase ? empty(in, out_features, in_features) : torch::stable::new_empty(x, {0});
  if (need_dbase) wanted.dbase.data = dbase.mutable_data_ptr();
  Tensor dcoeffs =
      need_dcoeffs ? torch::stable::new_zeros(coeffs, coeffs.sizes()) : torch::stable::new_empty(coeffs, {0});
  const ScalarType wide = weight.wide ? ScalarType::Double : ScalarType::Float;
  Tensor dbias = need_dbias ? torch::stable::new_zeros(x, {ids ? tasks + 1 : 1, out_features}, wide)
                            : torch::stable::new_empty(x, {0}, wide);
  if (need_dbias) wanted.dbias = dbias.mutable_data_ptr();
  if (in_features == 0) {  // there is nothing but dy to read
    wanted = {false, {}, {}, {}, {nullptr, 0}, wanted.dbias};
    p.cols = 1;
  }
  if (out_features > 0 && (in_features > 0 || need_dbias)) {
    const int threads = torch::stable::get_num_threads();
    plan.finish(weight, groups, wanted, rows, threads, kernels());
    run(p, kernels().weight_gradient, plan.workspace_bytes(kernels()), threads);
    if (need_dcoeffs) plan.reduce(dcoeffs.mutable_data_ptr(), weight.wide);
  }
  return {dcoeffs, ddeltas, dbase, dbias};
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
}

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&taps_fast::cpu_isa));
}
