// The pointwise operators of taps_fast/_ops.py, norms and the sums of norms on top of their CPU kernels.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "common/text.h"
#include "cpu/workspace.h"
#include "norm_call.h"

namespace taps_fast {
namespace {

using namespace cpu;

constexpr int64_t kItemElements = 1 << 14;   // of a pointwise item: 64 KiB of float32
constexpr int64_t kSpanElements = 1 << 18;   // of a span, whose sums are kept for the end
constexpr int64_t kChannelsPerItem = 64;
constexpr int64_t kLine = 64;                // bytes of a cache line

Activation read_activation(const char* op, StringHandle handle) {
  const std::string name = take(handle);
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
  return run_sums(x, p, false);
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, const OptionalTensor& ids, const OptionalTensor& order,
                                   const OptionalTensor& offsets, int64_t inner) {
  NormCall call("moments", x, ids, order, offsets, inner);
  GroupSums p{.in = call.rows, .activation = Activation::kNone, .x = call.elements("x", x)};
  return run_sums(x, p, true);
}

/// Where a call's two tables of `bytes` each lie, on whole cache lines: a load that crosses one takes twice as long.
std::pair<char*, char*> tables_of(int64_t bytes) {
  const int64_t lines = (bytes + kLine - 1) / kLine * kLine;
  char* memory = static_cast<char*>(workspace(2 * lines));
  return {memory, memory + lines};
}

using Tensors = std::vector<Tensor>;

Tensor batch_norm_eval(const Tensor& x, const Tensors& weight, const Tensors& bias, const Tensors& mean,
                       const Tensors& variance, const std::vector<double>& eps, const OptionalTensor& ids,
                       const OptionalTensor& order, const OptionalTensor& offsets, int64_t inner) {
  const char* op = "batch_norm_eval";
  NormCall call(op, x, ids, order, offsets, inner);
  const auto scales = call.vectors("weight", weight), shifts = call.vectors("bias", bias);
  auto means = call.vectors("mean", mean);
  const auto variances = call.vectors("variance", variance);
  check(!mean.empty() && mean.size() == variance.size() && mean.size() == eps.size(), op,
        ": mean, variance and eps must be one for each table, got ", mean.size(), ", ", variance.size(), " and ",
        eps.size());
  const int64_t tables = mean.size(), channels = call.rows.channels;
  const Membership& member = call.rows.member;
  for (int64_t g = 0; member.offsets && g < tables; g++)
    if (member.offsets[g] == member.offsets[g + 1]) means[task_row(member, g)] = nullptr;
  Tensor out = call.like_x();
  const auto [scale, shift] = tables_of(tables * channels * compute_size(call.rows.dtype));
  const NormTables n{call.rows.dtype == DType::kFloat64,
                     tables,
                     channels,
                     scales.empty() ? nullptr : scales.data(),
                     shifts.empty() ? nullptr : shifts.data(),
                     means.data(),
                     variances.data(),
                     eps.data(),
                     scale,
                     shift,
                     std::max<int64_t>(1, kItemElements / std::max<int64_t>(channels, 1))};
  run_items(n, norm_kernels().norm_tables);
  const int64_t stride = member.offsets ? channels : 0;
  Pointwise p{call.rows,       Activation::kNone, call.elements("x", x), nullptr,      out.mutable_data_ptr(),
              {scale, stride}, {shift, stride},   {nullptr, 0},          {nullptr, 0}, 0};
  run_pointwise(p);
  return out;
}

/// Groups that are not runs of adjacent elements: channels last, several pixels. Moments of every channel of every
/// image are joined by group, and the norm is then a scale and a shift for each of them.
template <class C>
void normalise_channels_last(NormCall& call, const Tensor& x, const std::vector<const void*>& weight,
                             const std::vector<const void*>& bias, int64_t groups, bool center, double eps,
                             Tensor& out) {
  const int64_t images = x.size(0), channels = call.rows.channels, each = channels / groups;
  std::vector<int64_t> places(2 * images + 2);
  for (int64_t n = 0; n < images; n++) places[n] = n, places[images + n + 1] = n;
  places[images] = 0;
  places[2 * images + 1] = images;
  // Every image is a task of its own; there are none of the base.
  Rows rows = call.rows;
  rows.member = {places.data(), places.data(), places.data() + images, images, images, call.rows.rows / images};
  GroupSums sums{.in = rows, .activation = Activation::kNone, .x = call.elements("x", x)};
  const auto [found_mean, found_variance] = run_sums(x, sums, true);
  const C *means = static_cast<const C*>(found_mean.const_data_ptr()),
          *variances = static_cast<const C*>(found_variance.const_data_ptr());
  const auto [first_table, second_table] = tables_of(images * channels * sizeof(C));
  C *scale = reinterpret_cast<C*>(first_table), *shift = reinterpret_cast<C*>(second_table);
  for (int64_t n = 0; n < images; n++) {
    const int64_t table = table_row(call.rows.member, n * (call.rows.rows / images));
    const C *w = weight.empty() ? nullptr : static_cast<const C*>(weight[table]),
            *b = bias.empty() ? nullptr : static_cast<const C*>(bias[table]);
    for (int64_t first = 0; first < channels; first += each) {
      const C *m = means + n * channels + first, *v = variances + n * channels + first;
      C mean = 0, variance = 0;
      for (int64_t c = 0; center && c < each; c++) mean += m[c] / each;
      for (int64_t c = 0; c < each; c++) variance += (v[c] + (m[c] - mean) * (m[c] - mean)) / each;
      const C rstd = 1 / std::sqrt(variance + static_cast<C>(eps));
      for (int64_t c = first; c < first + each; c++) {
        scale[n * channels + c] = w ? rstd * w[c] : rstd;
        shift[n * channels + c] = (b ? b[c] : 0) - mean * scale[n * channels + c];
      }
    }
  }
  Pointwise p{rows,
              Activation::kNone,
              call.elements("x", x),
              nullptr,
              out.mutable_data_ptr(),
              {scale, channels},
              {shift, channels},
              {nullptr, 0},
              {nullptr, 0},
              0};
  run_pointwise(p);
}

Tensor group_norm(const Tensor& x, const Tensors& weight, const Tensors& bias, int64_t groups, double eps, bool center,
                  const OptionalTensor& ids, const OptionalTensor& order, const OptionalTensor& offsets,
                  int64_t inner) {
  const char* op = "group_norm";
  NormCall call(op, x, ids, order, offsets, inner);
  const auto scales = call.vectors("weight", weight), shifts = call.vectors("bias", bias);
  check(groups >= 1 && call.rows.channels % groups == 0, op, ": groups must divide ", call.rows.channels,
        " channels, got ", groups);
  Tensor out = call.like_x();
  if (call.is_empty()) return out;
  if (call.is_channels_last()) {
    if (call.rows.dtype == DType::kFloat64)
      normalise_channels_last<double>(call, x, scales, shifts, groups, center, eps, out);
    else normalise_channels_last<float>(call, x, scales, shifts, groups, center, eps, out);
    return out;
  }
  const int64_t length = call.rows.channels / groups * call.rows.pixels;
  const GroupNorm p{call.rows,
                    groups,
                    center,
                    eps,
                    call.elements("x", x),
                    out.mutable_data_ptr(),
                    scales.empty() ? nullptr : scales.data(),
                    shifts.empty() ? nullptr : shifts.data(),
                    std::max<int64_t>(1, kItemElements / length)};
  run_items(p, norm_kernels().group_norm);
  return out;
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("scale_shift", TORCH_BOX(&taps_fast::scale_shift));
  m.impl("scale_shift_", TORCH_BOX(&taps_fast::scale_shift_));
  m.impl("scale_shift_dx", TORCH_BOX(&taps_fast::scale_shift_dx));
  m.impl("scale_shift_sums", TORCH_BOX(&taps_fast::scale_shift_sums));
  m.impl("moments", TORCH_BOX(&taps_fast::moments));
  m.impl("batch_norm_eval", TORCH_BOX(&taps_fast::batch_norm_eval));
  m.impl("group_norm", TORCH_BOX(&taps_fast::group_norm));
}
