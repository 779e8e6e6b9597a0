// The twin of csrc/cpu/amx.h: the instructions' published definition in plain C++, stricter than a processor.
//
// A tile that was not configured, shapes that do not fit and a configuration that is left behind end the process.
// Configured tiles hold NaNs, which a processor would have set to 0.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace taps_fast::cpu {
namespace {
namespace amx {

struct State {
  bool configured = false, wrong = false;
  AmxShapes shapes{};
  uint8_t data[kAmxTiles][kAmxRows][kAmxBytes];

  ~State() {
    if (configured) fail("a thread ended with its tiles configured");
  }
  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
  }
  void expect(bool condition, const char* what) const {
    if (!configured) fail("no tile is configured");
    if (!condition) fail(what);
  }
};
inline thread_local State state;

template <int kTile>
void check() {
  static_assert(0 <= kTile && kTile < kAmxTiles);
  state.expect(state.shapes.rows[kTile] > 0 && state.shapes.bytes[kTile] > 0, "a tile has no shape");
}

/// What a machine may do wrong, which a test asks for.
inline bool faulty(const char* what) {
  const char* fault = std::getenv("EMULATED_AMX_FAULT");
  return fault && !std::strcmp(fault, what);
}

inline bool permitted() { return !faulty("permission"); }

inline void configure(const AmxShapes& shapes) {
  if (state.configured) State::fail("configured twice");
  if (shapes.palette != 1 || shapes.start_row != 0) State::fail("palette must be 1 and start_row 0");
  for (int64_t i = 0; i < 16; i++) {
    if (shapes.rows[i] > kAmxRows) State::fail("a tile has more than 16 rows");
    if (shapes.bytes[i] > kAmxBytes) State::fail("a row has more than 64 bytes");
    if (i >= kAmxTiles && (shapes.rows[i] || shapes.bytes[i])) State::fail("there are 8 tiles");
  }
  state.configured = true;
  state.wrong = faulty("product");
  state.shapes = shapes;
  std::memset(state.data, 0xff, sizeof state.data);
}

inline void release() {
  state.expect(true, "");
  state.configured = false;
}

template <int kTile>
void zero() {
  check<kTile>();
  std::memset(state.data[kTile], 0, sizeof state.data[kTile]);
}

template <int kTile>
void load(const void* p, int64_t stride) {
  check<kTile>();
  std::memset(state.data[kTile], 0, sizeof state.data[kTile]);
  for (int64_t i = 0; i < state.shapes.rows[kTile]; i++)
    std::memcpy(state.data[kTile][i], static_cast<const char*>(p) + i * stride, state.shapes.bytes[kTile]);
}

template <int kTile>
void store(void* p, int64_t stride) {
  check<kTile>();
  for (int64_t i = 0; i < state.shapes.rows[kTile]; i++)
    std::memcpy(static_cast<char*>(p) + i * stride, state.data[kTile][i], state.shapes.bytes[kTile]);
}

/// Subnormal numbers count as 0, read or written.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float number(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
  return flush(__builtin_bit_cast(float, uint32_t(half) << 16));
}

template <int kSum, int kLeft, int kRight>
void multiply() {
  check<kSum>();
  check<kLeft>();
  check<kRight>();
  static_assert(kSum != kLeft && kSum != kRight && kLeft != kRight);
  const AmxShapes& s = state.shapes;
  state.expect(s.rows[kSum] == s.rows[kLeft] && s.bytes[kSum] == s.bytes[kRight], "the sums' shape does not fit");
  state.expect(s.bytes[kLeft] == 4 * s.rows[kRight], "the depths differ");
  const int64_t columns = s.bytes[kSum] / 4;
  for (int64_t m = 0; m < s.rows[kSum]; m++) {
    float even[kAmxBytes / 4] = {}, odd[kAmxBytes / 4] = {}, sum[kAmxBytes / 4];
    for (int64_t k = 0; k < s.rows[kRight]; k++) {
      const float first = number(&state.data[kLeft][m][4 * k]), second = number(&state.data[kLeft][m][4 * k + 2]);
      for (int64_t n = 0; n < columns; n++) {
        even[n] = flush(std::fma(first, number(&state.data[kRight][k][4 * n]), even[n]));
        odd[n] = flush(std::fma(second, number(&state.data[kRight][k][4 * n + 2]), odd[n]));
      }
    }
    std::memcpy(sum, state.data[kSum][m], sizeof sum);
    for (int64_t n = 0; n < columns; n++) sum[n] = flush(flush(sum[n]) + flush(even[n] + odd[n]));
    if (state.wrong && m == 15) sum[15] += 1;
    std::memcpy(state.data[kSum][m], sum, sizeof sum);
  }
}

}  // namespace amx
}  // namespace
}  // namespace taps_fast::cpu
