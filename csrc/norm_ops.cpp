// The pointwise operators of taps_fast/_ops.py and the sums of norms on top of their CPU kernels.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "common/layout.h"
#include "cpu/norm.h"

namespace taps_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace cpu;

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kItemElements = 1 << 14;   // of a pointwise item: 64 KiB of float32
constexpr int64_t kSpanElements = 1 << 18;   // of a span, whose sums are kept for the end
constexpr int64_t kChannelsPerItem = 64;

/// What every operator here is given, checked, with copies of what is not dense kept alive.
class Call {
 public:
  Call(const char* op, const Tensor& x, const OptionalTensor& ids, const OptionalTensor& order,
       const OptionalTensor& offsets, int64_t inner)
      : op_(op), x_(x) {
    check(x.dim() >= 2, op, ": x must have at least 2 dimensions, got ", x.dim());
    rows.dtype = dtype_of(op, x.scalar_type());
    last_ = !x.is_contiguous() && channels_last(x);
    dense_ = last_ || x.is_contiguous();
    int64_t pixels = 1;
    for (int64_t axis = 2; axis < x.dim(); axis++) pixels *= x.size(axis);
    rows.channels = x.size(1);
    rows.rows = last_ ? x.size(0) * pixels : x.size(0);
    rows.pixels = last_ ? 1 : pixels;
    Membership& m = rows.member;
    check(ids.has_value() == order.has_value() && ids.has_value() == offsets.has_value(), op,
          ": ids, order and offsets must come together");
    m = {nullptr, nullptr, nullptr, 0, 0, 1};
    if (!ids) return;
    m.batch = ids->numel();
    m.tasks = offsets->numel() - 2;
    m.inner = last_ ? inner * pixels : inner;
    m.ids = integers("ids", *ids, m.batch);
    m.order = integers("order", *order, m.batch);
    m.offsets = integers("offsets", *offsets, m.tasks + 2);
    check(inner >= 1 && (m.batch ? x.size(0) % (inner * m.batch) == 0 : x.size(0) == 0), op,
          ": rows must be a multiple of inner times the batch, got ", x.size(0), " (inner ", inner, ", batch ", m.batch,
          ")");
    check(m.offsets[0] == 0 && m.offsets[m.tasks + 1] == m.batch, op, ": offsets must span the batch of ", m.batch,
          ", got ", m.offsets[0], " to ", m.offsets[m.tasks + 1]);
    for (int64_t b = 0; b < m.batch; b++)
      check(-1 <= m.ids[b] && m.ids[b] < m.tasks && 0 <= m.order[b] && m.order[b] < m.batch, op,
            ": ids must be in [-1, ", m.tasks, "), got ", m.ids[b]);
  }

  /// A result like x, in its layout where that is dense.
  Tensor like_x() const { return dense_ ? torch::stable::empty_like(x_) : torch::stable::new_empty(x_, x_.sizes()); }

  /// The elements of x or of a gradient, in the order that `rows` describes.
  const void* elements(const char* name, const Tensor& t) {
    check(t.dim() == x_.dim() && t.scalar_type() == x_.scalar_type(), op_, ": ", name, " must be like x");
    for (int64_t axis = 0; axis < t.dim(); axis++)
      check(t.size(axis) == x_.size(axis), op_, ": ", name, " must have x's shape, got ", t.size(axis), " for ",
            x_.size(axis), " along axis ", axis);
    if (last_ ? channels_last(t) : t.is_contiguous()) return t.const_data_ptr();
    Tensor dense = last_ ? torch::stable::empty_like(x_) : torch::stable::new_empty(t, t.sizes());
    kept_.push_back(torch::stable::copy_(dense, t));
    return kept_.back().const_data_ptr();
  }

  /// A table; `fill` stands in for one that is absent.
  Matrix table(const char* name, const OptionalTensor& t, std::optional<double> fill) {
    if (!t) {
      if (!fill) return {nullptr, 0};
      const bool wide = rows.dtype == DType::kFloat64;
      Tensor row = torch::stable::new_empty(x_, {rows.channels}, wide ? ScalarType::Double : ScalarType::Float);
      kept_.push_back(torch::stable::fill_(row, *fill));
      return {kept_.back().const_data_ptr(), 0};
    }
    const ScalarType dtype = rows.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    const int64_t count = rows.member.offsets && t->dim() == 2 ? rows.member.tasks + 1 : 1;
    check(t->scalar_type() == dtype && t->numel() == count * rows.channels, op_, ": ", name, " must have ", count,
          " x ", rows.channels, " elements of scalar type ", int(dtype), ", got ", t->numel(), " of ",
          int(t->scalar_type()));
    if (t->is_contiguous()) return {t->const_data_ptr(), count > 1 ? rows.channels : 0};
    kept_.push_back(torch::stable::contiguous(*t));
    return {kept_.back().const_data_ptr(), count > 1 ? rows.channels : 0};
  }

  Rows rows;
  bool dense() const { return dense_; }

 private:
  const int64_t* integers(const char* name, const Tensor& t, int64_t size) {
    check(t.numel() == size && t.scalar_type() == ScalarType::Long, op_, ": ", name, " must be ", size, " int64, got ",
          t.numel());
    kept_.push_back(torch::stable::contiguous(t));
    return static_cast<const int64_t*>(kept_.back().const_data_ptr());
  }

  const char* op_;
  const Tensor& x_;
  bool last_, dense_;
  std::vector<Tensor> kept_;
};

Activation read_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "silu") return Activation::kSilu;
  check(name == "gelu", op, ": activation must be none, relu, relu6, silu or gelu, got '", name, "'");
  return Activation::kGelu;
}

void run_pointwise(Pointwise& p) {
  const int64_t length = p.in.pixels > 1 ? p.in.pixels : p.in.channels;
  p.rows_per_item = std::max<int64_t>(1, kItemElements / std::max<int64_t>(length, 1));
  if (p.in.rows > 0 && p.in.channels > 0 && p.in.pixels > 0) run_items(p, norm_kernels().pointwise);
}

Tensor scale_shift(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& ids,
                   const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner,
                   const std::string& activation) {
  const char* op = "scale_shift";
  Call call(op, x, ids, order, offsets, inner);
  Tensor out = call.like_x();
  Pointwise p{call.rows,
              read_activation(op, activation),
              call.elements("x", x),
              nullptr,
              out.mutable_data_ptr(),
              call.table("scale", scale, 1),
              call.table("shift", shift, 0),
              {nullptr, 0},
              {nullptr, 0},
              0};
  run_pointwise(p);
  return out;
}

void scale_shift_(Tensor x, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& ids,
                  const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner,
                  const std::string& activation) {
  const char* op = "scale_shift_";
  Call call(op, x, ids, order, offsets, inner);
  if (!call.dense()) {
    torch::stable::copy_(x, scale_shift(x, scale, shift, ids, order, offsets, inner, activation));
    return;
  }
  Pointwise p{call.rows,
              read_activation(op, activation),
              x.const_data_ptr(),
              nullptr,
              x.mutable_data_ptr(),
              call.table("scale", scale, 1),
              call.table("shift", shift, 0),
              {nullptr, 0},
              {nullptr, 0},
              0};
  run_pointwise(p);
}

Tensor scale_shift_dx(const Tensor& dy, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& slope, const OptionalTensor& offset, const OptionalTensor& ids,
                      const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner,
                      const std::string& activation) {
  const char* op = "scale_shift_dx";
  Call call(op, x, ids, order, offsets, inner);
  Tensor out = call.like_x();
  Pointwise p{call.rows,
              read_activation(op, activation),
              call.elements("x", x),
              call.elements("dy", dy),
              out.mutable_data_ptr(),
              call.table("scale", scale, 1),
              call.table("shift", shift, 0),
              call.table("slope", slope, std::nullopt),
              call.table("offset", offset, std::nullopt),
              0};
  run_pointwise(p);
  return out;
}

/// Runs p over spans of all groups and returns, in `first` and `second`, each group's rows and its spans' results.
std::tuple<Tensor, Tensor> run_sums(const Tensor& x, GroupSums& p, bool moments) {
  const Rows& in = p.in;
  const int64_t groups = in.member.offsets ? in.member.tasks + 1 : 1;
  const ScalarType dtype = in.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor first = torch::stable::new_zeros(x, {groups, in.channels}, dtype);
  Tensor second = torch::stable::new_zeros(x, {groups, in.channels}, dtype);
  if (in.channels == 0 || in.pixels == 0) return {first, second};
  // Spans depend on sizes alone, so that the number of threads changes no bit.
  const int64_t step = std::max<int64_t>(256, kSpanElements / (in.channels * in.pixels));
  std::vector<Span> spans;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t begin = 0, rows = rows_of_group(in, g); begin < rows; begin += step)
      spans.push_back({g, begin, std::min(rows, begin + step)});
  if (spans.empty()) return {first, second};
  std::vector<double> a(spans.size() * in.channels), b(spans.size() * in.channels);
  p.spans = spans.data();
  p.num_spans = spans.size();
  p.channels_per_item = kChannelsPerItem;
  p.first = a.data();
  p.second = b.data();
  run_items(p, norm_kernels().group_sums);

  std::vector<double> total_a(in.channels), total_b(in.channels);
  const auto finish = [&](auto* to_first, auto* to_second) {
    for (size_t s = 0; s < spans.size(); s++) {
      const Span& span = spans[s];
      const double before = double(span.begin) * in.pixels, count = double(span.end - span.begin) * in.pixels;
      const double share = count / (before + count);
      for (int64_t c = 0; c < in.channels; c++) {
        const double one = a[s * in.channels + c], two = b[s * in.channels + c];
        if (span.begin == 0) total_a[c] = total_b[c] = 0;
        const double d = one - total_a[c];
        total_a[c] += moments ? d * share : one;
        total_b[c] += moments ? two + d * d * before * share : two;
      }
      if (s + 1 < spans.size() && spans[s + 1].group == span.group) continue;
      const int64_t row = task_row(in.member, span.group) * in.channels;
      for (int64_t c = 0; c < in.channels; c++) {
        to_first[row + c] = total_a[c];
        to_second[row + c] = moments ? total_b[c] / (before + count) : total_b[c];
      }
    }
  };
  if (dtype == ScalarType::Double)
    finish(static_cast<double*>(first.mutable_data_ptr()), static_cast<double*>(second.mutable_data_ptr()));
  else finish(static_cast<float*>(first.mutable_data_ptr()), static_cast<float*>(second.mutable_data_ptr()));
  return {first, second};
}

std::tuple<Tensor, Tensor> scale_shift_sums(const Tensor& dy, const Tensor& x, const OptionalTensor& scale,
                                            const OptionalTensor& shift, const OptionalTensor& center,
                                            const OptionalTensor& ids, const OptionalTensor& order,
                                            const OptionalTensor& offsets, int64_t inner,
                                            const std::string& activation) {
  const char* op = "scale_shift_sums";
  Call call(op, x, ids, order, offsets, inner);
  GroupSums p{.in = call.rows,
              .activation = read_activation(op, activation),
              .x = call.elements("x", x),
              .dy = call.elements("dy", dy),
              .scale = call.table("scale", scale, 1),
              .shift = call.table("shift", shift, 0),
              .center = call.table("center", center, 0)};
  return run_sums(x, p, false);
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, const OptionalTensor& ids, const OptionalTensor& order,
                                   const OptionalTensor& offsets, int64_t inner) {
  Call call("moments", x, ids, order, offsets, inner);
  GroupSums p{.in = call.rows, .activation = Activation::kNone, .x = call.elements("x", x)};
  return run_sums(x, p, true);
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("scale_shift", TORCH_BOX(&taps_fast::scale_shift));
  m.impl("scale_shift_", TORCH_BOX(&taps_fast::scale_shift_));
  m.impl("scale_shift_dx", TORCH_BOX(&taps_fast::scale_shift_dx));
  m.impl("scale_shift_sums", TORCH_BOX(&taps_fast::scale_shift_sums));
  m.impl("moments", TORCH_BOX(&taps_fast::moments));
}
