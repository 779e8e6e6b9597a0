// The CUDA operators of taps_fast/_ops.py on top of the kernels: reads tensors, checks shapes, allocates results,
// starts. libtorch's stable ABI only, so one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "architectures.h"
#include "current.h"
#include "inputs.h"
#include "plan.h"
#include "stream.h"

namespace taps_fast::cuda {
namespace {

Tensor linear_stream(const Tensor& x, const Tensor& base, const std::vector<Tensor>& deltas, const Tensor& coeffs,
                     const OptionalTensor& base_coeffs, const OptionalTensor& bias, const OptionalTensor& ids,
                     int64_t inner) {
  const char* op = "linear_stream";
  check(x.dim() == 2 && base.dim() == 2, op, ": x and base must have 2 dimensions, got ", shape_of(x), " and ",
        shape_of(base));
  check(deltas.size() < kMaxSources, op, ": deltas must be fewer than ", kMaxSources, ", got ", deltas.size());
  const ScalarType type = x.scalar_type();
  Inputs inputs(op, x);
  StreamProblem p = {};
  p.dtype = dtype_of(op, x);
  check(p.dtype != DType::kFloat64, op, ": x must be float32, bfloat16 or float16, got ", name(p.dtype));
  p.rows = to_int(op, "rows", x.size(0));
  p.in_features = to_int(op, "in features", base.size(1));
  p.out_features = to_int(op, "out features", base.size(0));
  p.num_sources = 1 + static_cast<int>(deltas.size());
  p.x = inputs.matrix("x", x, p.rows, p.in_features, type, &p.x_stride);

  // One stride serves all sources; where they differ, all are copied.
  bool same_stride = true;
  for (int s = 0; s < p.num_sources; s++) {
    int64_t stride = 0;
    const Tensor& source = s ? deltas[s - 1] : base;
    p.sources[s] = inputs.matrix(s ? "deltas" : "base", source, p.out_features, p.in_features, type, &stride);
    same_stride &= s == 0 || stride == p.weight_stride || p.out_features <= 1;
    if (s == 0) p.weight_stride = stride;
  }
  if (!same_stride) {
    p.weight_stride = p.in_features;
    for (int s = 0; s < p.num_sources; s++) p.sources[s] = inputs.contiguous(s ? deltas[s - 1] : base);
  }

  p.tasks = 1;
  if (ids) {
    check(coeffs.dim() == 2, op, ": coeffs must have shape [T, K] with tasks, got ", shape_of(coeffs));
    p.tasks = coeffs.size(0);
    p.batch = ids->numel();
    p.inner = inner;
    p.ids = inputs.integers("ids", *ids, p.batch);
    check(inner >= 1 && (p.batch ? p.rows % (inner * p.batch) == 0 : p.rows == 0), op,
          ": rows must be a multiple of inner times the batch, got ", p.rows, " (inner ", inner, ", batch ", p.batch,
          ")");
  }
  p.coeffs =
      static_cast<const float*>(inputs.vector("coeffs", coeffs, p.tasks * int64_t(deltas.size()), ScalarType::Float));
  if (base_coeffs)
    p.base_coeffs = static_cast<const float*>(inputs.vector("base_coeffs", *base_coeffs, p.tasks, ScalarType::Float));
  if (bias && bias->dim() == 2) {
    check(ids.has_value(), op, ": bias must have shape [O] without tasks, got ", shape_of(*bias));
    p.bias = inputs.matrix("bias", *bias, p.tasks + 1, p.out_features, type, &p.bias_stride);
  } else if (bias) {
    p.bias = inputs.vector("bias", *bias, p.out_features, type);
  }

  Tensor y = new_tensor(x, {p.rows, p.out_features});
  if (p.rows == 0 || p.out_features == 0) return y;
  p.y = y.mutable_data_ptr();
  const Current current(x);
  stream(p, current.stream);
  return y;
}

/// A result of an operator, and where its kernel writes it.
template <class T>
Tensor result(const Tensor& like, std::initializer_list<int64_t> shape, T** data,
              std::optional<ScalarType> type = std::nullopt) {
  Tensor made = new_tensor(like, shape, type);
  *data = static_cast<T*>(made.mutable_data_ptr());
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> task_plan(const Tensor& ids, int64_t num_tasks) {
  const char* op = "task_plan";
  check(ids.dim() == 1, op, ": ids must have 1 dimension, got ", shape_of(ids));
  check(0 <= num_tasks && num_tasks <= kMaxTasks, op, ": num_tasks must be 0 to ", kMaxTasks, ", got ", num_tasks);
  Inputs inputs(op, ids);
  PlanProblem p = {};
  p.samples = to_int(op, "samples", ids.size(0));
  p.tasks = static_cast<int>(num_tasks);
  p.ids = inputs.integers("ids", ids, p.samples);
  Tensor order = result(ids, {p.samples}, &p.order);
  Tensor offsets = result(ids, {num_tasks + 2}, &p.offsets);
  Tensor inverse = result(ids, {p.samples}, &p.inverse);
  Tensor valid = result(ids, {}, &p.valid, ScalarType::Bool);
  const Current current(ids);
  plan(p, current.stream);
  return {order, offsets, inverse, valid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_plan(const Tensor& ids, const Tensor& coeffs,
                                                              const OptionalTensor& base_coeffs, int64_t rows,
                                                              int64_t inner) {
  const char* op = "layer_plan";
  check(ids.dim() == 1, op, ": ids must have 1 dimension, got ", shape_of(ids));
  check(coeffs.dim() == 2, op, ": coeffs must have 2 dimensions, got ", shape_of(coeffs));
  check(coeffs.size(0) <= kMaxLayerTasks, op, ": coeffs must be of at most ", kMaxLayerTasks, " tasks, got ",
        coeffs.size(0));
  Inputs inputs(op, ids);
  PlanProblem p = {};
  p.layer = true;
  p.samples = to_int(op, "samples", ids.size(0));
  p.tasks = static_cast<int>(coeffs.size(0));
  p.deltas = to_int(op, "deltas", coeffs.size(1));
  p.rows = to_int(op, "rows", rows);
  p.inner = to_int(op, "inner", inner);
  check(inner >= 1 && rows >= 0 && (p.samples ? rows % (inner * p.samples) == 0 : rows == 0), op,
        ": rows must be a multiple of inner times the batch, got ", rows, " (inner ", inner, ", batch ", p.samples,
        ")");
  p.ids = inputs.integers("ids", ids, p.samples);
  const auto floats = [&](const char* name, const Tensor& t, int64_t size) {
    return static_cast<const float*>(inputs.vector(name, t, size, ScalarType::Float));
  };
  p.coeffs = floats("coeffs", coeffs, int64_t{p.tasks} * p.deltas);
  if (base_coeffs) p.base_coeffs = floats("base_coeffs", *base_coeffs, p.tasks);
  Tensor slots = result(ids, {p.samples}, &p.slots);
  Tensor order = result(ids, {p.samples}, &p.order);
  Tensor offsets = result(ids, {p.tasks + 2}, &p.offsets);
  Tensor place = result(ids, {rows}, &p.place);
  Tensor ends = result(ids, {p.tasks + 1}, &p.ends, ScalarType::Int);
  const Current current(ids);
  plan(p, current.stream);
  return {slots, order, offsets, place, ends};
}

}  // namespace
}  // namespace taps_fast::cuda

TAPS_FAST_IMPL(m) {
  m.impl("linear_stream", TORCH_BOX(&taps_fast::cuda::linear_stream));
  m.impl("task_plan", TORCH_BOX(&taps_fast::cuda::task_plan));
  m.impl("layer_plan", TORCH_BOX(&taps_fast::cuda::layer_plan));
}

#ifndef TAPS_FAST_EMULATED

namespace taps_fast::cuda {
namespace {

std::string cuda_architectures() { return architectures(); }

}  // namespace
}  // namespace taps_fast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(taps_fast, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&taps_fast::cuda::cuda_architectures));
}

#endif
