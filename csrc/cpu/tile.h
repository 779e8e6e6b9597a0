// The register tile: kTileRows rows times one packed strip of columns, summed over the panel's depth.
//
//   out[i, j] (+)= scale · Σ_p a_i[p · step] · strip[p · width + j]        p counts elements (simd.h)
//
// Rows of `a` are broadcast from where they lie (one pointer each, so gathered rows cost nothing); the strip is read
// once a tile. 6 × 4 vectors (AVX-512) or 6 × 2 (AVX2) use all but a few registers as accumulators, which hides the
// latency of the multiply-adds. Meanwhile the load ports are half idle, so the loop can also fetch the weights of the
// panel that comes next (Ahead): with few rows, packing waits for memory longer than the product takes.
#pragma once

#include "simd.h"

namespace taps_fast::cpu {
namespace {

constexpr int64_t kMostFetched = 4;  // segments fetched at a time: see tile_row

/// Rows of weights to bring into L2, as segments that each are `lines` cache lines long.
struct Ahead {
  static constexpr int kMaxTerms = 9;
  static constexpr int64_t kLine = 64;

  const char* data[kMaxTerms];  // next segment of each matrix
  int64_t stride[kMaxTerms];    // bytes between segments
  int64_t num_terms = 0;
  int64_t rows = 0, lines = 0;

  /// Adds a matrix, from a place on; not one that has codes alone, which are few bytes.
  void add(const Matrix& m, int64_t row, int64_t column, int64_t element_size) {
    if (!m.data || num_terms == kMaxTerms) return;
    data[num_terms] = static_cast<const char*>(m.data) + (row * m.stride + column) * element_size;
    stride[num_terms++] = m.stride * element_size;
  }
  /// Spreads the segments over the last tiles of `tiles`, each of which can fetch `each` one after the other: what
  /// comes too early is gone from L2 when it is needed.
  void spread(int64_t each, int64_t tiles) {
    const int64_t segments = rows * num_terms;
    if (!segments || !lines || !each) return;
    at_once_ = min(ceil_div(segments, each * tiles), kMostFetched);
    last_tiles_ = ceil_div(segments, each * at_once_) + 1;
  }
  /// How many segments to fetch at a time, tiles_left tiles before they are needed.
  int64_t at_once(int64_t tiles_left) const { return tiles_left <= last_tiles_ ? at_once_ : 0; }
  bool done() const { return row_ >= rows || num_terms == 0; }
  /// The next segment, of each row those of all matrices; the last one again when none is left.
  const char* take() {
    if (done()) return segment_;
    segment_ = data[term_];
    data[term_] += stride[term_];
    if (++term_ == num_terms) {
      term_ = 0;
      row_++;
    }
    return segment_;
  }
  /// Fetches the next `count` lines, one segment after another.
  void fetch(int64_t count) {
    for (; count > 0; count--) {
      if (line_ == 0 && done()) return;
      if (line_ == 0) take();
      __builtin_prefetch(segment_ + line_ * kLine, 0, 2);
      line_ = line_ + 1 < lines ? line_ + 1 : 0;
    }
  }

 private:
  int64_t at_once_ = 0, last_tiles_ = 0;
  int64_t row_ = 0, term_ = 0, line_ = 0;
  const char* segment_ = nullptr;  // taken last
};

/// Elements of depth that a strip's tile multiplies between two fetches.
template <class E>
constexpr int64_t kFetchDepth = 1;

/// Rows of the tile after, of which a tile fetches a line each whenever it has come that far itself.
struct NextRows {
  const char* data[kTileRows];
  int64_t element_size = 0;      // of `data`, in bytes
  int64_t elements_of_line = 0;  // 0: no row is fetched
};

template <class E, int kRows, int kVectors, int kFetch>
void tile(const E* const* rows, int64_t step, const E* strip, Compute<E>* out, int64_t out_stride, int64_t depth,
          bool accumulate, Compute<E> scale, Ahead* ahead, const NextRows& next) {
  using C = Compute<E>;
  constexpr int lanes = kLanes<C>;
  Vec<C> sum[kRows][kVectors];
  const E* a[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++) {
    a[i] = rows[i];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) sum[i][j] = Vec<C>{};
  }
  const auto multiply = [&](int64_t p) __attribute__((always_inline)) {
    Vec<C> b[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) b[j] = load(strip + (p * kVectors + j) * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i++) {
      const Vec<C> x = broadcast(a[i][p * step]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++) sum[i][j] = multiply_add<E>(sum[i][j], x, b[j]);
    }
  };
  const auto run = [&](int64_t p, int64_t end, const auto& fetch) __attribute__((always_inline)) {
    while (p < end) {
      int64_t line_end = end;
      if (next.elements_of_line) {
        line_end = min(p + next.elements_of_line, end);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) __builtin_prefetch(next.data[i] + p * next.element_size, 0, 2);
      }
      for (; p < line_end; p++) {
        fetch(p);
        multiply(p);
      }
    }
  };
  if constexpr (kFetch == 0) {
    run(0, depth, [](int64_t) {});
  } else {
    for (int64_t begin = 0; begin < depth; begin += ahead->lines) {
      const char* segment[kFetch];
#pragma GCC unroll 8
      for (int s = 0; s < kFetch; s++) segment[s] = ahead->take() - begin * Ahead::kLine;
      run(begin, min(begin + ahead->lines, depth), [&](int64_t p) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int s = 0; s < kFetch; s++) __builtin_prefetch(segment[s] + p * Ahead::kLine, 0, 2);
      });
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) {
      // Sums of blocks are added up here rather than carried through the loop: shorter chains round less.
      C* y = out + i * out_stride + j * lanes;
      store(y, accumulate ? load(y) + scale * sum[i][j] : scale * sum[i][j]);
    }
}

/// num_rows <= kTileRows rows times a whole panel of num_columns columns; `fetch` segments are fetched at a time.
template <class E>
void tile_row(const E* const* rows, int64_t num_rows, int64_t step, const E* panel, int64_t num_columns,
              Compute<E>* out, int64_t out_stride, int64_t depth, bool accumulate, Compute<E> scale, Ahead* ahead,
              int64_t fetch, const NextRows& next) {
  constexpr int64_t lanes = kLanes<Compute<E>>, width = lanes * kStripVectors;
  with_constant<kTileRows>(num_rows, [&](auto r) {
    for (int64_t j = 0; j < num_columns; j += width) {
      const E* strip = panel + j * depth;
      const auto run = [&](auto vectors, auto fetched) {
        tile<E, r.value, vectors.value, fetched.value>(rows, step, strip, out + j, out_stride, depth, accumulate, scale,
                                                       ahead, next);
      };
      if (num_columns - j < width) {
        with_constant<kStripVectors>(ceil_div(num_columns - j, lanes), [&](auto v) { run(v, Int<0>{}); });
      } else if (fetch == 0 || ahead->done()) {
        run(Int<kStripVectors>{}, Int<0>{});
      } else if (fetch == 1) {
        run(Int<kStripVectors>{}, Int<1>{});
      } else if (fetch == 2) {
        run(Int<kStripVectors>{}, Int<2>{});
      } else {
        run(Int<kStripVectors>{}, Int<kMostFetched>{});
      }
    }
  });
}

}  // namespace
}  // namespace taps_fast::cpu
