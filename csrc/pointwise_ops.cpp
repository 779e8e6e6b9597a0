// The pointwise operators of taps_fast/_ops.py and the sums of norms on top of their CPU kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/text.h"
#include "norm_run.h"

namespace taps_fast {
namespace {

using namespace cpu;

constexpr int64_t kSpanElements = 1 << 18;   // of a span, whose sums are kept for the end
constexpr int64_t kChannelsPerItem = 64;

Activation read_activation(const char* op, StringHandle handle) {
  const std::string name = take(handle);
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "silu") return Activation::kSilu;
  check(name == "gelu", op, ": activation must be none, relu, relu6, silu or gelu, got '", name, "'");
  return Activation::kGelu;
}

/// act(scale·x + shift): over a dense x where it may be, and new otherwise.
Tensor shifted(const char* op, bool in_place, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
               const OptionalTensor& ids, const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner,
               StringHandle activation) {
  const Activation how = read_activation(op, activation);
  NormCall call(op, x, ids, order, offsets, inner);
  Tensor out = in_place && call.dense() ? x : call.like_x();
  Pointwise p{call.rows,
              how,
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
  const Activation how = read_activation(op, activation);
  NormCall call(op, x, ids, order, offsets, inner);
  Tensor out = call.like_x();
  Pointwise p{call.rows,
              how,
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

std::tuple<Tensor, Tensor> scale_shift_sums(const Tensor& dy, const Tensor& x, const OptionalTensor& scale,
                                            const OptionalTensor& shift, const OptionalTensor& center,
                                            const OptionalTensor& ids, const OptionalTensor& order,
                                            const OptionalTensor& offsets, int64_t inner, StringHandle activation) {
  const char* op = "scale_shift_sums";
  const Activation how = read_activation(op, activation);
  NormCall call(op, x, ids, order, offsets, inner);
  GroupSums p{.in = call.rows,
              .activation = how,
              .x = call.elements("x", x),
              .dy = call.elements("dy", dy),
              .scale = call.table("scale", scale, 1),
              .shift = call.table("shift", shift, 0),
              .center = call.table("center", center, 0)};
  return run_sums(p, false);
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, const OptionalTensor& ids, const OptionalTensor& order,
                                   const OptionalTensor& offsets, int64_t inner) {
  NormCall call("moments", x, ids, order, offsets, inner);
  GroupSums p{.in = call.rows, .activation = Activation::kNone, .x = call.elements("x", x)};
  return run_sums(p, true);
}

}  // namespace

void run_pointwise(Pointwise& p) {
  const int64_t length = p.in.pixels > 1 ? p.in.pixels : p.in.channels;
  p.rows_per_item = std::max<int64_t>(1, kItemElements / std::max<int64_t>(length, 1));
  if (p.in.rows > 0 && p.in.channels > 0 && p.in.pixels > 0) run_items(p, norm_kernels().pointwise);
}

std::tuple<Tensor, Tensor> run_sums(GroupSums& p, bool moments) {
  const Rows& in = p.in;
  const int64_t groups = in.member.offsets ? in.member.tasks + 1 : 1;
  const ScalarType dtype = in.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor first = new_zeros(dtype, {groups, in.channels});
  Tensor second = new_zeros(dtype, {groups, in.channels});
  if (in.channels == 0 || in.pixels == 0) return {first, second};
  // Spans depend on sizes alone, so that the number of threads changes no bit.
  const int64_t least = in.pixels > 1 ? 1 : 256;  // a row of planes is a whole image
  const int64_t step = std::max(least, kSpanElements / (in.channels * in.pixels));
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

}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("scale_shift", TORCH_BOX(&taps_fast::scale_shift));
  m.impl("scale_shift_", TORCH_BOX(&taps_fast::scale_shift_));
  m.impl("scale_shift_dx", TORCH_BOX(&taps_fast::scale_shift_dx));
  m.impl("scale_shift_sums", TORCH_BOX(&taps_fast::scale_shift_sums));
  m.impl("moments", TORCH_BOX(&taps_fast::moments));
}
