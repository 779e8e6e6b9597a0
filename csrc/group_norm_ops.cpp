// Layer, RMS and group norms of taps_fast/_ops.py on top of their CPU kernels.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "norm_run.h"

namespace taps_fast {
namespace {

using namespace cpu;

constexpr int64_t kGradElements = 1 << 15;  // of an item of a backward, whose sums are kept for the end
constexpr int64_t kMostRows = 256;          // of such an item: its sums are formed in the compute type

/// Every image of a batch as a task of its own; there are none of the base. Channels last.
class Images {
 public:
  Images(const NormCall& call, int64_t images) : rows(call.rows), places_(2 * images + 2) {
    for (int64_t n = 0; n < images; n++) places_[n] = n, places_[images + n + 1] = n;
    places_[images] = 0;
    places_[2 * images + 1] = images;
    rows.member = {places_.data(), places_.data(), places_.data() + images, images, images, pixels(call, images)};
  }
  static int64_t pixels(const NormCall& call, int64_t images) { return call.rows.rows / images; }

  Rows rows;

 private:
  Numbers places_;
};

/// A group norm whose groups are not runs of adjacent elements: channels last, several pixels. Moments of every channel
/// of every image are joined by group, and the norm is then a scale and a shift for each of them.
template <class C>
void normalise_channels_last(NormCall& call, const Tensor& x, const std::vector<const void*>& weight,
                             const std::vector<const void*>& bias, int64_t groups, bool center, double eps, Tensor& out,
                             C* mean_of, C* rstd_of) {
  const int64_t images = x.size(0), channels = call.rows.channels, each = channels / groups;
  const Images alone(call, images);
  GroupSums sums{.in = alone.rows, .activation = Activation::kNone, .x = call.elements("x", x)};
  const auto [found_mean, found_variance] = run_sums(sums, true);
  const C *means = static_cast<const C*>(found_mean.const_data_ptr()),
          *variances = static_cast<const C*>(found_variance.const_data_ptr());
  const auto [first_table, second_table] = tables_of<2>(images * channels * sizeof(C));
  C *scale = reinterpret_cast<C*>(first_table), *shift = reinterpret_cast<C*>(second_table);
  for (int64_t n = 0; n < images; n++) {
    const int64_t table = table_row(call.rows.member, n * Images::pixels(call, images));
    const C *w = weight.empty() ? nullptr : static_cast<const C*>(weight[table]),
            *b = bias.empty() ? nullptr : static_cast<const C*>(bias[table]);
    for (int64_t g = 0; g < groups; g++) {
      const C *m = means + n * channels + g * each, *v = variances + n * channels + g * each;
      C mean = 0, variance = 0;
      for (int64_t c = 0; center && c < each; c++) mean += m[c] / each;
      for (int64_t c = 0; c < each; c++) variance += (v[c] + (m[c] - mean) * (m[c] - mean)) / each;
      const C rstd = 1 / std::sqrt(variance + static_cast<C>(eps));
      if (mean_of) mean_of[n * groups + g] = mean, rstd_of[n * groups + g] = rstd;
      for (int64_t c = g * each; c < (g + 1) * each; c++) {
        scale[n * channels + c] = w ? rstd * w[c] : rstd;
        shift[n * channels + c] = (b ? b[c] : 0) - mean * scale[n * channels + c];
      }
    }
  }
  Pointwise p{alone.rows,        Activation::kNone, call.elements("x", x), nullptr,      out.mutable_data_ptr(),
              {scale, channels}, {shift, channels}, {nullptr, 0},          {nullptr, 0}, 0};
  run_pointwise(p);
}

/// y; with `keep`, also mean and 1 / √(variance + eps) of each group, [N, groups].
std::tuple<Tensor, Tensor, Tensor> normalise_groups(const char* op, bool keep, const Tensor& x, const Tensors& weight,
                                                    const Tensors& bias, int64_t groups, double eps, bool center,
                                                    const OptionalTensor& ids, const OptionalTensor& order,
                                                    const OptionalTensor& offsets, int64_t inner) {
  NormCall call(op, x, ids, order, offsets, inner);
  const auto scales = call.vectors("weight", weight), shifts = call.vectors("bias", bias);
  check(groups >= 1 && call.rows.channels % groups == 0, op, ": groups must divide ", call.rows.channels,
        " channels, got ", groups);
  Tensor out = call.like_x();
  Tensor mean = keep ? new_tensor(call.wide(), {x.size(0), groups}) : out;
  Tensor rstd = keep ? new_tensor(call.wide(), mean.sizes()) : out;
  if (call.is_empty()) return {out, mean, rstd};
  void *mean_of = keep ? mean.mutable_data_ptr() : nullptr, *rstd_of = keep ? rstd.mutable_data_ptr() : nullptr;
  if (call.is_channels_last()) {
    with_compute_type(call.rows.dtype, [&](auto zero) {
      using C = decltype(zero);
      normalise_channels_last<C>(call, x, scales, shifts, groups, center, eps, out, static_cast<C*>(mean_of),
                                 static_cast<C*>(rstd_of));
    });
    return {out, mean, rstd};
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
                    mean_of,
                    rstd_of,
                    std::max<int64_t>(1, kItemElements / length)};
  run_items(p, norm_kernels().group_norm);
  return {out, mean, rstd};
}

Tensor group_norm(const Tensor& x, const Tensors& weight, const Tensors& bias, int64_t groups, double eps, bool center,
                  const OptionalTensor& ids, const OptionalTensor& order, const OptionalTensor& offsets,
                  int64_t inner) {
  return std::get<0>(
      normalise_groups("group_norm", false, x, weight, bias, groups, eps, center, ids, order, offsets, inner));
}

std::tuple<Tensor, Tensor, Tensor> group_norm_train(const Tensor& x, const Tensors& weight, const Tensors& bias,
                                                    int64_t groups, double eps, bool center, const OptionalTensor& ids,
                                                    const OptionalTensor& order, const OptionalTensor& offsets,
                                                    int64_t inner) {
  return normalise_groups("group_norm_train", true, x, weight, bias, groups, eps, center, ids, order, offsets, inner);
}

/// The backward of `normalise_channels_last`: sums of every channel of every image, joined by group.
template <class C>
void channels_last_grad(NormCall& call, const Tensor& dy, const Tensor& x, const std::vector<const void*>& weight,
                        const C* mean, const C* rstd, int64_t groups, bool center, Tensor* dx, C* dweight, C* dbias) {
  const int64_t images = x.size(0), channels = call.rows.channels, each = channels / groups;
  const Images alone(call, images);
  const C elements = static_cast<C>(each * Images::pixels(call, images));
  std::vector<C> centers(images * channels);
  for (int64_t i = 0; i < images * channels; i++) centers[i] = mean[i / each];
  const void *of_x = call.elements("x", x), *of_dy = call.elements("dy", dy);
  GroupSums sums{
      .in = alone.rows, .activation = Activation::kNone, .x = of_x, .dy = of_dy, .center = {centers.data(), channels}};
  const auto [found_along, found_plain] = run_sums(sums, false);  // Σ dy·(x - mean) and Σ dy
  const C *along = static_cast<const C*>(found_along.const_data_ptr()),
          *plain = static_cast<const C*>(found_plain.const_data_ptr());
  const auto [t0, t1, t2] = tables_of<3>(images * channels * sizeof(C));
  C *scale = reinterpret_cast<C*>(t0), *slope = reinterpret_cast<C*>(t1), *offset = reinterpret_cast<C*>(t2);
  for (int64_t n = 0; n < images; n++) {
    const int64_t table = table_row(call.rows.member, n * Images::pixels(call, images));
    const C* w = weight.empty() ? nullptr : static_cast<const C*>(weight[table]);
    for (int64_t g = 0; g < groups; g++) {
      const C m = mean[n * groups + g], r = rstd[n * groups + g];
      C level = 0, tilt = 0;
      for (int64_t c = g * each; c < (g + 1) * each; c++) {
        const int64_t i = n * channels + c;
        level += (w ? w[c] : 1) * plain[i] / elements;
        tilt += (w ? w[c] : 1) * along[i] / elements;
      }
      for (int64_t c = g * each; c < (g + 1) * each; c++) {
        const int64_t i = n * channels + c;
        scale[i] = w ? r * w[c] : r;
        slope[i] = -r * r * r * tilt;
        offset[i] = (center ? -r * level : 0) - slope[i] * m;
        dweight[table * channels + c] += along[i] * r;
        dbias[table * channels + c] += plain[i];
      }
    }
  }
  if (!dx) return;
  Pointwise p{
      alone.rows,        Activation::kNone,  of_x, of_dy, dx->mutable_data_ptr(), {scale, channels}, {nullptr, 0},
      {slope, channels}, {offset, channels}, 0};
  run_pointwise(p);
}

/// The rows of every group in items, whose sums are added at the end in their order.
template <class C>
void runs_grad(NormCall& call, GroupNormGrad& p, C* dweight, C* dbias) {
  const Rows& in = p.in;
  const int64_t step = std::min(kMostRows, std::max<int64_t>(1, kGradElements / (in.channels * in.pixels)));
  std::vector<Span> spans;
  for (int64_t g = 0; g < num_tables(call); g++)
    for (int64_t begin = 0, rows = rows_of_group(in, g); begin < rows; begin += step)
      spans.push_back({g, begin, std::min(rows, begin + step)});
  std::vector<C> first(spans.size() * in.channels), second(spans.size() * in.channels);
  std::vector<double> total(2 * in.channels);
  p.spans = spans.data();
  p.num_spans = spans.size();
  p.first = first.data();
  p.second = second.data();
  run_items(p, norm_kernels().group_norm_grad);
  for (size_t s = 0; s < spans.size(); s++) {
    if (spans[s].begin == 0) total.assign(total.size(), 0);
    for (int64_t c = 0; c < in.channels; c++) {
      total[c] += first[s * in.channels + c];
      total[in.channels + c] += second[s * in.channels + c];
    }
    if (s + 1 < spans.size() && spans[s + 1].group == spans[s].group) continue;
    const int64_t row = task_row(in.member, spans[s].group) * in.channels;
    for (int64_t c = 0; c < in.channels; c++) {
      dweight[row + c] = static_cast<C>(total[c]);
      dbias[row + c] = static_cast<C>(total[in.channels + c]);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_grad(const Tensor& dy, const Tensor& x, const Tensors& weight,
                                                   const Tensor& mean, const Tensor& rstd, bool center,
                                                   const OptionalTensor& ids, const OptionalTensor& order,
                                                   const OptionalTensor& offsets, int64_t inner, bool need_dx) {
  const char* op = "group_norm_grad";
  NormCall call(op, x, ids, order, offsets, inner);
  const auto weights = call.vectors("weight", weight);
  for (const Tensor* t : {&mean, &rstd})
    check(t->dim() == 2 && t->size(0) == x.size(0) && t->scalar_type() == call.wide() && t->is_contiguous() &&
              t->size(1) >= 1 && t->size(1) == mean.size(1) && call.rows.channels % t->size(1) == 0,
          op, ": mean and rstd must be contiguous [", x.size(0), ", groups]");
  Tensor dweight = new_zeros(call.wide(), {num_tables(call), call.rows.channels});
  Tensor dbias = new_zeros(call.wide(), {num_tables(call), call.rows.channels});
  Tensor dx = need_dx ? call.like_x() : new_tensor(x.scalar_type(), {0});
  if (call.is_empty()) return {dx, dweight, dbias};
  with_compute_type(call.rows.dtype, [&](auto zero) {
    using C = decltype(zero);
    const C *m = static_cast<const C*>(mean.const_data_ptr()), *r = static_cast<const C*>(rstd.const_data_ptr());
    C *to_weight = static_cast<C*>(dweight.mutable_data_ptr()), *to_bias = static_cast<C*>(dbias.mutable_data_ptr());
    if (call.is_channels_last())
      return channels_last_grad<C>(call, dy, x, weights, m, r, mean.size(1), center, need_dx ? &dx : nullptr, to_weight,
                                   to_bias);
    GroupNormGrad p{call.rows,
                    mean.size(1),
                    center,
                    call.elements("x", x),
                    call.elements("dy", dy),
                    need_dx ? dx.mutable_data_ptr() : nullptr,
                    weights.empty() ? nullptr : weights.data(),
                    m,
                    r,
                    nullptr,
                    0,
                    nullptr,
                    nullptr};
    runs_grad<C>(call, p, to_weight, to_bias);
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace taps_fast

STABLE_TORCH_LIBRARY_IMPL(taps_fast, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&taps_fast::group_norm));
  m.impl("group_norm_train", TORCH_BOX(&taps_fast::group_norm_train));
  m.impl("group_norm_grad", TORCH_BOX(&taps_fast::group_norm_grad));
}
