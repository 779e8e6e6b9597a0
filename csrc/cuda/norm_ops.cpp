// The pointwise operators of taps_fast/_ops.py and the sums of norms on top of their CUDA kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/layout.h"
#include "../common/text.h"
#include "architectures.h"
#include "current.h"
#include "inputs.h"
#include "norm.h"

namespace taps_fast::cuda {
namespace {

Activation read_activation(const char* op, StringHandle handle) {
  const std::string name = take(handle);
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "silu") return Activation::kSilu;
  check(name == "gelu", op, ": activation must be none, relu, relu6, silu or gelu, got '", name, "'");
  return Activation::kGelu;
}

/// What every operator here is given, checked.
class Call {
 public:
  Call(const char* op, const Tensor& x, const OptionalTensor& ids, const OptionalTensor& order,
       const OptionalTensor& offsets, int64_t inner)
      : op_(op), x_(x), inputs_(op, x) {
    check(x.dim() >= 2, op, ": x must have at least 2 dimensions, got ", shape_of(x));
    last_ = !x.is_contiguous() && channels_last(x);
    int64_t pixels = 1;
    for (int64_t axis = 2; axis < x.dim(); axis++) pixels *= x.size(axis);
    lines.dtype = dtype_of(op, x);
    lines.channels = x.size(1);
    lines.rows = last_ ? x.size(0) * pixels : x.size(0);
    lines.pixels = last_ ? 1 : pixels;
    table_type_ = lines.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    check(ids.has_value() == order.has_value() && ids.has_value() == offsets.has_value(), op,
          ": ids, order and offsets must come together");
    lines.mixed = ids.has_value();
    if (!ids) return;
    lines.batch = ids->numel();
    lines.tasks = offsets->numel() - 2;
    lines.inner = last_ ? inner * pixels : inner;
    lines.ids = inputs_.integers("ids", *ids, lines.batch);
    lines.order = inputs_.integers("order", *order, lines.batch);
    lines.offsets = inputs_.integers("offsets", *offsets, lines.tasks + 2);
    check(inner >= 1 && (lines.batch ? x.size(0) % (inner * lines.batch) == 0 : x.size(0) == 0), op,
          ": rows must be a multiple of inner times the batch, got ", x.size(0), " (inner ", inner, ", batch ",
          lines.batch, ")");
  }

  bool is_dense() const { return last_ || x_.is_contiguous(); }
  bool is_empty() const { return lines.rows * lines.channels * lines.pixels == 0; }

  /// A result like x, in its layout where that is dense.
  Tensor like_x() const { return is_dense() ? torch::stable::empty_like(x_) : new_tensor(x_, x_.sizes()); }

  /// The elements of x or of a gradient, in the order that `lines` describes.
  const void* elements(const char* name, const Tensor& t) {
    bool same = t.dim() == x_.dim();
    for (int64_t axis = 0; same && axis < t.dim(); axis++) same = t.size(axis) == x_.size(axis);
    check(same, op_, ": ", name, " must have x's shape ", shape_of(x_), ", got ", shape_of(t));
    inputs_.expect(name, t, x_.scalar_type());
    if (last_ ? channels_last(t) : t.is_contiguous()) return t.const_data_ptr();
    Tensor dense = like_x();
    return inputs_.keep(torch::stable::copy_(dense, t)).const_data_ptr();
  }

  Table table(const char* name, const OptionalTensor& t) {
    if (!t) return {nullptr, 0};
    const bool by_task = lines.mixed && t->dim() == 2;
    const int64_t count = by_task ? lines.tasks + 1 : 1;
    return {inputs_.vector(name, *t, count * lines.channels, table_type_), by_task ? lines.channels : 0};
  }

  Tensor table_like(std::initializer_list<int64_t> sizes) const { return new_tensor(x_, sizes, table_type_); }

  Lines lines = {DType::kFloat32, 0, 0, 1, false, nullptr, nullptr, nullptr, 0, 1, 0};

 private:
  const char* op_;
  const Tensor& x_;
  Inputs inputs_;
  ScalarType table_type_;
  bool last_;
};

void run(Call& call, PointwiseProblem& p, Tensor& out, const Tensor& x) {
  p.in = call.lines;
  if (call.is_empty()) return;
  p.out = out.mutable_data_ptr();
  const Current current(x);
  pointwise(p, current.stream);
}

/// act(scale·x + shift): over a dense x where it may be, and new otherwise.
Tensor shifted(const char* op, bool in_place, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
               const OptionalTensor& ids, const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner,
               StringHandle activation) {
  PointwiseProblem p = {};
  p.activation = read_activation(op, activation);
  Call call(op, x, ids, order, offsets, inner);
  p.x = call.elements("x", x);
  p.scale = call.table("scale", scale);
  p.shift = call.table("shift", shift);
  Tensor out = in_place && call.is_dense() ? x : call.like_x();
  run(call, p, out, x);
  return out;
}

Tensor scale_shift(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& ids,
                   const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner, StringHandle activation) {
  return shifted("scale_shift", false, x, scale, shift, ids, order, offsets, inner, activation);
}

void scale_shift_(Tensor x, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& ids,
                  const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner, StringHandle activation) {
  const Tensor y = shifted("scale_shift_", true, x, scale, shift, ids, order, offsets, inner, activation);
  if (y.const_data_ptr() != x.const_data_ptr()) torch::stable::copy_(x, y);
}

Tensor scale_shift_dx(const Tensor& dy, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& slope, const OptionalTensor& offset, const OptionalTensor& ids,
                      const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner,
                      StringHandle activation) {
  const char* op = "scale_shift_dx";
  PointwiseProblem p = {};
  p.activation = read_activation(op, activation);
  Call call(op, x, ids, order, offsets, inner);
  p.x = call.elements("x", x);
  p.dy = call.elements("dy", dy);
  p.scale = call.table("scale", scale);
  p.shift = call.table("shift", shift);
  p.slope = call.table("slope", slope);
  p.offset = call.table("offset", offset);
  Tensor out = call.like_x();
  run(call, p, out, x);
  return out;
}

std::tuple<Tensor, Tensor> run(Call& call, SumsProblem& p, const Tensor& x) {
  p.in = call.lines;
  const int64_t groups = p.in.groups(), channels = p.in.channels;
  Tensor first = call.table_like({groups, channels}), second = call.table_like({groups, channels});
  if (channels == 0) return {first, second};
  const Current current(x);
  p.splits = choose_splits(p.in);
  Tensor partial = call.table_like({p.splits, groups, channels, 2});
  p.first = first.mutable_data_ptr();
  p.second = second.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  group_sums(p, current.stream);
  return {first, second};
}

std::tuple<Tensor, Tensor> scale_shift_sums(const Tensor& dy, const Tensor& x, const OptionalTensor& scale,
                                            const OptionalTensor& shift, const OptionalTensor& center,
                                            const OptionalTensor& ids, const OptionalTensor& order,
                                            const OptionalTensor& offsets, int64_t inner, StringHandle activation) {
  const char* op = "scale_shift_sums";
  SumsProblem p = {};
  p.kind = Sums::kGradients;
  p.activation = read_activation(op, activation);
  Call call(op, x, ids, order, offsets, inner);
  p.x = call.elements("x", x);
  p.dy = call.elements("dy", dy);
  p.scale = call.table("scale", scale);
  p.shift = call.table("shift", shift);
  p.center = call.table("center", center);
  return run(call, p, x);
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, const OptionalTensor& ids, const OptionalTensor& order,
                                   const OptionalTensor& offsets, int64_t inner) {
  Call call("moments", x, ids, order, offsets, inner);
  SumsProblem p = {};
  p.kind = Sums::kMoments;
  p.x = call.elements("x", x);
  return run(call, p, x);
}

/// Runs a boxed operator; on chips that the kernels were not compiled for, `<kName>.uncompiled` of the same arguments.
template <const char* kName, auto kBoxed>
void where_served(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  int32_t device = 0;  // of the first argument, a tensor, which stays the stack's
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(torch::stable::detail::to<AtenTensorHandle>(stack[0]), &device));
  if (serves(device)) return kBoxed(stack, num_arguments, num_results);
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(kName, "uncompiled", stack, TORCH_ABI_VERSION));
}

constexpr char kScaleShift[] = TAPS_FAST_NAMESPACE "::scale_shift";
constexpr char kScaleShiftInPlace[] = TAPS_FAST_NAMESPACE "::scale_shift_";
constexpr char kScaleShiftDx[] = TAPS_FAST_NAMESPACE "::scale_shift_dx";
constexpr char kScaleShiftSums[] = TAPS_FAST_NAMESPACE "::scale_shift_sums";
constexpr char kMoments[] = TAPS_FAST_NAMESPACE "::moments";

}  // namespace
}  // namespace taps_fast::cuda

TAPS_FAST_IMPL(m) {
  using namespace taps_fast::cuda;
  m.impl("scale_shift", where_served<kScaleShift, TORCH_BOX(&scale_shift)>);
  m.impl("scale_shift_", where_served<kScaleShiftInPlace, TORCH_BOX(&scale_shift_)>);
  m.impl("scale_shift_dx", where_served<kScaleShiftDx, TORCH_BOX(&scale_shift_dx)>);
  m.impl("scale_shift_sums", where_served<kScaleShiftSums, TORCH_BOX(&scale_shift_sums)>);
  m.impl("moments", where_served<kMoments, TORCH_BOX(&moments)>);
}
