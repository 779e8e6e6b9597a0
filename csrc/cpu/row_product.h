// Forward and dx: out[r, :] = in[r, :] · W_g(r) + bias for rows that are grouped by weight.
//
// One item = a block of rows times a block of columns. It walks the depth in blocks and, inside a block, the passes
// (groups of rows that share a sum of terms), so the base's part of the panel is still in L2 when the next task sums
// its delta onto it. Per pass: pack the panel once, then register tiles, which meanwhile fetch the weights of the step
// after; few rows skip the panel (dot.h forward, axpy.h for dx), and tasks that mask one tile share it (choose.h). Sums
// stay in a float32 tile until the last pass and depth block, when bias is added, the result rounded once and
// scattered. Few rows of dx are items of a part of the depth each, so that every thread reads one piece of memory.
#pragma once

#include "axpy.h"
#include "choose.h"
#include "dot.h"
#include "pack.h"
#include "tile.h"
#if defined(__AMX_BF16__)
#include "tile_amx.h"
#endif

namespace taps_fast::cpu {
namespace {

constexpr int64_t kRowBuffers = max(kTileRows, kDotRows<Float16>);
static_assert(kDotRows<float> <= kRowBuffers && kDotRowsComing <= kRowBuffers && kDotRows<BFloat16> <= kRowBuffers);
static_assert(kAxpyRows<float> <= kRowBuffers);  // more rows than that need the room of sums (row_plan.cpp)

template <class S>
class RowWorker {
  using C = Compute<S>;
  using E = Element<S>;
  static constexpr int64_t kWidth = kLanes<C> * kStripVectors;

  /// One pass, or those of one choice, in one depth block of one item.
  struct Step {
    int64_t item, depth_begin, pass, pass_end;
    int64_t row_begin, row_end, col_begin, cols, depth;  // what it covers
    bool begins, ends;  // at the item's first depth, at its last
  };

 public:
  RowWorker(const RowProduct& problem, int64_t* next_item, void* workspace)
      : p_(problem),
        next_item_(next_item),
        items_(num_items(problem)),
        parts_(num_parts(problem)),
        panels_(ceil_div(p_.cols, p_.blocking.col_block)),
        tile_stride_(round_up(p_.blocking.col_block, kLanes<C>)),
        panel_(static_cast<E*>(workspace)),
        inputs_(panel_ + tile_stride_ * p_.blocking.panel_depth),
        tile_(reinterpret_cast<C*>(inputs_ + kRowBuffers * round_up(p_.blocking.depth_block, kLanes<C>))) {}

  void run() {
    Step step{};
    take_item(step);
    for (advance(step); step.item < items_;) {
      Step next = step;
      advance(next);
      run_step(step, next);
      if (parts_ > 1 && next.item != step.item) end_part(step);
      step = next;
    }
  }

 private:
  void take_item(Step& step) {
    step.item = claim(next_item_);
    step.depth_begin = step.item % parts_ * p_.depth_part;
    step.pass_end = 0;
  }
  int64_t first_row(int64_t item) const { return item / parts_ / panels_ * p_.blocking.row_block; }

  /// The next pass with rows in the item, then the next depth block, then the next item.
  void advance(Step& step) {
    while (step.item < items_) {
      const int64_t begin = first_row(step.item), end = min(p_.rows, begin + p_.blocking.row_block);
      const int64_t depth_first = step.item % parts_ * p_.depth_part;
      const int64_t depth_end = min(p_.depth, depth_first + p_.depth_part);
      while (step.pass_end < p_.num_passes) {
        step.pass = step.pass_end;
        step.pass_end = max(p_.passes[step.pass].choice_end, step.pass + 1);
        step.row_begin = max(p_.passes[step.pass].row_begin, begin);
        step.row_end = min(p_.passes[step.pass_end - 1].row_end, end);
        if (step.row_begin >= step.row_end) continue;
        step.col_begin = step.item / parts_ % panels_ * p_.blocking.col_block;
        step.cols = min(p_.blocking.col_block, p_.cols - step.col_begin);
        step.depth = min(p_.blocking.depth_block, depth_end - step.depth_begin);
        step.begins = step.depth_begin == depth_first;
        step.ends = step.depth_begin + step.depth >= depth_end;
        return;
      }
      step.pass_end = 0;
      step.depth_begin += p_.blocking.depth_block;
      if (step.depth_begin >= depth_end) take_item(step);
    }
  }

  void run_step(const Step& s, const Step& next) {
    const Pass& pass = p_.passes[s.pass];
    if (pass.choice_end) {
      if (pass.term_end - pass.term_begin == 1) return run_masks(s);
#if defined(__AVX512F__) && !defined(__AMX_BF16__)
      if constexpr (sizeof(C) == 4) return run_choice(s, next);
#endif
    }
    const Term* terms = p_.terms + pass.term_begin;
    const int64_t num_terms = pass.term_end - pass.term_begin, num_rows = s.row_end - s.row_begin;
    const bool accumulate = !(pass.first && s.begins), finished = pass.last && s.ends;
    const bool codes = has_codes(terms, num_terms);
    // An item may have some rows of a pass that is no pass of few rows, and so has no room for many sums.
    const bool all_few = pass.row_end - pass.row_begin <= p_.few_rows;
    const bool few = num_rows <= (all_few ? p_.few_rows : min(p_.few_rows, kRowBuffers)) && s.depth > 0 &&
                     all_dense_or_masked(terms, num_terms);
    const int64_t part = few ? num_rows : tile_part(num_rows);
    const bool whole = !accumulate && finished && part <= kRowBuffers;  // its sums need not outlive one register tile
    Ahead ahead;
    C scale = 1;
    if (!few && num_terms > 0) {
      Term alone = terms[0];  // a single term is packed as it is, and scaled where pairs would have rounded it
      const bool exact = kDepths<E> == 2 && num_terms == 1 && !codes;
      if (exact) {
        scale = static_cast<C>(alone.coeff);
        alone.coeff = 1;
      }
      const Term* packed = exact ? &alone : terms;
      if (p_.transposed) pack_transposed<S>(panel_, packed, num_terms, s.col_begin, s.cols, s.depth_begin, s.depth);
      else pack_straight<S>(panel_, kWidth, packed, num_terms, s.depth_begin, s.depth, s.col_begin, s.cols);
      const bool come = p_.rows_come && !p_.transposed;  // a straight panel is packed from rows
      if (!come && next.item < items_) look_ahead(ahead, s, next, ceil_div(num_rows, part));
    }
    for (int64_t r = s.row_begin; r < s.row_end; r += part) {
      const int64_t n = min(part, s.row_end - r);
      C* out = whole ? tile_ : sums_of(s, r);
      if (num_terms == 0) {
        for (int64_t i = 0; i < n && !accumulate; i++)
          for (int64_t j = 0; j < tile_stride_; j++) out[i * tile_stride_ + j] = 0;
      } else if (few) {
        few_rows(s, terms, num_terms, out, accumulate);
      } else {
        // What the tile writes and the next one reads arrives while the tile is summed.
        for (int64_t i = 0; i < n && finished; i++) prefetch(output(r + i) + s.col_begin, s.cols);
        const int64_t length = ceil_div(s.depth, kDepths<E>), fetch = ahead.at_once(ceil_div(s.row_end - r, part));
        if constexpr (kInAmx<E>) {
          for (int64_t i = r + n; i < min(r + n + part, s.row_end); i++) prefetch(input(i) + s.depth_begin, s.depth);
          for (int64_t i = 0; i < n; i++) interleave<S>(inputs_, kTileRows, i, input(r + i) + s.depth_begin, s.depth);
          tile_row(inputs_, n, panel_, s.cols, out, tile_stride_, length, accumulate, scale, &ahead, fetch);
        } else {
          const E* a[kTileRows];
          NextRows next;
          if (!p_.rows_come) {
            next.element_size = sizeof(S) * kDepths<E>;
            next.elements_of_line = Ahead::kLine / next.element_size;
          }
          for (int64_t i = 0; i < n; i++) {
            a[i] = as_elements(input(r + i) + s.depth_begin, s.depth, i);
            next.data[i] = reinterpret_cast<const char*>(input(min(r + n + i, s.row_end - 1)) + s.depth_begin);
          }
          tile_row<E>(a, n, 1, panel_, s.cols, out, tile_stride_, length, accumulate, scale, &ahead, fetch, next);
        }
      }
      for (int64_t i = 0; i < n && finished; i++) {
        const C* sums = out + i * tile_stride_;
        if (parts_ > 1) copy(partial(s.item % parts_, r + i) + s.col_begin, sums, s.cols);
        else finish(r + i, s.col_begin, s.cols, sums);
      }
    }
  }

  /// Where row r of a step's item is summed, if more than one register tile does it.
  C* sums_of(const Step& s, int64_t r) const { return tile_ + (kRowBuffers + r - first_row(s.item)) * tile_stride_; }

  /// Sums of a part of the depth: those of row r.
  C* partial(int64_t part, int64_t r) const { return static_cast<C*>(p_.partials) + (part * p_.rows + r) * p_.cols; }

  /// The last part of a block to be done adds up all of them, in order.
  void end_part(const Step& s) {
    if (__atomic_add_fetch(p_.parts_done + s.item / parts_, 1, __ATOMIC_ACQ_REL) < parts_) return;
    const int64_t begin = first_row(s.item), end = min(p_.rows, begin + p_.blocking.row_block);
    for (int64_t i = 0; i < p_.num_passes; i++) {
      for (int64_t r = max(p_.passes[i].row_begin, begin); r < min(p_.passes[i].row_end, end) && p_.passes[i].last;
           r++) {
        copy(tile_, partial(0, r) + s.col_begin, s.cols);
        for (int64_t part = 1; part < parts_; part++) add(tile_, partial(part, r) + s.col_begin, s.cols);
        finish(r, s.col_begin, s.cols, tile_);
      }
    }
  }

  static void copy(C* out, const C* in, int64_t n) {
    for (int64_t j = 0; j < n; j++) out[j] = in[j];
  }
  static void add(C* out, const C* in, int64_t n) {
    for (int64_t j = 0; j < n; j++) out[j] += in[j];
  }

  /// Passes of a masked tile alone: dot products, each row with its own mask.
  void run_masks(const Step& s) {
    const Pass& first = p_.passes[s.pass];
    const bool accumulate = !(first.first && s.begins), finished = s.ends;
    const int64_t part = even_part(s.row_end - s.row_begin, kDotTile<E>);
    for (int64_t r = s.row_begin, i = s.pass; r < s.row_end; r += part) {
      const int64_t n = min(part, s.row_end - r);
      const Term* masks[kDotTile<E>];
      for (int64_t m = 0; m < n; m++) {
        while (p_.passes[i].row_end <= r + m) i++;
        masks[m] = p_.terms + p_.passes[i].term_begin;
        interleave<S>(inputs_, n, m, input(r + m) + s.depth_begin, s.depth);
      }
      C* out = sums_of(s, r);
      masked_dot_rows<S>(inputs_, n, masks, s.col_begin, s.cols, s.depth_begin, s.depth, out, tile_stride_, accumulate);
      for (int64_t m = 0; m < n && finished; m++) finish(r + m, s.col_begin, s.cols, out + m * tile_stride_);
    }
  }

#if defined(__AVX512F__) && !defined(__AMX_BF16__)
  /// A piece of a choice's depth, and what is fetched meanwhile: `lines` cache lines of weights at each test of bits,
  /// and the codes that lie code_rows rows further.
  struct Piece {
    int64_t begin, depth;
    Ahead ahead;
    int64_t lines, code_rows;
  };

  /// Passes of the base and a masked tile: both are packed once, a piece of the depth at a time (choose.h).
  void run_choice(const Step& s, const Step& next) {
    const bool more = next.item < items_;
    int64_t tiles = 0;
    for (int64_t i = s.pass; i < s.pass_end; i++)
      tiles += ceil_div(max(pass_end(s, i) - pass_begin(s, i), 0), kChoiceTileRows);
    const int64_t tests = max(tiles * ceil_div(s.cols, kWidth) * ChoiceBits<E>::kTests, 1);
    const int64_t end = s.depth_begin + s.depth;
    int64_t p = s.depth_begin;
    do {  // no depth at all is a piece as well, whose sums are 0
      Piece piece{p, min(kPieceDepth<E>, end - p), {}, 0, more ? next.col_begin - s.col_begin : 0};
      if (p + kPieceDepth<E> < end) look_at_piece(piece.ahead, s, p + kPieceDepth<E>);
      else if (more) look_at_piece(piece.ahead, next, next.depth_begin);
      piece.lines = ceil_div(piece.ahead.rows * piece.ahead.lines * piece.ahead.num_terms, tests);
      choose_piece(s, piece);
      p += kPieceDepth<E>;
    } while (p < end);
    for (int64_t r = s.row_begin; r < s.row_end && s.ends; r++) finish(r, s.col_begin, s.cols, sums_of(s, r));
  }

  void choose_piece(const Step& s, Piece& piece) {
    E* const other = panel_ + tile_stride_ * kPieceSteps;
    const int64_t length = ceil_div(piece.depth, kDepths<E>);
    const auto pack = [&](E* panel, const Term* terms, int64_t num_terms) {
      pack_transposed<S>(panel, terms, num_terms, s.col_begin, s.cols, piece.begin, piece.depth);
    };
    const Term* own = p_.terms + p_.passes[s.pass].term_begin;
    Term terms[2] = {own[0], {own[1].matrix, 1.0}};
    pack(panel_, terms, 1);
    if (kDepths<E> == 1) pack(other, terms + 1, 1);
    C packed = __builtin_nan("");  // the factor of pairs; none yet
    for (int64_t i = s.pass; i < s.pass_end; i++) {
      const int64_t row_begin = pass_begin(s, i), row_end = pass_end(s, i);
      if (row_begin >= row_end) continue;
      const Term& mask = p_.terms[p_.passes[i].term_begin + 1];
      const C factor = row_factor<C>(mask, 0);
      if (kDepths<E> == 2 && factor != packed) {
        terms[1].coeff = packed = factor;
        pack(other, terms, 2);
      }
      const int64_t part = even_part(row_end - row_begin, kChoiceTileRows);
      for (int64_t j = 0; j < s.cols; j += kWidth) {
        const int64_t cols = min(kWidth, s.cols - j);
        const int64_t vectors = ceil_div(cols, kLanes<C>);
        ChoiceBits<E> bits;
        bits.read(mask, s.col_begin + j, cols, piece.begin, piece.depth, piece.code_rows * mask.code_stride);
        for (int64_t r = row_begin; r < row_end; r += part) {
          const int64_t n = min(part, row_end - r);
          const E* a[kChoiceTileRows];
          for (int64_t k = 0; k < n; k++) a[k] = as_elements(input(r + k) + piece.begin, piece.depth, k);
          with_constant<kChoiceTileRows>(n, [&](auto rows) {
            constexpr int64_t at_once = rows.value > kTileRows ? kStripVectors / 2 : kStripVectors;
            for (int64_t v = 0; v < vectors; v += at_once)
              with_constant<at_once>(vectors - v, [&](auto count) {
                choose_tile<E, rows.value, count.value>(a, panel_ + j * length, other + j * length, factor, bits, v,
                                                        vectors, sums_of(s, r) + j, tile_stride_, length,
                                                        piece.begin > 0, piece.ahead, piece.lines);
              });
          });
        }
      }
    }
  }

  int64_t pass_begin(const Step& s, int64_t i) const { return max(p_.passes[i].row_begin, s.row_begin); }
  int64_t pass_end(const Step& s, int64_t i) const { return min(p_.passes[i].row_end, s.row_end); }

  /// The weights of a step's first pass, at depths from `begin` on, as many as a piece has.
  void look_at_piece(Ahead& ahead, const Step& s, int64_t begin) const {
    const Pass& pass = p_.passes[s.pass];
    ahead.rows = s.cols;
    ahead.lines = min(kPieceDepth<E>, s.depth_begin + s.depth - begin) * int64_t(sizeof(S)) / Ahead::kLine;
    for (int64_t t = pass.term_begin; t < pass.term_end; t++)
      ahead.add(p_.terms[t].matrix, s.col_begin, begin, sizeof(S));
  }
#endif

  void few_rows(const Step& s, const Term* terms, int64_t num_terms, C* out, bool accumulate) {
    const int64_t num_rows = s.row_end - s.row_begin;
    if (!p_.transposed) {
      const S* a[kAxpyRowsComing<E>];
      for (int64_t i = 0; i < num_rows; i++) a[i] = input(s.row_begin + i) + s.depth_begin;
      return axpy_rows<S>(a, num_rows, terms, num_terms, s.depth_begin, s.depth, s.col_begin, s.cols, out, tile_stride_,
                          accumulate, p_.rows_come && s.cols == p_.cols);
    }
    const int64_t part = even_part(num_rows, kDotTile<E>);
    const int64_t size = part * round_up(ceil_div(s.depth, kDepths<E>), kLanes<C>);
    for (int64_t i = 0; i < num_rows; i++) {
      const int64_t group = i / part;
      interleave<S>(inputs_ + group * size, min(part, num_rows - group * part), i % part,
                    input(s.row_begin + i) + s.depth_begin, s.depth);
    }
    dot_rows<S>(inputs_, num_rows, part, terms, num_terms, s.col_begin, s.cols, s.depth_begin, s.depth, out,
                tile_stride_, accumulate, p_.rows_come);
  }

  /// Rows of one register tile: as even as they come, but tiles of AMX take the same time for one row as for 16.
  static int64_t tile_part(int64_t num_rows) {
    return kInAmx<E> ? min(num_rows, kTileRows) : even_part(num_rows, kTileRows);
  }

  /// Describes the next step's weights, and when to fetch them.
  void look_ahead(Ahead& ahead, const Step& s, const Step& next, int64_t row_tiles) const {
    const Pass& pass = p_.passes[next.pass];
    const int64_t row = p_.transposed ? next.col_begin : next.depth_begin;
    const int64_t column = p_.transposed ? next.depth_begin : next.col_begin;
    ahead.rows = p_.transposed ? next.cols : next.depth;
    ahead.lines = (p_.transposed ? next.depth : next.cols) * int64_t(sizeof(S)) / Ahead::kLine;
    const bool same_place = s.item == next.item && s.depth_begin == next.depth_begin;
    const Pass& current = p_.passes[s.pass];
    for (int64_t t = pass.term_begin; t < pass.term_end; t++) {
      const Matrix& m = p_.terms[t].matrix;
      // In the same place a term that both passes have, the base, is in L2 already.
      bool here = false;
      for (int64_t u = current.term_begin; same_place && u < current.term_end; u++)
        here = here || p_.terms[u].matrix.data == m.data;
      if (here) continue;
      ahead.add(m, row, column, sizeof(S));
    }
    const int64_t steps = ceil_div(s.depth, kDepths<E> * kFetchDepth<E>);
    ahead.spread(s.cols / kWidth * ceil_div(steps, max(ahead.lines, 1)), row_tiles);
  }

  int64_t place(int64_t r) const { return p_.row_index ? p_.row_index[r] : r; }
  const S* input(int64_t r) const { return static_cast<const S*>(p_.in.data) + place(r) * p_.in.stride; }
  S* output(int64_t r) const { return static_cast<S*>(p_.out.data) + place(r) * p_.out.stride; }

  /// A row of inputs in place, or converted into one of the buffers (pairs: only where the last lacks its half).
  const E* as_elements(const S* in, int64_t depth, int64_t slot) {
    if (sizeof(S) * kDepths<E> == sizeof(E) && depth % kDepths<E> == 0) return reinterpret_cast<const E*>(in);
    E* out = inputs_ + slot * round_up(p_.blocking.depth_block, kLanes<C>);
    interleave<S>(out, 1, 0, in, depth);
    return out;
  }

  void finish(int64_t r, int64_t col_begin, int64_t cols, const C* sums) {
    constexpr int64_t lanes = kLanes<C>;
    S* out = output(r) + col_begin;
    const int64_t bias_row = p_.bias_index ? p_.bias_index[r] : 0;
    const S* bias =
        p_.bias.data ? static_cast<const S*>(p_.bias.data) + bias_row * p_.bias.stride + col_begin : nullptr;
    int64_t j = 0;
#if defined(__AVX512BF16__)
    if constexpr (kDepths<E> == 2) {
      const auto sum = [&](int64_t k) { return bias ? load(sums + k) + load(bias + k) : load(sums + k); };
      for (; j + 2 * lanes <= cols; j += 2 * lanes)
        store(reinterpret_cast<Pair*>(out + j), round_to_pairs(sum(j), sum(j + lanes)));
    }
#endif
    for (; j + lanes <= cols; j += lanes) store(out + j, bias ? load(sums + j) + load(bias + j) : load(sums + j));
    if (j < cols)
      store_partial(out + j, bias ? load(sums + j) + load_partial(bias + j, cols - j) : load(sums + j), cols - j);
  }

  const RowProduct& p_;
  int64_t* next_item_;
  const int64_t items_, parts_, panels_, tile_stride_;
  E *panel_, *inputs_;
  C* tile_;
};

template <class S>
void run_row_product(const RowProduct& problem, int64_t* next_item, void* workspace) {
  RowWorker<S>(problem, next_item, workspace).run();
}

}  // namespace
}  // namespace taps_fast::cpu
