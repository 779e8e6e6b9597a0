// dw: the tiles of P = Σ_r scale_r · dy_rᵀ x_r, used while they are in cache and stored only where a gradient is them.
//
// One item = one job's tile of P. Rows are packed in blocks (dy becomes the broadcast side, x the strips, both gathered
// and converted on the way); after the last block each strip of kTileRows rows of the tile is dotted with the deltas
// and scaled into the targets straight from L1. A job of few rows goes without a tile (outer.h). Dots end in float64
// partials, one a tile, which the plan sums in order. Σ_r dy_r, a bias's gradient, is summed by the tiles of the first
// columns from what they have packed.
#pragma once

#include "outer.h"
#include "pack.h"
#include "tile.h"
#if defined(__AMX_BF16__)
#include "tile_amx.h"
#endif

namespace taps_fast::cpu {
namespace {

template <class S, class E>
class GradientItem {
  using C = Compute<S>;
  static constexpr int64_t kWidth = kLanes<C> * kStripVectors;
  static constexpr int kSums = 4;  // additions that do not wait for each other

 public:
  GradientItem(const WeightGradient& problem, int64_t item, void* workspace) : p_(problem) {
    tiles_ = num_tiles(p_);
    const int64_t across = ceil_div(p_.cols, p_.blocking.col_block);
    tile_index_ = item % tiles_;
    job_ = p_.jobs[item / tiles_];
    row_begin_ = tile_index_ / across * p_.blocking.row_block;
    rows_ = min(p_.blocking.row_block, p_.rows - row_begin_);
    col_begin_ = tile_index_ % across * p_.blocking.col_block;
    cols_ = min(p_.blocking.col_block, p_.cols - col_begin_);
    tile_stride_ = round_up(p_.blocking.col_block, kLanes<C>);
    left_stride_ = round_up(p_.blocking.row_block, kLanes<C>);
    left_ = static_cast<E*>(workspace);
    right_ = left_ + left_stride_ * p_.blocking.depth_block;
    tile_ = reinterpret_cast<C*>(right_ + tile_stride_ * p_.blocking.depth_block);
    copies_ = reinterpret_cast<E*>(tile_ + tile_stride_ * p_.blocking.row_block);
  }

  void run() {
    for (int64_t d = job_.dot_begin; d < job_.dot_end; d++) partial(p_.dots[d]) = 0;
    const bool product = job_.dot_begin < job_.dot_end || job_.target_begin < job_.target_end;
    const bool sums = job_.sums && col_begin_ == 0;
    if (!product && !sums) return;
    const int64_t all = job_.row_end - job_.row_begin;
    const bool outer = product && 0 < all && all <= kOuterRows<E>;
    if (outer) add_outer(all);
    if (outer && !sums) return;
    int64_t begin = job_.row_begin;
    do {
      const int64_t depth = min(p_.blocking.depth_block, job_.row_end - begin);
      const Term dy{p_.dy, 1};
      pack_straight<S, E>(left_, left_stride_, &dy, 1, begin, depth, row_begin_, rows_, {p_.row_index, p_.row_scale});
      if (sums) add_rows(ceil_div(depth, kDepths<E>));
      if (product && !outer) multiply(begin, depth);
      begin += depth;
    } while (begin < job_.row_end);
  }

 private:
  /// A job of few rows. x is read in place, but pairs of its rows are packed, which the workspace has room for.
  void add_outer(int64_t num_rows) {
    if constexpr (kDepths<E> == 2) {
      const Term packed{p_.x, 1};
      const int64_t width = round_up(cols_, kLanes<C>);
      pack_straight<S, E>(right_, width, &packed, 1, job_.row_begin, num_rows, col_begin_, cols_,
                          {p_.row_index, nullptr});
      const E* x[kOuterLength];
      for (int64_t m = 0; m < ceil_div(num_rows, kDepths<E>); m++) x[m] = right_ + m * width;
      add_outer(num_rows, x);
    } else {
      const S* x[kOuterLength];
      for (int64_t m = 0; m < num_rows; m++) x[m] = job_row(p_.x, m) + col_begin_;
      add_outer(num_rows, x);
    }
  }

  /// Once for each delta that the job is dotted with and each gradient that it is.
  template <class X>
  void add_outer(int64_t num_rows, const X* const* x) {
    const S* dy[kOuterRows<E>];
    C scale[kOuterRows<E>];
    for (int64_t m = 0; m < num_rows; m++) {
      dy[m] = job_row(p_.dy, m) + row_begin_;
      scale[m] = p_.row_scale ? static_cast<C>(p_.row_scale[job_.row_begin + m]) : C(1);
    }
    const auto element = [&](int64_t m, int64_t row) {
      if constexpr (kDepths<E> == 2) return make_pair(dy[2 * m][row], 2 * m + 1 < num_rows ? dy[2 * m + 1][row] : S{});
      else return scale[m] * static_cast<C>(to_compute(dy[m][row]));
    };
    const int64_t num_dots = job_.dot_end - job_.dot_begin, num_targets = job_.target_end - job_.target_begin;
    for (int64_t k = 0; k < max(num_dots, num_targets); k++) {
      const Dot* dot = k < num_dots ? p_.dots + job_.dot_begin + k : nullptr;
      const Target* target = k < num_targets ? p_.targets + job_.target_begin + k : nullptr;
      const C factor = target ? static_cast<C>(target->factor) : C(0);
      double sum = 0;
      for (int64_t r = 0; r < rows_; r += kOuterAtOnce) {
        OuterRow<S, E> rows[kOuterAtOnce];
        for (int64_t i = 0; i < kOuterAtOnce; i++) {
          const int64_t row = min(r + i, rows_ - 1);
          for (int64_t m = 0; m < ceil_div(num_rows, kDepths<E>); m++) rows[i].y[m] = element(m, row);
          rows[i].delta = dot ? at<S>(dot->matrix, row_begin_ + row, col_begin_) : nullptr;
          rows[i].gradient =
              target ? static_cast<S*>(target->matrix.data) + (row_begin_ + row) * target->matrix.stride + col_begin_
                     : nullptr;
        }
        with_constant<kOuterLength>(ceil_div(num_rows, kDepths<E>), [&](auto length) {
          const auto step = [&](auto dots, auto stores) {
            sum += outer_step<S, E, length.value, dots.value, stores.value>(rows, rows_ - r, x, cols_, factor);
          };
          if (!target) step(Int<1>{}, Int<0>{});
          else if (!dot) step(Int<0>{}, Int<1>{});
          else step(Int<1>{}, Int<1>{});
        });
      }
      if (dot) partial(*dot) = sum;
    }
  }

  /// Row m of the job, of dy or x.
  const S* job_row(const Matrix& matrix, int64_t m) const {
    const int64_t place = job_.row_begin + m;
    return static_cast<const S*>(matrix.data) + (p_.row_index ? p_.row_index[place] : place) * matrix.stride;
  }

  /// The packed rows of dy times those of x; after the last ones the tile is used.
  void multiply(int64_t begin, int64_t depth) {
    const Term x{p_.x, 1};
    pack_straight<S, E>(right_, kWidth, &x, 1, begin, depth, col_begin_, cols_, {p_.row_index, nullptr});
    const int64_t width = round_up(rows_, kLanes<C>);
    const bool accumulate = begin > job_.row_begin, last = begin + depth == job_.row_end;
    for (int64_t r = 0; r < rows_; r += kTileRows) {
      const int64_t n = min(kTileRows, rows_ - r);
      C* out = last && !accumulate ? tile_ : tile_ + r * tile_stride_;  // used at once, it need not leave L1
      const int64_t length = ceil_div(depth, kDepths<E>);
      Ahead ahead;
      if (last) look_ahead(ahead, r, n, length);
      const int64_t fetch = ahead.at_once(1);
      if constexpr (kInAmx<E>) {
        copy_columns(copies_, left_ + r, width, n, length);
        tile_row(copies_, n, right_, cols_, out, tile_stride_, length, accumulate, 1, &ahead, fetch);
      } else {
        const E* a[kTileRows];
        for (int64_t i = 0; i < n; i++) a[i] = left_ + r + i;
        tile_row<E>(a, n, width, right_, cols_, out, tile_stride_, length, accumulate, 1, &ahead, fetch, {});
      }
      if (last) use_rows(r, n, out);
    }
  }

  /// Adds the packed rows of dy to the job's sums.
  void add_rows(int64_t length) {
    constexpr int64_t lanes = kLanes<C>;
    const int64_t width = round_up(rows_, lanes);
    const Vec<C> one = broadcast(ones<E>());
    C* sums = static_cast<C*>(job_.sums) + row_begin_;
    for (int64_t r = 0; r < rows_; r += lanes) {
      Vec<C> sum[kSums] = {};
      for (int64_t p = 0; p < length; p += kSums)
        for (int64_t i = 0; i < min(kSums, length - p); i++)
          sum[i] = multiply_add<E>(sum[i], load(left_ + (p + i) * width + r), one);
      const Vec<C> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      const int64_t n = min(lanes, rows_ - r);
      store_partial(sums + r, load_partial(sums + r, n) + total, n);
    }
  }

  double& partial(const Dot& dot) { return p_.partials[dot.slot * tiles_ + tile_index_]; }

  /// Describes what use_rows reads and writes.
  void look_ahead(Ahead& ahead, int64_t r, int64_t num_rows, int64_t length) const {
    ahead.rows = num_rows;
    ahead.lines = ceil_div(cols_ * int64_t(sizeof(S)), Ahead::kLine);
    for (int64_t d = job_.dot_begin; d < job_.dot_end; d++)
      ahead.add(p_.dots[d].matrix, row_begin_ + r, col_begin_, sizeof(S));
    for (int64_t t = job_.target_begin; t < job_.target_end; t++)
      ahead.add({p_.targets[t].matrix.data, p_.targets[t].matrix.stride}, row_begin_ + r, col_begin_, sizeof(S));
    ahead.spread(cols_ / kWidth * ceil_div(ceil_div(length, kFetchDepth<E>), ahead.lines), 1);
  }

  /// Rows [r, r + num_rows) of the tile are complete: dots and copies of them. A dot's products are summed in several
  /// lanes of several vectors before they meet in a double.
  void use_rows(int64_t r, int64_t num_rows, const C* rows) {
    constexpr int64_t lanes = kLanes<C>;
    for (int64_t d = job_.dot_begin; d < job_.dot_end; d++) {
      const Matrix& m = p_.dots[d].matrix;
      Vec<C> sum[kSums] = {};
      for (int64_t i = 0; i < num_rows; i++) {
        const C* row = rows + i * tile_stride_;
        const S* w = at<S>(m, row_begin_ + r + i, col_begin_);
        int64_t j = 0;
        for (; j + kSums * lanes <= cols_; j += kSums * lanes)
#pragma GCC unroll 4
          for (int v = 0; v < kSums; v++) sum[v] += load(row + j + v * lanes) * load(w + j + v * lanes);
        for (; j + lanes <= cols_; j += lanes) sum[0] += load(row + j) * load(w + j);
        if (j < cols_) sum[0] += load_partial(row + j, cols_ - j) * load_partial(w + j, cols_ - j);
      }
      partial(p_.dots[d]) += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    for (int64_t t = job_.target_begin; t < job_.target_end; t++) {
      const Target& target = p_.targets[t];
      const C factor = static_cast<C>(target.factor);
      for (int64_t i = 0; i < num_rows; i++) {
        const C* row = rows + i * tile_stride_;
        S* out = static_cast<S*>(target.matrix.data) + (row_begin_ + r + i) * target.matrix.stride + col_begin_;
        int64_t j = 0;
        for (; j + lanes <= cols_; j += lanes) store(out + j, factor * load(row + j));
        if (j < cols_) store_partial(out + j, factor * load(row + j), cols_ - j);
      }
    }
  }

  const WeightGradient& p_;
  Job job_;
  int64_t tiles_, tile_index_, row_begin_, rows_, col_begin_, cols_, tile_stride_, left_stride_;
  E *left_, *right_;
  C* tile_;
  E* copies_;  // of the left operand, for AMX
};

template <class S, class E = Element<S>>
void run_weight_gradient(const WeightGradient& problem, int64_t* next_item, void* workspace) {
  // A factor times dy would be rounded to pairs, so such rows are summed in the compute type.
  if constexpr (kDepths<E> > 1 && !kInAmx<E>) {
    if (problem.row_scale) return run_weight_gradient<S, Compute<S>>(problem, next_item, workspace);
  }
  const int64_t items = num_items(problem);
  for (int64_t item = claim(next_item); item < items; item = claim(next_item))
    GradientItem<S, E>(problem, item, workspace).run();
}

}  // namespace
}  // namespace taps_fast::cpu
