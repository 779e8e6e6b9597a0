// Forward and dx: out[r, :] = in[r, :] · W_g(r) + bias for rows that are grouped by weight.
//
// One item = a block of rows times a block of columns. It walks the depth in blocks and, inside a block, the passes
// (groups of rows that share a sum of terms), so the base's part of the panel is still in L2 when the next task sums
// its delta onto it. Per pass: pack the panel once, then register tiles; few rows take dot products instead. Sums stay
// in a float32 tile until the last pass and depth block, when bias is added, the result rounded once and scattered.
#pragma once

#include "dot.h"
#include "pack.h"
#include "tile.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kRowBuffers = max(kTileRows, kDotRows);

template <class S>
class RowItem {
  using C = Compute<S>;
  static constexpr int64_t kWidth = kLanes<C> * kStripVectors;

 public:
  RowItem(const RowProduct& problem, int64_t item, void* workspace) : p_(problem) {
    const int64_t panels = ceil_div(p_.cols, p_.blocking.col_block);
    row_begin_ = item / panels * p_.blocking.row_block;
    row_end_ = min(p_.rows, row_begin_ + p_.blocking.row_block);
    col_begin_ = item % panels * p_.blocking.col_block;
    cols_ = min(p_.blocking.col_block, p_.cols - col_begin_);
    tile_stride_ = round_up(p_.blocking.col_block, kLanes<C>);
    panel_ = static_cast<C*>(workspace);
    converted_ = panel_ + tile_stride_ * p_.blocking.depth_block;
    tile_ = converted_ + kRowBuffers * round_up(p_.blocking.depth_block, kLanes<C>);
  }

  void run() {
    int64_t depth_begin = 0;
    do {
      const int64_t depth = min(p_.blocking.depth_block, p_.depth - depth_begin);
      for (int64_t i = 0; i < p_.num_passes; i++) run_pass(p_.passes[i], depth_begin, depth);
      depth_begin += depth;
    } while (depth_begin < p_.depth);
  }

 private:
  void run_pass(const Pass& pass, int64_t depth_begin, int64_t depth) {
    const int64_t begin = max(pass.row_begin, row_begin_), end = min(pass.row_end, row_end_);
    if (begin >= end) return;
    const Term* terms = p_.terms + pass.term_begin;
    const int64_t num_terms = pass.term_end - pass.term_begin;
    const bool accumulate = !(pass.first && depth_begin == 0);
    const bool finished = pass.last && depth_begin + depth == p_.depth;
    const bool whole = !accumulate && finished;  // its sums need not outlive one register tile
    const bool dots = p_.transposed && end - begin <= kDotRows;
    if (!dots) {
      if (p_.transposed)
        pack_transposed<S>(panel_, terms, num_terms, col_begin_, cols_, depth_begin, depth);
      else
        pack_straight<S>(panel_, kWidth, terms, num_terms, depth_begin, depth, col_begin_, cols_);
    }
    const int64_t part = dots ? end - begin : even_part(end - begin, kTileRows);
    for (int64_t r = begin; r < end; r += part) {
      const int64_t n = min(part, end - r);
      const C* a[kRowBuffers];
      for (int64_t i = 0; i < n; i++) a[i] = input(r + i, depth_begin, depth, i);
      C* out = tile_ + (whole ? 0 : kRowBuffers + r - row_begin_) * tile_stride_;
      if (dots)
        dot_rows<S>(a, n, terms, num_terms, col_begin_, cols_, depth_begin, depth, out, tile_stride_, accumulate);
      else
        tile_row<C>(a, n, 1, panel_, cols_, out, tile_stride_, depth, accumulate);
      if (finished)
        for (int64_t i = 0; i < n; i++) finish(r + i, out + i * tile_stride_);
    }
  }

  /// Row r's inputs as C: in place, or converted into one of the buffer's slots.
  const C* input(int64_t r, int64_t depth_begin, int64_t depth, int64_t slot) {
    const int64_t row = p_.row_index ? p_.row_index[r] : r;
    const S* in = static_cast<const S*>(p_.in.data) + row * p_.in.stride + depth_begin;
    if constexpr (sizeof(S) == sizeof(C)) {
      return in;
    } else {
      constexpr int64_t lanes = kLanes<C>;
      C* out = converted_ + slot * round_up(p_.blocking.depth_block, lanes);
      int64_t p = 0;
      for (; p + lanes <= depth; p += lanes) store(out + p, load(in + p));
      if (p < depth) store(out + p, load_partial(in + p, depth - p));
      return out;
    }
  }

  void finish(int64_t r, const C* sums) {
    constexpr int64_t lanes = kLanes<C>;
    const int64_t row = p_.row_index ? p_.row_index[r] : r;
    S* out = static_cast<S*>(p_.out.data) + row * p_.out.stride + col_begin_;
    const int64_t bias_row = p_.bias_index ? p_.bias_index[r] : 0;
    const S* bias = p_.bias.data ? static_cast<const S*>(p_.bias.data) + bias_row * p_.bias.stride + col_begin_ : nullptr;
    int64_t j = 0;
    for (; j + lanes <= cols_; j += lanes) store(out + j, bias ? load(sums + j) + load(bias + j) : load(sums + j));
    if (j < cols_) {
      const int64_t n = cols_ - j;
      store_partial(out + j, bias ? load(sums + j) + load_partial(bias + j, n) : load(sums + j), n);
    }
  }

  const RowProduct& p_;
  int64_t row_begin_, row_end_, col_begin_, cols_, tile_stride_;
  C *panel_, *converted_, *tile_;
};

template <class S>
void run_row_product(const RowProduct& problem, int64_t item, void* workspace) {
  RowItem<S>(problem, item, workspace).run();
}

}  // namespace
}  // namespace taps_fast::cpu
